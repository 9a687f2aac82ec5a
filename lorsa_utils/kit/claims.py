"""The paper's claims beside our numbers, each with a computed verdict: data/paper/claims.csv.

1. A row holds a claim, its source, how far our wording can be trusted (`TRUST`), where our number is recorded
   (`notebook/key` of results.json) and the bound that it meets if the claim is true of our runs.
2. If all of the interval (or, without one, the number) meets the bound, the claim *holds*; if none, it *does not hold*.
3. Otherwise it is *not tested*: no such number can be had here, its notebook was not run in this profile, or the
   interval crosses the bound. The row says which.

data/paper/results.csv keeps one run's numbers, from which README's table is rendered (`lorsa claims --publish`).
"""

from __future__ import annotations

import csv
import operator
import re
from collections.abc import Callable, Mapping, Sequence
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
"""How far the wording of a claim can be trusted; the paper's full text was not at hand."""

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not tested"
COLUMNS = ("id", "claim", "source", "trust", "our number", "interval", "profile", "notebook", "verdict", "why")

_BEGIN, _END = "<!-- claims: written by lorsa claims --publish -->", "<!-- end of claims -->"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "/": operator.truediv}


class Number(NamedTuple):
    """A recorded number; `low` and `high` are None without an interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Claim:
    """One row of claims.csv."""

    id: str
    """One of `ITEMS`."""
    claim: str
    source: str
    trust: str
    """One of `TRUST`."""
    measure: str
    """What our number is; empty without one."""
    at: str
    """`notebook/key`, or two joined by ` - `, ` + ` or ` / `; {layer}, {first}, {last} and {k} are the profile's."""
    bound: str
    """`> 0`, `>= 0`, `< 1`, `<= 1` or `0.1 .. 0.3`; empty when no number could settle the claim here."""
    why: str
    """Why there is no number or bound, or what else to know about it."""


class Finding(NamedTuple):
    """A claim with our number and verdict."""

    claim: Claim
    number: Number | None
    verdict: str
    why: str


# ---- reading


def paper_dir() -> Path:
    """Folder of claims.csv and results.csv: `paper/` in the data folder, else in the checkout's."""
    own = store.data_dir() / "paper"
    return own if (own / "claims.csv").is_file() else store.CHECKOUT / "data" / "paper"


def read_claims() -> list[Claim]:
    """All rows of claims.csv in the order of `ITEMS`.

    Raises:
        UserError: a row lacks id, claim or source, has an unknown id or trust or an unreadable bound, or has neither a
            number nor a reason.
    """
    path = paper_dir() / "claims.csv"
    claims = [Claim(**row) for row in _read_csv(path, tuple(Claim.__dataclass_fields__))]
    for number, claim in enumerate(claims, start=2):
        if problem := _problem(claim):
            raise UserError(f"Line {number} of {path} {problem}; repair it.")
    return sorted(claims, key=lambda claim: [*ITEMS].index(claim.id))


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} is missing; restore it from the repository.")
    with open(path, encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns) or any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} must have the columns {', '.join(columns)} in every line; repair it.")
    return rows


def _problem(claim: Claim) -> str | None:
    if claim.id not in ITEMS or claim.trust not in TRUST:
        return f"has the id {claim.id!r} and the trust {claim.trust!r}, of which one is unknown"
    if not claim.claim or not claim.source:
        return "has no claim or no source"
    if claim.bound and not _conditions(claim.bound):
        return f"has the bound {claim.bound!r}, which is none"
    if bool(claim.at) != bool(claim.measure):
        return "must say both where its number is and what it is, or neither"
    if not (claim.at and claim.bound) and not claim.why:
        return "cannot be tested and does not say why"
    return None


def _conditions(bound: str) -> list[tuple[Callable[[float, float], bool], float]]:
    if match := re.fullmatch(rf"({_NUMBER}) \.\. ({_NUMBER})", bound):
        return [(operator.ge, float(match[1])), (operator.le, float(match[2]))]
    if match := re.fullmatch(rf"(>=|>|<=|<) ({_NUMBER})", bound):
        return [(_COMPARISONS[match[1]], float(match[2]))]
    return []


def _places(at: str) -> list[str]:
    return re.split(r" [-+/] ", at) if at else []


# ---- numbers


def numbers(claims: Sequence[Claim], results: Mapping[str, Mapping[str, Any]], profile: Profile) -> dict[str, Number]:
    """`at` of a claim to its number in `results` (`notebook.read_results`), where all parts were recorded."""
    recorded = {at: _number(at, results, profile) for at in {claim.at for claim in claims} if at}
    return {at: number for at, number in recorded.items() if number is not None}


def _number(at: str, results: Mapping[str, Mapping[str, Any]], profile: Profile) -> Number | None:
    """A recorded number; a sum, difference or ratio has no interval."""
    first, *rest = re.split(r" ([-+/]) ", at)
    number = _recorded(first, results, profile)
    for sign, place in zip(rest[::2], rest[1::2], strict=True):
        other = _recorded(place, results, profile)
        if number is None or other is None or (sign == "/" and not other.value):
            return None
        number = Number(_ARITHMETIC[sign](number.value, other.value))
    return number


def _recorded(place: str, results: Mapping[str, Mapping[str, Any]], profile: Profile) -> Number | None:
    """A recorded number, with its interval from {value, low, high} or from key_low and key_high beside it."""
    layers = {"layer": f"{profile.layer:02d}", "first": f"{profile.layers[0]:02d}", "last": f"{profile.layers[-1]:02d}"}
    name, pattern = place.split("/", 1)
    key, values = pattern.format(k=profile.k, **layers), results.get(name, {})
    value, low, high = values.get(key), values.get(f"{key}_low"), values.get(f"{key}_high")
    if isinstance(value, Mapping):
        low, high = value.get("low"), value.get("high")
        rest = (item for part, item in value.items() if part not in ("low", "high"))
        value = next((item for item in rest if isinstance(item, int | float)), None)
    return Number(float(value), low, high) if isinstance(value, int | float) else None


