"""What reconstructions of an attention layer miss, and whether two modules miss the same (P16).

    error                      e = y - yhat, of a module at a token
    cosine                     mean over tokens of e_a . e_b / (|e_a| |e_b|)
    shared energy              sum e_a . e_b / sum |e_a|^2: the share of a's error that b has too, if what they do not
                               share is unrelated
    norm correlation           Pearson's r of |e_a| and |e_b| over tokens
    correlation at equal size  partial correlation of log |e_a| and log |e_b| given log |y - mean(y)|: large outputs
                               make large errors, whatever the module
    linear predictability      R^2 = 1 - sum |e - ehat|^2 / sum |e - mean(e)|^2, ehat a ridge regression on the layer's
                               input, on sequences that it was not fitted on

Everything but R^2's fit is a function of sums over tokens. They are kept by sequence, and intervals (95 %) come from
drawing sequences with replacement: tokens of one sequence are not independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from lorsa_utils.activations import ActivationSource
from lorsa_utils.circuits.faithfulness import Interval, interval
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SparseModule
from lorsa_utils.models import LanguageModel
from lorsa_utils.text import Sequences

N_DRAWS = 1000
"""Bootstrap draws."""

POSITIONS = (1, 2, 8, 32, 128)
"""Where bins of positions begin."""


@dataclass(frozen=True)
class LayerErrors:
    """Errors of several modules at one layer on the same tokens. Made by `collect`."""

    layer: int
    inputs: Tensor
    """What the layer reads, [n_tokens, d_model]."""
    deviations: Tensor
    """What it writes, less the mean over these tokens, [n_tokens, d_model]."""
    mean: Tensor
    """That mean, [d_model]."""
    errors: dict[str, Tensor]
    """Module to what it writes less what the module says, [n_tokens, d_model]."""
    tokens: Tensor
    """Token ids, [n_tokens]."""
    positions: Tensor
    """Positions within the sequence, [n_tokens]; BOS, which is not counted, is 0."""
    sequence: Tensor
    """Number of the sequence, [n_tokens]."""


@torch.no_grad()
def collect(
    modules: Mapping[str, SparseModule], source: ActivationSource, layer: int, n_tokens: int, batch_size: int = 8
) -> LayerErrors:
    """Run modules over the first `n_tokens` counted tokens of a source; whole batches, so it can be a few more.

    Args:
        modules: name to module; they take raw activations.
        source: held-out activations.
        layer: of all modules.
        n_tokens: how many; fewer when the source ends.
        batch_size: sequences at a time.

    Raises:
        UserError: there are fewer than two sequences, which leaves nothing to compare with.
    """
    parts: dict[str, list[Tensor]] = {}
    first = found = 0
    for batch in source.batches(batch_size, layers=[layer]):
        x, y, mask = batch.inputs[layer], batch.outputs[layer], batch.mask.cpu()
        where = mask.nonzero()
        one = {"inputs": x, "outputs": y, "tokens": batch.tokens}
        for name, module in modules.items():
            read = module.input_from(x, y).to(module.b_O)
            one[name] = y - module(read).y.to(y)
        rows = {name: value.cpu()[mask] for name, value in one.items()}
        for name, value in (rows | {"sequence": where[:, 0] + first, "positions": where[:, 1]}).items():
            parts.setdefault(name, []).append(value)
        first += len(mask)
        found += len(where)
        if found >= n_tokens:
            break
    whole = {name: torch.cat(pieces) for name, pieces in parts.items()}
    if not found or whole["sequence"].unique().numel() < 2:
        raise UserError("Errors are compared over sequences, and this text has fewer than two; give a longer text.")
    errors = {name: whole[name] for name in modules}
    mean = whole["outputs"].mean(dim=0)
    return LayerErrors(
        layer,
        whole["inputs"],
        whole["outputs"] - mean,
        mean,
        errors,
        whole["tokens"],
        whole["positions"],
        whole["sequence"],
    )


# ---- sums and intervals


def resampled(
    columns: Mapping[str, Tensor], sequence: Tensor, seed: int = 0, n_draws: int = N_DRAWS
) -> dict[str, Tensor]:
    """Sums over tokens of all columns, in the sample and in every bootstrap draw of sequences.

    Args:
        columns: name to one number a token, [n_tokens].
        sequence: which sequence each token belongs to, [n_tokens].
        seed: of the draws.
        n_draws: how many.

    Returns:
        name to sums [n_draws + 1], float64; entry 0 is the sample itself.
    """
    numbers = sequence.unique(return_inverse=True)[1]
    n = int(numbers.max()) + 1
    table = torch.stack([column.double() for column in columns.values()], dim=1)
    sums = torch.zeros(n, table.shape[1], dtype=torch.float64).index_add_(0, numbers, table)
    drawn = torch.randint(n, (n_draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(n_draws, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(n_draws, n, dtype=torch.float64)
    )
    totals = torch.cat([torch.ones(1, n, dtype=torch.float64), counts]) @ sums
    return dict(zip(columns, totals.T, strict=True))


def pearson(n: Tensor, x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Correlation from sums of 1, x, y, x^2, y^2 and x y."""
    covariance, variances = xy - x * y / n, (xx - x * x / n) * (yy - y * y / n)
    return covariance / variances.clamp_min(torch.finfo(torch.float64).tiny).sqrt()


