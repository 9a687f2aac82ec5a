import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pandas as pd
import pytest
from calling import lorsa
from tiny_models import save_tiny_model
from typer.main import get_command

from lorsa_utils import store
from lorsa_utils.config import PRESETS, PROFILES, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import cli
from lorsa_utils.kit.reproduce import NotebookStatus

ROOT = Path(__file__).resolve().parents[2]
EVAL_KEYS = "fvu fvu_token_mean ce ce_spliced ce_mean_ablated ce_recovered l0 dead_fraction n_tokens cosine"
BUDGET = ["--context", "32", "--tokens", "3000", "--held-out-tokens", "600"]
SHAPE = ["--n-heads", "32", "--n-qk", "4", "--k", "4", *BUDGET]


class Runs:
    """What all tests share, made when first asked for."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def made(self, out: str, *words: object) -> Path:
        assert lorsa(*words, "--out", self.place / out) == 0
        return self.place / out

    def from_text(self, out: object, *more: object, text: object = None) -> list[object]:
        """Words of `lorsa train`; later ones of a name win, except of --text."""
        return ["train", *self.whole(text), "--layer", "1", "--out", out, *SHAPE, *more]

    def from_cache(self, out: object, *more: object) -> list[object]:
        return ["train", "--model", self.model, "--cache", self.cached, "--layer", "1", "--out", out, *SHAPE, *more]

    def to_cache(self, out: object, *more: object, text: object = None) -> list[object]:
        return ["cache", *self.whole(text), "--layers", "0,1", "--out", out, *BUDGET, *more]

    def whole(self, text: object = None) -> list[object]:
        return ["--model", self.model, "--text", text or self.text]

    @cached_property
    def model(self) -> str:
        return str(save_tiny_model(self.place / "model", "llama"))

    @cached_property
    def other_model(self) -> str:
        return str(save_tiny_model(self.place / "other", "llama", seed=1))

    @cached_property
    def text(self) -> str:
        rng = random.Random(0)
        words = ["attention", "head", "layer", "of", "the", "model", "reads", "writes", "a", "token"]
        paragraphs = [" ".join(rng.choices(words, k=120)) + "." for _ in range(40)]
        store.write_text(self.place / "prose.txt", "\n\n".join(paragraphs))
        return str(self.place / "prose.txt")

    @cached_property
    def cached(self) -> Path:
        return self.made("cache", *self.to_cache(""))

    @cached_property
    def trained(self) -> Path:
        return self.made("run", *self.from_text(""))

    @cached_property
    def sae(self) -> Path:
        return self.baseline("sae")

    @cached_property
    def transcoder(self) -> Path:
        return self.baseline("transcoder")

    def baseline(self, kind: str) -> Path:
        return self.made(kind, *self.from_cache("", "--kind", kind, "--tokens", "600"))

    @cached_property
    def described(self) -> Path:
        """The table of heads."""
        return self.made("new/heads.parquet", "heads", self.trained, "--text", self.text, "--tokens", "600")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("shared"))


# ---- usage


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def test_help_answers_without_torch() -> None:
    script = (
        "import sys; from lorsa_utils.kit.cli import main; code = main(['train', '--help']); "
        "assert not {'torch', 'numpy', 'pandas'} & set(sys.modules); sys.exit(code)"
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert "--n-heads" in result.stdout


def test_the_package_is_a_command_too() -> None:
    assert python("-m", "lorsa_utils", "--version").stdout.startswith("lorsa 0.")


@pytest.mark.parametrize(
    ("command", "default"), [("doctor", "--profile"), ("cache", "[default: bfloat16]"), ("eval", "[default: 100000]")]
)
def test_help_shows_defaults(command: str, default: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lorsa(command, "--help") == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert default in help_text
    assert "--json" in help_text


def parsed(command: str, *words: str) -> dict[str, Any]:
    group: Any = get_command(cli.app)
    return dict(group.commands[command].make_context(command, list(words)).params)


def test_every_training_setting_is_an_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert lorsa("train", "--help") == 0
    help_text = " ".join(capsys.readouterr().out.split())
    required = ["--layer", "1", "--out", "x"]
    options = parsed("train", *required)
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in help_text
        assert field.name in cli.OWN_OPTIONS or field.metadata["help"] in help_text
        assert options[field.name] == field.default
    options = parsed("train", *required, "--lr", "0.01", "--aux-k", "8")
    assert (options["lr"], options["aux_k"]) == (0.01, 8)


def test_options_take_several_values() -> None:
    words = ["--text", "a.txt", "b.txt", "--out", "x", "--layer", "17,9,9", "--tokens", "5_000"]
    options = parsed("train", *words, "--text", "c.txt")
    assert (options["text"], options["layer"], options["tokens"]) == (["a.txt", "b.txt", "c.txt"], [9, 17], 5000)
    options = parsed("autointerp", "one", "--scorers", "detection, fuzzing", "two", "--out", "x", "--prices", "1,0.5")
    assert (options["folders"], options["scorers"]) == (["one", "two"], ["detection", "fuzzing"])
    assert options["prices"] == (1, 0.5)


def test_a_preset_brings_defaults_and_options_win() -> None:
    options = parsed("train", "--k", "3", "--preset", "pythia-160m", "--layer", "3", "--out", "x")
    preset = PRESETS["pythia-160m"]
    assert (options["k"], options["n_heads"], options["context"]) == (3, preset.n_heads, preset.context)
    assert (options["tokens"], options["model"], options["dataset"]) == (preset.train_tokens, preset.model, None)


def test_profiles_are_those_of_the_config() -> None:
    assert set(get_args(cli.Profile)) == set(PROFILES)
    assert set(get_args(cli.Preset)) == set(PRESETS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "lorsa: Missing command; see `lorsa --help`."),
        (["dance"], "lorsa: No such command 'dance'; see `lorsa --help`."),
        (["train"], "lorsa train: Missing option '--layer'; see `lorsa train --help`."),
        (["eval"], "lorsa eval: Missing argument 'DIR'"),
        (["train", "--lyer", "1"], "No such option: --lyer (Possible options: --layer"),
        (["train", "--layer", "one"], "numbers separated by commas, such as 9,17, not 'one'"),
        (["train", "--tokens", "0"], "Invalid value for '--tokens': must be at least 1, not 0"),
        (["train", "--tokens", "many"], "'many' is not a number"),
        (["train", "--kind", "magic"], "'magic' is not one of 'lorsa', 'sae', 'transcoder'"),
        (["train", "--lr", "fast"], "Invalid value for '--lr'"),
        (["cache", "--layers", "1,"], "numbers separated by commas"),
        (["eval", "x", "--text"], "Option '--text' needs at least one value"),
        (["eval", "x", "--text", "--json"], "Option '--text' needs at least one value"),
        (["autointerp", "x", "--prices", "1"], "two prices, such as 0.15,0.60, not '1'"),
        (["reproduce", "--profile", "huge"], "'huge' is not one of 'smoke', 'laptop', 'paper'"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorsa(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


# ---- the stages


def test_cache_shows_size_and_speed_and_goes_on_where_it_was(runs: Runs, answer: Any) -> None:
    result = answer(*runs.to_cache(runs.cached))
    assert (result["tokens"], result["held_out_tokens"]) == (3000, 600)
    assert result["bytes"] == sum(file.stat().st_size for file in runs.cached.glob("*.safetensors"))
    assert result["tokens_per_s"] == 0, "everything was there already"
    source = store.read_json(runs.cached / "manifest.json")["splits"]["train"]["source"]
    assert source["text"] == [runs.text]


def results_of(folder: Path) -> dict[str, Any]:
    results = store.read_json(folder / "results.json")
    assert set(results) >= {"fvu", "tokens_per_s", "dead_fraction", "seconds"}
    assert 0 < results["fvu"] < 1
    return results


def test_train_measures_and_saves_a_run(runs: Runs) -> None:
    results = results_of(runs.trained)
    assert results["n_tokens"] == 600
    assert results["l0"] <= 4
    config = store.read_json(runs.trained / "config.json")
    assert (config["source"]["text"], config["source"]["model"]) == ([runs.text], runs.model)
    assert config["module"]["n_ov_heads"] == 32


def test_resume_of_a_finished_run_measures_the_same(runs: Runs, answer: Any) -> None:
    again = answer(*runs.from_text(runs.trained, "--resume"))
    assert again["fvu"] == results_of(runs.trained)["fvu"]
    assert again["tokens_per_s"] == 0


def test_baselines_train_from_the_cache(runs: Runs) -> None:
    for folder in (runs.sae, runs.transcoder):
        results_of(folder)


def test_several_layers_train_together(runs: Runs, tmp_path: Path, answer: Any) -> None:
    result = answer(*runs.from_cache(tmp_path / "run", "--layer", "0,1"))
    assert set(result["layers"]) == {"0", "1"}
    alone = answer(*runs.from_cache(tmp_path / "alone"))
    assert alone["fvu"] == result["layers"]["1"]["fvu"]
    assert (tmp_path / "run" / "layer_0" / "model.safetensors").is_file()


def test_shape_follows_from_the_layer_when_not_given(runs: Runs, tmp_path: Path, answer: Any) -> None:
    small = ["--layer", "0", "--out", tmp_path / "run", *BUDGET, "--tokens", "600", "--k", "4"]
    answer("train", *runs.whole(), *small)
    module = store.read_json(tmp_path / "run" / "config.json")["module"]
    assert (module["n_ov_heads"], module["n_qk_heads"], module["d_qk"]) == (512, 32, 16)


def test_eval_measures_on_the_held_out_part_or_on_a_given_text(runs: Runs, tmp_path: Path, answer: Any) -> None:
    own = answer("eval", runs.trained, "--tokens", "600")
    assert set(own) == set(EVAL_KEYS.split())
    assert own["fvu"] == pytest.approx(results_of(runs.trained)["fvu"], rel=1e-4), "as at the end of training"
    most = answer("eval", runs.trained)["n_tokens"]
    assert most > 600
    whole = answer("eval", runs.trained, "--text", runs.text, "--tokens", most + 1000)
    assert whole["n_tokens"] == most + 1000, "with --text nothing is held out"
    short = tmp_path / "short.txt"
    short.write_text("Shorter than one context.")
    assert answer("eval", runs.trained, "--text", short)["n_tokens"] == len("Shorter than one context.")


def test_eval_warns_when_worse_than_the_mean(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = copy_of(runs.trained, tmp_path / "broken")
    tensors = store.read_tensors(broken / "model.safetensors")
    store.write_tensors(broken / "model.safetensors", tensors | {"b_O": tensors["b_O"] + 10})
    assert lorsa("eval", broken, "--tokens", "300") == 0
    out, err = capsys.readouterr()
    assert "Warning: FVU is above 1" in err
    assert re.search(r"^fvu_token_mean   \d", out, re.MULTILINE), "answers for people are aligned lines"


def test_heads_writes_one_row_per_head(runs: Runs, tmp_path: Path, answer: Any) -> None:
    table = pd.read_parquet(runs.described)
    columns = {"head", "family", "frequency", "induction_share", "induction_precision", "top_logits", "contexts"}
    assert columns | {"effect"} <= set(table)
    assert len(table) == 32
    assert len(table.loc[0, "top_logits"]) == 10
    options = ("--text", runs.text, "--tokens", "300", "--removed", "0", "--out", tmp_path / "few.parquet")
    seen = answer("heads", runs.trained, *options)
    assert (seen["heads"], seen["n_tokens"]) == (32, 300)
    assert seen["dead_fraction"] == pd.read_parquet(tmp_path / "few.parquet")["dead"].mean()
    assert set(seen["families"]) & set(seen["skipped"]) == set()
    assert {"induction", "duplicate_token", "local"} <= set(seen["families"])
    assert {"name_mover", "subtoken_induction"} <= set(seen["skipped"]), "bytes have no names"


def test_heads_of_what_has_none(runs: Runs, tmp_path: Path, complaint: Any) -> None:
    assert "ends in .parquet" in complaint("heads", runs.trained, "--out", tmp_path / "heads.csv")
    assert "is a sae; give a Lorsa" in complaint("heads", runs.sae, "--out", tmp_path / "heads.parquet")
    assert not list(tmp_path.glob("heads.*"))


def test_show_writes_pages(runs: Runs, tmp_path: Path, answer: Any) -> None:
    page, little = tmp_path / "new" / "page.html", ["--text", runs.text, "--tokens", "600"]
    seen = answer("show", runs.trained, "--head", "5", "--out", page, *little)
    assert seen["path"] == str(page)
    content = page.read_text(encoding="utf-8")
    assert seen["bytes"] == page.stat().st_size < 2_000_000
    assert "Head 5" in content
    assert "name was not looked for" in content
    scores = tmp_path / "scores.parquet"
    rows = [
        ("Lorsa", 1, 3, "Only letters.", 0.75),
        ("Lorsa", 1, 5, "Only digits.", None),
        ("Lorsa", 0, 3, "wrong layer", 1.0),
        ("Lorsa", 1, 4, None, None),
        ("SAE", 1, 3, "wrong kind", 1.0),
    ]
    pd.DataFrame(rows, columns=["dictionary", "layer", "unit", "explanation", "detection"]).to_parquet(scores)
    beside = ["--explanations", scores, "--table", runs.described, "--sae", runs.sae, "--transcoder", runs.transcoder]
    seen = answer("show", runs.trained, "--head", "3,5,3", "--out", tmp_path / "pages", *beside, *little)
    assert [Path(path).name for path in seen["pages"]] == ["layer01_head00003.html", "layer01_head00005.html"]
    first, second = (Path(path).read_text(encoding="utf-8") for path in seen["pages"])
    for content in (first, second):
        assert "Nearest to w_o" in content
        assert "Nearest to w_v" in content
        assert "name was not looked for" not in content
        assert "wrong" not in content
    assert "Only letters." in first
    assert "balanced accuracy 0.75" in first
    assert "Only digits." in second
    assert "balanced accuracy" not in second


def test_show_of_what_is_not_there(runs: Runs, tmp_path: Path, complaint: Any) -> None:
    page = tmp_path / "page.html"

    def about(*more: object, run: Path = runs.trained) -> str:
        return str(complaint("show", run, "--head", "1", "--out", page, *more))

    assert "no unit 32 among 32 Lorsa heads; choose one from 0 to 31" in about("--head", "32")
    assert "give --out a folder" in about("--head", "1,2")
    assert "ends in .html" in about("--out", tmp_path / "page")
    assert "is not a run folder" in about(run=runs.cached)
    assert "make it with `lorsa heads`" in about("--table", tmp_path / "no.parquet")
    assert "make it with `lorsa autointerp`" in about("--explanations", runs.described)
    assert "give a sae of layer 1" in about("--sae", runs.transcoder)
    assert not page.exists()


def test_a_single_short_paragraph_can_be_trained_on(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One sentence that is shorter than the context.")
    assert lorsa(*runs.from_text(tmp_path / "run", "--context", "64", "--tokens", "300", text=short)) == 0
    err = capsys.readouterr().err
    assert "so it is read" in err
    assert "too short to hold a part of it out" in err
    assert lorsa("eval", tmp_path / "run") == 0
    assert "too short to hold a part of it out" in capsys.readouterr().err


def test_doctor_shows_what_is_here_and_what_a_profile_costs(answer: Any) -> None:
    result = answer("doctor", "--profile", "laptop")
    keys = "kit torch transformers device memory_gb disk_free_gb embedded_model missing estimate"
    assert set(keys.split()) <= set(result)
    assert result["embedded_model"] is None
    assert any("lorsa fetch" in line for line in result["missing"])
    assert result["estimate"]["minutes"] > 0


# ---- bad input


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--model", "./nowhere"], "There is no model at ./nowhere; give smollm2"),
        (["--model", "nobody/nothing"], "nobody/nothing cannot be loaded (HF_HUB_OFFLINE is set"),
        (["--layer", "3"], "Layer 3 does not exist in"),
        (["--k", "33"], "k (33) must not exceed the number of heads (32)"),
        (["--text", "nowhere.txt"], "There is no file or folder nowhere.txt"),
        (["--dataset", "x/y"], "either text files or a dataset"),
        (["--cache", "somewhere"], "either --cache or --text/--dataset"),
        (["--context", "1"], "context must be at least 2"),
        (["--device", "quantum"], "Device 'quantum' is not available"),
    ],
)
def test_bad_training_requests(extra: list[str], sentence: str, runs: Runs, tmp_path: Path, complaint: Any) -> None:
    out = tmp_path / "run"
    assert sentence in complaint(*runs.from_text(out, *extra))
    assert not (out / "config.json").exists()


def test_an_empty_text_is_refused_by_every_command(runs: Runs, tmp_path: Path, complaint: Any) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out.parquet"
    file.write_text("  \n")
    others = (["eval", runs.trained, "--text", file], ["heads", runs.trained, "--out", out, "--text", file])
    for command in (runs.from_text(out, text=file), runs.to_cache(out, text=file), *others):
        assert "is empty" in complaint(*command)


def test_folders_that_cannot_be_written(runs: Runs, tmp_path: Path, complaint: Any) -> None:
    (tmp_path / "file").write_text("a regular file")
    for words in (runs.from_text, runs.to_cache):
        sentence = complaint(*words(tmp_path / "file" / "out"))
        assert re.search("Cannot write to .*choose a folder you can write to", sentence)


def copy_of(folder: Path, target: Path) -> Path:
    """The files of a run, without its state."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("state")))


