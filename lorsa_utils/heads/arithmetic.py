"""What units say about operands: activations at `=` over the operand grid, read as simple rules (paper item P9).

A rule says where a unit is active: op1, op2 or the result in a range or, modulo m, in a set of residues (m = 10: the
last digit), or whether the last digits carry. It predicts two levels,

    z(op1, op2) = base + height * [variable in values]

The best range and residues are found exactly on a random half of the grid's cells. What counts is the variance
explained on the other half, compared with a smooth null: a cubic polynomial in op1 and op2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.prompts import OPERATORS, Vocabulary, pad
from lorsa_utils.lorsa import SparseModule
from lorsa_utils.models import LanguageModel

MODULI = tuple(range(2, 11))
LEAST_ACTIVE = 0.02
LEAST_EXPLAINED = 0.5
"""A rule is named when it explains more of the held-out variance than this share and than the smooth null."""


class ArithmeticGrid(NamedTuple):
    """One prompt per pair of operands, ordered by the first, then the second."""

    operator: str
    tokens: Tensor
    """[n, length] int64, right-padded."""
    low: int
    equals: Tensor
    """[n], position of `=`."""
    answer: Tensor
    """[n], first token of the answer (not part of the prompt)."""


def arithmetic_grid(vocabulary: Vocabulary, operator: str = "+", low: int = 0, high: int = 99) -> ArithmeticGrid:
    """`a+b=` for all operands from `low` to `high`.

    Raises:
        UserError: unknown operator, an impossible range, or a tokenizer that merges `=`.
    """
    if operator not in OPERATORS:
        raise UserError(f"Operator {operator!r} is not one of {', '.join(OPERATORS)}.")
    if not 0 <= low < high:
        raise UserError(f"Operands must run from 0 or more upwards, not from {low} to {high}.")
    operands = torch.cartesian_prod(torch.arange(low, high + 1), torch.arange(low, high + 1))
    rows = [vocabulary.start + vocabulary.encode(f"{a}{operator}{b}=") for a, b in operands.tolist()]
    if vocabulary.texts.get(rows[0][-1], "")[-1:] != "=":
        raise UserError("Arithmetic needs a tokenizer in which prompts end in '='; this one merges it.")
    answers = [vocabulary.encode(str(OPERATORS[operator](a, b)))[0] for a, b in operands.tolist()]
    ends = torch.tensor([len(row) - 1 for row in rows])
    return ArithmeticGrid(operator, pad(rows), low, ends, torch.tensor(answers))


class Activations(NamedTuple):
    """Units over the operand grid."""

    z: Tensor
    """[n_units, n, n], activation at `=`; rows are op1, columns op2."""
    operator: str = "+"
    low: int = 0
    """Smallest operand; the largest is low + n - 1."""
    correct: Tensor | None = None
    """[n, n] bool, whether the model's first answer token is right; None if it was not asked."""


@torch.no_grad()
def grid_activations(
    model: LanguageModel,
    layer: int,
    module: SparseModule,
    grid: ArithmeticGrid,
    answers: bool = False,
    batch_size: int = 64,
    progress: bool = True,
) -> Activations:
    """Activations of every unit at `=`; with `answers` also where the whole model answers correctly."""
    n = round(len(grid.tokens) ** 0.5)
    z, correct = torch.zeros(len(grid.tokens), module.n_units), torch.zeros(len(grid.tokens), dtype=torch.bool)
    for rows in tqdm(torch.arange(len(grid.tokens)).split(batch_size), desc=f"a{grid.operator}b", disable=not progress):
        tokens, ends = grid.tokens[rows], grid.equals[rows].to(model.device)
        x, y = (side.float() for side in model.capture(tokens, [layer])[layer])
        indices, values = module.encode(module.input_from(x, y))
        place = torch.arange(len(rows), device=x.device)
        z[rows] = z[rows].scatter(1, indices[place, ends].cpu(), values[place, ends].cpu())
        if answers:
            said = model.logits(tokens[:, : int(ends.max()) + 1])[place, ends].argmax(dim=1)
            correct[rows] = said.cpu() == grid.answer[rows]
    return Activations(z.T.reshape(-1, n, n), grid.operator, grid.low, correct.view(n, n) if answers else None)


# ---- rules


@dataclass(frozen=True)
class Rule:
    """Values of one variable for which a unit is active."""

    variable: str
    """`op1`, `op2`, `result` or `carry`."""
    modulus: int
    """`values` are residues modulo this; 0 when they are plain values."""
    values: tuple[int, ...]
    """For `carry`, 1 (carry) or 0 (no carry)."""

    def __str__(self) -> str:
        if self.variable == "carry":
            return "carry" if self.values == (1,) else "no carry"
        if self.modulus:
            return f"{self.variable} % {self.modulus} in {{{', '.join(map(str, self.values))}}}"
        return f"{self.variable} in {self.values[0]}..{self.values[-1]}"

    def holds(self, op1: np.ndarray, op2: np.ndarray, operator: str) -> np.ndarray:
        """Where the rule holds, for operands of equal shape."""
        value = variables(op1, op2, operator)[self.variable]
        return np.isin(value % self.modulus if self.modulus else value, self.values)


class Fit(NamedTuple):
    """A rule fitted to one unit; `base` and `height` as in the module docstring."""

    rule: Rule
    explained: float
    """Share of variance, on held-out cells."""
    smooth: float
    """That of the smooth null."""
    base: float
    height: float