def _partial(s: Mapping[str, Tensor]) -> Tensor:
    """Partial correlation of the columns log_a and log_b given log_size."""

    def r(x: str, y: str) -> Tensor:
        return pearson(s["one"], s[x], s[y], s[f"{x}*{x}"], s[f"{y}*{y}"], s[f"{x}*{y}"])

    with_a, with_b = r("log_a", "log_size"), r("log_b", "log_size")
    rest = ((1 - with_a**2) * (1 - with_b**2)).clamp_min(torch.finfo(torch.float64).tiny)
    return (r("log_a", "log_b") - with_a * with_b) / rest.sqrt()


PAIR_STATISTICS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "cosine": lambda s: s["cosine"] / s["one"],
    "shared_energy": lambda s: s["dot"] / s["aa"],
    "norm_correlation": lambda s: pearson(s["one"], s["a"], s["b"], s["aa"], s["bb"], s["ab"]),
    "correlation_at_equal_size": lambda s: _partial(s),
}
"""Name to the statistic, from sums over tokens; formulas in the module's docstring."""


def pair_columns(a: Tensor, b: Tensor, size: Tensor) -> dict[str, Tensor]:
    """What `PAIR_STATISTICS` sum: for errors a, b [n_tokens, d_model] and the size |y - mean(y)| of a's target, [n_tokens]."""
    tiny = torch.finfo(torch.float64).tiny
    dot, aa, bb = (a * b).sum(dim=1).double(), a.square().sum(dim=1).double(), b.square().sum(dim=1).double()
    norm_a, norm_b = aa.sqrt(), bb.sqrt()
    logs = {"log_a": norm_a, "log_b": norm_b, "log_size": size.double()}
    logs = {name: value.clamp_min(tiny).log() for name, value in logs.items()}
    products = {f"{x}*{y}": logs[x] * logs[y] for x, y in itertools.combinations_with_replacement(logs, 2)}
    return {
        **{"one": torch.ones_like(dot), "dot": dot, "cosine": dot / (norm_a * norm_b).clamp_min(tiny)},
        **{"a": norm_a, "b": norm_b, "aa": aa, "bb": bb, "ab": norm_a * norm_b, **logs, **products},
    }


def compare(data: LayerErrors, a: str, b: str, elsewhere: bool = False, seed: int = 0) -> dict[str, Interval]:
    """How alike the errors of two modules are.

    Args:
        data: of `collect`.
        a: a module.
        b: another.
        elsewhere: the control: pair each token's error of `a` with the error of `b` at a token of another sequence.
        seed: of the control and of the bootstrap.

    Returns:
        the statistics of `PAIR_STATISTICS`.
    """
    size = data.deviations.norm(dim=1)
    other = tokens_elsewhere(data.sequence, seed) if elsewhere else torch.arange(len(size))
    columns = pair_columns(data.errors[a], data.errors[b][other], size)
    return _statistics(columns, data.sequence, seed)


