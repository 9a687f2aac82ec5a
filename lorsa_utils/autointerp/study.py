"""Automated interpretability (paper item P6): explain units, score the explanations on text they were not made from, compare dictionaries.

Scorers, as in the field's recipe:

- detection: is the unit active anywhere in this text? (active windows of every quantile against silent ones, three
  quarters of them hard)
- fuzzing: are the marked tokens those where it is active? (each active window once, rightly or wrongly marked)
- simulation: how active is it at each token? (correlation of predicted and true activations over all tokens; Bills et
  al. 2023)

Detection and fuzzing are balanced accuracies: the mean of the shares of right answers among positives and among
negatives, so that a constant answer gets 0.5 whatever the mixture. Unreadable answers are left out and counted.

Baselines on the detection task: the explanation of a random other unit (`shuffled`), that of a unit of the same QK
group or with the most similar write direction (`relative`), and a constant answer.

Two dictionaries of one layer have different units, so their scores are compared without pairing: two-sided permutation
test of the difference of means. Beside it stand the same scores paired by rank of activation frequency (sign-flip
test), since what is rarer may be easier; and p values corrected by Holm's method over all layers and scorers of the
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lorsa_utils.autointerp import judges
from lorsa_utils.autointerp.examples import KINDS, Examples, Text, UnitExamples, Windows
from lorsa_utils.autointerp.judges import SCORERS, Explanation, Judge, OpenAIJudge
from lorsa_utils.exceptions import UserError
from lorsa_utils.stats import Interval, auc, bootstrap_mean, holm, paired_p, percentile_interval, permutation_p

ALPHA = 0.05
PAPER_OUTCOMES = {"win": 6, "loss": 3, "tie": 15}
"""Of Lorsa against the SAE, 24 comparisons (paper, Sec. 5)."""
N_SIMULATED = 10
"""Windows of a unit that activations are predicted for: half active, half random silent ones."""
MARK_SHARE = 0.7
"""A marked token has this share of its window's largest activation, at least."""
N_DRAWS = 2000


# ---- scoring


def balanced_accuracy(truth: np.ndarray, verdicts: np.ndarray, seed: int = 0) -> Interval:
    """Mean of the shares of right verdicts in both classes; NaN verdicts are left out.

    Args:
        truth: bool [n].
        verdicts: from 0 to 1, [n]; above one half means yes, exactly one half counts as half right.
        seed: of the bootstrap, which draws windows with replacement within each class.
    """
    known = ~np.isnan(verdicts)
    right = np.where(verdicts == 0.5, 0.5, (verdicts > 0.5) == truth)[known]
    classes = [right[truth[known]], right[~truth[known]]]
    if any(len(part) == 0 for part in classes):
        return Interval(math.nan)
    rng = np.random.default_rng(seed)
    draws = np.mean([rng.choice(part, (1000, len(part))).mean(axis=1) for part in classes], axis=0)
    return percentile_interval(np.mean([part.mean() for part in classes]), draws)


def verdict_auc(truth: np.ndarray, verdicts: np.ndarray) -> float:
    """How often a positive gets a higher verdict than a negative, ties half; NaN when a class is missing."""
    known = ~np.isnan(verdicts)
    yes, no = verdicts[known & truth], verdicts[known & ~truth]
    if len(yes) == 0 or len(no) == 0:
        return math.nan
    return float(auc(torch.from_numpy(yes)[:, None], torch.from_numpy(no)[:, None])[0])


