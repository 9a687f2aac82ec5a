"""A two-layer Transformer made sparse from end to end (paper item P18): Lorsa for both attention layers, transcoders for both MLPs.

The language has three planted rules, and random choices between them (`Language`):

    successor      c, c+1, c+2, c+3 in a cycle of series tokens: the current token decides
    skip-bigram    a question token asks for the answer that belongs to the key token at the start of the sequence
    induction      a block of random letters comes once, and later again from a random letter on

A small Llama learns it on a CPU in a minute or two. Each attention layer and each MLP is then replaced by a sparse
module with at most 8 active units a token. In the sparse model every unit reads and writes fixed directions, so weights
between units do not depend on any input, but for the scale of the norms, for which the mean over text is taken:

    weight(a -> b) = (write of a) . (gain of the norm before b * read of b) * mean scale of that norm

and for queries and keys, averaged over distances: how much a query-side feature wants a key-side feature.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lorsa_utils import ops, store
from lorsa_utils.activations import ActivationBatch
from lorsa_utils.config import Config, LorsaConfig, SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.train import Run, RunSpec

PUBLIC_TWO_LAYERS = "JackFram/llama-68m"
"""A public two-layer Llama on the Hugging Face Hub (d_model 768, 12 heads): `models.load_model(PUBLIC_TWO_LAYERS)` in place of the toy."""

BOS = 0
N_RANDOM = 5
RULES = ("successor", "skip-bigram", "induction", "free")


@dataclass(frozen=True)
class SparseToyConfig(Config):
    """Sizes of the language, of the Transformer, and of its sparse replacement."""

    n_letters: int = 16
    """Tokens of the induction rule."""
    n_series: int = 8
    """Tokens of the successor rule."""
    n_keys: int = 6
    """Key tokens, as many answer tokens."""
    block: int = 5
    """Letters in a sequence's block."""
    length: int = 32
    """Tokens of a sequence, BOS included."""
    d_model: int = 64
    """Width of the residual stream."""
    n_heads: int = 4
    """MHSA heads of a layer."""
    d_mlp: int = 128
    """Width of an MLP."""
    steps: int = 1500
    """Training steps of the Transformer."""
    lr: float = 3e-3
    """Its learning rate."""
    batch_size: int = 64
    """Sequences in a step of anything."""
    n_lorsa_heads: int = 256
    """Heads of each Lorsa."""
    n_qk_heads: int = 8
    """QK groups of each Lorsa."""
    n_features: int = 256
    """Features of each transcoder."""
    k: int = 8
    """Units kept for each token, in every module."""
    sparse_steps: int = 1000
    """Training steps of each sparse module."""
    sparse_lr: float = 3e-3
    """Their learning rate."""

    @property
    def n_tokens(self) -> int:
        """Vocabulary: BOS, letters, series, keys, answers, question."""
        return 1 + self.n_letters + self.n_series + 2 * self.n_keys + 1


class Sample(NamedTuple):
    """Sequences of the toy language."""

    tokens: Tensor
    """[n, length]."""
    rule: Tensor
    """[n, length], the rule (number in `RULES`) that decides the NEXT token; `free` where it is random."""


class Language:
    """The toy language: which token ids are what, and samples."""

    def __init__(self, config: SparseToyConfig) -> None:
        self.config = config
        ids = torch.arange(1, config.n_tokens)
        sizes = [config.n_letters, config.n_series, config.n_keys, config.n_keys, 1]
        self.letters, self.series, self.keys, self.answers, question = ids.split(sizes)
        self.question = int(question)

    def name(self, token: int) -> str:
        """A token for people."""
        groups = ((self.letters, "abcdefghijklmnopqrstuvwxyz"), (self.series, "0123456789"), (self.keys, "ABCDEFGHIJ"))
        for ids, names in groups:
            if token in ids:
                return names[int((ids == token).nonzero()[0, 0])]
        if token in self.answers:
            return "=" + "ABCDEFGHIJ"[int((self.answers == token).nonzero()[0, 0])]
        return "BOS" if token == BOS else "?"

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """`n` random sequences."""
        rows = [self._sequence(generator) for _ in range(n)]
        return Sample(torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows]))

    def _sequence(self, generator: torch.Generator) -> tuple[list[int], list[int]]:
        config, free = self.config, RULES.index("free")
        key = self._draw(config.n_keys, generator)
        block = self.letters[torch.randperm(config.n_letters, generator=generator)[: config.block]].tolist()
        tokens, rule = [BOS, int(self.keys[key]), *block], [free] * (2 + config.block)
        while len(tokens) < config.length:
            kind = self._draw(3, generator)
            if kind == 0:
                begin = self._draw(config.n_series, generator)
                piece = [int(self.series[(begin + i) % config.n_series]) for i in range(4)]
            elif kind == 1:
                piece = [self.question, int(self.answers[key])]
            else:
                piece = block[self._draw(config.block - 1, generator) :]
            tokens += piece
            rule += [kind] * (len(piece) - 1) + [free]
        return tokens[: config.length], rule[: config.length]

    @staticmethod
    def _draw(n: int, generator: torch.Generator) -> int:
        return int(torch.randint(n, (), generator=generator))


