"""Automated interpretability (paper item P6): explain units, score explanations on other text, compare dictionaries.

Scorers:

- detection: is the unit active anywhere in this text? (active windows of every quantile against silent ones)
- fuzzing: are the marked tokens those where it is active? (each active window once, rightly or wrongly marked)
- simulation: how active is it at each token? (correlation with true activations; Bills et al. 2023)

Detection and fuzzing are balanced accuracies, so a constant answer gets 0.5. Baselines of detection: the explanation of
a random other unit (`shuffled`) or of one of the same QK group or the most similar write direction (`relative`).

Two dictionaries have different units, so scores are compared by an unpaired two-sided permutation test of the
difference of means, also with Holm's correction over the table. Since what is rarer may be easier, scores are also
paired by rank of activation frequency (sign-flip test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lorsa_utils.autointerp import judges
from lorsa_utils.autointerp.examples import KINDS, Examples, UnitExamples, Windows
from lorsa_utils.autointerp.judges import SCORERS, Explanation, Judge, OpenAIJudge
from lorsa_utils.exceptions import UserError
from lorsa_utils.stats import Interval, auc, bootstrap_mean, holm, paired_p, percentile_interval, permutation_p

ALPHA = 0.05
PAPER_OUTCOMES = {"win": 6, "loss": 3, "tie": 15}
"""Of Lorsa against the SAE, 24 comparisons (paper, Sec. 5)."""
N_SIMULATED = 10
"""Windows per unit for simulation: half active, half random silent ones."""
MARK_SHARE = 0.7
"""A marked token's least share of its window's largest activation."""
N_DRAWS = 2000

Item = TypeVar("Item")
Result = TypeVar("Result")


# ---- scoring


def balanced_accuracy(truth: np.ndarray, verdicts: np.ndarray, seed: int = 0) -> Interval:
    """Mean of the shares of right verdicts in both classes, of truth (bool [n]) and verdicts [n] from 0 to 1.

    Verdicts above 0.5 mean yes, 0.5 is half right, NaN is left out. The bootstrap draws windows within each class.
    """
    known = ~np.isnan(verdicts)
    right = np.where(verdicts == 0.5, 0.5, (verdicts > 0.5) == truth)
    classes = [right[known & truth], right[known & ~truth]]
    if not all(map(len, classes)):
        return Interval(math.nan)
    rng = np.random.default_rng(seed)
    draws = np.mean([rng.choice(side, (1000, len(side))).mean(axis=1) for side in classes], axis=0)
    return percentile_interval(np.mean([side.mean() for side in classes]), draws)


def verdict_auc(truth: np.ndarray, verdicts: np.ndarray) -> float:
    """How often a positive gets a higher verdict than a negative, ties half; NaN when a class is missing."""
    known = ~np.isnan(verdicts)
    yes, no = (torch.from_numpy(verdicts[known & side])[:, None] for side in (truth, ~truth))
    return float(auc(yes, no)[0]) if len(yes) and len(no) else math.nan


def correlation(true: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's r over tokens; 0 for a constant prediction, NaN when undefined."""
    known = ~np.isnan(predicted)
    if known.sum() < 2 or true[known].std() == 0:
        return math.nan
    return 0.0 if predicted[known].std() == 0 else float(np.corrcoef(true[known], predicted[known])[0, 1])