def test_caches_of_something_else_are_refused(runs: Runs, tmp_path: Path, complaint: Any) -> None:
    run = tmp_path / "run"
    assert "was made with another model" in complaint(*runs.from_cache(run, "--model", runs.other_model))
    assert "holds layers [0, 1], not 2" in complaint(*runs.from_cache(run, "--layer", "2"))
    assert "has BOS policy 'prepend'" in complaint(*runs.from_cache(run, "--bos", "none"))
    in_use = "holds another cache: its layers is [0, 1], asked is [0]"
    assert in_use in complaint(*runs.to_cache(runs.cached, "--layers", "0"))


def test_runs_are_not_overwritten_and_not_resumed_with_other_settings(runs: Runs, complaint: Any) -> None:
    again = runs.from_text(runs.trained)
    assert "holds a run already; add --resume" in complaint(*again)
    again.append("--resume")
    assert "was started with train.lr = 0.002, not 0.01" in complaint(*again, "--lr", "0.01")
    assert "was started with source.text_sha256" in complaint(*again, "--tokens", "2000")


def test_eval_needs_the_run_and_its_model(runs: Runs, tmp_path: Path, complaint: Any) -> None:
    assert "is not a run folder" in complaint("eval", tmp_path)
    assert "other weights" in complaint("eval", runs.trained, "--model", runs.other_model)
    unfinished = copy_of(runs.trained, tmp_path / "unfinished")
    (unfinished / "model.safetensors").unlink()
    assert "holds an unfinished run" in complaint("eval", unfinished)
    moved = copy_of(runs.trained, tmp_path / "moved")
    config = store.read_json(moved / "config.json")
    config["source"]["text"] = [str(tmp_path / "gone.txt")]
    store.write_json(moved / "config.json", config)
    assert "gone.txt is no longer there; give a text with --text" in complaint("eval", moved)


