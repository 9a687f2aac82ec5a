"""Automated interpretability (paper item P6): explain units, score explanations on other text, compare dictionaries.

Scorers:

- detection: is the unit active anywhere in this text? (active windows of every quantile against silent ones)
- fuzzing: are the marked tokens those where it is active? (each active window once, rightly or wrongly marked)
- simulation: how active is it at each token? (correlation with true activations; Bills et al. 2023)

Detection and fuzzing are balanced accuracies, so a constant answer gets 0.5. Baselines of detection are explanations of
other units: a random one (`shuffled`), one of the same QK group or the most similar write direction (`relative`).

Two dictionaries have different units, so scores are compared by an unpaired two-sided permutation test of the
difference of means, also with Holm's correction over the table. Since what is rarer may be easier, scores are also
paired by rank of activation frequency (sign-flip test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from typing_extensions import override

from lorsa_utils.autointerp import judges
from lorsa_utils.autointerp.examples import KINDS, Examples, UnitExamples, Windows
from lorsa_utils.autointerp.judges import SCORERS, Answers, Explanation, Judge, Request, TextJudge
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
    """Mean of the shares of right verdicts [n] in both classes of truth, bool [n].

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
    """Columns of `study`."""
    rng = np.random.default_rng([seed, unit.unit])
    windows = unit.second[rng.permutation(len(unit.second))]
    active = windows[windows.active]
    row: dict[str, Any] = {}
    if "detection" in scorers:
        verdicts = judge.verdicts(explanation, windows)
        weak = windows.active & (windows.quantile < 0.8 * (windows.quantile.max() + 1))
        row |= _columns("detection", windows.active, verdicts, seed)
        row["detection_strong"] = balanced_accuracy(windows.active, np.where(weak, math.nan, verdicts)).value
        row["detection_auc"] = verdict_auc(windows.active, verdicts)
        right = pd.Series((verdicts > 0.5) == windows.active, dtype=float).mask(np.isnan(verdicts))
        row |= right.groupby(windows.kind).mean().reindex(KINDS).add_prefix("right_").to_dict()
        row["n_windows"] = len(windows)
    if "fuzzing" in scorers:
        marks, correct = fuzzing_marks(active, rng)
        verdicts = judge.verdicts(explanation, active, marks)
        row |= _columns("fuzzing", correct, verdicts, seed)
        row["fuzzing_auc"] = verdict_auc(correct, verdicts)
    if "simulation" in scorers:
        half = N_SIMULATED // 2
        strong = judges.evenly(np.flatnonzero(windows.active)[np.argsort(active.quantile, kind="stable")], half)
        silent = rng.permutation(np.flatnonzero(windows.kind == "random"))[:half]
        simulated = windows[np.concatenate([strong, silent])]
        predicted, real = judge.simulate(explanation, simulated), simulated.tokens >= 0
        row["simulation"] = correlation(simulated.values[real], predicted[real])
    return row


def _columns(name: str, truth: np.ndarray, verdicts: np.ndarray, seed: int) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), balanced_accuracy(truth, verdicts, seed), strict=True))


# ---- a study


