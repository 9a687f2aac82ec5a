"""What reconstructions of an attention layer miss, and whether two modules miss the same (P16).

    error                      e = y - yhat, of a module at a token
    cosine                     mean over tokens of e_a . e_b / (|e_a| |e_b|)
    shared energy              sum e_a . e_b / sum |e_a|^2: the share of a's error that b has too, if what they do not
                               share is unrelated
    norm correlation           Pearson's r of |e_a| and |e_b| over tokens
    correlation at equal size  partial correlation of log |e_a| and log |e_b| given log |y - mean(y)|, as large outputs
                               make large errors
    linear predictability      R^2 = 1 - sum |e - ehat|^2 / sum |e - mean(e)|^2, ehat a ridge regression on the layer's
                               input, on sequences that it was not fitted on

All but R^2's fit are functions of sums over tokens, kept by sequence. Intervals (95 %) come from drawing sequences with
replacement, as tokens of one sequence are not independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorsa_utils.activations import ActivationSource
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.units import replaced_loss
from lorsa_utils.lorsa import SparseModule
from lorsa_utils.models import LanguageModel
from lorsa_utils.stats import N_DRAWS, Interval, sample_interval
from lorsa_utils.text import Sequences

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class LayerErrors:
    """Errors of modules at one layer on the same tokens. Made by `collect`."""

    inputs: Tensor
    """What the layer reads, [n_tokens, d_model]."""
    deviations: Tensor
    """What it writes, less its mean over these tokens, [n_tokens, d_model]."""
    mean: Tensor
    """That mean, [d_model]."""
    errors: dict[str, Tensor]
    """Module to the layer's output less the module's, [n_tokens, d_model]."""
    tokens: Tensor
    """Ids, [n_tokens]."""
    positions: Tensor
    """Within the sequence, [n_tokens]; 0 is BOS, which is not counted."""
    sequence: Tensor
    """Number of the sequence, [n_tokens]."""


def module_error(module: SparseModule, x: Tensor, y: Tensor) -> Tensor:
    """The layer's output y less that of a module for raw activations, [batch, length, d_model]."""
    return y - module(module.input_from(x, y).to(module.b_O)).y.to(y)


@torch.no_grad()
def collect(
    modules: Mapping[str, SparseModule], source: ActivationSource, layer: int, n_tokens: int, batch_size: int = 8
) -> LayerErrors:
    """Run modules over the first `n_tokens` counted tokens of a source, rounded up to whole batches.

    Raises:
        UserError: there are fewer than two sequences.
    """
    parts: list[dict[str, Tensor]] = []
    n_sequences = n_counted = 0
    for batch in source.batches(batch_size, layers=[layer]):
        x, y, mask = batch.inputs[layer], batch.outputs[layer], batch.mask.cpu()
        sides = {"inputs": x, "outputs": y, "tokens": batch.tokens}
        sides |= {name: module_error(module, x, y) for name, module in modules.items()}
        sequence, positions = mask.nonzero().T
        places = {"sequence": sequence + n_sequences, "positions": positions}
        parts.append({name: side.cpu()[mask] for name, side in sides.items()} | places)
        n_sequences += len(mask)
        n_counted += len(sequence)
        if n_counted >= n_tokens:
            break
    if len({int(number) for part in parts for number in part["sequence"].unique()}) < 2:
        raise UserError("Errors are compared over sequences, and this text has fewer than two; give a longer text.")
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    outputs, errors = whole.pop("outputs"), {name: whole.pop(name) for name in modules}
    mean = outputs.mean(dim=0)
    return LayerErrors(deviations=outputs - mean, mean=mean, errors=errors, **whole)


# ---- sums and intervals