# ---- other endings


def test_interrupted_training_shows_how_to_go_on(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorsa_utils import training

    class Interrupted(training.Run):
        def train_step(self, batch: Any) -> None:
            if self.step == 3:
                raise KeyboardInterrupt
            super().train_step(batch)

    arguments = runs.from_text(tmp_path / "run", "--batch-size", "8")
    with monkeypatch.context() as patch:
        patch.setattr(training, "Run", Interrupted)
        assert lorsa(*arguments) == 130
    assert cli.INTERRUPTED["train"] in capsys.readouterr().err.splitlines()
    assert lorsa(*arguments, "--resume") == 0
    assert [row["step"] for row in training.read_log(tmp_path / "run")][-1] == 3000 // (8 * 31) + 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "some/file"), "Cannot read or write some/file (Permission denied)"),
        (MemoryError(), "The memory is full; use a smaller --batch-size"),
        (UserError("Do this."), "lorsa: Do this."),
    ],
)
def test_errors_become_sentences(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, complaint: Any
) -> None:
    def fail(force: bool) -> None:
        print("noise, which does not reach stdout")
        raise error

    monkeypatch.setattr("lorsa_utils.fetch.fetch_embedded_model", fail)
    assert sentence in complaint("fetch")


def test_fetch_checks_the_model_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, complaint: Any
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    store.write_json(tmp_path / "source.json", {"safetensors_sha256": store.sha256_file(weights)})
    monkeypatch.setattr("lorsa_utils.fetch.fetch_embedded_model", lambda force: tmp_path)
    assert answer("fetch") == {"path": str(tmp_path), "sha256": store.sha256_file(weights)}
    weights.write_bytes(b"other")
    assert "run `lorsa fetch --force`" in complaint("fetch")