def correlation(true: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's r over tokens; 0 for a constant prediction, NaN without a readable one."""
    known = ~np.isnan(predicted)
    if known.sum() < 2 or true[known].std() == 0:
        return math.nan
    return 0.0 if predicted[known].std() == 0 else float(np.corrcoef(true[known], predicted[known])[0, 1])


def fuzzing_marks(windows: Windows, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Marks for active windows: in one half, by turns over the quantiles, at the active tokens, in the other at as many silent ones.

    Returns:
        marks, bool [n, WIDTH], and whether they are right, bool [n].
    """
    right = windows.values >= MARK_SHARE * windows.values.max(axis=1, keepdims=True)
    correct = np.zeros(len(windows), dtype=bool)
    correct[np.argsort(windows.quantile, kind="stable")[::2]] = True
    marks = right.copy()
    for row in np.flatnonzero(~correct):
        silent = np.flatnonzero((windows.values[row] == 0) & (windows.tokens[row] >= 0))
        chosen = rng.permutation(silent)[: right[row].sum()]
        marks[row] = False
        marks[row, chosen] = True
    return marks, correct


def _simulated(windows: Windows, rng: np.random.Generator) -> Windows:
    active = np.flatnonzero(windows.active)
    spread = active[np.argsort(windows.quantile[active], kind="stable")][
        np.linspace(0, len(active) - 1, N_SIMULATED // 2).astype(int)
    ]
    silent = np.flatnonzero(windows.kind == "random")
    return windows[np.concatenate([spread, rng.permutation(silent)[: N_SIMULATED // 2]])]


def score_unit(
    judge: Judge,
    explanation: Explanation,
    unit: UnitExamples,
    strings: Mapping[int, str],
    scorers: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """All scores of one explanation of one unit, with what they are made of."""
    rng = np.random.default_rng([seed, unit.unit])
    windows = unit.second[rng.permutation(len(unit.second))]
    row: dict[str, Any] = {}
    if "detection" in scorers:
        verdicts = judge.detect(explanation, windows, strings)
        row |= _named("detection", balanced_accuracy(windows.active, verdicts, seed))
        strong = windows.quantile >= 0.8 * (windows.quantile.max() + 1)
        row["detection_strong"] = balanced_accuracy(
            windows.active, np.where(windows.active & ~strong, math.nan, verdicts)
        ).value
        row["detection_auc"] = verdict_auc(windows.active, verdicts)
        row |= {
            f"right_{kind}": _share((verdicts > 0.5) == windows.active, (windows.kind == kind) & ~np.isnan(verdicts))
            for kind in KINDS
        }
        row["n_windows"] = len(windows)
    if "fuzzing" in scorers:
        active = windows[windows.active]
        marks, correct = fuzzing_marks(active, rng)
        verdicts = judge.fuzz(explanation, active, marks, strings)
        row |= _named("fuzzing", balanced_accuracy(correct, verdicts, seed))
        row["fuzzing_auc"] = verdict_auc(correct, verdicts)
    if "simulation" in scorers:
        some = _simulated(windows, rng)
        predicted = judge.simulate(explanation, some, strings)
        real = some.tokens >= 0
        row["simulation"] = correlation(some.values[real], predicted[real])
    return row


def _named(scorer: str, accuracy: Interval) -> dict[str, float]:
    return {scorer: accuracy.value, f"{scorer}_low": accuracy.low, f"{scorer}_high": accuracy.high}


def _share(right: np.ndarray, among: np.ndarray) -> float:
    return float(right[among].mean()) if among.any() else math.nan


# ---- a study


def study(
    sets: Sequence[Examples],
    text: Text,
    judge: Judge,
    scorers: Sequence[str] = SCORERS,
    baselines: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Explain and score every unit.

    Args:
        sets: of `examples.examples`, one for each dictionary, all with the same budget.
        text: of the pass.
        judge: explains and scores.
        scorers: some of `SCORERS`.
        baselines: score other units' explanations by detection, too.
        seed: of the order of windows, marks and shuffles.
        progress: show bars.

    Returns:
        one row a unit: `dictionary`, `layer`, `unit`, `group`, `frequency`, `maximum`, `explanation` (None when it
        could not be read; then there are no scores), `detection` and `fuzzing` (each with `_low`, `_high`, `_auc`),
        `simulation`, `detection_strong` (active windows of the upper fifth alone), `right_<kind>` (share of right
        verdicts on each kind of window), `shuffled` and `relative` (detection), `relative_unit`, `n_windows`.

    Raises:
        UserError: more than `judges.MAX_FAILED` of the answers cannot be read, or a scorer is unknown.
    """
    check_scorers(scorers)
    rows: list[dict[str, Any]] = []
    for one in sets:
        name = f"{one.dictionary.name} {one.dictionary.layer}"
        explanations = _spread(
            judge, [_explaining(judge, unit, text.strings) for unit in one.units], f"{name} explain", progress
        )
        shuffled = _shuffle([index for index, explanation in enumerate(explanations) if explanation is not None], seed)
        tasks = [
            _scoring(judge, one, index, explanations, shuffled.get(index), text.strings, scorers, baselines, seed)
            for index in range(len(one.units))
        ]
        rows += _spread(judge, tasks, f"{name} score", progress)
    judge.tally.check(final=True)
    return pd.DataFrame(rows)


def check_scorers(scorers: Sequence[str]) -> None:
    """Refuse names of scorers that do not exist.

    Raises:
        UserError: names the first of them.
    """
    if unknown := sorted(set(scorers) - set(SCORERS)):
        raise UserError(f"Scorer {unknown[0]!r} is unknown; known are {', '.join(SCORERS)}.")


def _spread(judge: Judge, tasks: Sequence[Callable[[], Any]], title: str, progress: bool) -> list[Any]:
    """Run tasks, as many at a time as the judge likes.

    When one fails, those that run may finish, the rest are not begun.
    """
    if judge.concurrency == 1:
        return [task() for task in tqdm(tasks, desc=title, disable=not progress)]
    with ThreadPoolExecutor(judge.concurrency) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in tqdm(futures, desc=title, disable=not progress)]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _explaining(judge: Judge, unit: UnitExamples, strings: Mapping[int, str]) -> Callable[[], Explanation | None]:
    def task() -> Explanation | None:
        explanation = judge.explain(unit, strings)
        judge.tally.check()
        return explanation

    return task


def _shuffle(members: Sequence[int], seed: int) -> dict[int, int]:
    """To every member another one, each used once."""
    order = np.random.default_rng(seed).permutation(np.asarray(members, dtype=int))
    return dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True)) if len(order) > 1 else {}


