"""A toy whose attention units are known, so that recovering them can be measured (paper item P1).

Unit u is a skip-bigram (Elhage et al. 2021): wherever token a_u stands and token b_u stood earlier, write direction
d_u. An ordinary attention layer with fewer heads than units is trained to do that, then a Lorsa is trained on what this
layer reads and writes, as on any model. Only the score looks at the true units.

    y_i = sum_u active_u(i) d_u,   active_u(i) = 1 if t_i = a_u and t_j = b_u for some j < i, else 0

While the attention layer is trained, each head is left out of a random share of the sequences (head dropout). No unit
can then rely on one head alone, which is one of the pressures that spread units over heads; without it each unit
settles in one head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from lorsa_utils.activations import ActivationBatch
from lorsa_utils.config import Config, LorsaConfig, RotaryConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.initialize import CALIBRATION_SEQUENCES
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import AttentionSite
from lorsa_utils.train import Run, RunSpec

BOS = 0


@dataclass(frozen=True)
class ToyConfig(Config):
    """Sizes of the toy: its language, the attention layer that learns it, and the Lorsa that takes the layer apart."""

    n_units: int = 12
    """True units, more than heads."""
    n_queries: int = 4
    """Different tokens a; each belongs to n_units / n_queries units. Every unit has its own token b."""
    length: int = 12
    """Tokens of a sequence, BOS included."""
    d_model: int = 32
    """Width of the residual stream."""
    n_heads: int = 4
    """Heads of the attention layer."""
    d_head: int = 8
    """Width of its queries, keys and values."""
    head_dropout: float = 0.25
    """Share of the sequences in which a head is left out while the attention layer is trained."""
    attention_steps: int = 600
    """Training steps of the attention layer."""
    attention_lr: float = 1e-2
    """Its learning rate."""
    n_lorsa_heads: int = 32
    """Lorsa heads, more than units, because nobody knows the number of units beforehand."""
    n_qk_heads: int = 8
    """QK groups of Lorsa."""
    k: int = 2
    """Lorsa heads kept for each token."""
    lorsa_steps: int = 600
    """Training steps of Lorsa."""
    lorsa_lr: float = 1e-2
    """Its learning rate."""
    batch_size: int = 64
    """Sequences in one step of either."""

    def __post_init__(self) -> None:
        if self.n_queries < 1 or self.n_units % self.n_queries:
            raise UserError(f"n_units ({self.n_units}) must be a multiple of n_queries ({self.n_queries}).")
        if self.n_tokens > self.d_model:
            raise UserError(
                f"{self.n_tokens} tokens need orthogonal embeddings; make d_model ({self.d_model}) at least as large."
            )
        if not 0 <= self.head_dropout < 1:
            raise UserError(f"head_dropout is a share below 1, not {self.head_dropout}.")

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary: BOS, the tokens a, the tokens b."""
        return 1 + self.n_queries + self.n_units

    def lorsa(self) -> LorsaConfig:
        """Shape of the Lorsa."""
        return LorsaConfig(self.d_model, self.n_lorsa_heads, self.n_qk_heads, self.d_head, self.k)


class Sample(NamedTuple):
    """Some sequences of the toy language."""

    tokens: Tensor
    """[n, length], token ids; the first is BOS."""
    mask: Tensor
    """[n, length] bool, False at BOS."""
    x: Tensor
    """[n, length, d_model], embeddings: what attention reads."""
    active: Tensor
    """[n, length, n_units], 1 where a unit is active."""


