"""A two-layer Transformer made sparse from end to end (paper item P18).

The language has three planted rules and random choices between them:

    successor      c, c+1, c+2, c+3 in a cycle of series tokens: the current token decides
    skip-bigram    a question token asks for the answer that belongs to the key token at the start of the sequence
    induction      a block of random letters comes once, and later again from a random letter on

Notebook 14 trains a small Llama on it, replaces both attention layers by Lorsa and both MLPs by transcoders, reads the
induction circuit off their weights and cuts it.
"""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorsa_utils import store
from lorsa_utils.activations import ActivationBatch
from lorsa_utils.config import Config
from lorsa_utils.lorsa import SAE, Lorsa, load
from lorsa_utils.models import LanguageModel, load_model

BOS = 0
RULES = ("successor", "skip-bigram", "induction", "free")
PLACES = (("attention", 0), ("attention", 1), ("mlp", 0), ("mlp", 1))
"""What is replaced, in this order."""


@dataclass(frozen=True)
class SparseToyConfig(Config):
    """Sizes of the language, the Transformer and its sparse replacement."""

    n_letters: int = 16
    """Tokens of the induction rule."""
    n_series: int = 8
    """Tokens of the successor rule."""
    n_keys: int = 6
    """Key tokens, and as many answer tokens."""
    block: int = 5
    """Letters in the repeated block."""
    length: int = 32
    """Tokens of a sequence, BOS included."""
    d_model: int = 64
    n_heads: int = 4
    d_mlp: int = 128
    steps: int = 1500
    """Of the Transformer, as `lr`."""
    lr: float = 3e-3
    batch_size: int = 64
    """Sequences, in either training."""
    n_lorsa_heads: int = 256
    n_qk_heads: int = 8
    n_features: int = 256
    """Of each transcoder."""
    k: int = 8
    """Units kept per token in every module."""
    sparse_steps: int = 1000
    sparse_lr: float = 3e-3

    @property
    def n_tokens(self) -> int:
        """Vocabulary: BOS, letters, series, keys, answers, question."""
        return 1 + self.n_letters + self.n_series + 2 * self.n_keys + 1


class Sample(NamedTuple):
    """Sequences of the language."""

    tokens: Tensor
    """[n, length]."""
    rule: Tensor
    """[n, length], index in `RULES` of what decides the NEXT token; `free`: random."""


class Language:
    """The toy language: what each token id is, and random sequences."""

    def __init__(self, config: SparseToyConfig) -> None:
        self.config = config
        sizes = [1, config.n_letters, config.n_series, config.n_keys, config.n_keys, 1]
        _, self.letters, self.series, self.keys, self.answers, question = torch.arange(config.n_tokens).split(sizes)
        self.question = int(question)
        alphabets = zip((string.ascii_lowercase, string.digits, string.ascii_uppercase), sizes[1:4], strict=True)
        characters = [alphabet[:size] for alphabet, size in alphabets]
        self.names = ["BOS", *"".join(characters), *(f"={key}" for key in characters[2]), "?"]

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """`n` random sequences."""
        rows = [self._sequence(generator) for _ in range(n)]
        return Sample(torch.tensor([tokens for tokens, _ in rows]), torch.tensor([rules for _, rules in rows]))

    def _sequence(self, generator: torch.Generator) -> tuple[list[int], list[int]]:
        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        config, free = self.config, RULES.index("free")
        key = draw(config.n_keys)
        block = self.letters[torch.randperm(config.n_letters, generator=generator)[: config.block]].tolist()
        tokens, rules = [BOS, int(self.keys[key]), *block], [free] * (2 + config.block)
        while len(tokens) < config.length:
            rule = draw(3)
            if RULES[rule] == "successor":
                begin = draw(config.n_series)
                piece = [int(self.series[(begin + i) % config.n_series]) for i in range(4)]
            elif RULES[rule] == "skip-bigram":
                piece = [self.question, int(self.answers[key])]
            else:
                piece = block[draw(config.block - 1) :]
            tokens += piece
            rules += [rule] * (len(piece) - 1) + [free]
        return tokens[: config.length], rules[: config.length]


# ---- the sparse model


Write = Callable[[Tensor, Tensor], Tensor]
"""What a layer reads and wrote to what it writes instead."""


@contextlib.contextmanager
def _replaced(model: LanguageModel, writes: Mapping[tuple[str, int], Write]) -> Iterator[None]:
    def hook(write: Write) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, arguments, output: write(arguments[0], output)

    with contextlib.ExitStack() as stack:
        for (kind, layer), write in writes.items():
            if kind == "mlp":
                mlp = model.block(layer).get_submodule(model.architecture.mlp)
                stack.callback(mlp.register_forward_hook(hook(write)).remove)
        stack.enter_context(model.splice({layer: writes[kind, layer] for kind, layer in writes if kind == "attention"}))
        yield


@torch.no_grad()
def read_layers(model: LanguageModel, tokens: Tensor) -> ActivationBatch:
    """What every place in `PLACES` reads and writes, by number."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def reader(number: int) -> Write:
        def read(x: Tensor, y: Tensor) -> Tensor:
            inputs[number], outputs[number] = x, y
            return y

        return read

    with _replaced(model, {place: reader(number) for number, place in enumerate(PLACES)}):
        model.logits(tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return ActivationBatch(tokens, mask, inputs, outputs, mask)


@dataclass(frozen=True)
class SparseTransformer:
    """A two-layer language model and its sparse modules."""

    model: LanguageModel
    modules: tuple[Lorsa | SAE, ...]
    """In the order of `PLACES`."""

    @contextlib.contextmanager
    def installed(self, cut: Mapping[tuple[str, int], Tensor] | None = None) -> Iterator[None]:
        """The model runs on its sparse modules alone, without the units in `cut` (indices by place)."""

        def writer(module: Lorsa | SAE, gone: Tensor) -> Write:
            def write(x: Tensor, y: Tensor) -> Tensor:
                indices, values = module.encode(x)
                return module.decode(indices, torch.where(torch.isin(indices, gone), 0.0, values))

            return write

        none = torch.zeros(0, dtype=torch.long)
        places = zip(PLACES, self.modules, strict=True)
        with _replaced(self.model, {place: writer(module, (cut or {}).get(place, none)) for place, module in places}):
            yield

    def save(self, folder: str | Path) -> None:
        """Write all modules and the model, one folder each."""
        path = store.require_writable(folder)
        self.model.model.save_pretrained(path / "model")
        for (kind, layer), module in zip(PLACES, self.modules, strict=True):
            module.save(path / f"{kind}_{layer}")

    @classmethod
    def load(cls, folder: str | Path) -> SparseTransformer:
        """Read what `save` wrote."""
        path = Path(folder)
        model = load_model(path / "model", device="cpu", dtype=torch.float32)
        return cls(model, tuple(load(path / f"{kind}_{layer}") for kind, layer in PLACES))
