"""A language model of one attention layer built by hand, whose heads are known, for tests of head discovery.

The residual stream has blocks of CODE dimensions: the token, the token before it, the position, the position before it,
and a block that the layer writes predicted tokens to; two more dimensions mark the first token and names of days. Codes
are random unit vectors, so that keys and queries match sharply. The layer reads the stream as it is, and the
unembedding reads the written block.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toys import sequences_of

from lorsa_utils import architectures
from lorsa_utils.config import LorsaConfig, RotaryConfig
from lorsa_utils.heads.prompts import SERIES, Passage, Vocabulary
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import AttentionSite
from lorsa_utils.text import Sequences

CODE = 96
D_MODEL = 5 * CODE + 2
LENGTH = 128
TOKEN, BEFORE, PLACE, PLACE_BEFORE, WRITTEN = (slice(i * CODE, (i + 1) * CODE) for i in range(5))
FIRST, DAY = 5 * CODE, 5 * CODE + 1
SHARP = 400.0
KNOWN = ("induction", "previous_token", "attention_sink", "successor")


class _Norm(nn.Module):
    """An RMSNorm that changes nothing: its input is divided by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Inside(nn.Module):
    """The parts that a Hugging Face model would have."""

    def __init__(self, unembedding: Tensor) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.norm = _Norm()
        self.lm_head = nn.Linear(D_MODEL, len(unembedding), bias=False)
        self.lm_head.weight = nn.Parameter(unembedding)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


class HandModel:
    """What head discovery asks of `LanguageModel`."""

    n_layers, d_model, name = 1, D_MODEL, "by hand"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, vocabulary: Vocabulary, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        n_tokens = max(vocabulary.tokenizer.get_vocab().values()) + 1
        self.codes = nn.functional.normalize(torch.randn(n_tokens, CODE, generator=generator), dim=1)
        self.places = nn.functional.normalize(torch.randn(LENGTH + 1, CODE, generator=generator), dim=1)
        unembedding = torch.zeros(n_tokens, D_MODEL)
        unembedding[:, WRITTEN] = self.codes
        self.vocabulary, self.tokenizer = vocabulary, vocabulary.tokenizer
        self.days = torch.tensor(list(vocabulary.singles(SERIES["days"]).values()), dtype=torch.long)
        self.model = _Inside(unembedding).requires_grad_(False)
        self.architecture = architectures.of("llama")
        self._replacements: Mapping[int, Callable[[Tensor, Tensor], Tensor]] = {}
        self._resumed: Tensor | None = None
        self._site = self._by_hand()

    def module_path(self, layer: int) -> str:
        return "by hand"

    def site(self, layer: int) -> AttentionSite:
        return self._site

    def _by_hand(self) -> AttentionSite:
        """One MHSA head for each of KNOWN: the same query-key circuits as in the Lorsa, values of width one."""
        lorsa = known_lorsa(self, n_random=0)
        weights = {"W_Q": lorsa.W_Q, "W_K": lorsa.W_K, "W_V": lorsa.W_V[:, :, None], "W_O": lorsa.W_O[:, None]}
        biases = {"b_Q": lorsa.b_Q, "b_K": torch.zeros_like(lorsa.b_K), "b_V": lorsa.b_V[:, None]}
        return AttentionSite(1.0, RotaryConfig(), **weights, **biases, b_O=torch.zeros(D_MODEL))

    def sequences(self, passages: Sequence[Passage]) -> Sequences:
        """Passages as text."""
        tokens = torch.tensor([self.vocabulary.start + list(passage.ids) for passage in passages])
        return sequences_of(tokens, tokens != self.vocabulary.bos_id)

    def stream(self, tokens: Tensor) -> Tensor:
        """What the layer reads, [batch, length, D_MODEL]."""
        x = torch.zeros(*tokens.shape, D_MODEL)
        x[..., TOKEN] = self.codes[tokens]
        x[:, 1:, BEFORE] = self.codes[tokens[:, :-1]]
        x[..., PLACE] = self.places[1 : tokens.shape[1] + 1]
        x[..., PLACE_BEFORE] = self.places[: tokens.shape[1]]
        x[:, 0, FIRST] = 1
        x[..., DAY] = torch.isin(tokens, self.days).float()
        return x

    def _layer(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stream(tokens) if self._resumed is None else self._resumed
        y = self._site.head_outputs(x).sum(dim=2)
        return x, self._replacements[0](x, y) if 0 in self._replacements else y

    def capture(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        return {layer: self._layer(tokens) for layer in layers}

    @contextlib.contextmanager
    def splice(self, replacements: Mapping[int, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
        self._replacements = replacements
        yield
        self._replacements = {}

    def residual(self, tokens: Tensor, layer: int) -> Tensor:
        return self.stream(tokens)

    @contextlib.contextmanager
    def resume(self, layer: int, residual: Tensor) -> Iterator[None]:
        self._resumed = residual
        yield
        self._resumed = None

    def logits(self, tokens: Tensor, positions: Any = None) -> Tensor:
        x, y = self._layer(tokens)
        return self.model.lm_head(self.model.model.norm(x + y))

    def loss(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.logits(tokens)[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(tokens.shape[0], -1), torch.ones_like(tokens[:, 1:], dtype=torch.bool)


def known_lorsa(model: HandModel, n_random: int = 20, seed: int = 0, k: int | None = None) -> Lorsa:
    """Heads of KNOWN in this order, one a group, then heads that are random in everything."""
    n = len(KNOWN) + n_random
    lorsa = Lorsa(LorsaConfig(d_model=D_MODEL, n_ov_heads=n, n_qk_heads=n, d_qk=CODE + 1, k=k or n, attn_scale=1.0))
    generator = torch.Generator().manual_seed(seed)
    # Induction: after the token like mine. Previous token and successor: the place before mine. Sink: the first token.
    circuits = {0: (TOKEN, BEFORE), 1: (PLACE_BEFORE, PLACE), 3: (PLACE_BEFORE, PLACE)}
    with torch.no_grad():
        for parameter in (lorsa.W_Q, lorsa.W_K, lorsa.W_V, lorsa.W_O):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * D_MODEL**-0.5)
            parameter[: len(KNOWN)] = 0
        for head in range(len(KNOWN)):
            # The last dimension of keys is the first token's; where nothing matches, heads rest there.
            lorsa.W_K[head, FIRST, CODE] = 1
            lorsa.b_Q[head, CODE] = 0.7 * SHARP
            if head in circuits:
                query, key = circuits[head]
                lorsa.W_Q[head, query, :CODE], lorsa.W_K[head, key, :CODE] = SHARP * torch.eye(CODE), torch.eye(CODE)
            lorsa.W_O[head, WRITTEN] = torch.randn(CODE, generator=generator)
        lorsa.b_V[:3] = 1.0
        lorsa.W_V[0, FIRST] = -1.0
        lorsa.W_V[3, DAY] = 1.0
        lorsa.W_O[3, WRITTEN] = 30 * model.codes[model.days].sum(dim=0)
    lorsa.fold_norms()
    return lorsa.requires_grad_(False)