def resampled(columns: Mapping[str, Tensor], sequence: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Sums of columns [n_tokens] in the sample and in bootstrap draws of sequences.

    Name to sums [N_DRAWS + 1], float64; entry 0 is the sample.
    """
    numbers = sequence.unique(return_inverse=True)[1]
    n = int(numbers.max()) + 1
    table = torch.stack([column.double() for column in columns.values()], dim=1)
    sums = torch.zeros(n, table.shape[1], dtype=torch.float64).index_add_(0, numbers, table)
    drawn = torch.randint(n, (N_DRAWS, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(N_DRAWS, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    totals = torch.cat([torch.ones(1, n, dtype=torch.float64), counts]) @ sums
    return dict(zip(columns, totals.T, strict=True))


def pearson(s: Mapping[str, Tensor], x: str, y: str) -> Tensor:
    """Correlation of two columns, from sums."""
    n, covariance = s["one"], s[f"{x}*{y}"] - s[x] * s[y] / s["one"]
    variances = (s[f"{x}*{x}"] - s[x] * s[x] / n) * (s[f"{y}*{y}"] - s[y] * s[y] / n)
    return covariance / variances.clamp_min(_TINY).sqrt()


def _partial(s: Mapping[str, Tensor]) -> Tensor:
    with_a, with_b = pearson(s, "log_a", "log_size"), pearson(s, "log_b", "log_size")
    rest = ((1 - with_a**2) * (1 - with_b**2)).clamp_min(_TINY)
    return (pearson(s, "log_a", "log_b") - with_a * with_b) / rest.sqrt()


PAIR_STATISTICS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "cosine": lambda s: s["cosine"] / s["one"],
    "shared_energy": lambda s: s["dot"] / s["a*a"],
    "norm_correlation": lambda s: pearson(s, "a", "b"),
    "correlation_at_equal_size": _partial,
}
"""Statistics of sums of `pair_columns`; formulas in the module's docstring."""


def pair_columns(a: Tensor, b: Tensor, size: Tensor) -> dict[str, Tensor]:
    """Columns of `PAIR_STATISTICS`: errors a, b [n_tokens, d_model] and the target's size |y - mean(y)| [n_tokens]."""
    dot, aa, bb = (a * b).sum(dim=1).double(), a.square().sum(dim=1).double(), b.square().sum(dim=1).double()
    norm_a, norm_b = aa.sqrt(), bb.sqrt()
    norms = {"log_a": norm_a, "log_b": norm_b, "log_size": size.double()}
    logs = {name: value.clamp_min(_TINY).log() for name, value in norms.items()}
    products = {f"{x}*{y}": logs[x] * logs[y] for x, y in itertools.combinations_with_replacement(logs, 2)}
    columns = {"one": torch.ones_like(dot), "dot": dot, "cosine": dot / (norm_a * norm_b).clamp_min(_TINY)}
    return columns | {"a": norm_a, "b": norm_b, "a*a": aa, "b*b": bb, "a*b": norm_a * norm_b} | logs | products


def compare(data: LayerErrors, a: str, b: str, elsewhere: bool = False, seed: int = 0) -> dict[str, Interval]:
    """How alike the errors of modules a and b are, by `PAIR_STATISTICS`.

    With `elsewhere`, the control, a's error at each token is paired with b's at a token of another sequence.
    """
    other = tokens_elsewhere(data.sequence, seed) if elsewhere else torch.arange(len(data.sequence))
    columns = pair_columns(data.errors[a], data.errors[b][other], data.deviations.norm(dim=1))
    sums = resampled(columns, data.sequence, seed)
    return {name: sample_interval(statistic(sums)) for name, statistic in PAIR_STATISTICS.items()}


def tokens_elsewhere(sequence: Tensor, seed: int = 0) -> Tensor:
    """For every token the index of a random token of another sequence, [n_tokens]."""
    n, generator = len(sequence), torch.Generator().manual_seed(seed)
    other = torch.randint(n, (n,), generator=generator)
    while (same := sequence[other] == sequence).any():
        other[same] = torch.randint(n, (int(same.sum()),), generator=generator)
    return other


# ---- linear predictability

PENALTIES = tuple(10.0**power for power in range(-4, 4))
"""Ridge penalties to try, in units of the inputs' mean variance."""


def predictability(inputs: Tensor, targets: Tensor, sequence: Tensor, seed: int = 0) -> Interval:
    """Ridge regression, fitted on half of the sequences, penalty chosen on a fifth, R^2 on the rest.

    Shapes: `inputs` [n_tokens, d], `targets` [n_tokens, d_out] or [n_tokens], `sequence` [n_tokens].

    Raises:
        UserError: there are fewer than ten sequences.
    """
    numbers = sequence.unique()
    if len(numbers) < 10:
        raise UserError(
            f"A held-out fit wants at least 10 sequences, and there are {len(numbers)}; give a longer text."
        )
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]
    splits = shuffled.tensor_split([len(numbers) // 2, len(numbers) * 7 // 10])
    fit, choose, test = (torch.isin(sequence, split) for split in splits)
    x, y = inputs.double(), targets.double().view(len(inputs), -1)
    x_mean, y_mean = x[fit].mean(dim=0), y[fit].mean(dim=0)
    x = x - x_mean
    values, vectors = torch.linalg.eigh(x[fit].T @ x[fit])
    projected = vectors.T @ (x[fit].T @ (y[fit] - y_mean))

    def residual(penalty: float, rows: Tensor) -> Tensor:
        weights = vectors @ (projected / (values.clamp_min(0) + penalty * values.mean())[:, None])
        return (y[rows] - y_mean - x[rows] @ weights).square().sum(dim=1)

    best = min(PENALTIES, key=lambda penalty: float(residual(penalty, choose).sum()))
    deviation = (y[test] - y[test].mean(dim=0)).square().sum(dim=1)
    sums = resampled({"residual": residual(best, test), "deviation": deviation}, sequence[test], seed)
    return sample_interval(1 - sums["residual"] / sums["deviation"])


# ---- the model's loss


def shared_part(error: Tensor, other: Tensor) -> Tensor:
    """The part of errors [..., d_model] along those of another module; its energy is cosine^2 of the whole."""
    energy = other.square().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(other.dtype).tiny)
    return (error * other).sum(dim=-1, keepdim=True) / energy * other


def shrunk(a: Tensor, b: Tensor) -> Tensor:
    """a, scaled at each token to the size it has left without the shared part."""
    size = a.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    return a * ((a - shared_part(a, b)).norm(dim=-1, keepdim=True) / size)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mean output": lambda y, a, b, mean: mean.expand_as(y),
    "a": lambda y, a, b, mean: y - a,
    "b": lambda y, a, b, mean: y - b,
    "a with the shared part": lambda y, a, b, mean: y - a + shared_part(a, b),
    "a, shrunk as much": lambda y, a, b, mean: y - shrunk(a, b),
    "a without the shared part only": lambda y, a, b, mean: y - shared_part(a, b),
}
"""Name to what replaces the layer's output y, from the errors a and b of two modules and the mean output.

`a, shrunk as much` is the control of `a with the shared part`: it removes as much squared error at every token, without
asking where it points. In `a without the shared part only` nothing but what both miss is missing."""


