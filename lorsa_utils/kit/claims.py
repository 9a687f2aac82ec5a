"""The paper's claims beside our numbers, each with a verdict that is computed: data/paper/claims.csv.

1. A row names the claim, its source, how far our wording of it can be trusted (`TRUST`), where our number is recorded
   (`notebook/key` of results.json) and the bound that the number must meet if the claim is true of our runs.
2. Its interval is the recorded one; without one, the number alone. If all of the interval meets the bound the claim
   *holds*, if none of it does the claim *does not hold*.
3. Otherwise it is *not tested*, and the row says why: no such number can be had here, its notebook was not run in this
   profile, or the interval reaches across the bound.

data/paper/results.csv keeps the numbers of one run, from which README's table is rendered (`lorsa claims --publish`).
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lorsa_utils import store
from lorsa_utils.config import Profile, get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import notebook

ITEMS = {
    "P1": "Attention units in superposition, a toy",
    "P2": "Architecture",
    "P3": "Scaling law",
    "P4": "Reconstruction over layers",
    "P5": "Looking at heads",
    "P6": "Automated interpretability",
    "P7": "Known heads, found again",
    "P8": "Attention sinks",
    "P9": "Arithmetic",
    "P10": "Thematic anchors",
    "P11": "Subtoken induction",
    "P12": "Correspondence to MHSA heads",
    "P13": "QK is not copied",
    "P14": "Ablations",
    "P15": "QK spectra",
    "P16": "Dark matter",
    "P17": "Circuits",
    "P18": "A fully sparsified toy Transformer",
    "T1": "MHSA and Lorsa side by side",
    "T2": "Cost",
    "T3": "What could not be matched",
}
"""Our labels of figures and tables, in order."""

TRUST = {
    "S": "stated in the abstract, in reviews or in several summaries",
    "C": "read off the authors' released code",
    "D": "derived by arithmetic",
    "U": "unverified",
    "O": "our own question, not the paper's",
}
"""How far the wording of a claim can be trusted: the paper's full text was not at hand."""

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested"
COLUMNS = ("id", "claim", "source", "trust", "our number", "interval", "profile", "notebook", "verdict", "why")
"""Of the table that is shown."""

_BEGIN, _END = "<!-- claims: written by lorsa claims --publish -->", "<!-- end of claims -->"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"


class Number(NamedTuple):
    """A recorded number; without an interval `low` and `high` are None."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Claim:
    """One row of claims.csv."""

    id: str
    """One of `ITEMS`."""
    claim: str
    """In our words."""
    source: str
    """Where the paper is said to say it."""
    trust: str
    """One of `TRUST`."""
    measure: str
    """What our number is; empty when there is none."""
    at: str
    """`notebook/key`, or two of them joined by ` - `, ` + ` or ` / `; {layer}, {first} and {last} stand for layers of the profile,
    {k} for its K."""
    bound: str
    """`> 0`, `>= 0`, `< 1`, `<= 1` or `0.1 .. 0.3`; empty when no number could settle the claim here."""
    why: str
    """Why there is no number or no bound, or what the reader should know of it."""


@dataclass(frozen=True)
class Finding:
    """A claim with our number and verdict."""

    claim: Claim
    number: Number | None
    verdict: str
    why: str

    @property
    def notebook(self) -> str:
        """Where the number comes from, empty when there is none."""
        return ", ".join(dict.fromkeys(place.split("/")[0] for place in _places(self.claim.at)))


# ---- reading


def paper_dir() -> Path:
    """The folder with claims.csv and results.csv: `paper/` in the data folder, else in the checkout's."""
    own = store.data_dir() / "paper"
    return own if (own / "claims.csv").is_file() else store.CHECKOUT / "data" / "paper"


def read_claims(file: str | Path | None = None) -> list[Claim]:
    """All rows of claims.csv in the order of `ITEMS`.

    Raises:
        UserError: a row has no id, claim or source, an unknown id or trust, a bound that cannot be read, or neither a
            number nor a reason.
    """
    path = paper_dir() / "claims.csv" if file is None else Path(file)
    claims = [Claim(**row) for row in _read_csv(path, tuple(Claim.__dataclass_fields__))]
    for number, claim in enumerate(claims, start=2):
        if problem := _problem(claim):
            raise UserError(f"Line {number} of {path} {problem}; repair it.")
    return sorted(claims, key=lambda claim: [*ITEMS].index(claim.id))


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} is missing; restore it from the repository.")
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns) or any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} must have the columns {', '.join(columns)} in every line; repair it.")
    return rows