# ---- the model


def train_transformer(language: Language, seed: int = 0, progress: bool = False) -> LanguageModel:
    """Train a two-layer Llama from scratch on the language (next-token cross-entropy, Adam)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = language.config
    shape = {"hidden_size": config.d_model, "intermediate_size": config.d_mlp, "num_hidden_layers": 2}
    shape |= {
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "vocab_size": config.n_tokens,
    }
    special = {
        "bos_token_id": BOS,
        "eos_token_id": BOS,
        "max_position_embeddings": config.length,
        "tie_word_embeddings": False,
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **special))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    for step in tqdm(range(config.steps), desc="transformer", disable=not progress):
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / 100, 2.5 * (1 - step / config.steps))
        tokens = language.sample(config.batch_size, generator).tokens
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return LanguageModel("two-layer toy", model.requires_grad_(False).eval(), None)


def _mlp(model: LanguageModel, layer: int) -> nn.Module:
    return model.block(layer).get_submodule(model.architecture.mlp)


@torch.no_grad()
def read_layers(model: LanguageModel, tokens: Tensor) -> ActivationBatch:
    """What every attention layer and every MLP reads and writes; MLPs are numbered after the attention layers."""
    captured: dict[int, tuple[Tensor, Tensor]] = {}

    def keeper(number: int) -> Any:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            captured[number] = arguments[0], output

        return keep

    with contextlib.ExitStack() as stack:
        for layer in range(model.n_layers):
            stack.callback(_mlp(model, layer).register_forward_hook(keeper(model.n_layers + layer)).remove)
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def observer(layer: int) -> Any:
            def observe(x: Tensor, y: Tensor) -> Tensor:
                kept[layer] = x, y
                return y

            return observe

        with model.splice({layer: observer(layer) for layer in range(model.n_layers)}):
            model._hidden(tokens)
    captured |= kept
    mask = torch.ones_like(tokens, dtype=torch.bool)
    inputs, outputs = ({number: pair[side] for number, pair in captured.items()} for side in (0, 1))
    return ActivationBatch(tokens, mask, inputs, outputs, mask)


@dataclass(frozen=True)
class SparseTransformer:
    """A language model with a sparse module for every attention layer and every MLP."""

    model: LanguageModel
    lorsas: tuple[Lorsa, ...]
    transcoders: tuple[SAE, ...]

    @contextlib.contextmanager
    def installed(self, cut: Mapping[tuple[str, int], Tensor] | None = None) -> Iterator[None]:
        """Inside the context the model runs on its sparse modules alone.

        Args:
            cut: units to leave out, by ("attention" or "mlp", layer): indices.
        """
        cut = cut or {}

        def run(module: Lorsa | SAE, x: Tensor, gone: Tensor | None) -> Tensor:
            indices, values = module.encode(x)
            if gone is not None and len(gone):
                values = torch.where(torch.isin(indices, gone), 0.0, values)
            return module.decode(indices, values)

        def attention(layer: int) -> Any:
            return lambda x, y: run(self.lorsas[layer], x, cut.get(("attention", layer)))

        def mlp(layer: int) -> Any:
            return lambda module, arguments, output: run(self.transcoders[layer], arguments[0], cut.get(("mlp", layer)))

        with contextlib.ExitStack() as stack:
            for layer in range(self.model.n_layers):
                stack.callback(_mlp(self.model, layer).register_forward_hook(mlp(layer)).remove)
            stack.enter_context(self.model.splice({layer: attention(layer) for layer in range(self.model.n_layers)}))
            yield

    def save(self, folder: str | Path) -> None:
        """Write all modules and the model, one folder each."""
        path = store.require_writable(folder)
        self.model.model.save_pretrained(path / "model")
        for layer, (lorsa, transcoder) in enumerate(zip(self.lorsas, self.transcoders, strict=True)):
            lorsa.save(path / f"attention_{layer}")
            transcoder.save(path / f"mlp_{layer}")

    @classmethod
    def load(cls, folder: str | Path) -> SparseTransformer:
        """Read what `save` wrote."""
        from lorsa_utils.models import load_model

        path = Path(folder)
        model = load_model(path / "model", device="cpu", dtype=torch.float32)
        layers = range(model.n_layers)
        lorsas = tuple(Lorsa.load(path / f"attention_{layer}") for layer in layers)
        return cls(model, lorsas, tuple(SAE.load(path / f"mlp_{layer}") for layer in layers))


def make_sparse(model: LanguageModel, language: Language, seed: int = 0, progress: bool = False) -> SparseTransformer:
    """Train the sparse modules of all layers on what the model reads and writes, with the kit's own training step."""
    config, n = language.config, model.n_layers
    generator = torch.Generator().manual_seed(seed + 1_000)
    train = TrainConfig(
        tokens=config.sparse_steps * config.batch_size * config.length,
        batch_size=config.batch_size,
        lr=config.sparse_lr,
        warmup=0.05,
        decay=0.4,
        aux_k=8,
        seed=seed,
    )
    runs: dict[int, Run] = {}
    calibration = read_layers(model, language.sample(128, generator).tokens)
    for number in range(2 * n):
        site = model.site(number % n)
        shape: LorsaConfig | SAEConfig = SAEConfig(config.d_model, config.n_features, config.k, kind="transcoder")
        if number < n:
            shape = Lorsa.config_for_site(site, config.n_lorsa_heads, config.n_qk_heads, config.k)
        runs[number] = Run(RunSpec(f"toy{number}", number, shape, train, Path()), {}, torch.device("cpu"))
        runs[number].start(site, calibration)
    for _ in tqdm(range(config.sparse_steps), desc="sparse modules", disable=not progress):
        batch = read_layers(model, language.sample(config.batch_size, generator).tokens)
        for run in runs.values():
            run.train_step(batch)
    modules = [runs[number].finished_module().requires_grad_(False) for number in range(2 * n)]
    return SparseTransformer(model, tuple(modules[:n]), tuple(modules[n:]))  # type: ignore[arg-type]


