"""`index.html` of a run folder: the paper's claims with our numbers, figures, head pages, recorded values.

It opens from the disk, offline.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorsa_utils import store
from lorsa_utils.config import get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import claims, notebook
from lorsa_utils.view import pages

OTHER = "more"
"""Section of figures whose label names no item of the paper."""


def write_index(folder: str | Path, profile: str) -> Path:
    """Write `index.html` for a run folder.

    Raises:
        UserError: a figure's record or the claims are damaged, or the folder cannot be written.
    """
    path = Path(folder)
    listed = path / "heads" / pages.PAGES_FILE
    heads = store.read_json(listed) if listed.is_file() else []
    profile = notebook.profile_of_run(path, profile)
    results, records, findings = notebook.read_results(path), figure_records(path), claims.of_run(path, profile)
    names = sorted({*results, *(record["notebook"] for record in records)})
    page = pages.render(
        "index.html",
        profile=profile,
        banners=notebook.banners(path),
        scaled_down=get_profile(profile).is_scaled_down,
        items=claims.ITEMS,
        count=claims.count(findings),
        trust=claims.TRUST,
        claims=claims.table(findings, profile).to_dict("records"),
        words={claims.HOLDS: "PASS", claims.FAILS: "FAIL"},
        plates={item: [_plate(path, one) for one in of_item] for item, of_item in itertools.groupby(records, item_of)},
        heads=[page for page in heads if (listed.parent / page["file"]).is_file()],
        notebooks=[_notebook(path, name, results.get(name, {}), profile) for name in names],
        facts=" · ".join(f"{key} {value}" for key, value in notebook.provenance().items()),
    )
    store.write_text(path / "index.html", page)
    return path / "index.html"


def figure_records(folder: Path) -> list[dict[str, Any]]:
    """Records of a run's figures whose files exist, by paper item, notebook and label.

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
    order = [*claims.ITEMS, OTHER]
    return sorted(records, key=lambda record: (order.index(item_of(record)), record["notebook"], record["label"]))


def item_of(record: Mapping[str, Any]) -> str:
    """The paper item that a figure's label begins with."""
    item = re.match(r"([PT]\d+)", record["label"])
    return item[1] if item and item[1] in claims.ITEMS else OTHER


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The run that made a figure: profile, model, layer, tokens, seed, commit and versions, where they apply."""
    about = ("profile", "model", "layer", "tokens", "seed", "commit")
    return {key: record[key] for key in about if record.get(key) is not None} | dict(record.get("versions", {}))


def _plate(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    html, png, csv = (f"figures/{record['label']}.{ending}" for ending in ("html", "png", "csv"))
    links = [(html, "interactive"), (csv, "numbers (CSV)"), *_notebook_files(folder, record["notebook"])]
    return {
        "number": None,
        **record,
        "html": html,
        "png": png if (folder / png).is_file() else None,
        "links": [(file, name) for file, name in links if (folder / file).is_file()],
        "facts": " · ".join(f"{key} {value}" for key, value in facts_of(record).items()),
    }


def _notebook_files(folder: Path, name: str) -> list[tuple[str, str]]:
    files = {f"{name}.html": f"notebook {name}", f"{name}.ipynb": "as .ipynb", f"{name}.failed.ipynb": "failed"}
    return [(file, label) for file, label in files.items() if (folder / file).is_file()]


def _notebook(folder: Path, name: str, values: Mapping[str, Any], profile: str) -> dict[str, Any]:
    checks = notebook.check_values(values, notebook.expected_values(name, profile))
    rows = [(check.key, _short(check.value), check.expected, check.result) for check in checks]
    return {"name": name, "files": _notebook_files(folder, name), "recorded": rows}


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