@dataclass(frozen=True)
class Language:
    """Tokens and true units. Made by `make_language`."""

    config: ToyConfig
    embeddings: Tensor
    """[n_tokens, d_model], orthogonal, of norm sqrt(d_model)."""
    queries: Tensor
    """[n_units], id of each unit's token a."""
    keys: Tensor
    """[n_units], id of each unit's token b."""
    write: Tensor
    """[n_units, d_model], each unit's write direction, of norm 1."""

    def token_name(self, token: int) -> str:
        """`BOS`, `a1`, `a2`, ... or `b1`, `b2`, ..."""
        if token == BOS:
            return "BOS"
        n = self.config.n_queries
        return f"a{token}" if token <= n else f"b{token - n}"

    def unit_name(self, unit: int) -> str:
        """Key and query of a unit, as `b3 … a1`."""
        return f"{self.token_name(int(self.keys[unit]))} … {self.token_name(int(self.queries[unit]))}"

    def read(self, tokens: Tensor) -> Sample:
        """What stands in token ids [n, length], and where units are active."""
        seen = (tokens[..., None] == self.keys).cumsum(dim=1) > 0
        active = ((tokens[..., None] == self.queries) & seen).float()
        return Sample(tokens, tokens != BOS, self.embeddings[tokens], active)

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """`n` random sequences: after BOS, half of the tokens are an a, half a b."""
        config = self.config
        weights = torch.ones(config.n_tokens)
        weights[BOS] = 0
        weights[1 : 1 + config.n_queries] = config.n_units / config.n_queries
        tokens = torch.multinomial(weights.expand(n, -1), config.length, replacement=True, generator=generator)
        tokens[:, 0] = BOS
        return self.read(tokens)

    def target(self, active: Tensor) -> Tensor:
        """What the units write, [..., n_units] to [..., d_model]."""
        return active @ self.write


def make_language(config: ToyConfig, seed: int) -> Language:
    """Draw embeddings and write directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(config.d_model, config.d_model, generator=generator)).Q
    units = torch.arange(config.n_units)
    return Language(
        config,
        embeddings=basis[: config.n_tokens] * config.d_model**0.5,
        queries=1 + units % config.n_queries,
        keys=1 + config.n_queries + units,
        write=F.normalize(torch.randn(config.n_units, config.d_model, generator=generator), dim=1),
    )


# ---- training


def train_attention(language: Language, seed: int) -> AttentionSite:
    """Train an ordinary causal attention layer, without positions, to write what the units write (mean squared error)."""
    config = language.config
    generator = torch.Generator().manual_seed(seed)
    d, d_head = config.d_model, config.d_head
    shapes = {"W_Q": (d, d_head), "W_K": (d, d_head), "W_V": (d, d_head), "W_O": (d_head, d)}
    weights = {
        name: torch.randn(config.n_heads, *shape, generator=generator) * d**-0.5 for name, shape in shapes.items()
    }
    zeros = torch.zeros(config.n_heads, d_head)
    bias = torch.zeros(d)
    parameters = [tensor.requires_grad_() for tensor in (*weights.values(), bias)]
    site = AttentionSite(0, "toy", d_head**-0.5, RotaryConfig(), **weights, b_Q=zeros, b_K=zeros, b_V=zeros, b_O=bias)
    optimizer = torch.optim.Adam(parameters, lr=config.attention_lr)
    for step in range(config.attention_steps):
        optimizer.param_groups[0]["lr"] = config.attention_lr * min(1.0, 2 * (1 - step / config.attention_steps))
        batch = language.sample(config.batch_size, generator)
        kept = (torch.rand(config.batch_size, 1, config.n_heads, 1, generator=generator) >= config.head_dropout) / (
            1 - config.head_dropout
        )
        error = output(site, batch.x, kept) - language.target(batch.active)
        optimizer.zero_grad(set_to_none=True)
        error[batch.mask].square().sum(dim=-1).mean().backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return site


def output(site: AttentionSite, x: Tensor, head_weights: Tensor | None = None) -> Tensor:
    """What an attention layer writes, [n, length, d_model] to the same; `head_weights` [n, 1, n_heads, 1] scale the heads."""
    values = site.head_values(x)
    scaled = values if head_weights is None else values * head_weights
    return scaled.flatten(-2) @ site.W_O.flatten(0, 1) + site.b_O


def start_lorsa(language: Language, site: AttentionSite, seed: int) -> Run:
    """A Lorsa at its `mhsa` start, ready to be trained on what the attention layer reads and writes."""
    config = language.config
    # Everything that changes the result is written down here, so that the kit's defaults can move without it.
    train = TrainConfig(
        tokens=config.lorsa_steps * config.batch_size * (config.length - 1),
        batch_size=config.batch_size,
        lr=config.lorsa_lr,
        qk_lr_factor=0.3,
        warmup=0.05,
        decay=0.4,
        aux_k=0,
        seed=seed,
    )
    run = Run(RunSpec("toy", 0, config.lorsa(), train, Path()), {}, torch.device("cpu"))
    # The seed of the draws differs from the attention layer's, so that no sequence is seen by both in the same order.
    run.start(site, _activations(language, site, CALIBRATION_SEQUENCES, torch.Generator().manual_seed(seed + 1_000)))
    return run


def train_lorsa(language: Language, site: AttentionSite, seed: int) -> Lorsa:
    """Train a Lorsa with the kit's own training step; the true units are never shown to it."""
    run = start_lorsa(language, site, seed)
    generator = torch.Generator().manual_seed(seed + 2_000)
    for _ in range(language.config.lorsa_steps):
        run.train_step(_activations(language, site, language.config.batch_size, generator))
    return finished(run)