@torch.no_grad()
def rule_losses(model: LanguageModel, sample: Sample) -> dict[str, float]:
    """Mean loss of the next token in nats, over all tokens (`all`) and where each rule decides it."""
    losses, _ = model.loss(sample.tokens)
    found = {"all": float(losses.mean())}
    rule = sample.rule[:, :-1]
    return found | {name: float(losses[rule == number].mean()) for number, name in enumerate(RULES)}


# ---- global weights


class Features(NamedTuple):
    """Everything that writes into the residual stream of the sparse model."""

    names: list[str]
    write: Tensor
    """[n, d_model]."""


class Weights:
    """Input-independent weights of a sparse two-layer model, read off its parameters (see the module's docstring)."""

    @torch.no_grad()
    def __init__(self, sparse: SparseTransformer, language: Language, n_sequences: int = 64, seed: int = 5) -> None:
        self.sparse, self.language = sparse, language
        model = sparse.model
        tokens = language.sample(n_sequences, torch.Generator().manual_seed(seed)).tokens
        self.embedding: Tensor = model.model.get_input_embeddings().weight.detach().float()
        self.unembedding: Tensor = model.model.get_output_embeddings().weight.detach().float()
        self.scale: dict[str, Tensor] = {}
        names = [
            *(
                f"model.layers.{layer}.{norm}"
                for layer in range(2)
                for norm in ("input_layernorm", "post_attention_layernorm")
            ),
            "model.norm",
        ]
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.callback(model.model.get_submodule(name).register_forward_hook(self._measure(name)).remove)
            with sparse.installed():
                model._hidden(tokens)

    def _measure(self, name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            epsilon = float(module.variance_epsilon)  # type: ignore[arg-type]
            scale = (arguments[0].square().mean(dim=-1) + epsilon).rsqrt().mean()
            self.scale[name] = module.weight.detach() * scale  # type: ignore[operator]

        return keep

    def _into(self, layer: int, vectors: Tensor) -> Tensor:
        """Written vectors as the attention of a layer reads them, on average."""
        return vectors * self.scale[f"model.layers.{layer}.input_layernorm"]

    def values(self, layer: int, write: Tensor) -> Tensor:
        """How much each Lorsa head of a layer moves of each writer: write [n, d_model] to [n, n_heads]."""
        return self._into(layer, write) @ self.sparse.lorsas[layer].W_V.T

    def logits(self, write: Tensor) -> Tensor:
        """Direct effect of each writer on the logits, above their mean: [n, d_model] to [n, n_tokens]."""
        found = (write * self.scale["model.norm"]) @ self.unembedding.T
        return found - found.mean(dim=1, keepdim=True)

    def wants(self, layer: int, group: int, query: Tensor, key: Tensor, distances: range) -> Tensor:
        """Mean attention score, over distances, of query-side writers for key-side writers: [n_query, n_key]."""
        lorsa = self.sparse.lorsas[layer]
        q, k = self._into(layer, query) @ lorsa.W_Q[group], self._into(layer, key) @ lorsa.W_K[group]
        cos, sin = ops.rotary_tables(lorsa.config.rotary, distances.stop, q.device, q.dtype)
        total = q.new_zeros(len(q), len(k))
        for distance in distances:
            spread = q[:, None].expand(-1, distance + 1, -1).contiguous()
            turned = ops.apply_rotary(
                spread, cos[: distance + 1], sin[: distance + 1], lorsa.config.rotary.adjacent_pairs
            )[:, distance]
            total += turned @ k.T
        return total / len(distances) * lorsa.attn_scale

    def by_distance(self, layer: int, group: int, query: Tensor, key: Tensor, distances: range) -> Tensor:
        """The same, mean over writers, for each distance: [n_distances]."""
        return torch.stack([self.wants(layer, group, query, key, range(d, d + 1)).mean() for d in distances])


class InductionCircuit(NamedTuple):
    """What `find_induction` read off the weights."""

    previous: dict[int, list[int]]
    """Letter -> heads of the first layer that write `the token before is this letter`."""
    copying: dict[int, list[int]]
    """Letter -> heads of the second layer that read this letter and raise its logit."""
    groups: list[int]
    """QK groups of the second layer whose queries want the first layer's head of their own letter."""
    table: pd.DataFrame
    """One row a letter: `letter`, `previous`, `reads` (letter read by the wanted head), `group`, `wanted` (score above the mean)."""

    def cut(self) -> dict[tuple[str, int], Tensor]:
        """Its units, to be left out."""
        first = sorted({head for heads in self.previous.values() for head in heads})
        second = sorted({head for heads in self.copying.values() for head in heads})
        return {
            ("attention", 0): torch.tensor(first, dtype=torch.long),
            ("attention", 1): torch.tensor(second, dtype=torch.long),
        }


@torch.no_grad()
def find_induction(weights: Weights, least: float = 0.5) -> InductionCircuit:
    """Read the induction circuit off the weights alone; no sequence is looked at.

    1. The second layer's QK groups: how much does a letter as query want what each first-layer head writes? In an
       induction group the wanted head is one that reads the same letter.
    2. The first layer's heads that read a letter and are wanted by it: those with at least `least` of the largest
       product of the two.
    3. The second layer's heads, in induction groups, that read a letter's embedding and raise its logit: those with at
       least `least` of the largest product.
    """
    language, sparse = weights.language, weights.sparse
    letters = language.letters
    embedded = weights.embedding[letters]
    first, second = sparse.lorsas
    reads = weights.values(0, embedded)
    size = second.config.group_size
    distances = range(2, language.config.length // 2)
    wants = [weights.wants(1, group, embedded, first.W_O, distances) for group in range(second.config.n_qk_heads)]
    matches = []
    for want in wants:
        product = (want - want.mean(dim=0)) @ (reads - reads.mean(dim=0)).clamp_min(0).T
        matches.append(float((product.argmax(dim=1) == torch.arange(len(letters))).float().mean()))
    groups = [group for group, match in enumerate(matches) if match >= least]
    if not groups:
        raise UserError(
            "No QK group of the second layer wants what the first layer writes about the token before; train the toy longer."
        )
    total = torch.stack([(wants[group] - wants[group].mean(dim=0)) for group in groups]).sum(dim=0)
    product = (total.clamp_min(0)) * (reads - reads.mean(dim=0)).clamp_min(0)
    previous = {int(letter): _large(row, least) for letter, row in zip(letters, product, strict=True)}
    heads = torch.cat([torch.arange(group * size, (group + 1) * size) for group in groups])
    moves = weights.values(1, embedded)[:, heads]
    raises = weights.logits(second.W_O[heads])[:, letters].T
    copies = (moves - moves.mean(dim=0)).clamp_min(0) * raises.clamp_min(0)
    copying = {
        int(letter): [int(heads[i]) for i in _large(row, least)] for letter, row in zip(letters, copies, strict=True)
    }
    rows = []
    for number, letter in enumerate(letters.tolist()):
        best = int(product[number].argmax())
        read = int(letters[reads[:, best].argmax()])
        group = max(groups, key=lambda g: float(wants[g][number, best]))
        row = {"letter": language.name(letter), "previous": best, "reads": language.name(read), "group": group}
        rows.append(row | {"wanted": float(total[number, best]), "copying": copying[letter][0]})
    return InductionCircuit(previous, copying, groups, pd.DataFrame(rows))


def _large(values: Tensor, least: float) -> list[int]:
    return [int(i) for i in (values >= least * values.max().clamp_min(1e-9)).nonzero()[:, 0]]


@torch.no_grad()
def cut_table(sparse: SparseTransformer, circuit: InductionCircuit, sample: Sample, seed: int = 0) -> pd.DataFrame:
    """Losses by rule: original, sparse, with the circuit cut, with each of its layers cut, with as many random live heads cut instead.

    The random row is the mean over `N_RANDOM` draws.

    Returns:
        one row a model: `model`, `heads` (left out), `all` and one column for each rule.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = circuit.cut()
    first, second = ("attention", 0), ("attention", 1)
    live = {("attention", layer): _live(sparse, layer, sample.tokens) for layer in (0, 1)}
    cuts: dict[str, dict[tuple[str, int], Tensor]] = {
        "sparse": {},
        "circuit cut": whole,
        "first layer's heads cut": {first: whole[first]},
        "second layer's heads cut": {second: whole[second]},
    }
    rows = [{"model": "original", "heads": 0, **rule_losses(sparse.model, sample)}]
    for name, cut in cuts.items():
        with sparse.installed(cut):
            rows.append(
                {"model": name, "heads": sum(len(heads) for heads in cut.values()), **rule_losses(sparse.model, sample)}
            )
    by_chance = []
    for _ in range(N_RANDOM):
        drawn = {place: _others(live[place], heads, generator) for place, heads in whole.items()}
        with sparse.installed(drawn):
            by_chance.append(
                {"heads": sum(len(heads) for heads in drawn.values()), **rule_losses(sparse.model, sample)}
            )
    rows.append({"model": "random heads cut", **pd.DataFrame(by_chance).mean().to_dict()})
    return pd.DataFrame(rows)


def _others(live: Tensor, heads: Tensor, generator: torch.Generator) -> Tensor:
    """As many live heads as there are in a set, none of them in it."""
    others = live[~torch.isin(live, heads)]
    return others[torch.randperm(len(others), generator=generator)[: len(heads)]]


def _live(sparse: SparseTransformer, layer: int, tokens: Tensor) -> Tensor:
    """Heads of a Lorsa that are active on some tokens."""
    indices, values = sparse.lorsas[layer].encode(read_layers(sparse.model, tokens).inputs[layer])
    return torch.unique(indices[values > 0])
