"""The figures of a run in the paper's order, from what its notebooks saved; nothing is computed again but rates of the training logs.

data/paper/figures.csv lists the figures that a whole run of each profile has, and the notebook that makes each.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lorsa_utils import store
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit.claims import paper_dir
from lorsa_utils.training import read_log
from lorsa_utils.view.gallery import figure_records, item_of


def expected_figures(profile: str) -> dict[str, str]:
    """Label to notebook of the figures that a whole run of a profile has; profiles that are not listed have those of `paper`.

    Raises:
        UserError: figures.csv is missing.
    """
    file = paper_dir() / "figures.csv"
    if not file.is_file():
        raise UserError(f"{file} is missing; restore it from the repository.")
    with open(file, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    listed = {name for row in rows for name in row["profiles"].split()}
    wanted = profile if profile in listed else "paper"
    return {row["label"]: row["notebook"] for row in rows if wanted in row["profiles"].split()}


def missing_figures(folder: str | Path, profile: str) -> dict[str, str]:
    """Those of `expected_figures` that a run folder lacks."""
    made = {record["label"] for record in figure_records(Path(folder))}
    return {label: name for label, name in expected_figures(profile).items() if label not in made}


def provenance_line(record: Mapping[str, Any]) -> str:
    """What run made a figure, in one line: of the record that `notebook.Context.show` writes."""
    keys = ("profile", "model", "layer", "tokens", "seed", "commit")
    known = {"notebook": record["notebook"]} | {key: record[key] for key in keys if record.get(key) is not None}
    facts = [f"{key} {_fact(value)}" for key, value in (known | dict(record.get("versions", {}))).items()]
    return ", ".join(facts)


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def show(folder: str | Path, item: str) -> None:
    """Display all figures of one item of the paper: the static image, or the numbers where none could be drawn; caption, provenance.

    Args:
        folder: run folder.
        item: as `P4`.
    """
    from IPython.display import Image, Markdown, display

    place = Path(folder) / "figures"
    records = [record for record in figure_records(Path(folder)) if item_of(record) == item]
    for record in records:
        label = record["label"]
        display(Markdown(f"**{label}**. {record['caption']}"))
        if (image := place / f"{label}.png").is_file():
            display(Image(image.read_bytes(), width=600))
        else:
            display(pd.read_csv(place / f"{label}.csv").head(12))
        display(Markdown(f"*{provenance_line(record)}*"))
    if not records:
        display(Markdown(f"*This run has no figure of {item}.*"))


def device(folder: str | Path, name: str) -> str:
    """The device that a notebook's figures were made on; `unknown` when no record says so."""
    found = [
        record["versions"]["device"]
        for record in figure_records(Path(folder))
        if record["notebook"] == name and "versions" in record
    ]
    return str(found[0]) if found else "unknown"


def costs(folder: str | Path) -> pd.DataFrame:
    """What training cost: one row a module trained to its end.

    Args:
        folder: run folder.

    Returns:
        columns `module` (its folder's name without the hash), `kind`, `layer`, `units`, `tokens`, `minutes` (steps
        alone: no pass of the model, no reading of the cache), `tokens_per_s`; sorted by name. Empty when nothing was
        trained.
    """
    rows = []
    for log in sorted(Path(folder).glob("runs/*/metrics.jsonl")):
        config = store.read_json(log.parent / "config.json")
        lines = read_log(log.parent)
        if not lines or not (log.parent / "model.safetensors").is_file():
            continue
        last, module = lines[-1], config["module"]
        units = module["n_ov_heads"] if module["kind"] == "lorsa" else module["n_features"]
        about = (log.parent.name.rsplit("-", 1)[0], module["kind"], config["layer"], units)
        rows.append((*about, int(last["tokens"]), last["seconds"] / 60, last["tokens"] / max(last["seconds"], 1e-9)))
    return pd.DataFrame(rows, columns=["module", "kind", "layer", "units", "tokens", "minutes", "tokens_per_s"])
