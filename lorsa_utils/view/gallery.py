"""`index.html` of a run folder: the paper's claims with our numbers and verdicts, every figure, pages of heads, every recorded value.

It opens from the disk, offline: pictures and pages lie beside it, and it asks nobody for anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from lorsa_utils import store
from lorsa_utils.config import get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import notebook
from lorsa_utils.kit.claims import COLUMNS, FAILS, HOLDS, ITEMS, TRUST, Finding, count, of_run, table
from lorsa_utils.view.pages import PAGES_FILE, document, text

OTHER = "more"
"""Where figures are shown whose label names no item of the paper."""


def write_index(folder: str | Path, profile: str) -> Path:
    """Write `index.html` for a run folder.

    Args:
        folder: of the run.
        profile: its profile.

    Returns:
        the page.

    Raises:
        UserError: a figure's record or the claims are damaged, or the folder cannot be written.
    """
    path = Path(folder)
    profile = notebook.profile_of_run(path, profile)
    results, records, rows = notebook.read_results(path), figure_records(path), of_run(path, profile)
    names = sorted({*results, *(record["notebook"] for record in records)})
    parts = [
        _opening(path, profile),
        _contents(records),
        _claims(rows, profile, {item_of(record) for record in records}),
        *_plates(path, records, rows),
        _heads(path),
    ]
    parts += [_notebook(path, name, results.get(name, {}), profile) for name in names]
    facts = " · ".join(f"{key} {value}" for key, value in notebook.provenance().items())
    main = f"<header><h1>Lorsa <small>results of the {text(profile)} profile</small></h1></header><main>{''.join(parts)}</main>"
    frames = "default-src 'none'; frame-src 'self' file:"
    store.write_text(
        path / "index.html",
        document(f"Lorsa, {profile} profile", f"{main}<footer>{text(facts)}</footer>", policy=frames),
    )
    return path / "index.html"


def figure_records(folder: Path) -> list[dict[str, Any]]:
    """What was noted about each figure of a run whose files are there, by paper item, notebook and label.

    Raises:
        UserError: a record is damaged.
    """
    records = []
    for file in (folder / "figures").glob("*.json"):
        record = store.read_json(file)
        if not isinstance(record, dict) or not {"label", "notebook", "caption", "profile"} <= set(record):
            raise UserError(f"{file} is no record of a figure; delete it and run its notebook again.")
        if file.with_suffix(".html").is_file():
            records.append(record)
    return sorted(records, key=lambda record: (_order(item_of(record)), record["notebook"], record["label"]))


def item_of(record: Mapping[str, Any]) -> str:
    """The paper item that a figure's label begins with."""
    found = re.match(r"([PT]\d+)(?![0-9])", record["label"])
    return found[1] if found and found[1] in ITEMS else OTHER


def _order(item: str) -> int:
    return [*ITEMS, OTHER].index(item)


# ---- parts


def _opening(folder: Path, profile: str) -> str:
    banners = "".join(f'<p class="banner" role="alert">{text(sentence)}</p>' for sentence in notebook.banners(folder))
    if not get_profile(profile).is_scaled_down:
        return banners
    return (
        banners
        + '<p class="lead">Models, data and budgets are scaled down; numbers are not those of the paper\'s setting.</p>'
    )


def _contents(records: Sequence[Mapping[str, Any]]) -> str:
    """All items of the paper, and how many figures each has here."""
    counts = {item: sum(item_of(record) == item for record in records) for item in ITEMS}
    made = [f'<a href="#{item}">{item} {text(ITEMS[item])}</a> ({n})' for item, n in counts.items() if n]
    missing = [f"{item} {text(ITEMS[item])}" for item, n in counts.items() if not n]
    parts = [f"<p><b>Figures</b>: {' · '.join(made) or 'none yet'}</p>"]
    if missing:
        parts.append(
            f'<details class="soft"><summary>{len(missing)} items without a figure in this run</summary>{" · ".join(missing)}</details>'
        )
    return "".join(parts)


def _claims(rows: Sequence[Finding], profile: str, shown: Set[str]) -> str:
    """The table of all claims, with links to the items that are shown; on a narrow screen each row becomes a card (templates/page.css)."""
    words = {HOLDS: "PASS", FAILS: "FAIL"}
    lines = []
    for cells in table(rows, profile).to_dict("records"):
        kinds = {"verdict": words.get(cells["verdict"], "soft"), "claim": "what"}
        inside = {column: text(cells[column]).replace("_", "_<wbr>") for column in COLUMNS}
        if cells["id"] in shown:
            inside["id"] = _link(f"#{cells['id']}", cells["id"])
        row = "".join(
            f'<td data-label="{column}" class="{kinds.get(column, "")}">{inside[column]}</td>' for column in COLUMNS
        )
        lines.append(f"<tr>{row}</tr>")
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    trust = "; ".join(f"{letter} {meaning}" for letter, meaning in TRUST.items())
    about = f"Verdicts are computed from this run's numbers: they are about its model and budget, not the paper's. Trust: {trust}."
    body = f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<h2 id="claims">The paper\'s claims</h2><p>{text(count(rows))}</p><p class="soft">{text(about)}</p>{body}'