def fuzzing_marks(windows: Windows, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Marks for active windows, bool [n, WIDTH], and whether they are right, bool [n].

    Every other window by quantile is marked at its active tokens, the others at as many silent ones.
    """
    marks = windows.values >= MARK_SHARE * windows.values.max(axis=1, keepdims=True)
    correct = np.zeros(len(windows), dtype=bool)
    correct[np.argsort(windows.quantile, kind="stable")[::2]] = True
    for row in np.flatnonzero(~correct):
        silent = np.flatnonzero((windows.values[row] == 0) & (windows.tokens[row] >= 0))
        chosen = rng.permutation(silent)[: marks[row].sum()]
        marks[row] = False
        marks[row, chosen] = True
    return marks, correct


def score_unit(
    judge: Judge, explanation: Explanation, unit: UnitExamples, scorers: Sequence[str], seed: int
) -> dict[str, Any]:
    """All scores of one explanation of one unit."""
    rng = np.random.default_rng([seed, unit.unit])
    windows = unit.second[rng.permutation(len(unit.second))]
    active = windows[windows.active]
    row: dict[str, Any] = {}
    if "detection" in scorers:
        verdicts = judge.verdicts(explanation, windows)
        right, known = (verdicts > 0.5) == windows.active, ~np.isnan(verdicts)
        weak = windows.active & (windows.quantile < 0.8 * (windows.quantile.max() + 1))
        row |= _columns("detection", balanced_accuracy(windows.active, verdicts, seed))
        row["detection_strong"] = balanced_accuracy(windows.active, np.where(weak, math.nan, verdicts)).value
        row["detection_auc"] = verdict_auc(windows.active, verdicts)
        for kind in KINDS:
            among = known & (windows.kind == kind)
            row[f"right_{kind}"] = float(right[among].mean()) if among.any() else math.nan
        row["n_windows"] = len(windows)
    if "fuzzing" in scorers:
        marks, correct = fuzzing_marks(active, rng)
        verdicts = judge.verdicts(explanation, active, marks)
        row |= _columns("fuzzing", balanced_accuracy(correct, verdicts, seed))
        row["fuzzing_auc"] = verdict_auc(correct, verdicts)
    if "simulation" in scorers:
        half = N_SIMULATED // 2
        strong = judges.evenly(np.flatnonzero(windows.active)[np.argsort(active.quantile, kind="stable")], half)
        silent = rng.permutation(np.flatnonzero(windows.kind == "random"))[:half]
        simulated = windows[np.concatenate([strong, silent])]
        predicted, real = judge.simulate(explanation, simulated), simulated.tokens >= 0
        row["simulation"] = correlation(simulated.values[real], predicted[real])
    return row


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


# ---- a study


class Subject(NamedTuple):
    """`baselines` are other units' explanations."""

    unit: UnitExamples
    explanation: Explanation | None
    relative_unit: int
    baselines: dict[str, Explanation | None]


def study(
    sets: Sequence[Examples],
    judge: Judge,
    scorers: Sequence[str] = SCORERS,
    baselines: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Explain and score all units, one row each; all sets have the same budget.

    Columns `dictionary`, `layer`, `unit`, `group`, `frequency`, `maximum`, `explanation` (None when unreadable; then
    there are no scores), `detection` and `fuzzing` (each with `_low`, `_high`, `_auc`), `simulation`,
    `detection_strong` (active windows of the upper fifth alone), `right_<kind>` (share of right verdicts on each kind
    of window), `shuffled` and `relative` (detection by these baselines), `relative_unit`, `n_windows`.

    Raises:
        UserError: more than `judges.MAX_FAILED` of the answers cannot be read, or a scorer is unknown.
    """
    check_scorers(scorers)
    rows: list[dict[str, Any]] = []
    for examples in sets:
        name, layer = examples.dictionary.name, examples.dictionary.layer
        explanations = _for_all(judge, judge.explain, examples.units, f"{name} {layer} explain", progress)
        subjects = _subjects(examples, explanations, baselines, seed)
        scores = _for_all(
            judge, lambda subject: _score(judge, subject, scorers, seed), subjects, f"{name} {layer} score", progress
        )
        rows += [{"dictionary": name, "layer": layer} | row for row in scores]
    judge.tally.check(final=True)
    return pd.DataFrame(rows)


def check_scorers(scorers: Sequence[str]) -> None:
    """Raise a UserError that names the first unknown scorer."""
    if unknown := sorted(set(scorers) - set(SCORERS)):
        raise UserError(f"Scorer {unknown[0]!r} is unknown; known are {', '.join(SCORERS)}.")


def _for_all(
    judge: Judge, function: Callable[[Item], Result], items: Sequence[Item], title: str, progress: bool
) -> list[Result]:
    """When one fails, the rest are not begun."""

    def checked(item: Item) -> Result:
        result = function(item)
        judge.tally.check()
        return result

    with ThreadPoolExecutor(judge.concurrency) as pool:
        results = map(checked, items) if judge.concurrency == 1 else pool.map(checked, items)
        return list(tqdm(results, title, len(items), disable=not progress))


def _subjects(
    examples: Examples, explanations: Sequence[Explanation | None], baselines: bool, seed: int
) -> list[Subject]:
    explained = [index for index, explanation in enumerate(explanations) if explanation is not None]
    order = np.random.default_rng(seed).permutation(np.asarray(explained, dtype=int)).tolist()
    stranger = dict(zip(order, order[-1:] + order[:-1], strict=True))  # everybody's explanation once, nobody's own
    subjects = []
    for index, relative in enumerate(examples.relatives):
        others = {"shuffled": stranger.get(index, index), "relative": relative} if baselines else {}
        theirs = {name: explanations[other] for name, other in others.items() if other != index}
        subjects.append(Subject(examples.units[index], explanations[index], examples.units[relative].unit, theirs))
    return subjects


def _score(judge: Judge, subject: Subject, scorers: Sequence[str], seed: int) -> dict[str, Any]:
    unit, explanation = subject.unit, subject.explanation
    row: dict[str, Any] = {"unit": unit.unit, "group": unit.group, "frequency": unit.frequency, "maximum": unit.maximum}
    row |= {"explanation": explanation and explanation.text, "relative_unit": subject.relative_unit}
    if explanation is not None:
        row |= score_unit(judge, explanation, unit, scorers, seed)
        for name, other in subject.baselines.items():
            if other is not None:
                row[name] = score_unit(judge, other, unit, ("detection",), seed)["detection"]
    return row


def constant_answer(examples: Examples) -> float:
    """Mean detection score of always answering yes (0.5)."""
    scores = [balanced_accuracy(unit.second.active, np.ones(len(unit.second))).value for unit in examples.units]
    return float(np.mean(scores))


# ---- cost


class Estimate(NamedTuple):
    """What a study asks of a language model at most: stored answers are not asked for again."""

    calls: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None
    """In the currency of the prices, None without them."""

    def sentence(self) -> str:
        """Human-readable."""
        money = "" if self.cost is None else f", about {self.cost:.2f} at the given prices"
        return (
            f"At most {self.calls:,} questions, {self.prompt_tokens:,} tokens to read "
            f"and {self.answer_tokens:,} to write{money}."
        )


def estimate(
    sets: Sequence[Examples],
    scorers: Sequence[str] = SCORERS,
    baselines: bool = True,
    prices: tuple[float, float] | None = None,
) -> Estimate:
    """Count the questions of `study`, for explanations of 25 words and four characters per token.

    `prices` are per million tokens to read, and to write.
    """
    calls = read = written = 0
    for unit in (unit for examples in sets for unit in examples.units):
        requests = _requests(unit, scorers, baselines)
        calls += len(requests)
        read += sum(len(text) for request in requests for _, text in request.messages) // 4 + 8 * len(requests)
        written += sum(request.max_tokens for request in requests)
    cost = None if prices is None else (read * prices[0] + written * prices[1]) / 1e6
    return Estimate(calls, read, written, cost)


def _requests(unit: UnitExamples, scorers: Sequence[str], baselines: bool) -> list[judges.Request]:
    words, second = " ".join(["explanation"] * 25), unit.second
    texts = [second.marked(row) for row in range(len(second))]
    requests = [judges.explain_request(unit)]
    for kind, asked, times in (
        ("detection", texts, 3 if baselines else 1),
        ("fuzzing", texts[: second.active.sum()], 1),
    ):
        if kind in scorers:
            starts = range(0, len(asked), judges.PER_CALL)
            requests += times * [
                judges.verdict_request(kind, words, asked[first : first + judges.PER_CALL]) for first in starts
            ]
    if "simulation" in scorers:
        n = N_SIMULATED // 2 + min(N_SIMULATED // 2, int((second.kind == "random").sum()))
        requests += [judges.simulation_request(words, second.pieces(row)) for row in range(min(n, len(second)))]
    return requests


def confirmed(judge: Judge, expected: Estimate, confirm: Callable[[str], bool]) -> None:
    """Ask before the first question to an endpoint that may cost money.

    Raises:
        UserError: the answer is no.
    """
    if isinstance(judge, OpenAIJudge) and not confirm(expected.sentence()):
        raise UserError("Nothing was asked; confirm the estimate, or ask for fewer units.")


# ---- statistics


def summary(
    scores: pd.DataFrame, columns: Sequence[str] = (*SCORERS, "detection_strong", "shuffled", "relative"), seed: int = 0
) -> pd.DataFrame:
    """Means over units with intervals: `dictionary`, `layer`, `score` (name), `n`, `mean`, `low`, `high`."""
    rows = []
    for (layer, name), units in scores.groupby(["layer", "dictionary"], sort=False):
        for column in (column for column in columns if column in units):
            mean, low, high = bootstrap_mean(units[column].to_numpy(dtype=float), seed, N_DRAWS)
            rows.append((name, layer, column, units[column].count(), mean, low, high))
    return pd.DataFrame(rows, columns=["dictionary", "layer", "score", "n", "mean", "low", "high"])


def compare_dictionaries(
    scores: pd.DataFrame, first: str = "Lorsa", second: str = "SAE", scorers: Sequence[str] = SCORERS, seed: int = 0
) -> pd.DataFrame:
    """Test `first` against `second` on scores of `study`, one row per layer and scorer.

    Columns `layer`, `scorer`, `n_first`, `n_second`, `mean_first`, `mean_second`; `difference` with `low`, `high` (95 %
    bootstrap over units); `effect` (Cohen's d) with `effect_low`, `effect_high`; `p`; `outcome` (`win`, `loss` or `tie`
    of `first` at `ALPHA`) and `outcome_holm` (corrected); `matched_difference` and `matched_p` (paired by rank of
    frequency); `spread` (pooled standard deviation).

    Raises:
        UserError: no layer has both dictionaries with two scored units or more.
    """
    rows = []
    for layer, units in scores.groupby("layer"):
        for scorer in (scorer for scorer in scorers if scorer in units):
            sides = [units[(units["dictionary"] == name) & units[scorer].notna()] for name in (first, second)]
            if min(map(len, sides)) >= 2:
                rows.append({"layer": int(layer), "scorer": scorer} | _comparison(sides, scorer, seed))
    if not rows:
        raise UserError(f"No layer has scores of both {first} and {second}; study both at the same layer.")
    table = pd.DataFrame(rows)
    sign = np.sign(table["difference"]).map({1.0: "win", -1.0: "loss", 0.0: "tie"})
    table["outcome"] = np.where(table["p"] < ALPHA, sign, "tie")
    table["outcome_holm"] = np.where(holm(table["p"].to_numpy(), ALPHA), sign, "tie")
    return table


def _comparison(sides: Sequence[pd.DataFrame], scorer: str, seed: int) -> dict[str, Any]:
    a, b = (side[scorer].to_numpy(dtype=float) for side in sides)
    by_frequency = [side.sort_values("frequency")[scorer].to_numpy(dtype=float) for side in sides]
    rng = np.random.default_rng(seed)
    draws = [rng.choice(side, (N_DRAWS, len(side))) for side in (a, b)]
    gaps = draws[0].mean(axis=1) - draws[1].mean(axis=1)
    spreads = np.sqrt((draws[0].var(axis=1, ddof=1) + draws[1].var(axis=1, ddof=1)) / 2)
    spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    difference = percentile_interval(a.mean() - b.mean(), gaps)
    effects = np.divide(gaps, spreads, out=np.zeros_like(gaps), where=spreads > 0)
    effect = percentile_interval(difference.value / spread if spread > 0 else 0.0, effects)
    n = min(len(a), len(b))
    matched = np.subtract(*(side[np.linspace(0, len(side) - 1, n).round().astype(int)] for side in by_frequency))
    return {
        **{"n_first": len(a), "n_second": len(b), "mean_first": float(a.mean()), "mean_second": float(b.mean())},
        **{"difference": difference.value, "low": difference.low, "high": difference.high},
        **{"effect": effect.value, "effect_low": effect.low, "effect_high": effect.high},
        "p": permutation_p(a, b, seed),
        **{"matched_difference": float(matched.mean()), "matched_p": paired_p(matched, seed)},
        "spread": spread,
    }


def outcomes(comparison: pd.DataFrame) -> pd.DataFrame:
    """Wins, losses and ties of the first dictionary: rows `here`, `here, corrected`, `paper`."""
    counts = {"here": comparison["outcome"], "here, corrected": comparison["outcome_holm"]}
    rows = [{"where": name} | {key: (side == key).sum() for key in PAPER_OUTCOMES} for name, side in counts.items()]
    table = pd.DataFrame([*rows, {"where": "paper", **PAPER_OUTCOMES}])
    return table.assign(comparisons=table[list(PAPER_OUTCOMES)].sum(axis=1))


def read_explanations(path: str | Path, layer: int) -> dict[int, tuple[str | None, float | None]]:
    """Explanations of a layer's Lorsa heads in the table of `study`, each with its detection score if any.

    Raises:
        UserError: the file is missing, or is something else.
    """
    try:
        scores = pd.read_parquet(path)
        own = scores[(scores["dictionary"] == "Lorsa") & (scores["layer"] == layer) & scores["explanation"].notna()]
        rows = own.assign(detection=own.get("detection", math.nan)).to_dict("records")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a table of explanations; make it with `lorsa autointerp`."
        ) from error
    return {
        int(row["unit"]): (row["explanation"], None if math.isnan(row["detection"]) else float(row["detection"]))
        for row in rows
    }