def _scoring(
    judge: Judge,
    one: Examples,
    index: int,
    explanations: Sequence[Explanation | None],
    stranger: int | None,
    strings: Mapping[int, str],
    scorers: Sequence[str],
    baselines: bool,
    seed: int,
) -> Callable[[], dict[str, Any]]:
    def task() -> dict[str, Any]:
        unit, explanation, relative = one.units[index], explanations[index], one.relatives[index]
        row = {"dictionary": one.dictionary.name, "layer": one.dictionary.layer}
        row |= {"unit": unit.unit, "group": unit.group, "frequency": unit.frequency, "maximum": unit.maximum}
        row |= {
            "explanation": None if explanation is None else explanation.text,
            "relative_unit": one.units[relative].unit,
        }
        if explanation is None:
            return row
        row |= score_unit(judge, explanation, unit, strings, scorers, seed)
        others = {"shuffled": stranger, "relative": relative if relative != index else None} if baselines else {}
        for name, other in others.items():
            theirs = explanations[other] if other is not None else None
            if theirs is not None:
                row[name] = score_unit(judge, theirs, unit, strings, ("detection",), seed)["detection"]
        judge.tally.check()
        return row

    return task


def constant_answer(one: Examples) -> float:
    """Mean detection score of answering yes to everything: 0.5, by the definition of balanced accuracy."""
    scores = [balanced_accuracy(unit.second.active, np.ones(len(unit.second))).value for unit in one.units]
    return float(np.mean(scores))


# ---- cost


class Estimate(NamedTuple):
    """What a study will ask of a language model, at most: answers that are kept already are not asked for again."""

    calls: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None
    """In the currency of the prices, None without them."""

    def sentence(self) -> str:
        """For a person."""
        money = "" if self.cost is None else f", about {self.cost:.2f} at the given prices"
        return f"At most {self.calls:,} questions, {self.prompt_tokens:,} tokens to read and {self.answer_tokens:,} to write{money}."


def estimate(
    sets: Sequence[Examples],
    text: Text,
    scorers: Sequence[str] = SCORERS,
    baselines: bool = True,
    prices: tuple[float, float] | None = None,
) -> Estimate:
    """Count the questions of a chat endpoint from the examples themselves, with an explanation of 25 words; four characters a token.

    Args:
        sets: of `examples.examples`.
        text: of the pass.
        scorers: some of `SCORERS`.
        baselines: whether they are scored, too.
        prices: for a million tokens to read, and to write.
    """
    words = " ".join(["explanation"] * 25)
    calls, read, written = 0, 0, 0
    for one in sets:
        for unit in one.units:
            texts = [unit.second.marked(row, text.strings) for row in range(len(unit.second))]
            asked = [judges.explain_request(unit, text.strings)]
            kinds = {"detection": texts, "fuzzing": texts[: int(unit.second.active.sum())]}
            for kind, some in kinds.items():
                repeats = (3 if baselines and kind == "detection" else 1) * (kind in scorers)
                starts = range(0, len(some), judges.PER_CALL)
                asked += repeats * [
                    judges.verdict_request(kind, words, some[first : first + judges.PER_CALL]) for first in starts
                ]
            if "simulation" in scorers:
                n = N_SIMULATED // 2 + min(N_SIMULATED // 2, int((unit.second.kind == "random").sum()))
                asked += [
                    judges.simulation_request(words, unit.second.pieces(row, text.strings))
                    for row in range(min(n, len(texts)))
                ]
            calls += len(asked)
            read += sum(len(part) for request in asked for _, part in request.messages) // 4 + 8 * len(asked)
            written += sum(request.max_tokens for request in asked)
    cost = None if prices is None else (read * prices[0] + written * prices[1]) / 1e6
    return Estimate(calls, read, written, cost)