def _problem(claim: Claim) -> str | None:
    if claim.id not in ITEMS or claim.trust not in TRUST:
        return f"has the id {claim.id!r} and the trust {claim.trust!r}, of which one is unknown"
    if not claim.claim or not claim.source:
        return "has no claim or no source"
    if claim.bound and not _bound(claim.bound):
        return f"has the bound {claim.bound!r}, which is none"
    if bool(claim.at) != bool(claim.measure):
        return "must say both where its number is and what it is, or neither"
    if not (claim.at and claim.bound) and not claim.why:
        return "cannot be tested and does not say why"
    return None


def _bound(text: str) -> tuple[float, bool, float, bool] | None:
    """Lowest, whether it is allowed, highest, whether it is allowed; None when the text is no bound."""
    if match := re.fullmatch(rf"({_NUMBER}) \.\. ({_NUMBER})", text):
        return float(match[1]), True, float(match[2]), True
    if match := re.fullmatch(rf"(>=|>|<=|<) ({_NUMBER})", text):
        at, closed = float(match[2]), match[1].endswith("=")
        return (at, closed, math.inf, False) if match[1].startswith(">") else (-math.inf, False, at, closed)
    return None


def _places(at: str) -> list[str]:
    return re.split(r" [-+/] ", at) if at else []


# ---- numbers


def numbers(claims: Sequence[Claim], results: Mapping[str, Mapping[str, Any]], profile: Profile) -> dict[str, Number]:
    """What a run recorded for the claims.

    Args:
        claims: of `read_claims`.
        results: of `notebook.read_results`.
        profile: of the run.

    Returns:
        `at` of a claim to its number, where all of its parts were recorded.
    """
    found = {}
    for at in {claim.at for claim in claims if claim.at}:
        parts = [_recorded(place, results, profile) for place in _places(at)]
        if all(parts):
            found[at] = _combine([part for part in parts if part], re.findall(r" ([-+/]) ", at))
    return {at: number for at, number in found.items() if math.isfinite(number.value)}


def _recorded(place: str, results: Mapping[str, Mapping[str, Any]], profile: Profile) -> Number | None:
    """A recorded number.

    Its interval is recorded with it as {value, low, high}, or beside it as key_low and key_high.
    """
    layers = {"layer": f"{profile.layer:02d}", "first": f"{profile.layers[0]:02d}", "last": f"{profile.layers[-1]:02d}"}
    name, pattern = place.split("/", 1)
    key, values = pattern.format(k=profile.k, **layers), results.get(name, {})
    value = values.get(key)
    if isinstance(value, Mapping):
        main = [item for part, item in value.items() if part not in ("low", "high") and isinstance(item, int | float)]
        return Number(float(main[0]), value.get("low"), value.get("high")) if main else None
    return (
        Number(float(value), values.get(f"{key}_low"), values.get(f"{key}_high"))
        if isinstance(value, int | float)
        else None
    )


def _combine(parts: Sequence[Number], signs: Sequence[str]) -> Number:
    if not signs:
        return parts[0]
    total = parts[0].value
    for sign, part in zip(signs, parts[1:], strict=True):
        total = (
            total - part.value
            if sign == "-"
            else total + part.value
            if sign == "+"
            else total / part.value
            if part.value
            else math.nan
        )
    return Number(total)


def judge(number: Number, bound: str) -> str | None:
    """`HOLDS`, `FAILS`, or None when the interval reaches across the bound."""
    limits = _bound(bound)
    if limits is None:
        raise UserError(f"{bound!r} is no bound; write it as `> 0`, `<= 1` or `0.1 .. 0.3`.")
    lowest, with_lowest, highest, with_highest = limits
    ends = (number.value if number.low is None else number.low, number.value if number.high is None else number.high)
    above = [end > lowest or (with_lowest and end == lowest) for end in ends]
    below = [end < highest or (with_highest and end == highest) for end in ends]
    if all(above) and all(below):
        return HOLDS
    return FAILS if not above[1] or not below[0] else None


def findings(claims: Sequence[Claim], found: Mapping[str, Number]) -> list[Finding]:
    """Every claim with its number and verdict.

    Args:
        claims: of `read_claims`.
        found: of `numbers`.
    """
    rows = []
    for claim in claims:
        number = found.get(claim.at)
        if claim.at and number is None:
            rows.append(Finding(claim, None, UNTESTED, "not run in this profile"))
        elif number is None or not claim.bound:
            rows.append(Finding(claim, number, UNTESTED, claim.why))
        else:
            verdict = judge(number, claim.bound)
            reason = f"{'asked' if verdict else 'the interval reaches across'}: {claim.bound}"
            rows.append(Finding(claim, number, verdict or UNTESTED, "; ".join(filter(None, (reason, claim.why)))))
    return rows


# ---- tables


