"""A two-layer language model built by hand: a known induction circuit, and a feature that two heads write together.

GPT-2 shape: width 128 in four blocks of 32, one for the token, one for the position, one for the token before (written
by the first layer) and one for the predicted token (written by the second, read by the unembedding). MLPs write
nothing. First layer: heads 0 and 1 both look at the token before and each write half of it: one feature, two heads.
Head 2 of the second layer looks at the token after the one like mine and writes it. All other heads look around at
random and write nothing that anything reads.
"""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lorsa_utils.config import LorsaConfig, SAEConfig
from lorsa_utils.heads.tasks import Task
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import LanguageModel

N = 32
D_MODEL = 4 * N
TOKEN, PLACE, BEFORE, SAID = (slice(i * N, (i + 1) * N) for i in range(4))
SHARP = (2.0, 0.8)
"""Factor on query-key products of each layer; in the second, half a feature is not enough to be found."""
FIRST_LAYER, SECOND_LAYER = (0, 1), (2,)


class Letters:
    """Decodes the model's tokens."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("A") + token) for token in tokens)


def planted_model(seed: int = 0) -> LanguageModel:
    """The model; its tokenizer only decodes."""
    sizes = {"n_embd": D_MODEL, "n_layer": 2, "n_head": 4, "vocab_size": N, "n_positions": N}
    config = AutoConfig.for_model("gpt2", **sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.zero_()
    body, eye = model.transformer, torch.eye(N)
    for block in body.h:
        block.ln_1.weight.fill_(1.0)
        block.ln_2.weight.fill_(1.0)
        block.attn.c_attn.weight.copy_(torch.randn(block.attn.c_attn.weight.shape, generator=generator) * 0.1)
        # What heads without a part write is the same for all tokens of the said block: it decides between no two.
        block.attn.c_proj.weight[:, PLACE] = torch.randn(D_MODEL, N, generator=generator) * 0.002
    body.ln_f.weight.fill_(1.0)
    body.wte.weight[:, TOKEN] = eye
    body.wpe.weight[:, PLACE] = eye
    model.lm_head.weight[:, SAID] = 20 * eye
    first, second = (block.attn for block in body.h)
    for head in FIRST_LAYER:
        _set_head(first, head, SHARP[0], PLACE, PLACE, eye.roll(1, dims=1), TOKEN, BEFORE, 1 / 16)
    _set_head(second, SECOND_LAYER[0], SHARP[1], TOKEN, BEFORE, eye, TOKEN, SAID, 1.0)
    return LanguageModel("planted", model, Letters())


def _set_head(attention, head, sharp, query, key, match, read, write, size) -> None:  # type: ignore[no-untyped-def]
    """One head: queries of a block match keys of another through `match`, values copy a block into another."""
    mine, eye = slice(head * N, (head + 1) * N), torch.eye(N)
    weight = attention.c_attn.weight.view(D_MODEL, 3, D_MODEL)[..., mine]  # of queries, keys, values
    weight.zero_()
    weight[query, 0], weight[key, 1], weight[read, 2] = sharp**0.5 * eye, sharp**0.5 * match, eye
    attention.c_proj.weight[mine] = 0
    attention.c_proj.weight[mine, write] = size * eye


def planted_lorsa(model: LanguageModel, layer: int, k: int = 8) -> Lorsa:
    """Heads 0..31 write what the MHSA heads of the layer write together, one token each; 32..63 are random."""
    site = model.site(layer)
    heads = FIRST_LAYER if layer == 0 else SECOND_LAYER
    lorsa = Lorsa(LorsaConfig(d_model=D_MODEL, n_ov_heads=2 * N, n_qk_heads=2, d_qk=N, k=k, attn_scale=site.attn_scale))
    generator = torch.Generator().manual_seed(layer)
    lorsa.W_Q[0], lorsa.W_K[0] = site.W_Q[heads[0]], site.W_K[heads[0]]
    lorsa.W_V[:N] = site.W_V[heads[0]].T
    lorsa.W_O[:N] = site.W_O[list(heads)].sum(dim=0)
    lorsa.W_V[N:] = 0.1 * torch.randn(N, D_MODEL, generator=generator)
    lorsa.W_O[N:, PLACE] = 0.002 * torch.randn(N, N, generator=generator)
    return lorsa


def planted_sae(layer: int, k: int = 8) -> SAE:
    """One feature for every token that the layer's real heads write, and as many random ones."""
    sae = SAE(SAEConfig(d_model=D_MODEL, n_features=2 * N, k=k))
    block = BEFORE if layer == 0 else SAID
    generator = torch.Generator().manual_seed(layer)
    sae.W_E[:N, block] = sae.W_O[:N, block] = torch.eye(N)
    sae.W_E[N:, PLACE] = 0.1 * torch.randn(N, N, generator=generator)
    sae.W_O[N:, PLACE] = 0.002 * torch.randn(N, N, generator=generator)
    return sae


def planted_task(n: int = 16, length: int = 6, again: int = 3, seed: int = 0, repeat: bool = False) -> Task:
    """Induction on the planted model's tokens; with `repeat` all pairs are the same one."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[Tensor, ...]] = []
    while len(rows) < n:
        first = torch.randperm(N, generator=generator)[:length]
        other = first[torch.randperm(length, generator=generator)]
        place = int((other == first[again - 1]).nonzero()[0, 0]) + 1
        if place < length and place != again and other[place] != first[again]:
            tail = first[:again]
            rows.append((torch.cat([first, tail]), torch.cat([other, tail]), first[again], other[place]))
    rows = rows[:1] * n if repeat else rows
    clean, corrupted, answers, wrong = (torch.stack(side) for side in zip(*rows, strict=True))
    return Task("induction", clean, corrupted, torch.full((n,), clean.shape[1] - 1), answers[:, None], wrong[:, None])
