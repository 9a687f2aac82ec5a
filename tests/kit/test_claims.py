"""Claims: rows that say all they must, verdicts by the stated rule, and README's table equal to what the files give."""

import csv
from pathlib import Path
from typing import Any

import pytest

from lorsa_utils import store
from lorsa_utils.config import PROFILES
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import claims, reproduce
from lorsa_utils.kit.claims import FAILS, HOLDS, UNTESTED, Claim, Number

ROOT = Path(__file__).resolve().parents[2]
HEADER = "id,claim,source,trust,measure,at,bound,why\n"


def test_every_item_has_a_claim_and_numbers_come_from_notebooks_that_are_there() -> None:
    rows = claims.read_claims()
    assert list(dict.fromkeys(row.id for row in rows)) == [*claims.ITEMS]
    assert [*claims.ITEMS] == [*(f"P{n}" for n in range(1, 19)), "T1", "T2", "T3"]
    assert len({(row.id, row.claim) for row in rows}) == len(rows)
    sources = {path.stem: path.read_text(encoding="utf-8") for path in reproduce.find_notebooks()}
    for name, key in (place.split("/", 1) for row in rows for place in claims._places(row.at)):
        assert key.split("_")[0].split("{")[0] in sources[name], f"{name} records nothing like {key}"


def test_unverified_statements_are_never_called_the_papers() -> None:
    for row in claims.read_claims():
        if row.trust == "U":
            assert "paper says" not in row.claim.lower()
            assert not row.at, "what nobody verified gets no verdict"


@pytest.mark.parametrize(
    ("bound", "verdict", "numbers"),
    [
        ("> 0.1", HOLDS, [(0.2,), (0.2, 0.15, 0.3)]),
        ("> 0.1", FAILS, [(0.1,), (0.02, -0.05, 0.1)]),
        ("> 0.1", None, [(0.2, 0.05, 0.3), (0.02, -0.05, 0.11)]),
        (">= 0.1", HOLDS, [(0.1,)]),
        ("< 4", HOLDS, [(3,)]),
        ("< 4", FAILS, [(4,)]),
        ("<= 4", HOLDS, [(4,)]),
        ("0.1 .. 0.3", HOLDS, [(0.2,), (0.3,)]),
        ("0.1 .. 0.3", FAILS, [(0.31,), (0.5, 0.4, 0.6)]),
        ("0.1 .. 0.3", None, [(0.2, 0.05, 0.25), (0.2, 0.05, 0.35)]),
        ("-0.2 .. 1e-3", HOLDS, [(-0.1,)]),
    ],
)
def test_verdicts_follow_the_rule(bound: str, verdict: str | None, numbers: list[tuple[float, ...]]) -> None:
    for number in numbers:
        assert claims.judge(Number(*number), bound) == verdict, number


def test_numbers_are_read_with_intervals_layers_and_sums() -> None:
    results = {
        "03_a": {"fvu_layer17_x": 0.4, "fvu_layer01_x": 0.1, "words": "none", "yes": True}
        | {"r": {"r": 0.9, "low": 0.8, "high": 0.95, "n": 4}},
        "04_b": {"zero": 0, "effect": 3, "effect_low": 1.5, "effect_high": 4, "ratio_k64": 1.1},
    }
    last, first = "03_a/fvu_layer{layer}_x", "03_a/fvu_layer{first}_x"
    places: dict[str, Any] = {
        "03_a/r": Number(0.9, 0.8, 0.95),
        "03_a/yes": Number(1.0),
        "04_b/effect": Number(3.0, 1.5, 4),
        "04_b/ratio_k{k}": Number(1.1),
        last: Number(0.4),
    }
    for sign, value in (("-", 0.3), ("+", 0.5), ("/", 4)):
        places[f"{last} {sign} {first}"] = Number(pytest.approx(value))  # type: ignore[arg-type]
    absent = ["03_a/words", "03_a/gone", "05_c/x", f"{last} / 04_b/zero", "03_a/r - 03_a/gone"]
    rows = [Claim("P4", at, "abstract", "S", "x", at, "> 0", "") for at in [*places, *absent]]
    assert claims.numbers(rows, results, PROFILES["laptop"]) == places