def study(
    sets: Sequence[Examples], judge: Judge, scorers: Sequence[str] = SCORERS, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Explain and score all units, one row each; all sets have the same budget.

    Columns `dictionary`, `layer`, `unit`, `group`, `frequency`, `maximum`, `explanation` (None when unreadable; then
    there are no scores), `detection` and `fuzzing` (each with `_low`, `_high`, `_auc`), `simulation`,
    `detection_strong` (active windows of the upper fifth alone), `right_<kind>` (share of right verdicts on each kind
    of window), `shuffled` and `relative` (detection by these baselines), `relative_unit`, `n_windows`. UserError if a
    scorer is unknown, or more than `judges.MAX_FAILED` of the answers cannot be read.
    """
    check_scorers(scorers)
    rows = [row for examples in sets for row in _rows(examples, judge, scorers, seed, progress)]
    judge.tally.check(final=True)
    return pd.DataFrame(rows)


def check_scorers(scorers: Sequence[str]) -> None:
    """UserError that names the first unknown scorer."""
    if unknown := sorted(set(scorers) - set(SCORERS)):
        raise UserError(f"Scorer {unknown[0]!r} is unknown; known are {', '.join(SCORERS)}.")


def _rows(examples: Examples, judge: Judge, scorers: Sequence[str], seed: int, progress: bool) -> list[dict[str, Any]]:
    (name, layer, _), units = examples.dictionary, examples.units
    explanations = _for_all(judge, judge.explain, units, f"{name} {layer} explain", progress)
    baselines = {"shuffled": strangers(explanations, seed), "relative": examples.relatives}

    def score(index: int) -> dict[str, Any]:
        unit, explanation, relative = units[index], explanations[index], units[examples.relatives[index]]
        row: dict[str, Any] = {"dictionary": name, "layer": layer, "unit": unit.unit, "group": unit.group}
        row |= {"frequency": unit.frequency, "maximum": unit.maximum}
        row |= {"explanation": explanation and explanation.text, "relative_unit": relative.unit}
        if explanation is not None:
            row |= score_unit(judge, explanation, unit, scorers, seed)
            for baseline, others in baselines.items():
                other = explanations[others[index]]
                if others[index] != index and other is not None:
                    row[baseline] = score_unit(judge, other, unit, ("detection",), seed)["detection"]
        return row

    return _for_all(judge, score, range(len(units)), f"{name} {layer} score", progress)


def strangers(explanations: Sequence[Explanation | None], seed: int) -> list[int]:
    """For each unit another one, each once; the unit itself where there is no explanation."""
    explained = [index for index, explanation in enumerate(explanations) if explanation is not None]
    order = np.random.default_rng(seed).permutation(np.asarray(explained, dtype=int)).tolist()
    others = dict(zip(order, order[-1:] + order[:-1], strict=True))
    return [others.get(index, index) for index in range(len(explanations))]


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


def constant_answer(examples: Examples) -> float:
    """Mean detection score of always answering yes (0.5)."""
    scores = [balanced_accuracy(unit.second.active, np.ones(len(unit.second))).value for unit in examples.units]
    return float(np.mean(scores))


# ---- cost


class _DryRun(TextJudge):
    """Collects a study's questions; every explanation is another one of 25 words."""

    def __init__(self) -> None:
        super().__init__("", Answers(None))
        self.requests: list[Request] = []

    @override
    def complete(self, requests: Sequence[Request]) -> list[str]:
        self.requests += requests
        return [f"EXPLANATION: {'explanation ' * 24}{len(self.requests)}"] * len(requests)

    @override
    def numbers(self, answer: str, n: int, highest: int) -> list[float]:
        return [0.0] * n


def estimate(
    sets: Sequence[Examples], scorers: Sequence[str] = SCORERS, prices: tuple[float, float] | None = None, seed: int = 0
) -> str:
    """What `study` asks of a chat endpoint at most, in a sentence; stored answers are not asked for again.

    `prices` are per million tokens (of four characters) to read, and to write.
    """
    judge = _DryRun()
    study(sets, judge, scorers, seed, progress=False)
    calls, texts = len(judge.requests), [text for request in judge.requests for _, text in request.messages]
    read, written = sum(map(len, texts)) // 4 + 8 * calls, sum(request.max_tokens for request in judge.requests)
    money = f", about {(read * prices[0] + written * prices[1]) / 1e6:.2f} at the given prices" if prices else ""
    return f"At most {calls:,} questions, {read:,} tokens to read and {written:,} to write{money}."


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
    frequency); `spread` (pooled standard deviation). UserError if no layer has two scored units of both.
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
        **dict(zip(("difference", "low", "high"), difference, strict=True)),
        **dict(zip(("effect", "effect_low", "effect_high"), effect, strict=True)),
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
    """Explanations of a layer's Lorsa heads, and detection scores if any; UserError if it is no table of `study`."""
    try:
        scores = pd.read_parquet(path)
        own = scores[(scores["dictionary"] == "Lorsa") & (scores["layer"] == layer) & scores["explanation"].notna()]
        rows = own.assign(detection=own.get("detection", math.nan))[["unit", "explanation", "detection"]]
        return {
            int(unit): (text, None if math.isnan(score) else float(score))
            for unit, text, score in rows.itertuples(index=False)
        }
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a table of explanations; make it with `lorsa autointerp`."
        ) from error
