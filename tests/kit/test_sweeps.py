"""A sweep goes on where it was killed and gives what it would have given; starts hold what they say."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from definitions import definitions
from scripts import run_script
from toys import D_HEAD, D_MODEL, ROTARY, ToySource, toy_site

from lorsa_utils import metrics, ops
from lorsa_utils.activations import ActivationBatch
from lorsa_utils.config import LorsaConfig, RotaryConfig, SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.initialize import CALIBRATION_SEQUENCES
from lorsa_utils.kit import sweeps
from lorsa_utils.kit.sweeps import FirstTokens, Sweep, Trial, kept_dimensions, lorsa_shape
from lorsa_utils.stats import t_interval
from lorsa_utils.training import Run, RunSpec, train_runs

SITE = toy_site(0)
SOURCE, HELD_OUT = ToySource(40, 12, layers=(0, 1)), ToySource(16, 12, seed=9)
TRAIN = TrainConfig(tokens=120, batch_size=3, lr=3e-3, aux_k=4, dead_window=30)
LORSA = lorsa_shape(SITE, 16, 4, 4)
SAE = SAEConfig(d_model=D_MODEL, n_features=24, k=4)
TRIAL = Trial("base", "base", LORSA, TRAIN)
CPU = torch.device("cpu")
NOTEBOOK = definitions("09_ablations", "verdict", "effects", "draw_changes")


def trials() -> list[Trial]:
    return [
        *TRIAL.over_seeds(2),
        replace(TRIAL, factor="start", level="random", start="random"),
        replace(TRIAL, factor="D_QK", level="2", module=lorsa_shape(SITE, 16, 4, 4, 2)),
        replace(TRIAL, factor="biases", level="none", biases=False),
        replace(TRIAL, factor="kind", level="SAE", module=SAE),
    ]


def sweep(file: Path, chosen: list[Trial] | None = None, workers: int = 2) -> Sweep:
    made = Sweep(trials() if chosen is None else chosen, SITE, SOURCE, HELD_OUT, 40, file)
    made.workers = workers
    return made


def same_but_for_times(one: pd.DataFrame, two: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"), check_exact=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return sweep(tmp_path_factory.mktemp("sweep") / "results.parquet").run()


# ---- data


def test_first_tokens_are_those_of_the_source() -> None:
    ours, theirs = list(FirstTokens(SOURCE, 1, 100).batches(5)), SOURCE.batches(5, layers=(1,))
    assert sum(int(batch.mask.sum()) for batch in ours) == 100
    for mine, other in zip(ours, theirs, strict=False):
        assert torch.equal(mine.inputs[1], other.inputs[1])
        assert torch.equal(mine.outputs[1], other.outputs[1])
        assert torch.equal(mine.tokens, other.tokens)
        assert not (mine.mask & ~other.mask).any()


def test_more_tokens_than_there_are_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"9,999 tokens are asked for and .* are cached"):
        sweep(Path("unused"), [replace(TRIAL, train=TRAIN.replace(tokens=9_999))])
    with pytest.raises(UserError, match=r"9,998 tokens are asked for and .* are cached"):
        Sweep([TRIAL], SITE, SOURCE, HELD_OUT, 9_998, Path("unused"))


# ---- sweep


def test_table_has_a_row_for_every_trial_in_order(finished: pd.DataFrame) -> None:
    labels = [(trial.factor, trial.level, trial.train.seed) for trial in trials()]
    assert list(finished[["factor", "level", "seed"]].itertuples(index=False, name=None)) == labels
    assert (finished["status"] == "done").all()
    assert (finished["tokens"] == 120).all()
    assert finished["fvu"].between(0, 2).all()
    assert finished.loc[finished["level"] == "SAE", "units"].tolist() == [24]
    assert finished["fvu"].nunique() == len(finished), "every run is another one"


@pytest.mark.parametrize("module", [LORSA, SAE], ids=["lorsa", "sae"])
def test_a_run_is_what_training_it_alone_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: LorsaConfig | SAEConfig
) -> None:
    monkeypatch.setattr(sweeps, "CALIBRATION_SEQUENCES", CALIBRATION_SEQUENCES)
    table = sweep(tmp_path / "r.parquet", [replace(TRIAL, module=module)]).run()
    with sweeps.one_thread_each(CPU):
        spec = RunSpec("alone", 0, module, TRAIN, tmp_path / "alone")
        (run,) = train_runs([spec], SOURCE, {0: SITE}, progress=False)
        held_out: Any = FirstTokens(HELD_OUT, 0, 40)
        alone = metrics.evaluate_activations({"m": (0, run.finished_module())}, held_out)["m"]
    assert table.loc[0, "fvu"] == alone["fvu"]
    assert table.loc[0, "dead_fraction"] == alone["dead_fraction"]


def test_runs_at_once_are_the_same_as_one_by_one(tmp_path: Path, finished: pd.DataFrame) -> None:
    same_but_for_times(sweep(tmp_path / "results.parquet", workers=1).run(), finished)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    begun = sweep(file, trials()[:4])
    assert begun.plan() == "4 runs, 0 of them finished before; 2 at a time"
    first = begun.run()
    again, more = sweep(file, trials()[:4]), sweep(file, trials()[2:5])
    assert again.plan() == "4 runs, 4 of them finished before; 2 at a time"
    pd.testing.assert_frame_equal(again.run(), first, check_exact=True)  # to the seconds it took
    assert [trial.factor for trial in more.pending().values()] == ["biases"]
    pd.testing.assert_frame_equal(more.run().iloc[:2], first.iloc[2:].reset_index(drop=True), check_exact=True)


def test_labels_do_not_make_another_run(tmp_path: Path) -> None:
    same = Trial("b", "2", LORSA, TRAIN.replace(log_every=7, init="random"))
    twice = sweep(tmp_path / "r.parquet", [TRIAL, same])
    assert len(twice.pending()) == 1
    table = twice.run()
    assert table["level"].tolist() == ["base", "2"]
    assert table["fvu"].nunique() == 1


def test_every_setting_and_other_text_make_another_run() -> None:
    chosen = [TRIAL, *(replace(TRIAL, train=TRAIN.replace(**change)) for change in ({"seed": 5}, {"lr": 1e-4}))]
    chosen += [replace(TRIAL, module=LORSA.replace(k=3)), replace(TRIAL, start="qk"), replace(TRIAL, biases=False)]
    keys = sweep(Path("unused"), chosen).keys
    other = Sweep([TRIAL], SITE, SOURCE, ToySource(16, 12, seed=2), 40, Path("unused")).keys
    assert len({*keys, *other}) == len(chosen) + 1


KILLED = """
import os, signal, sys
from pathlib import Path
import pandas as pd
from kit import test_sweeps
from lorsa_utils.training import Run