def confirmed(judge: Judge, expected: Estimate, confirm: Callable[[str], bool]) -> None:
    """Ask a person before the first question to an endpoint that may cost money.

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
    for (layer, name), part in scores.groupby(["layer", "dictionary"], sort=False):
        for column in columns:
            if column in part:
                values = part[column].to_numpy(dtype=float)
                mean, low, high = bootstrap_mean(values, seed)
                count = int((~np.isnan(values)).sum())
                rows.append(
                    {
                        "dictionary": name,
                        "layer": layer,
                        "score": column,
                        "n": count,
                        "mean": mean,
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows)


def compare(
    scores: pd.DataFrame, first: str = "Lorsa", second: str = "SAE", scorers: Sequence[str] = SCORERS, seed: int = 0
) -> pd.DataFrame:
    """Test `first` against `second` in every layer by every scorer.

    Args:
        scores: of `study`.
        first: dictionary whose wins are counted.
        second: the other one.
        scorers: columns to compare.
        seed: of permutations and bootstrap.

    Returns:
        one row a layer and scorer: `layer`, `scorer`, `n_first`, `n_second`, `mean_first`, `mean_second`; `difference`
        with `low` and `high` (95 % bootstrap over units); `effect` (Cohen's d) with `effect_low` and `effect_high`; `p`
        (permutation, unpaired); `outcome` (`win`, `loss` or `tie` of `first` at `ALPHA`, uncorrected) and
        `outcome_holm` (corrected over the whole table); `matched_difference` and `matched_p` (paired by rank of
        frequency); `spread` (pooled standard deviation over units).

    Raises:
        UserError: no layer has both dictionaries with two scored units or more.
    """
    rows = []
    for layer, part in scores.groupby("layer"):
        for scorer in scorers:
            sides = (
                [part[(part["dictionary"] == name) & part[scorer].notna()] for name in (first, second)]
                if scorer in part
                else []
            )
            if len(sides) == 2 and min(map(len, sides)) >= 2:
                rows.append({"layer": int(layer), "scorer": scorer} | _compared(sides[0], sides[1], scorer, seed))
    if not rows:
        raise UserError(f"No layer has scores of both {first} and {second}; study both at the same layer.")
    table = pd.DataFrame(rows)
    corrected = holm(table["p"].to_numpy(), ALPHA)
    table["outcome_holm"] = np.where(
        corrected, np.sign(table["difference"]).map({1.0: "win", -1.0: "loss", 0.0: "tie"}), "tie"
    )
    return table


def _compared(one: pd.DataFrame, other: pd.DataFrame, scorer: str, seed: int) -> dict[str, Any]:
    a, b = (side[scorer].to_numpy(dtype=float) for side in (one, other))
    rng = np.random.default_rng(seed)
    draws = [rng.choice(side, (N_DRAWS, len(side))) for side in (a, b)]
    gaps = draws[0].mean(axis=1) - draws[1].mean(axis=1)
    spreads = np.sqrt((draws[0].var(axis=1, ddof=1) + draws[1].var(axis=1, ddof=1)) / 2)
    spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    difference, p = float(a.mean() - b.mean()), permutation_p(a, b, seed)
    ranked = [side.sort_values("frequency")[scorer].to_numpy(dtype=float) for side in (one, other)]
    n = min(len(a), len(b))
    picked = [side[np.linspace(0, len(side) - 1, n).round().astype(int)] for side in ranked]
    matched = picked[0] - picked[1]
    low, high = np.quantile(gaps, [0.025, 0.975])
    effects = np.divide(gaps, spreads, out=np.zeros_like(gaps), where=spreads > 0)
    effect_low, effect_high = np.quantile(effects, [0.025, 0.975])
    return {
        **{"n_first": len(a), "n_second": len(b), "mean_first": float(a.mean()), "mean_second": float(b.mean())},
        **{"difference": difference, "low": float(low), "high": float(high)},
        **{
            "effect": difference / spread if spread > 0 else 0.0,
            "effect_low": float(effect_low),
            "effect_high": float(effect_high),
        },
        **{"p": p, "outcome": "tie" if p >= ALPHA or difference == 0 else "win" if difference > 0 else "loss"},
        **{"matched_difference": float(matched.mean()), "matched_p": paired_p(matched, seed)},
        "spread": spread,
    }


def overall(
    scores: pd.DataFrame, first: str = "Lorsa", second: str = "SAE", scorers: Sequence[str] = SCORERS, seed: int = 0
) -> pd.DataFrame:
    """Difference of `first` and `second`, averaged over the layers that have both: `scorer`, `layers`, `difference`, `low`, `high`.

    The interval is a 95 % bootstrap over units within layers: it holds for these layers, not for layers that were not
    looked at.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for scorer in (column for column in scorers if column in scores):
        draws, means = [], []
        for _, part in scores[scores[scorer].notna()].groupby("layer"):
            sides = [part.loc[part["dictionary"] == name, scorer].to_numpy(dtype=float) for name in (first, second)]
            if min(map(len, sides)) >= 2:
                drawn = [rng.choice(side, (N_DRAWS, len(side))).mean(axis=1) for side in sides]
                draws.append(drawn[0] - drawn[1])
                means.append(sides[0].mean() - sides[1].mean())
        if means:
            low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
            rows.append(
                {
                    "scorer": scorer,
                    "layers": len(means),
                    "difference": float(np.mean(means)),
                    "low": float(low),
                    "high": float(high),
                }
            )
    return pd.DataFrame(rows, columns=["scorer", "layers", "difference", "low", "high"])


def outcomes(comparison: pd.DataFrame) -> pd.DataFrame:
    """Wins, losses and ties of the first dictionary beside the paper's: rows `here`, `here, corrected`, `paper`."""
    rows = []
    for name, column in (("here", "outcome"), ("here, corrected", "outcome_holm")):
        counts = comparison[column].value_counts()
        rows.append(
            {"where": name, **{key: int(counts.get(key, 0)) for key in PAPER_OUTCOMES}, "comparisons": len(comparison)}
        )
    rows.append({"where": "paper", **PAPER_OUTCOMES, "comparisons": sum(PAPER_OUTCOMES.values())})
    return pd.DataFrame(rows)


def trend(scores: pd.DataFrame, against: str, scorers: Sequence[str] = SCORERS, seed: int = 0) -> pd.DataFrame:
    """Spearman's correlation of each score with `against` (`layer` for depth, `frequency`), with 95 % bootstrap intervals over units.

    Returns:
        columns `dictionary`, `scorer`, `n`, `rho`, `low`, `high`. Against `frequency`, scores are first taken minus
        their layer's mean.
    """
    rows = []
    for name, part in scores.groupby("dictionary", sort=False):
        for scorer in (column for column in scorers if column in part):
            known = part[part[scorer].notna()]
            y = (
                known[scorer]
                if against == "layer"
                else known[scorer] - known.groupby("layer")[scorer].transform("mean")
            )
            ranks = [np.asarray(side.rank(), dtype=float) for side in (known[against], y)]
            if len(known) < 3 or min(side.std() for side in ranks) == 0:
                continue
            picks = np.random.default_rng(seed).integers(0, len(known), (N_DRAWS, len(known)))
            draws = _rows_correlation(ranks[0][picks], ranks[1][picks])
            low, high = np.nanquantile(draws, [0.025, 0.975])
            rho = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
            rows.append(
                {
                    "dictionary": name,
                    "scorer": scorer,
                    "n": len(known),
                    "rho": rho,
                    "low": float(low),
                    "high": float(high),
                }
            )
    return pd.DataFrame(rows, columns=["dictionary", "scorer", "n", "rho", "low", "high"])


def _rows_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's r of each row of a with the same row of b; NaN where one is constant."""
    a, b = (side - side.mean(axis=1, keepdims=True) for side in (a, b))
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.full(len(a), math.nan), where=norm > 0)


def sample_size(spread: float, difference: float, power: float = 0.8) -> int:
    """Units of each dictionary that a two-sided test at `ALPHA` needs to see a difference of means.

    Args:
        spread: standard deviation of the score over units.
        difference: of the means.
        power: probability of seeing it.
    """
    if difference <= 0 or not 0 < power < 1:
        raise UserError("A sample size needs a difference above 0 and a power between 0 and 1.")
    normal = NormalDist()
    z = normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(power)
    return max(2, math.ceil(2 * (z * spread / difference) ** 2))