def test_reproduce_shows_every_status_and_fails_when_a_notebook_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = [NotebookStatus("01_first", "done", 3.0), NotebookStatus("02_second", "failed", 1.0, "it failed")]
    monkeypatch.setattr("lorsa_utils.kit.reproduce.reproduce", lambda *args, **kwargs: statuses)
    assert lorsa("reproduce", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert [book["status"] for book in result["notebooks"]] == ["done", "failed"]
    assert result["profile"] == "laptop"
    del statuses[1]
    assert lorsa("reproduce", "--only", "01") == 0
    assert "01_first  done  3\n" in capsys.readouterr().out


def test_claims_are_told_with_numbers_and_verdicts(
    tmp_path: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write_json(tmp_path / "results.json", {"03_reconstruction": {"fvu_lorsa_mean": 0.25}})
    command = ("claims", "--profile", "smoke", "--run-dir", tmp_path)
    result = answer(*command)
    (row,) = [row for row in result["claims"] if row["at"] == "03_reconstruction/fvu_lorsa_mean"]
    assert (row["value"], row["low"], row["verdict"]) == (0.25, None, "holds")
    assert "statements" in result["count"]
    assert lorsa(*command) == 0
    assert "holds (FVU, mean over layers: 0.25)" in capsys.readouterr().out


# ---- circuit


@pytest.fixture
def byte_pairs(tmp_path: Path) -> Path:
    """Own prompts: single bytes as answers."""
    rng, rows = random.Random(1), []
    for _ in range(8):
        sides = {side: "".join(rng.choices("abcdefgh", k=6)) for side in ("clean", "corrupted")}
        rows.append(json.dumps(sides | {"answer": "x", "wrong": "y"}))
    store.write_text(tmp_path / "pairs.jsonl", "\n".join(rows))
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize("nodes", ["lorsa", "mhsa"])
def test_circuit_prints_curves(
    runs: Runs, byte_pairs: Path, tmp_path: Path, answer: Any, monkeypatch: pytest.MonkeyPatch, nodes: str
) -> None:
    asked = Mock()  # a random model is not able
    monkeypatch.setattr("lorsa_utils.heads.tasks.require_able", asked)
    out, graph = tmp_path / "curves.csv", tmp_path / "graph.json"
    options = ["--graph", graph, "--traced", "4"] if nodes == "lorsa" else []
    result = answer("circuit", runs.trained, "--prompts", byte_pairs, "--nodes", nodes, "--out", out, *options)
    assert (result["task"], result["layers"]) == ("pairs", [1])
    assert 0 <= result["accuracy"] <= 1
    asked.assert_called_once_with("pairs", pytest.approx(result["accuracy"], abs=1e-3))
    curves = pd.DataFrame(result["curves"])
    assert set(curves["nodes"]) == {nodes, f"random {nodes}"}
    assert {"size", "parameters", "faithfulness", "low", "high", "completeness"} <= set(curves)
    assert len(pd.read_csv(out)) == len(curves)
    assert all(set(row) == {"node", "effect"} for row in result["circuit"])
    if nodes == "lorsa":
        assert store.read_json(graph)["metadata"]["slug"] == "pairs"
        assert result["graph"]["traced"] == 4
    else:
        assert result["error_share"] == pytest.approx(0, abs=1e-6), "MHSA heads leave nothing over"


def test_circuit_of_what_has_none(runs: Runs, tmp_path: Path, complaint: Any) -> None:
    def about(*more: object) -> str:
        return str(complaint("circuit", runs.trained, *more))

    assert "No run folder was given" in complaint("circuit")
    assert "is given twice" in about(runs.trained)
    assert "not a sae" in about("--nodes", "sae")
    assert "check the path" in about("--prompts", tmp_path / "nowhere.jsonl")
    (tmp_path / "broken.jsonl").write_text("nothing")
    assert "not JSON lines" in about("--prompts", tmp_path / "broken.jsonl")