file, step = Path(sys.argv[1]), Run.train_step
def killed(run, batch):
    if file.exists() and len(pd.read_parquet(file)) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    step(run, batch)
Run.train_step = killed
test_sweeps.sweep(file, workers=1).run()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_kill_9_and_go_on(tmp_path: Path, finished: pd.DataFrame) -> None:
    file = tmp_path / "results.parquet"
    assert run_script(KILLED, file).returncode == -signal.SIGKILL
    saved = pd.read_parquet(file)
    assert 2 <= len(saved) < len(trials())
    (tmp_path / ".results.parquet.0123abcd.tmp").touch()  # as a kill in the middle of writing leaves it
    same_but_for_times(sweep(file).run(), finished)
    before, after = (table.set_index("key")["seconds"] for table in (saved, pd.read_parquet(file)))
    assert after[before.index].equals(before), "what was finished was not run again"
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps.tqdm, "update", Mock(side_effect=[None, None, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "r.parquet").run()
    assert len(pd.read_parquet(tmp_path / "r.parquet")) == 3


def test_a_diverged_run_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run.train_step

    def diverging(run: Run, batch: Any) -> None:
        if run.spec.train.lr > 1:
            with torch.no_grad():
                run.module.b_O.fill_(math.inf)
        whole(run, batch)

    monkeypatch.setattr(Run, "train_step", diverging)
    wanted = [TRIAL, Trial("lr", "9", LORSA, TRAIN.replace(lr=9.0))]
    table = sweep(tmp_path / "r.parquet", wanted).run()
    assert table["status"].tolist() == ["done", "diverged"]
    assert math.isnan(table["fvu"][1])
    changes = NOTEBOOK.effects(table, table[table["level"] == "base"])
    assert changes["verdict"].tolist() == ["no difference shown", "diverged"]
    assert len(sweep(tmp_path / "r.parquet", wanted).pending()) == 0


def test_damaged_data_is_no_divergence(tmp_path: Path) -> None:
    class Damaged(ToySource):
        asked = 0

        def batches(self, *arguments: Any, **options: Any) -> Iterator[ActivationBatch]:
            self.asked += 1
            if self.asked > 1:  # the first batch was for the start
                raise UserError("a shard is damaged")
            return super().batches(*arguments, **options)

    one = Sweep([replace(TRIAL, module=SAE)], SITE, Damaged(40, 12), HELD_OUT, 40, tmp_path / "r.parquet")
    with pytest.raises(UserError, match="a shard is damaged"):
        one.run()
    assert not (tmp_path / "r.parquet").exists()


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="x"), sweeps.one_thread_each(CPU):
        raise ValueError("x")
    assert torch.get_num_threads() == before


# ---- starts


def started(**changes: Any) -> Run:
    calibration = next(iter(SOURCE.batches(16, layers=(0,))))
    return sweeps.start_run(replace(TRIAL, **changes), SITE, calibration, CPU)


