"""The page of a run: every figure with claim, number and links; nothing that is not there."""

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import plotly.graph_objects as go
import pytest

from lorsa_utils import store
from lorsa_utils.config import PROFILES
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import claims, notebook, reproduce
from lorsa_utils.view import figures, gallery, pages


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> notebook.Context:
    monkeypatch.setenv("LORSA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(figures, "can_draw_png", lambda: False)
    made = notebook.start("03_reconstruction", "smoke", tmp_path / "run")
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
    for label in ("P10_anchors", "P4_layer_fvu", "T2_cost", "unlabelled"):
        made.show(figure, label, f"What <b>{label}</b> shows.", pd.DataFrame({"x": [1]}))
    made.show(figure, "P4_other", "Another.", number="1.23 ± 0.04")
    made.record("fvu_lorsa_mean", 0.25)
    (made.folder / "03_reconstruction.ipynb").write_text("{}")
    store.write_json(
        made.folder / "heads" / pages.PAGES_FILE,
        [{"file": "a.html", "layer": 1, "head": 7, "about": "<i>Sink</i>"}] * 2,
    )
    (made.folder / "heads" / "a.html").write_text("x")
    return made


def test_every_figure_is_shown_with_claim_and_number(run: notebook.Context) -> None:
    page = gallery.write_index(run.folder, "smoke").read_text(encoding="utf-8")
    labels = [file.stem for file in (run.folder / "figures").glob("*.json")]
    assert len(labels) == 5
    for label in labels:
        assert f'src="figures/{label}.html"' in page
        assert f'href="figures/{label}.csv"' in page
    assert page.count('href="03_reconstruction.ipynb"') == 6, "of each figure and of the notebook's own section"
    order = [page.index(f'id="{item}"') for item in ("P4", "P10", "T2", "more", "heads", "03_reconstruction")]
    assert order == sorted(order)
    assert "FVU, mean over layers: 0.25" in page
    table = page[page.index('<table class="claims">') : page.index("</table>")]
    assert table.count("<tr>") == len(claims.read_claims()) + 1
    assert 'class="PASS">holds<' in table
    assert "not run in this profile" in table
    assert not re.search(r"<td[^>]*></td>", table), "no empty cell"
    assert page.index('id="claims"') < page.index('id="P4"')
    for part in ("torch", "transformers", "python", "device"):
        assert re.search(rf"commit \S+.* · {part} \S+", page)
    for said in ("1.23 ± 0.04", "smoke", "scaled down", "What &lt;b&gt;", "&lt;i&gt;Sink", "18 items without a figure"):
        assert said in page
    for target in set(re.findall(r'(?:src|href)="([^"#]+)"', page)) - {"data:,"}:
        assert (run.folder / target).is_file(), target
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page


def test_what_is_half_there_is_left_out_or_named(run: notebook.Context) -> None:
    for file in ("figures/T2_cost.html", "figures/P10_anchors.csv", "heads/a.html"):
        (run.folder / file).unlink()
    page = gallery.write_index(run.folder, "smoke").read_text(encoding="utf-8")
    assert "T2_cost" not in page, "a figure without its file, as in a folder half copied"
    assert "P10_anchors.csv" not in page
    assert "heads/a.html" not in page
    for record, sentence in (('{"label": "P4_other"}', "no record of a figure"), ("{", "not valid JSON")):
        (run.folder / "figures" / "P4_other.json").write_text(record)
        with pytest.raises(UserError, match=sentence):
            gallery.write_index(run.folder, "smoke")


def test_items_of_labels() -> None:
    items = {"P1_toy": "P1", "P10_x": "P10", "P12": "P12", "P99_x": "more", "T3_missing": "T3", "Plot": "more"}
    assert {label: gallery.item_of({"label": label}) for label in items} == items


def shown_labels() -> dict[str, str]:
    """Labels that notebooks write out in full, and the notebook of each."""
    found = {}
    for path in reproduce.find_notebooks():
        code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and len(node.args) > 1]
        labels = [call.args[1] for call in calls if ast.unparse(call.func) == "run.show"]
        found |= {str(label.value): path.stem for label in labels if isinstance(label, ast.Constant)}
    return found


def test_every_figure_of_a_notebook_is_listed_and_every_profile_shows_every_item() -> None:
    listed = pd.read_csv(claims.paper_dir() / "figures.csv")
    shown = shown_labels()
    assert len(shown) > 40
    by_label = dict(zip(listed["label"], listed["notebook"], strict=True))
    assert {label: by_label.get(label) for label in shown} == shown
    assert set(listed["notebook"]) <= {path.stem for path in reproduce.find_notebooks()}
    profiles = listed["profiles"].str.split()
    for profile in PROFILES:
        labels = listed["label"][profiles.map(lambda names, profile=profile: profile in names)]
        assert {label.split("_")[0] for label in labels} in (set(claims.ITEMS), set()), profile