def finished(run: Run) -> Lorsa:
    """The run's Lorsa, for raw activations, with write directions of norm 1."""
    module = run.finished_module()
    assert isinstance(module, Lorsa)
    return module


@torch.no_grad()
def _activations(language: Language, site: AttentionSite, n: int, generator: torch.Generator) -> ActivationBatch:
    batch = language.sample(n, generator)
    return ActivationBatch(batch.tokens, batch.mask, {0: batch.x}, {0: output(site, batch.x)}, batch.mask)


# ---- measuring


def fvu(predicted: Tensor, target: Tensor) -> float:
    """Fraction of variance unexplained over tokens [n_tokens, d_model], as in `metrics`."""
    return float((target - predicted).square().sum() / (target - target.mean(dim=0)).square().sum())


@torch.no_grad()
def head_parts(site: AttentionSite, batch: Sample) -> Tensor:
    """What each MHSA head writes for each unit, [n_units, n_heads, d_model]: least squares of head outputs on active units.

    Summed over heads, a row is what the whole layer writes when that unit becomes active.
    """
    active = batch.active[batch.mask]
    design = torch.cat([active, torch.ones(len(active), 1)], dim=1)
    heads = site.head_outputs(batch.x)[batch.mask]
    solution = torch.linalg.lstsq(design, heads.flatten(1)).solution[:-1]
    return solution.view(active.shape[1], *heads.shape[1:])


def unit_shares(language: Language, parts: Tensor) -> Tensor:
    """Share of each MHSA head in each unit, [n_units, n_heads], rows sum to 1: its part along d_u over the layer's part along d_u."""
    along = torch.einsum("uhd,ud->uh", parts, language.write)
    return along / along.sum(dim=1, keepdim=True)


def effective_number(shares: Tensor) -> Tensor:
    """How many entries of each row carry it: (sum |s|)^2 / sum s^2, between 1 and the length of the row (participation ratio)."""
    return shares.abs().sum(dim=-1).square() / shares.square().sum(dim=-1)


class Candidates(NamedTuple):
    """Directions that may be the true units, and how active each is at every counted token."""

    directions: Tensor
    """[n, d_model], norm 1."""
    activations: Tensor
    """[n_tokens, n]."""


@torch.no_grad()
def lorsa_heads(lorsa: Lorsa, batch: Sample) -> Candidates:
    """Lorsa heads: write directions, and activations after the selection."""
    result = lorsa(batch.x)
    activations = batch.x.new_zeros(*batch.x.shape[:2], lorsa.n_units).scatter(-1, result.indices, result.values)
    return Candidates(F.normalize(lorsa.W_O, dim=1), activations[batch.mask])