@torch.no_grad()
def replaced_losses(
    model: LanguageModel,
    layer: int,
    a: SparseModule,
    b: SparseModule,
    mean: Tensor,
    sequences: Sequences,
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """The model's loss with the layer's output replaced by each of `VARIANTS`, and `original`.

    `mean` [d_model] is the mean output. Positions that are not counted keep their output. Returns variant to summed
    loss per sequence in nats, [n_sequences], float64, and `counted`, the number of counted targets.
    """
    rows: dict[str, list[Tensor]] = {}
    for tokens, mask in sequences.batches(batch_size, model.device):
        # Nothing before the layer changes, so that one pass gives what all variants start from.
        with model.resume(layer, model.residual(tokens, layer)):
            x, y = model.capture(tokens, [layer])[layer]
            of_a, of_b = module_error(a, x, y), module_error(b, x, y)
            outputs = {name: variant(y, of_a, of_b, mean.to(y)) for name, variant in VARIANTS.items()}
            for name, output in {"original": y, **outputs}.items():
                losses = replaced_loss(model, layer, torch.where(mask[..., None], output, y), tokens, mask)
                rows.setdefault(name, []).append(losses.double().sum(dim=1).cpu())
        rows.setdefault("counted", []).append(mask[:, 1:].sum(dim=1).double().cpu())
    return {name: torch.cat(pieces) for name, pieces in rows.items()}
