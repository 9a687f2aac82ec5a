import functools
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from toys import D_HEAD, D_MODEL, ROTARY, ToySource, toy_site

from lorsa_utils import store, training
from lorsa_utils.config import PROFILES, LorsaConfig, SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import hub, notebook, recipes
from lorsa_utils.view import figures


@pytest.fixture(autouse=True)
def every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorsa_utils.models.require_available", lambda name: None)


def begin(name: str = "02_test") -> notebook.Context:
    return notebook.start(name, "smoke")


def expect(**sections: object) -> None:
    store.write_json(store.data_dir() / "expected" / "02_test.json", sections)


def test_start_tells_where_numbers_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = notebook.start("02_test", "smoke", tmp_path / "run", seed=3)
    text = capsys.readouterr().out
    for word in ("kit", "commit", "python", "torch", "transformers", "device", "profile smoke", "seed 3", "02_test"):
        assert word in text
    assert (run.profile, run.folder, run.seed) == (PROFILES["smoke"], tmp_path / "run", 3)
    assert notebook.start("02_test", "smoke").folder == tmp_path / "data" / "runs" / "smoke"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """The kit's checkpoints, of the smoke profile's layer."""
    layer, folders = PROFILES["smoke"].layer, {"lorsa": tmp_path / "shipped lorsa", "sae": tmp_path / "shipped sae"}
    monkeypatch.setattr(hub, "find", lambda model, number, kind: folders[kind] if number == layer else None)
    return cast(Any, folders)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What notebooks 02 and 03 trained in this run."""
    folders = {"lorsa": tmp_path / "own lorsa", "sae_equal_features": tmp_path / "own sae"}
    makers = {
        "sequences": lambda run, model: {},
        "activation_cache": lambda run, model, splits: tmp_path,
        "ActivationCache": lambda folder, split, model: "cache",
        "main_lorsa": lambda run, model, source: tmp_path / "of notebook 02",
        "layer_modules": lambda run, model, source, kinds: dict.fromkeys(run.profile.layers, folders),
    }
    for name, maker in makers.items():
        monkeypatch.setattr(recipes, name, maker)
    return folders


def test_modules_at_hand_are_the_checkpoint_alone_until_notebook_03_has_run(
    tmp_path: Path, shipped: dict[str, Path | None], own: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, tokens in ((tmp_path / "shipped lorsa", 2000), (own["lorsa"], 100)):
        store.write_json(folder / "config.json", {"train": {"tokens": tokens}})
    expect(smoke={"fvu": {"min": 0.5}}, smoke_checkpoint={"fvu": {"max": 0.5}})
    layers, model, stages = PROFILES["smoke"].layers, cast(Any, None), begin().folder / "runs"
    all_of_them = {layer: {"lorsa": own["lorsa"], "sae": own["sae_equal_features"]} for layer in layers}

    def opened(train: bool, fvu: float) -> dict[int, dict[str, Path]]:
        run = begin()
        folders = recipes.modules_at_hand(run, model, {}, train)
        run.record("fvu", fvu)
        run.finish()  # each way has expected values of its own
        assert (run.layers, run.about["layer"]) == (tuple(folders), list(folders))
        assert run.about["tokens"] == (2000 if run.checkpoint_alone else 100)
        return folders

    assert opened(False, 0.1) == {PROFILES["smoke"].layer: shipped}
    assert "looks at layer 1 alone" in capsys.readouterr().out
    assert opened(True, 0.9) == all_of_them
    for layer in layers:
        for kind in own:
            store.write_text(stages / f"layer{layer:02d}_{kind}-0abc" / "model.safetensors", "")
    assert opened(False, 0.9) == all_of_them
    (stages / "layer02_lorsa-0abc" / "model.safetensors").unlink()
    assert opened(False, 0.1) == {PROFILES["smoke"].layer: shipped}
    shipped["sae"] = None
    assert opened(False, 0.9) == all_of_them


@pytest.mark.parametrize(
    ("package", "version"), [("torch", "2.7.1"), ("torch", "3.0"), ("transformers", "4.55.0"), ("transformers", "6.1")]
)
def test_untested_versions_are_refused_with_the_command_that_helps(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}
    monkeypatch.setattr(notebook.metadata, "version", lambda name: installed[name])
    notebook.check_versions()
    installed[package] = version
    with pytest.raises(UserError, match=rf'{package} {version} .* run: pip install -c constraints.txt "{package}>='):
        notebook.check_versions()


def test_no_git_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert notebook.git_commit.__wrapped__() is None


def test_a_commit_has_a_plus_when_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(store, "CHECKOUT", tmp_path)
    assert notebook.git_commit.__wrapped__() is None
    git("init")
    file = tmp_path / "file"
    file.write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag")
    commit = git("rev-parse", "--short=10", "HEAD").strip()
    (tmp_path / "untracked").write_text("1")
    assert notebook.git_commit.__wrapped__() == commit
    file.write_text("2")
    assert notebook.git_commit.__wrapped__() == commit + "+"


def test_records_are_kept_by_notebook_and_start_forgets_only_its_own() -> None:
    begin("01_other").record("tokens", 7)
    run = begin()
    run.record("fvu", np.float32(0.5))
    run.record("dead", torch.tensor(0.25))
    run.record("shares", {"a": [torch.tensor(1), 2.0]})
    own = {"fvu": 0.5, "dead": 0.25, "shares": {"a": [1, 2.0]}}
    assert notebook.read_results(run.folder) == {"01_other": {"tokens": 7}, "02_test": own}
    begin()
    assert notebook.read_results(run.folder) == {"01_other": {"tokens": 7}, "02_test": {}}


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan), object()])
def test_what_is_no_result_is_refused(value: object) -> None:
    run = begin()
    with pytest.raises(UserError, match="fvu is"):
        run.record("fvu", value)
    assert notebook.read_results(run.folder)["02_test"] == {}


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"max": 0.2}, [0.2], [0.21]),
        ({"min": 0.2, "max": 0.3}, [0.2], [0.1]),
        ({"value": 0.5, "tolerance": 0.05}, [0.52], [0.56]),
        ({"value": 3}, [3], [4]),
        ({"value": "bf16"}, ["bf16"], ["fp32"]),
        ({"value": True, "note": "they agree"}, [True], [False]),
        ({"min": 0}, [], ["text"]),
        ({"value": 0.3, "tolerance": 0.1, "max": 0.2}, [], [0.3]),
    ],
)
def test_expectations(rule: dict[str, object], good: list[object], bad: list[object]) -> None:
    for values, result in ((good, "PASS"), (bad, "FAIL")):
        for value in values:
            assert notebook.check_values({"key": value}, {"key": rule})[0].result == result, value


def test_a_rule_without_a_bound_is_refused() -> None:
    with pytest.raises(UserError, match="neither min, max nor value"):
        notebook.check_values({"key": 1}, {"key": {"maximum": 2}})


def test_finish_returns_the_table_or_names_what_failed_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    run = begin()
    run.record("fvu", 0.5)
    run.record("seconds", 12)
    assert list(run.finish()["result"]) == ["-", "-"], "nothing is expected"
    expect(smoke={"fvu": {"max": 0.6, "note": "three seeds"}})
    table = run.finish()
    assert list(table["result"]) == ["PASS", "-"]
    assert table["expected"][0] == "at most 0.6 (three seeds)"
    expect(smoke={"fvu": {"max": 0.4}, "dead": {"max": 0.1}, "seconds": {"min": 0}})
    with pytest.raises(AssertionError, match=r"fvu is 0.5, expected at most 0.4; dead is None"):
        run.finish()
    assert "PASS" in capsys.readouterr().out


def test_a_stage_is_made_once_and_again_only_when_its_files_its_key_or_its_code_change(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        store.write_text(folder / "part" / "result.txt", "1")

    def pipeline(tokens: int = 10) -> list[Path]:
        return [begin().stage(name, {"tokens": tokens}, make) for name in ("a", "b", "c")]

    folders = pipeline()
    assert pipeline() == folders == made
    (folders[1] / "part" / "result.txt").unlink()
    assert pipeline() == folders
    assert made == [*folders, folders[1]]
    assert set(pipeline(tokens=20)).isdisjoint(folders)
    assert len(made) == 7
    module = tmp_path / "counting.py"
    code = [cast(Any, SimpleNamespace(__file__=str(module)))]
    for n, given in ((8, code), (8, code), (9, code), (10, [])):
        module.write_text(f"n = {n}")
        begin().stage("count", {}, make, given)
        assert len(made) == len(set(made[4:])) + 4 == n


def test_a_half_made_stage_goes_on_from_what_is_there() -> None:
    def die(folder: Path) -> None:
        store.write_text(folder / "first.txt", "1")
        raise KeyboardInterrupt

    def resume(folder: Path) -> None:
        assert (folder / "first.txt").read_text() == "1"
        store.write_text(folder / "second.txt", "2")

    run = begin()
    with pytest.raises(KeyboardInterrupt):
        run.stage("train", {}, die)
    folder = run.stage("train", {}, resume)
    assert store.read_json(folder / "stage.json")["files"] == ["first.txt", "second.txt"]


def test_shown_figures_say_that_they_are_scaled_down() -> None:
    for profile, note in (("smoke", " (smoke profile, scaled down)"), ("paper", "")):
        figure = go.Figure(go.Scatter(x=[1], y=[2]), layout={"title": {"text": "FVU"}})
        saved = notebook.start("02_test", profile).show(figure, "P4_fvu", "One point.", layer=9, tokens=None)
        record = store.read_json(saved.with_suffix(".json"))
        assert f"FVU{note}" in saved.read_text(encoding="utf-8")
        assert figure.layout.title.text == "FVU", "the caller's figure stays as it is"
        about = {"label": "P4_fvu", "caption": "One point.", "notebook": "02_test", "profile": profile}
        about |= {"model": PROFILES[profile].model, "layer": 9, "tokens": None, "seed": 0}
        assert record == about | {"commit": notebook.git_commit(), "versions": record["versions"]}
        assert set(record["versions"]) == {"kit", "python", "torch", "transformers", "device"}
        assert all(record["versions"].values())


def test_display_offers_an_image_to_programs_without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shown: list[dict[str, object]] = []
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: InteractiveShell)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    monkeypatch.setattr(figures, "draw_png", lambda figure: b"png")
    begin().show(go.Figure(go.Scatter(x=[1], y=[2])), "P4", "One point.")
    assert set(shown[0]) == {"text/plain", "application/vnd.plotly.v1+json", "image/png"}


def test_trained_goes_on_with_runs_that_stopped_at_different_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source = begin(), ToySource(20, 12, layers=(0, 1))
    model: Any = SimpleNamespace(device=torch.device("cpu"), site=toy_site)
    lorsa = LorsaConfig(d_model=D_MODEL, n_ov_heads=16, n_qk_heads=4, d_qk=D_HEAD, k=4, rotary=ROTARY)
    modules = {"lorsa": (0, lorsa), "sae": (1, SAEConfig(d_model=D_MODEL, n_features=20, k=4))}
    settings = TrainConfig(tokens=300, batch_size=3, dead_window=50)

    for name, steps in (("lorsa", 2), ("sae", 4)):
        with monkeypatch.context() as patch:
            stopped = functools.partial(training.train_runs, stop_after_steps=steps, progress=False)
            patch.setattr(recipes, "train_runs", stopped)
            recipes.trained(run, model, source, {name: modules[name]}, settings)
    folders = recipes.trained(run, model, source, modules, settings)
    assert [training.read_log(folder)[-1]["tokens"] for folder in folders.values()] == [300, 300]
    fresh = recipes.trained(notebook.start("02_test", "smoke", tmp_path / "fresh"), model, source, modules, settings)
    for name, folder in folders.items():
        assert store.sha256_file(folder / "model.safetensors") == store.sha256_file(fresh[name] / "model.safetensors")
    monkeypatch.setattr(recipes, "train_runs", None)  # nothing is left to train
    assert recipes.trained(run, model, source, modules, settings) == folders


def test_best_modules_are_the_shipped_ones_when_both_are_there(
    tmp_path: Path, shipped: dict[str, Path | None], own: dict[str, Path]
) -> None:
    run, model = begin(), cast(Any, None)
    assert recipes.best_modules(run, model) == shipped
    shipped["sae"] = None
    of_notebooks = {"lorsa": tmp_path / "of notebook 02", "sae": own["sae_equal_features"]}
    assert recipes.best_modules(run, model) == of_notebooks