@torch.no_grad()
def mhsa_heads(site: AttentionSite, batch: Sample, per_head: int = 1) -> Candidates:
    """MHSA heads: the `per_head` largest principal directions of each head's output, and the output along them.

    With `per_head` equal to d_head these are as many directions as the heads can write.
    """
    directions, activations = [], []
    outputs = site.head_outputs(batch.x)[batch.mask]
    for head in (outputs - outputs.mean(dim=0)).unbind(dim=1):
        axes = torch.linalg.eigh(head.T @ head).eigenvectors[:, -per_head:].flip(1)
        directions.append(axes.T)
        activations.append(head @ axes)
    return _both_signs(torch.cat(directions), torch.cat(activations, dim=1))


@torch.no_grad()
def random_directions(site: AttentionSite, batch: Sample, n: int, seed: int) -> Candidates:
    """Random directions, and the layer's output along them: what luck reaches."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(n, site.d_model, generator=generator), dim=1)
    return _both_signs(directions, output(site, batch.x)[batch.mask] @ directions.T)


def _both_signs(directions: Tensor, activations: Tensor) -> Candidates:
    """Axes have no sign, units have: let an axis count both ways."""
    return Candidates(torch.cat([directions, -directions]), torch.cat([activations, -activations], dim=1))


def recovery(language: Language, candidates: Candidates, batch: Sample) -> pd.DataFrame:
    """For every true unit the candidate that points most nearly its way.

    Returns:
        one row a unit: `unit` (name), `match` (index of the candidate), `cosine` (of the two directions) and
        `correlation` (Pearson, of the unit's being active and the candidate's activation, over counted tokens; 0 for
        one that is never active).
    """
    cosine, match = (language.write @ candidates.directions.T).max(dim=1)
    matched = candidates.activations[:, match]
    centred = [side - side.mean(dim=0) for side in (batch.active[batch.mask].double(), matched.double())]
    norms = centred[0].norm(dim=0) * centred[1].norm(dim=0)
    correlation = (centred[0] * centred[1]).sum(dim=0) / norms.clamp_min(1e-9)
    names = [language.unit_name(unit) for unit in range(len(match))]
    return pd.DataFrame(
        {"unit": names, "match": match.tolist(), "cosine": cosine.tolist(), "correlation": correlation.tolist()}
    )


class Experiment(NamedTuple):
    """One seed of everything. Made by `run_experiment`."""

    language: Language
    site: AttentionSite
    lorsa: Lorsa
    test: Sample
    """Sequences that neither layer was trained on."""
    recovery: pd.DataFrame
    """Rows of `recovery` for each kind of candidate, with columns `seed` and `candidates`."""
    facts: dict[str, float]
    """`mhsa_fvu` (attention layer against the true units), `lorsa_fvu` (Lorsa against the attention layer), `heads_per_unit` and
    `units_per_head` (effective numbers, means)."""


def run_experiment(config: ToyConfig, seed: int, n_test: int = 1_000) -> Experiment:
    """Language, attention layer, Lorsa and scores for one seed."""
    language = make_language(config, seed)
    site = train_attention(language, seed)
    before, lorsa = finished(start_lorsa(language, site, seed)), train_lorsa(language, site, seed)
    test = language.sample(n_test, torch.Generator().manual_seed(seed + 3_000))
    candidates = {
        "Lorsa heads": lorsa_heads(lorsa, test),
        "Lorsa before training": lorsa_heads(before, test),
        "MHSA heads": mhsa_heads(site, test),
        "MHSA components": mhsa_heads(site, test, config.d_head),
        "random": random_directions(site, test, config.n_lorsa_heads, seed + 4_000),
    }
    tables = [recovery(language, each, test).assign(seed=seed, candidates=name) for name, each in candidates.items()]
    shares = unit_shares(language, head_parts(site, test))
    written = output(site, test.x)[test.mask]
    with torch.no_grad():
        predicted = lorsa(test.x).y[test.mask]
    facts = {
        "mhsa_fvu": fvu(written, language.target(test.active)[test.mask]),
        "lorsa_fvu": fvu(predicted, written),
        "heads_per_unit": float(effective_number(shares).mean()),
        "units_per_head": float(effective_number(shares.T).mean()),
    }
    return Experiment(language, site, lorsa, test, pd.concat(tables, ignore_index=True), facts)