def table(rows: Sequence[Finding], profile: str) -> pd.DataFrame:
    """The table of all claims, every cell filled: `COLUMNS`."""
    lines = []
    for row in rows:
        claim, number = row.claim, row.number
        ours = f"{claim.measure}: {short(number.value)}" if number else "none"
        interval = (
            "none"
            if number is None
            else "one value"
            if number.low is None
            else f"{short(number.low)} to {short(number.high)}"
        )
        place = row.notebook.replace(", ", ",\n") or "none"
        about = (claim.id, claim.claim, claim.source, claim.trust)
        lines.append(
            (*about, ours, interval, profile if number else "none", place, row.verdict, row.why or "no remark")
        )
    return pd.DataFrame(lines, columns=list(COLUMNS))


def short(value: float | None) -> str:
    """A number for a table."""
    if value is None:
        return "?"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.3g}"


def count(rows: Sequence[Finding]) -> str:
    """How many claims hold, do not hold and were not tested, in a sentence."""
    verdicts = [row.verdict for row in rows]
    return (
        f"{len(rows)} statements: "
        + ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in (HOLDS, FAILS, UNTESTED))
        + "."
    )


def of_run(folder: str | Path, profile: str) -> list[Finding]:
    """All claims with the numbers of a run folder."""
    claims = read_claims()
    return findings(claims, numbers(claims, notebook.read_results(folder), get_profile(profile)))


# ---- publishing

_PUBLISHED = ("at", "value", "low", "high", "profile", "commit")


def publish(folder: str | Path, profile: str, readme: str | Path) -> list[Finding]:
    """Keep a run's numbers in results.csv and write README's table from them.

    Args:
        folder: run folder.
        profile: its profile.
        readme: the file with the two marks between which the table stands.

    Raises:
        UserError: the run recorded nothing for the claims, or the file has no such marks.
    """
    claims = read_claims()
    found = numbers(claims, notebook.read_results(folder), get_profile(profile))
    if not found:
        raise UserError(f"{folder} has no recorded numbers for the claims; run `lorsa reproduce` first.")
    place = Path(readme)
    text = place.read_text(encoding="utf-8") if place.is_file() else ""
    if _BEGIN not in text or _END not in text:
        raise UserError(
            f"{place} has no place for the table; put the lines {_BEGIN!r} and {_END!r} where it shall stand."
        )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_PUBLISHED)
    log = Path(folder) / "reproduce.json"
    runs = store.read_json(log) if log.is_file() else {}
    for at, number in sorted(found.items()):
        commit = runs.get(at.split("/")[0], {}).get("commit") or "unknown"
        writer.writerow([at, *("" if value is None else f"{value:.6g}" for value in number), profile, commit])
    store.write_text(paper_dir() / "results.csv", buffer.getvalue())
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    store.write_text(place, f"{before}{_BEGIN}\n{published_table()}\n{_END}{after}")
    return published()[0]


def published() -> tuple[list[Finding], str]:
    """All claims with the numbers of results.csv, and the profile that they are of.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = paper_dir() / "results.csv"
    lines = _read_csv(file, _PUBLISHED)
    try:
        found = {
            line["at"]: Number(
                float(line["value"]), *(float(line[key]) if line[key] else None for key in ("low", "high"))
            )
            for line in lines
        }
    except ValueError as error:
        raise UserError(f"{file} holds something that is no number ({error}); run `lorsa claims --publish`.") from error
    return findings(read_claims(), found), ", ".join(sorted({line["profile"] for line in lines})) or "none"


def published_table() -> str:
    """README's table: numbers of results.csv, as Markdown."""
    rows, profile = published()
    shown = table(rows, profile)
    shown["source"] = shown["source"] + " (" + shown["trust"] + ")"
    shown["our number"] = shown["our number"] + [f" ({each})" if " to " in each else "" for each in shown["interval"]]
    shown["notebook"] = shown["notebook"].str.replace(r"(\d\d)_\w+", r"\1", regex=True).str.replace("\n", " ")
    shown["verdict"] = "**" + shown["verdict"] + "**"
    columns = ["id", "claim", "source", "our number", "notebook", "verdict", "why"]
    lines = [columns, ["---"] * len(columns), *shown[columns].to_numpy().tolist()]
    cells = (
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
    return f"{count(rows)} Numbers are those of the {profile} profile.\n\n" + "\n".join(cells)


def as_json(rows: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON values."""
    keys = ("value", "low", "high")
    return [
        {
            **asdict(row.claim),
            **dict(zip(keys, row.number or (None,) * 3, strict=True)),
            "verdict": row.verdict,
            "why": row.why,
        }
        for row in rows
    ]
