"""A tiny random Lorsa on a tiny random model, read on text with emoji and right-to-left letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_models import save_tiny_model
from toys import sequences_of

from lorsa_utils.heads import survey, units
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import AttentionSite, LanguageModel, load_model
from lorsa_utils.text import Sequences
from lorsa_utils.view.evidence import Evidence

LAYER, LENGTH, DEAD = 1, 192, 23
TEXTS = (
    "The cat sat on the mat & said <b>hello</b> to the dog. ",
    "שלום עולם: right to left words in the middle of a line. ",
    "Faces 😀🎉 and a flag, then tabs\tand\nlines. ",
    "</script><script>alert(1)</script> is only text here. ",
)


class Tiny(NamedTuple):
    """What pages are made from."""

    model: LanguageModel
    lorsa: Lorsa
    sequences: Sequences
    found: survey.Survey

    def evidence(self, **options: Any) -> Evidence:
        return Evidence(self.model, LAYER, self.lorsa, self.sequences, self.found, progress=False, **options)


def random_heads(site: AttentionSite, n_heads: int = 24, n_qk: int = 6, k: int = 4, scale: float = 0.3) -> Lorsa:
    """A Lorsa for a layer, random in everything."""
    lorsa, generator = Lorsa(Lorsa.config_for_site(site, n_heads, n_qk, k)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return lorsa.requires_grad_(False)


def tiny_heads(folder: Path, n_heads: int = 24, n_qk: int = 6, k: int = 4) -> Tiny:
    """The last head of the first 24 is dead. One text ends in padding."""
    model = load_model(save_tiny_model(folder, "llama", max_position_embeddings=256))
    lorsa = random_heads(model.site(LAYER), n_heads, n_qk, k)
    lorsa.W_V[DEAD], lorsa.b_V[DEAD] = 0, 0
    rows = [[256, *model.tokenizer.encode(8 * text)][:LENGTH] for text in TEXTS * 3]
    tokens = torch.tensor(rows)
    mask = tokens != 256
    mask[0, 150:] = False
    sequences = sequences_of(tokens, mask)
    found = survey.survey(model, LAYER, units.LorsaHeads(lorsa), sequences, batch_size=4, progress=False)
    return Tiny(model, lorsa, sequences, found)