def _statistics(columns: Mapping[str, Tensor], sequence: Tensor, seed: int) -> dict[str, Interval]:
    sums = resampled(columns, sequence, seed)
    return {name: interval(statistic(sums)) for name, statistic in PAIR_STATISTICS.items()}


def tokens_elsewhere(sequence: Tensor, seed: int = 0) -> Tensor:
    """For every token the index of a random token of another sequence, [n_tokens]."""
    n, generator = len(sequence), torch.Generator().manual_seed(seed)
    found = torch.randint(n, (n,), generator=generator)
    while (same := sequence[found] == sequence).any():
        found[same] = torch.randint(n, (int(same.sum()),), generator=generator)
    return found


# ---- linear predictability

PENALTIES = tuple(10.0**power for power in range(-4, 4))
"""Ridge penalties that are tried, in units of the inputs' mean variance."""


class Prediction(NamedTuple):
    """How well a ridge regression does on sequences it has not seen."""

    r2: Interval
    penalty: float
    """The chosen one of `PENALTIES`."""


def predictability(inputs: Tensor, targets: Tensor, sequence: Tensor, seed: int = 0) -> Prediction:
    """Ridge regression of targets on inputs: fitted on half of the sequences, penalty chosen on a fifth, R^2 on the rest.

    Args:
        inputs: [n_tokens, d].
        targets: [n_tokens, d_out], or [n_tokens] for one number a token.
        sequence: [n_tokens].
        seed: of the split and of the bootstrap.

    Raises:
        UserError: there are fewer than ten sequences.
    """
    numbers = sequence.unique()
    if len(numbers) < 10:
        raise UserError(
            f"A held-out fit wants at least 10 sequences, and there are {len(numbers)}; give a longer text."
        )
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]
    fit, choose, test = (
        torch.isin(sequence, part) for part in shuffled.tensor_split([len(numbers) // 2, len(numbers) * 7 // 10])
    )
    x, y = inputs.double(), targets.double().view(len(inputs), -1)
    x_mean, y_mean = x[fit].mean(dim=0), y[fit].mean(dim=0)
    x = x - x_mean
    values, vectors = torch.linalg.eigh(x[fit].T @ x[fit])
    projected = vectors.T @ (x[fit].T @ (y[fit] - y_mean))

    def residual(penalty: float, part: Tensor) -> Tensor:
        weights = vectors @ (projected / (values.clamp_min(0) + penalty * values.mean())[:, None])
        return (y[part] - y_mean - x[part] @ weights).square().sum(dim=1)

    best = min(PENALTIES, key=lambda penalty: float(residual(penalty, choose).sum()))
    deviation = (y[test] - y[test].mean(dim=0)).square().sum(dim=1)
    sums = resampled({"residual": residual(best, test), "deviation": deviation}, sequence[test], seed)
    return Prediction(interval(1 - sums["residual"] / sums["deviation"]), best)


# ---- larger dictionary


def recovered(
    data: LayerErrors, small: str, large: str, other: str, elsewhere: bool = False, seed: int = 0
) -> dict[str, Interval]:
    """What a larger dictionary recovers of its smaller sister's error, and of another module's.

    The larger one adds r = e_small - e_large to the reconstruction.

    Args:
        data: of `collect`.
        small: a dictionary.
        large: a larger one of the same kind.
        other: the module whose error is asked about.
        elsewhere: the control: r of a token of another sequence.
        seed: of the control and of the bootstrap.

    Returns:
        `own`: 1 - sum |e_large|^2 / sum |e_small|^2, negative when the larger one is worse (not affected by
        `elsewhere`); `other`: the share of sum |e_other|^2 that adding r, times the one factor that suits best, takes
        away.
    """
    error, added = data.errors[other], data.errors[small] - data.errors[large]
    if elsewhere:
        added = added[tokens_elsewhere(data.sequence, seed)]
    energy = {name: data.errors[name].square().sum(dim=1) for name in (small, large, other)}
    columns = {"small": energy[small], "large": energy[large], "error": energy[other]}
    sums = resampled(
        columns | {"dot": (error * added).sum(dim=1), "added": added.square().sum(dim=1)}, data.sequence, seed
    )
    own, shared = (
        1 - sums["large"] / sums["small"],
        sums["dot"] ** 2 / (sums["added"] * sums["error"]).clamp_min(1e-300),
    )
    return {"own": interval(own), "other": interval(shared)}


# ---- by token


def token_classes(tokens: Tensor, positions: Tensor, tokenizer: Any) -> list[str]:
    """Class of each token [n_tokens], the first that fits: `after BOS`, `digit`, `punctuation` (or space), `word start`, `word piece`."""
    kinds = {int(token): _kind(str(tokenizer.decode([int(token)]))) for token in tokens.unique()}
    return [
        "after BOS" if position == 1 else kinds[token]
        for token, position in zip(tokens.tolist(), positions.tolist(), strict=True)
    ]


def _kind(text: str) -> str:
    if any(letter.isdigit() for letter in text):
        return "digit"
    if not any(letter.isalpha() for letter in text):
        return "punctuation"
    return "word start" if text[0].isspace() else "word piece"


def token_frequency(tokens: Tensor, text: Tensor) -> list[str]:
    """`frequent` for the most frequent tokens that make up half of a text, `rare` for the others.

    Args:
        tokens: [n_tokens].
        text: counted tokens of a (training) text, [n].
    """
    counts = torch.bincount(text.long(), minlength=int(tokens.max()) + 1)
    order = counts.argsort(descending=True, stable=True)
    half = int((counts[order].cumsum(0) < len(text) / 2).sum()) + 1
    frequent = torch.zeros(len(counts), dtype=torch.bool)
    frequent[order[:half]] = True
    return ["frequent" if known else "rare" for known in frequent[tokens.long()].tolist()]


def position_bins(positions: Tensor) -> list[str]:
    """Bin of each position, as `8-31`; the bins begin at `POSITIONS`."""
    ends = [*(begin - 1 for begin in POSITIONS[1:]), int(positions.max())]
    names = [str(begin) if begin == end else f"{begin}-{end}" for begin, end in zip(POSITIONS, ends, strict=True)]
    found = torch.bucketize(positions, torch.tensor(POSITIONS), right=True) - 1
    return [names[number] for number in found.tolist()]


def by_group(data: LayerErrors, groups: Sequence[str], a: str, b: str, seed: int = 0) -> pd.DataFrame:
    """Errors of two modules by group of tokens.

    Args:
        data: of `collect`.
        groups: one name a token.
        a: a module.
        b: another.
        seed: of the bootstrap.

    Returns:
        one row a group with at least ten tokens in two sequences or more: `group`; `tokens`, its share of tokens;
        `fvu_a` and `fvu_b`, each with `_low` and `_high`: sum |e|^2 / sum |y - mean(y)|^2 within the group; `error_a`,
        its share of a's squared error; each of `PAIR_STATISTICS` with `_low` and `_high`.
    """
    names = pd.Series(list(groups))
    deviation, total = data.deviations.square().sum(dim=1), float(data.errors[a].square().sum())
    rows = []
    for name, where in names.groupby(names, sort=False).groups.items():
        index = torch.tensor(where.to_numpy())
        if len(index) < 10 or data.sequence[index].unique().numel() < 2:
            continue
        size = deviation[index].sqrt()
        columns = pair_columns(data.errors[a][index], data.errors[b][index], size) | {"deviation": deviation[index]}
        sums = resampled(columns, data.sequence[index], seed)
        values = {"fvu_a": sums["aa"] / sums["deviation"], "fvu_b": sums["bb"] / sums["deviation"]}
        values |= {key: statistic(sums) for key, statistic in PAIR_STATISTICS.items()}
        row = {"group": name, "tokens": len(index) / len(names), "error_a": float(sums["aa"][0]) / total}
        for key, draws in values.items():
            row[key], row[f"{key}_low"], row[f"{key}_high"] = interval(draws)
        rows.append(row)
    return pd.DataFrame(rows)


# ---- the model's loss


def shared_part(error: Tensor, other: Tensor) -> Tensor:
    """The part of each token's error [..., d_model] along the other module's error there; its energy is cosine^2 of the whole."""
    scale = (error * other).sum(dim=-1, keepdim=True) / other.square().sum(dim=-1, keepdim=True).clamp_min(
        torch.finfo(other.dtype).tiny
    )
    return scale * other


Variant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

VARIANTS: dict[str, Variant] = {
    "mean output": lambda y, a, b, mean: mean.expand_as(y),
    "a": lambda y, a, b, mean: y - a,
    "b": lambda y, a, b, mean: y - b,
    "a with the shared part": lambda y, a, b, mean: y - a + shared_part(a, b),
    "a, shrunk as much": lambda y, a, b, mean: y - a * _left(a, b),
    "a without the shared part only": lambda y, a, b, mean: y - shared_part(a, b),
}
"""Name to what takes the place of the layer's output y, from the errors a and b of two modules and the mean output.

`a with the shared part` gives back what both miss; `a, shrunk as much` takes away as much squared error at every token
without asking where it points, which is the control; in `a without the shared part only` nothing but what both miss is
missing."""


def _left(a: Tensor, b: Tensor) -> Tensor:
    """|a - shared part| / |a|."""
    return (a - shared_part(a, b)).norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True).clamp_min(
        torch.finfo(a.dtype).tiny
    )


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

    Args:
        model: the language model.
        layer: which one.
        a: a module.
        b: another.
        mean: mean output, [d_model].
        sequences: text; positions that are not counted keep their output.
        batch_size: sequences at a time.

    Returns:
        variant to summed loss of each sequence in nats, [n_sequences], float64; and `counted`, the number of counted
        targets.
    """
    found: dict[str, list[Tensor]] = {}
    for tokens, mask in sequences.batches(batch_size, model.device):
        # Nothing before the layer changes, so that one pass gives what all variants start from.
        residual = model.residual(tokens, layer)
        with model.resume(layer, residual):
            x, y = model.capture(tokens, [layer])[layer]
        of_a, of_b = (y - module(module.input_from(x, y).to(module.b_O)).y.to(y) for module in (a, b))
        for variant in ("original", *VARIANTS):
            new = y if variant == "original" else VARIANTS[variant](y, of_a, of_b, mean.to(y))
            with (
                model.resume(layer, residual),
                model.splice({layer: _constantly(torch.where(mask[..., None], new, y))}),
            ):
                losses, counted = model.loss(tokens, mask)
            found.setdefault(variant, []).append((losses.double() * counted).sum(dim=1).cpu())
        found.setdefault("counted", []).append(counted.sum(dim=1).double().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _constantly(value: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: value


def loss_increases(losses: Mapping[str, Tensor], seed: int = 0) -> pd.DataFrame:
    """Loss of each variant above the original's, nats a token.

    Args:
        losses: of `replaced_losses`.
        seed: of the bootstrap.

    Returns:
        one row a variant: `variant`, `increase`, `low`, `high`, and `against_a` (with `_low`, `_high`), the variant
        less `a`.
    """
    sums = resampled(losses, torch.arange(len(losses["counted"])), seed)
    rows = []
    for name in VARIANTS:
        above, against = ((sums[name] - sums[base]) / sums["counted"] for base in ("original", "a"))
        rows.append((name, *interval(above), *interval(against)))
    return pd.DataFrame(
        rows, columns=["variant", "increase", "low", "high", "against_a", "against_a_low", "against_a_high"]
    )