def test_findings_say_why_there_is_no_verdict() -> None:
    asked = [
        ("x", "00_a/x", "> 0", "our bar"),
        ("x", "00_a/y", "> 0", ""),
        ("x", "00_a/z", "> 0", ""),
        ("", "", "", "no GPU"),
        ("x", "00_a/x", "", "another device"),
    ]
    rows = [Claim("P1", "a claim", "abstract", "S", *row) for row in asked]
    found = claims.findings(rows, {"00_a/x": Number(1.0), "00_a/y": Number(0.1, -0.1, 0.2)})
    assert [(row.verdict, row.why) for row in found] == [
        (HOLDS, "asked: > 0; our bar"),
        (UNTESTED, "the interval reaches across: > 0"),
        (UNTESTED, "not run in this profile"),
        (UNTESTED, "no GPU"),
        (UNTESTED, "another device"),
    ]
    table = claims.table(found, "smoke")
    assert tuple(table.columns) == claims.COLUMNS
    assert (table != "").all().all(), "no empty cell"
    assert list(table["interval"]) == ["one value", "-0.1 to 0.2", "none", "none", "one value"]
    assert claims.count(found) == "5 statements: holds 1, does not hold 0, not tested 4."
    assert claims.as_json(found)[1]["high"] == 0.2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("P19,a claim,abstract,S,,,,why", "the id 'P19'"),
        ("P1,a claim,abstract,X,,,,why", "the trust 'X'"),
        ("P1,,abstract,S,,,,why", "no claim or no source"),
        ("P1,a claim,abstract,S,,,,", "does not say why"),
        ("P1,a claim,abstract,S,x,00_a/x,,", "does not say why"),
        ("P1,a claim,abstract,S,,00_a/x,> 0,", "must say both"),
        ("P1,a claim,abstract,S,x,00_a/x,more than 0,", "which is none"),
        ("P1,a claim,abstract,S,x,00_a/x,__import__('os'),", "which is none"),
        ("P1,a claim", "must have the columns"),
    ],
)
def test_half_rows_are_refused(tmp_path: Path, line: str, problem: str) -> None:
    store.write_text(tmp_path / "data" / "paper" / "claims.csv", HEADER + line + "\n")
    with pytest.raises(UserError, match=problem):
        claims.read_claims()
    with pytest.raises(UserError, match=r"results.csv is missing"):
        claims.published()


def test_publishing_writes_numbers_and_table_and_nothing_else(tmp_path: Path) -> None:
    rows = "P4,FVU | size,abstract,S,FVU,03_a/fvu,< 0.3,\nP9,sums,Sec. 6,S,,,,no GPU\n"
    store.write_text(tmp_path / "data" / "paper" / "claims.csv", HEADER + rows)
    readme, folder = tmp_path / "README.md", tmp_path / "run"
    store.write_text(readme, f"before\n{claims._BEGIN}\nyesterday\n{claims._END}\nafter\n")
    with pytest.raises(UserError, match="run `lorsa reproduce` first"):
        claims.publish(folder, "smoke", readme)
    store.write_json(folder / "results.json", {"03_a": {"fvu": {"value": 0.25, "low": 0.2, "high": 0.27}}})
    found = claims.publish(folder, "smoke", readme)
    assert [row.verdict for row in found] == [HOLDS, UNTESTED]
    text = readme.read_text(encoding="utf-8")
    assert (text.split(claims._BEGIN)[0], text.split(claims._END)[1]) == ("before\n", "\nafter\n")
    assert "yesterday" not in text
    assert "| P4 | FVU \\| size | abstract (S) | FVU: 0.25 (0.2 to 0.27) | 03 | **holds** | asked: < 0.3 |" in text
    assert claims.publish(folder, "smoke", readme) == found
    assert readme.read_text(encoding="utf-8") == text
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(UserError, match="has no place for the table"):
        claims.publish(folder, "smoke", readme)


def test_readme_shows_what_the_files_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORSA_DATA", str(ROOT / "data"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split(claims._BEGIN)[1].split(claims._END)[0].strip()
    assert shown == claims.published_table(), "run `lorsa claims --publish` after `make reproduce`"
    assert "| |" not in shown
    with open(ROOT / "data" / "paper" / "results.csv", encoding="utf-8") as handle:
        known = {row["at"] for row in csv.DictReader(handle)}
    assert known <= {row.at for row in claims.read_claims()}, "numbers that no claim asks for; publish again"