def test_starts_take_what_they_say() -> None:
    modules = {start: started(start=start).module for start in sweeps.STARTS}
    for name in ("W_Q", "W_K", "b_Q", "b_K", "W_O"):
        of = {start: module.get_parameter(name) for start, module in modules.items()}
        copying, other = ("ov", "qk") if name == "W_O" else ("qk", "ov")
        assert torch.equal(of[copying], of["both"])
        assert torch.equal(of[other], of["random"])
        assert not torch.equal(of["qk"], of["ov"])


def test_without_biases_they_stay_zero() -> None:
    run = started(biases=False)
    module: Any = run.module
    before = module.W_V.detach().clone()
    for batch in SOURCE.batches(3, layers=(0,)):
        run.train_step(batch)
    assert not any(bias.any() for bias in (module.b_Q, module.b_K, module.b_V))
    assert not torch.equal(before, module.W_V)
    assert module.b_O.any()


@pytest.mark.parametrize(
    "rotary", [ROTARY, ROTARY.replace(adjacent_pairs=True), ROTARY.replace(rope_type="linear", factor=3.0)]
)
def test_narrow_copies_are_a_part_of_the_scores(rotary: RotaryConfig) -> None:
    def rotated(x: torch.Tensor, width: int) -> torch.Tensor:
        tables = ops.rotary_tables(rotary.replace(rotary_dim=width), 6, dtype=torch.float64)
        return ops.apply_rotary(x, *tables, rotary.adjacent_pairs)

    kept = kept_dimensions(rotary.replace(rotary_dim=16), 24, 12)
    assert len(kept) == len(set(kept.tolist())) == 12
    x = torch.randn(1, 1, 6, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rotated(x[..., kept], 8), rotated(x, 16)[..., kept])


def test_a_narrow_start_copies_a_part_of_the_whole_one() -> None:
    whole = started().module
    narrow: Any = started(module=lorsa_shape(SITE, 16, 4, 4, D_HEAD // 2)).module
    kept = kept_dimensions(SITE.rotary, D_HEAD, D_HEAD // 2)
    assert torch.equal(narrow.W_Q, whole.W_Q[..., kept])
    assert narrow.attn_scale == pytest.approx(SITE.attn_scale * math.sqrt(2))


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start must be one of both, qk, ov, random, not 'copy'"):
        replace(TRIAL, start="copy")
    with pytest.raises(UserError, match="another rotation"):
        sweep(Path("unused"), [replace(TRIAL, module=LORSA.replace(rotary=RotaryConfig()))])
    with pytest.raises(UserError, match="width 3 cannot be cut from heads of width 4"):
        lorsa_shape(SITE, 16, 4, 4, 3)
    file = tmp_path / "r.parquet"
    for write in (lambda: file.write_text("something else"), lambda: pd.DataFrame({"a": [1]}).to_parquet(file)):
        write()
        with pytest.raises(UserError, match="is not the results file of a sweep"):
            sweep(file)


# ---- intervals


def test_mean_interval_by_hand() -> None:
    half = pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert [mean, high - mean, mean - low] == [2.0, half, half]
    assert math.isnan(t_interval([1.0])[1])
    assert math.isnan(t_interval([1.0, math.nan])[0])


def test_effects_are_paired_by_seed() -> None:
    def runs(level: str, *fvu: float) -> pd.DataFrame:
        return pd.DataFrame({"factor": "f", "level": level, "seed": [0, 1, 2], "fvu": fvu})

    base, up = runs("base", 0.30, 0.40, 0.50), runs("up", 0.359, 0.46, 0.561)[::-1]
    table = pd.concat([up, runs("same", 0.31, 0.39, 0.50), runs("down", 0.299, 0.399, 0.499)])
    effects = NOTEBOOK.effects(table, base).set_index("level")
    assert effects["verdict"].to_dict() == {"up": "worse", "same": "no difference shown", "down": "small"}
    assert effects.loc["up", "change"] == pytest.approx(15)  # percent of 0.4
    assert effects.loc["up", "low"] == pytest.approx(15 - 4.303 * 0.25 / math.sqrt(3), rel=1e-3)
    with pytest.raises(KeyError):
        NOTEBOOK.effects(up, base[base["seed"] < 2])


def test_changes_stand_under_their_factor_with_their_intervals() -> None:
    table = {"factor": ["G", "G", "start"], "level": ["32", "128", "random"], "change": [1.0, -2.0, 9.0]}
    effects = pd.DataFrame(table | {"low": [0.5, -4.0, 8.0], "high": [1.5, 0.0, 11.0]})
    figure = NOTEBOOK.draw_changes(effects, "t")
    places = [[list(side) for side in trace.y] for trace in figure.data]
    assert places == [[["G", "G"], ["32", "128"]], [["start"], ["random"]]]
    assert list(figure.data[0].error_x.array) == pytest.approx([0.5, 2.0])
    assert list(figure.data[0].error_x.arrayminus) == pytest.approx([0.5, 2.0])