def variables(op1: np.ndarray, op2: np.ndarray, operator: str) -> dict[str, np.ndarray]:
    """Both operands, the result and, for sums and differences, whether the last digits carry (borrow)."""
    values = {"op1": op1, "op2": op2, "result": np.asarray(OPERATORS[operator](op1, op2))}
    if operator == "+":
        values["carry"] = (op1 % 10 + op2 % 10 >= 10).astype(int)
    if operator == "-":
        values["carry"] = (op1 % 10 < op2 % 10).astype(int)
    return values


def best_rule(z: np.ndarray, operator: str = "+", low: int = 0) -> Fit | None:
    """The rule that explains most of one unit, of equally good ones the simplest; None if it is constant on a half.

    z [n, n] is over operands from `low` on.
    """
    cells = _Cells(z, operator, low)
    if any(np.ptp(cells.z[half]) == 0 for half in (cells.fitted, ~cells.fitted)):
        return None
    scaled = [(cells.variables[name] - low) / max(1, len(z) - 1) for name in ("op1", "op2")]
    design = np.stack([scaled[0] ** i * scaled[1] ** j for i in range(4) for j in range(4 - i)], axis=1)
    weights, *_ = np.linalg.lstsq(design[cells.fitted], cells.z[cells.fitted], rcond=None)
    smooth = cells.explained(design @ weights)
    kinds = [(name, modulus) for name in cells.variables for modulus in ((0,) if name == "carry" else (0, *MODULI))]
    # Rules within a thousandth count as equal.
    return max(
        (cells.fit(*kind, smooth) for kind in kinds), key=lambda fit: (round(fit.explained, 3), -fit.rule.modulus)
    )


class _Cells:
    """One unit's grid, flattened; rules are fitted on half of the cells."""

    def __init__(self, z: np.ndarray, operator: str, low: int) -> None:
        op1, op2 = (side.ravel() + low for side in np.indices(z.shape))
        self.z, self.variables = np.asarray(z, dtype=float).ravel(), variables(op1, op2, operator)
        self.fitted = np.zeros(z.size, dtype=bool)
        self.fitted[np.random.default_rng(0).permutation(z.size)[: z.size // 2]] = True

    def explained(self, predicted: np.ndarray) -> float:
        """1 - squared error / squared deviation from the mean, on held-out cells."""
        z = self.z[~self.fitted]
        return float(1 - np.square(z - predicted[~self.fitted]).sum() / np.square(z - z.mean()).sum())

    def fit(self, name: str, modulus: int, smooth: float) -> Fit:
        value = self.variables[name] % modulus if modulus else self.variables[name]
        labels, place = np.unique(value, return_inverse=True)
        counts = np.bincount(place[self.fitted], minlength=len(labels)).astype(float)
        sums = np.bincount(place[self.fitted], self.z[self.fitted], minlength=len(labels))
        best = _best_residues if modulus or name == "carry" else _best_range
        chosen = best(counts, sums)
        holds = chosen[place]
        sides = (self.z[self.fitted & side] for side in (~holds, holds))
        base, top = (float(side.mean()) if len(side) else 0.0 for side in sides)
        rule = Rule(name, modulus, tuple(int(label) for label in labels[chosen]))
        return Fit(rule, self.explained(np.where(holds, top, base)), smooth, base, top - base)


def _between(counts: np.ndarray, sums: np.ndarray, inside_counts: np.ndarray, inside_sums: np.ndarray) -> np.ndarray:
    """Variance between inside and outside, up to a constant; -1 where inside is not higher."""
    outside_counts, outside_sums = counts.sum() - inside_counts, sums.sum() - inside_sums
    with np.errstate(divide="ignore", invalid="ignore"):
        means = inside_sums / inside_counts, outside_sums / outside_counts
        gain = inside_counts * outside_counts * (means[0] - means[1]) ** 2
    return np.where((inside_counts > 0) & (outside_counts > 0) & (means[0] > means[1]), gain, -1.0)


def _best_range(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The interval of values that explains most variance."""
    totals = [np.concatenate([[0.0], side.cumsum()]) for side in (counts, sums)]
    inside = [side[None, :] - side[:, None] for side in totals]
    first, last = np.unravel_index(np.argmax(_between(counts, sums, *inside)), inside[0].shape)
    values = np.arange(len(counts))
    return (values >= first) & (values < last)


def _best_residues(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The best set of residues: for two levels, it is a cut of the residues ordered by mean."""
    order = np.argsort(-(sums / np.maximum(counts, 1)), kind="stable")
    n = int(np.argmax(_between(counts, sums, counts[order].cumsum(), sums[order].cumsum()))) + 1
    return np.isin(np.arange(len(counts)), order[:n])


def rule_table(grid: Activations) -> pd.DataFrame:
    """The best rule of all units that are active on at least `LEAST_ACTIVE` of the cells.

    Columns: `unit`, `rule` (text), the fields of `Rule` and `Fit`, `active` (share of cells) and `named` (see
    `LEAST_EXPLAINED`), the best explained first.
    """
    active = (grid.z > 0).float().mean(dim=(1, 2))
    rows = []
    for unit in (active >= LEAST_ACTIVE).nonzero()[:, 0].tolist():
        if fit := best_rule(grid.z[unit].numpy(), grid.operator, grid.low):
            rule, *numbers = fit
            named = fit.explained > max(LEAST_EXPLAINED, fit.smooth)
            text = (unit, str(rule), rule.variable, rule.modulus, list(rule.values))
            rows.append((*text, *numbers, float(active[unit]), named))
    names = "unit rule variable modulus values explained smooth base height active named"
    return pd.DataFrame(rows, columns=names.split()).sort_values("explained", ascending=False, ignore_index=True)