def judge(number: Number, bound: str) -> str | None:
    """`HOLDS`, `FAILS`, or None when the interval crosses the bound."""
    ends = [number.value if end is None else end for end in (number.low, number.high)]
    passed = [[compare(end, limit) for end in ends] for compare, limit in _conditions(bound)]
    if all(all(both) for both in passed):
        return HOLDS
    return None if all(any(both) for both in passed) else FAILS


def findings(claims: Sequence[Claim], recorded: Mapping[str, Number]) -> list[Finding]:
    """Every claim with its number and verdict."""
    rows = []
    for claim in claims:
        number = recorded.get(claim.at)
        if claim.at and number is None:
            rows.append(Finding(claim, None, UNTESTED, "not run in this profile"))
        elif number is None or not claim.bound:
            rows.append(Finding(claim, number, UNTESTED, claim.why))
        else:
            verdict = judge(number, claim.bound)
            reason = f"{'asked' if verdict else 'the interval reaches across'}: {claim.bound}"
            rows.append(Finding(claim, number, verdict or UNTESTED, "; ".join(filter(None, (reason, claim.why)))))
    return rows


def of_run(folder: str | Path, profile: str) -> list[Finding]:
    """All claims with a run's numbers."""
    claims = read_claims()
    return findings(claims, numbers(claims, notebook.read_results(folder), get_profile(profile)))


# ---- tables


def table(rows: Sequence[Finding], profile: str) -> pd.DataFrame:
    """All claims, every cell filled."""
    lines = []
    for claim, number, verdict, why in rows:
        ours = interval = "none"
        if number:
            ours = f"{claim.measure}: {short(number.value)}"
            interval = "one value" if number.low is None else f"{short(number.low)} to {short(number.high)}"
        places = ",\n".join(dict.fromkeys(place.split("/")[0] for place in _places(claim.at))) or "none"
        about = (claim.id, claim.claim, claim.source, claim.trust, ours, interval, profile if number else "none")
        lines.append((*about, places, verdict, why or "no remark"))
    return pd.DataFrame(lines, columns=list(COLUMNS))


def short(value: float | None) -> str:
    """A number for a table."""
    if value is None:
        return "?"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.3g}"


def count(rows: Sequence[Finding]) -> str:
    """How many claims hold, do not hold and were not tested."""
    verdicts = [row.verdict for row in rows]
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in (HOLDS, FAILS, UNTESTED))
    return f"{len(rows)} statements: {counts}."


def as_json(rows: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON values."""
    nothing = dict.fromkeys(Number._fields)
    return [
        asdict(row.claim) | (row.number._asdict() if row.number else nothing) | {"verdict": row.verdict, "why": row.why}
        for row in rows
    ]


# ---- publishing

_PUBLISHED = ("at", "value", "low", "high", "profile", "commit")


def publish(folder: str | Path, profile: str, readme: str | Path) -> list[Finding]:
    """Keep a run's numbers in results.csv and write README's table from them, between its two marks.

    Raises:
        UserError: the run recorded nothing for the claims, or the file has no such marks.
    """
    recorded = numbers(read_claims(), notebook.read_results(folder), get_profile(profile))
    if not recorded:
        raise UserError(f"{folder} has no recorded numbers for the claims; run `lorsa reproduce` first.")
    place = Path(readme)
    text = place.read_text(encoding="utf-8") if place.is_file() else ""
    if _BEGIN not in text or _END not in text:
        raise UserError(
            f"{place} has no place for the table; put the lines {_BEGIN!r} and {_END!r} where it shall stand."
        )
    runs = notebook.read_object(Path(folder) / "reproduce.json")
    lines = [
        (at, *number, profile, runs.get(at.split("/")[0], {}).get("commit") or "unknown")
        for at, number in sorted(recorded.items())
    ]
    frame = pd.DataFrame(lines, columns=list(_PUBLISHED)).astype(dict.fromkeys(Number._fields, float))
    store.write_text(paper_dir() / "results.csv", frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    store.write_text(place, f"{before}{_BEGIN}\n{published_table()}\n{_END}{after}")
    return published()[0]


def published() -> tuple[list[Finding], str]:
    """All claims with the numbers of results.csv, and their profile.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = paper_dir() / "results.csv"
    lines = _read_csv(file, _PUBLISHED)
    try:
        recorded = {
            line["at"]: Number(
                float(line["value"]), *(float(line[key]) if line[key] else None for key in ("low", "high"))
            )
            for line in lines
        }
    except ValueError as error:
        raise UserError(f"{file} holds something that is no number ({error}); run `lorsa claims --publish`.") from error
    return findings(read_claims(), recorded), ", ".join(sorted({line["profile"] for line in lines})) or "none"


def published_table() -> str:
    """README's table as Markdown, from results.csv."""
    rows, profile = published()
    shown = table(rows, profile)
    shown["source"] += " (" + shown["trust"] + ")"
    shown["our number"] += [f" ({interval})" if " to " in interval else "" for interval in shown["interval"]]
    shown["notebook"] = shown["notebook"].str.replace(r"(\d\d)_\w+", r"\1", regex=True)
    shown["verdict"] = "**" + shown["verdict"] + "**"
    columns = ["id", "claim", "source", "our number", "notebook", "verdict", "why"]
    lines = [columns, ["---"] * len(columns), *shown[columns].to_numpy().tolist()]
    cells = ("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
    return f"{count(rows)} Numbers are those of the {profile} profile.\n\n" + "\n".join(cells)