def _plates(folder: Path, records: Sequence[Mapping[str, Any]], rows: Sequence[Finding]) -> list[str]:
    parts, before = [], None
    for record in records:
        item = item_of(record)
        if item != before:
            parts.append(_item(item, rows))
        parts.append(_plate(folder, record))
        before = item
    return parts


def _item(item: str, rows: Sequence[Finding]) -> str:
    if item == OTHER:
        return f'<h2 id="{OTHER}">More figures</h2>'
    own = table([row for row in rows if row.claim.id == item], "").to_dict("records")
    lines = []
    for cells in own:
        interval = f" ({cells['interval']})" if " to " in cells["interval"] else ""
        lines.append(
            f"<li>{text(cells['claim'])} ({text(cells['source'])}, {cells['trust']}). "
            f"<b>Here</b>: {text(cells['our number'])}{text(interval)}: <b>{text(cells['verdict'])}</b></li>"
        )
    return f'<h2 id="{item}">{item} {text(ITEMS[item])}</h2><ul class="claim">{"".join(lines)}</ul>'


def _plate(folder: Path, record: Mapping[str, Any]) -> str:
    """One figure: its image, or the interactive page in a frame, with caption, facts and links."""
    label = record["label"]
    files = {ending: f"figures/{label}.{ending}" for ending in ("png", "html", "csv")}
    if (folder / files["png"]).is_file():
        picture = f'<a href="{text(files["html"])}"><img src="{text(files["png"])}" alt="{text(record["caption"])}" loading="lazy"></a>'
    else:
        picture = f'<iframe src="{text(files["html"])}" title="{text(label)}" loading="lazy"></iframe>'
    wanted = [
        (files["html"], "interactive"),
        (files["csv"], "numbers (CSV)"),
        *_notebook_files(folder, record["notebook"]),
    ]
    links = " · ".join(_link(file, name) for file, name in wanted if (folder / file).is_file())
    about = ("profile", "model", "layer", "tokens", "seed", "commit")
    known = {key: record[key] for key in about if record.get(key) is not None} | dict(record.get("versions", {}))
    facts = " · ".join(f"{key} {value}" for key, value in known.items())
    number = f"<p><b>Here</b>: {text(record['number'])}</p>" if record.get("number") is not None else ""
    caption = (
        f'<p><b>{text(label)}</b>. {text(record["caption"])}</p>{number}<p>{links}</p><p class="soft">{text(facts)}</p>'
    )
    return f'<figure class="plate">{picture}<figcaption>{caption}</figcaption></figure>'


def _notebook_files(folder: Path, name: str) -> list[tuple[str, str]]:
    """The forms a notebook has in the run folder."""
    files = {f"{name}.html": f"notebook {name}", f"{name}.ipynb": "as .ipynb", f"{name}.failed.ipynb": "failed"}
    return [(file, label) for file, label in files.items() if (folder / file).is_file()]


def _link(target: str, label: str) -> str:
    return f'<a href="{text(target)}">{text(label)}</a>'


def _heads(folder: Path) -> str:
    """Pages of heads that the run wrote."""
    file = folder / "heads" / PAGES_FILE
    if not file.is_file():
        return ""
    rows = []
    for page in store.read_json(file):
        target, name = f"heads/{page['file']}", f"Layer {page['layer']}, head {page['head']}"
        if (folder / target).is_file():
            rows.append(f"<li>{_link(target, name)}: {text(page['about'])}</li>")
    return f'<h2 id="heads">Pages of heads</h2><ul>{"".join(rows)}</ul>' if rows else ""


def _notebook(folder: Path, name: str, values: Mapping[str, Any], profile: str) -> str:
    links = ", ".join(_link(file, label) for file, label in _notebook_files(folder, name)) or "not finished"
    return f'<h2 id="{text(name)}">{text(name)}</h2><p>{links}</p>{_values(values, name, profile)}'


def _values(values: Mapping[str, Any], name: str, profile: str) -> str:
    """The table of recorded values."""
    checks = notebook.check_values(values, notebook.expected_values(name, profile))
    if not checks:
        return ""
    rows = "".join(
        f"<tr><td>{text(check.key)}</td><td>{text(_short(check.value))}</td><td>{text(check.expected)}</td>"
        f'<td class="{check.word}">{check.word}</td></tr>'
        for check in checks
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("value", "measured", "expected", "result"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<details><summary>{len(checks)} recorded values</summary><div class="wide">{table}</div></details>'


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
