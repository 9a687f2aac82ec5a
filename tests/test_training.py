"""Resuming is exact, runs do not touch each other, budgets are counted tokens, the last good state is never lost."""

import gc
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
from refusals import refused
from scripts import run_script
from toys import D_HEAD, D_MODEL, ROTARY, ToySource, toy_site

from lorsa_utils import store, training
from lorsa_utils.activations import ActivationBatch
from lorsa_utils.config import LorsaConfig, SAEConfig, TrainConfig
from lorsa_utils.lorsa import Lorsa, Scaling, load
from lorsa_utils.metrics import evaluate_activations
from lorsa_utils.training import (
    Run,
    RunSpec,
    kept_heads,
    learning_rate_factor,
    make_logger,
    prepare_runs,
    read_log,
    train_runs,
)

SITES = {0: toy_site(0), 1: toy_site(1)}
toy = partial(ToySource, 20, 12, layers=(0, 1))
SOURCE = toy()
LORSA = LorsaConfig(d_model=D_MODEL, n_ov_heads=32, n_qk_heads=4, d_qk=D_HEAD, k=4, rotary=ROTARY)
SAE = SAEConfig(d_model=D_MODEL, n_features=40, k=4)
TRAIN = TrainConfig(
    tokens=600, batch_size=3, lr=3e-3, warmup=0.1, decay=0.3, k_start=0, aux_k=0, dead_window=50, log_every=3
)
"""About 30 steps: 7 batches an epoch, the last of 2 sequences."""

VARIANTS: dict[str, tuple[LorsaConfig | SAEConfig, int, TrainConfig]] = {
    "lorsa": (LORSA, 0, TRAIN.replace(aux_k=6, k_start=32, k_warmup=0.5, clip=0.5)),
    "lorsa abs": (LORSA.replace(score="abs"), 1, TRAIN.replace(init="random")),
    "lorsa frozen": (LORSA, 0, TRAIN.replace(freeze_qk=True, aux_k=3)),
    "sae": (SAE, 1, TRAIN.replace(aux_k=5)),
    "transcoder": (SAEConfig(d_model=D_MODEL, n_features=40, k=4, kind="transcoder"), 0, TRAIN),
}


def spec(folder: Path, name: str = "lorsa", **changes: Any) -> RunSpec:
    module, layer, settings = VARIANTS[name]
    return RunSpec(name, layer, module, settings.replace(**changes), folder / name)


def go(specs: Sequence[RunSpec], source: Any = SOURCE, **options: Any) -> list[Run]:
    return train_runs(specs, source, SITES, progress=False, **options)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for seconds: the state's tensors and counters, the saved module, the log."""
    file = folder / "state" / "state.safetensors"
    counters = json.loads(store.read_tensor_metadata(file)["counters"])
    rows = read_log(folder)
    for timed in (counters, *rows):
        timed.pop("seconds")
    saved = folder / "model.safetensors"
    return {
        "tensors": {name: value.numpy().tobytes() for name, value in store.read_tensors(file).items()},
        "counters": counters,
        "rows": rows,
        "module": saved.read_bytes() if saved.is_file() else None,
    }


def assert_same_outcome(first: Path, second: Path, *names: str) -> None:
    for name in names:
        found, expected = outcome(first / name), outcome(second / name)
        for part in ("counters", "rows", "tensors", "module"):
            assert found[part] == expected[part], (name, part)


# ---- resume exactly


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, name: str) -> None:
    """Also in the middle of an epoch and between two lines of the log."""
    go([spec(tmp_path / "whole", name)])
    for steps, reached in ((1, 1), (6, 7), (8, 15)):
        runs = go([spec(tmp_path / "parts", name)], resume=reached > 1, stop_after_steps=steps)
        assert runs[0].step == reached
        assert not (tmp_path / "parts" / name / "model.safetensors").exists()
    for _ in range(2):  # a finished run stays as it is
        go([spec(tmp_path / "parts", name)], resume=True)
        assert_same_outcome(tmp_path / "parts", tmp_path / "whole", name)
    kinds = {part.rpartition(".")[2] for part in outcome(tmp_path / "whole" / name)["tensors"]}
    assert {"exp_avg", "exp_avg_sq", "step", "since_fired", "W_O"} <= kinds


def test_runs_in_one_pass_that_also_stop_apart_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    """As after a kill between the savings of two runs."""
    together = [spec(tmp_path / "together", name) for name in VARIANTS]
    go(together, stop_after_steps=2)
    for steps, one in zip((6, 9, 3), together, strict=False):
        go([one], resume=True, stop_after_steps=steps)
    go(together, resume=True)
    for name in VARIANTS:
        go([spec(tmp_path / "alone", name)])
    assert_same_outcome(tmp_path / "together", tmp_path / "alone", *VARIANTS)


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import test_training
from lorsa_utils import store

replace, savings = os.replace, 0
def killed_at_a_saving(source, target):
    global savings
    savings += str(target).endswith("state.safetensors")
    if savings == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
store.os.replace = killed_at_a_saving
test_training.go([test_training.spec(Path(sys.argv[1]), name, save_every_seconds=1e-9) for name in ("lorsa", "sae")])
"""


def test_kill_9_and_resume(tmp_path: Path) -> None:
    """Killed inside the saving of one of two runs: they are a step apart, and half a file lies beside the state."""
    killed = run_script(KILLED_RUN, tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(tmp_path.glob("killed/*/state/.*.tmp"))
    names = ("lorsa", "sae")
    assert [outcome(tmp_path / "killed" / name)["counters"]["step"] for name in names] == [9, 8]
    go([spec(tmp_path / "killed", name, save_every_seconds=1e-9) for name in names], resume=True)
    go([spec(tmp_path / "whole", name) for name in names])
    assert_same_outcome(tmp_path / "killed", tmp_path / "whole", *names)
    assert not list(tmp_path.glob("killed/*/state/.*.tmp"))


@pytest.mark.parametrize("moment", ["train_step", "_summed_over_processes", "_log"])
def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The signal comes when one of two runs has made its step and the other has not, or half of it."""
    names, calls = ("lorsa", "sae"), itertools.count(1)
    owner: Any = training if moment == "_log" else Run
    real = getattr(owner, moment)

    def pressed(*arguments: Any) -> Any:
        if next(calls) == (3 if moment == "_log" else 17):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, pressed)
        with pytest.raises(KeyboardInterrupt):
            go([spec(tmp_path / "parts", name) for name in names])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    assert [outcome(tmp_path / "parts" / name)["counters"]["step"] for name in names] == [9, 9]
    go([spec(tmp_path / "parts", name) for name in names], resume=True)
    go([spec(tmp_path / "whole", name) for name in names])
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole", *names)


# ---- refusals


def test_an_unfinished_run_is_neither_loaded_nor_overwritten_nor_resumed_with_other_settings(tmp_path: Path) -> None:
    go([spec(tmp_path)], stop_after_steps=2)
    with refused(r"model.safetensors does not exist"):
        load(tmp_path / "lorsa")
    before, same = outcome(tmp_path / "lorsa"), spec(tmp_path)
    for other, sentence in (
        (spec(tmp_path, lr=1.0), r"train\.lr = 0\.003, not 1\.0"),
        (spec(tmp_path, tokens=601), r"train\.tokens = 600, not 601"),
        (spec(tmp_path, seed=1), r"train\.seed = 0, not 1"),
        (replace(same, module=LORSA.replace(k=5)), r"module\.k = 4, not 5"),
        (replace(same, module=LORSA.replace(rotary=ROTARY.replace(theta=7.0))), r"module\.rotary\.theta"),
        (replace(same, layer=1), r"layer = 0, not 1"),
        (replace(same, module=SAE), r"was started with module\."),
    ):
        with refused(sentence):
            go([other], resume=True)
    with refused(r"source\.text_sha256"):
        go([same], toy(seed=1), resume=True)
    with refused(r"holds a run already; add --resume to continue it or choose another --out"):
        go([same])
    assert outcome(tmp_path / "lorsa") == before


def test_runs_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with refused(r"must have the same batch_size and tokens"):
        go([spec(tmp_path), spec(tmp_path, "sae", batch_size=4)])
    with refused(r"Two runs would write to"):
        go([spec(tmp_path), spec(tmp_path)])
    with refused(r"k_start \(33\) must not exceed the number of heads or features \(32\)"):
        go([spec(tmp_path, k_start=33)])
    empty = ToySource(4, 6)
    empty.n_tokens = 0
    with refused(r"not one token to train on"):
        go([spec(tmp_path)], empty)
    assert not list(tmp_path.glob("*/state"))


@pytest.mark.parametrize("damage", ["cut", "foreign", "no counters"])
def test_a_damaged_state_is_named(tmp_path: Path, damage: str) -> None:
    go([spec(tmp_path)], stop_after_steps=2)
    file = tmp_path / "lorsa" / "state" / "state.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "foreign":
        go([spec(tmp_path, "sae")], stop_after_steps=2)
        file.write_bytes((tmp_path / "sae" / "state" / "state.safetensors").read_bytes())
    else:
        store.write_tensors(file, store.read_tensors(file), {"counters": "{}"})
    with refused(r"state.safetensors (is damaged|does not belong to this run)"):
        go([spec(tmp_path)], resume=True)


class Spoiled(ToySource):
    """Gives one value that is not finite in sequence `row` from the second epoch on."""

    def __init__(self, row: int, value: float) -> None:
        super().__init__(20, 12, layers=(0, 1))
        self.row, self.value, self.epochs = row, value, 0

    def batches(self, batch_size: int, start: int = 0, *others: Any, **named: Any) -> Iterator[ActivationBatch]:
        self.epochs += start == 0 and batch_size < 20  # the calibration batch is not an epoch
        for number, batch in enumerate(super().batches(batch_size, start, *others, **named)):
            if self.epochs == 2 and start // batch_size + number == self.row // batch_size:
                for side in (*batch.inputs.values(), *batch.outputs.values()):
                    side[self.row % batch_size, 1, 3] = self.value
            yield batch


@pytest.mark.parametrize(("name", "value"), [("lorsa", math.nan), ("sae", math.inf)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path, name: str, value: float) -> None:
    sentence = rf"loss of {name} is no longer finite at step 9; the last good state is kept in"
    with refused(sentence):
        go([spec(tmp_path / "spoiled", name)], Spoiled(7, value))
    go([spec(tmp_path / "clean", name)], toy(), stop_after_steps=9)
    assert_same_outcome(tmp_path / "spoiled", tmp_path / "clean", name)
    state = store.read_tensors(tmp_path / "spoiled" / name / "state" / "state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


# ---- budgets, batches, schedules


@pytest.mark.parametrize(
    ("tokens", "batch_size"),
    [(1, 3), (37, 1), (SOURCE.n_tokens, 32), (SOURCE.n_tokens, 3), (3 * SOURCE.n_tokens + 5, 7)],
)
def test_the_budget_is_met_exactly_in_counted_tokens(tmp_path: Path, tokens: int, batch_size: int) -> None:
    run = go([spec(tmp_path, "sae", tokens=tokens, batch_size=batch_size)])[0]
    assert run.tokens_seen == tokens
    row = read_log(tmp_path / "sae")[-1]
    assert row["tokens"] == tokens
    assert all(math.isfinite(value) for value in row.values())


def test_epochs_follow_each_other_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Mock(side_effect=Run.train_step)
    monkeypatch.setattr(Run, "train_step", lambda run, batch: watched(run, batch))
    go([spec(tmp_path, "sae", tokens=2 * SOURCE.n_tokens)])
    given = torch.cat([call.args[1].tokens[:, 0] for call in watched.call_args_list])
    assert torch.equal(given, SOURCE.tokens[:, 0].repeat(2))


def test_tokens_that_do_not_count_neither_train_nor_reach_the_start(tmp_path: Path) -> None:
    spoiled = toy()
    padding = ~spoiled.mask & (torch.arange(12) > 0)
    for side in (spoiled.inputs, spoiled.outputs):
        for values in side.values():
            values[padding] = 100.0
    for name in VARIANTS:
        clean = go([spec(tmp_path / "clean", name, tokens=300)])[0]
        other = go([spec(tmp_path / "spoiled", name, tokens=300)], spoiled)[0]
        for parameter, expected in zip(other.module.parameters(), clean.module.parameters(), strict=True):
            assert torch.allclose(parameter, expected, atol=1e-4), name
        assert torch.equal(other.since_fired, clean.since_fired)
        assert other.scaling[1:] == pytest.approx(clean.scaling[1:], rel=1e-5)
        assert torch.allclose(other.scaling.input_mean, clean.scaling.input_mean, atol=1e-5)


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.0, 0.0), (0.025, 0.5), (0.05, 1.0), (0.5, 1.0), (0.8, 1.0), (0.9, 0.5), (0.95, 0.25), (1.0, 0.0)],
)
def test_learning_rate_by_hand(progress: float, factor: float) -> None:
    assert learning_rate_factor(progress, warmup=0.05, decay=0.2) == pytest.approx(factor)
    assert learning_rate_factor(progress, 0.0, 0.0) == 1.0


def test_kept_heads_by_hand() -> None:
    """From 4096 to 64 is a factor 2^6: one halving each sixth of the warm-up."""
    found = [kept_heads(0.2 * step / 6, 64, 4096, 0.2) for step in range(7)]
    assert found == [4096, 2048, 1024, 512, 256, 128, 64]
    assert kept_heads(0.9, 64, 4096, 0.2) == kept_heads(0.0, 64, 0, 0.2) == kept_heads(0.0, 64, 4096, 0.0) == 64
    assert all(64 <= kept_heads(step / 1000, 64, 4096, 0.2) <= 4096 for step in range(1001))


def test_schedules_run_by_tokens_not_by_steps(tmp_path: Path) -> None:
    """Half the batch size takes twice the steps, and rate and k are the same after the same tokens."""
    rows, schedule = {}, {"tokens": 1000, "log_every": 1, "k_start": 32, "k_warmup": 0.5, "warmup": 0.3}
    for batch_size in (2, 4):
        run = spec(tmp_path / str(batch_size), batch_size=batch_size, **schedule)
        go([run], ToySource(20, 12, padded=False))
        rows[batch_size] = {row["tokens"]: row for row in read_log(run.folder)}
    common = sorted(set(rows[2]) & set(rows[4]))
    assert len(common) > 15
    for tokens in common:
        assert rows[2][tokens]["lr"] == pytest.approx(rows[4][tokens]["lr"], abs=0.04 * TRAIN.lr)
    kept = [row["k"] for row in rows[2].values()]
    assert kept[0] == 32
    assert kept == sorted(kept, reverse=True)
    assert all(row["k"] == 4 for tokens, row in rows[2].items() if tokens > 522)
    assert all(row["k"] > 4 for tokens, row in rows[2].items() if tokens < 400)
    rates = [row["lr"] for row in rows[2].values()]
    assert max(rates) == TRAIN.lr
    assert 0 < rates[0] < 0.2 * TRAIN.lr
    assert 0 < rates[-1] < 0.2 * TRAIN.lr


def test_the_log_says_what_happened(tmp_path: Path) -> None:
    """Its FVU is the module's own error over the same tokens, computed here from the first step."""
    run = prepare_runs([spec(tmp_path, "sae", log_every=1, aux_k=0)], SOURCE, SITES)[0]
    batch = next(iter(SOURCE.batches(3)))
    y = run.scaling.targets(batch.outputs[1])
    result = run.module(run.scaling.inputs(batch.outputs[1]))
    error, counted = (result.y - y)[batch.mask].detach(), y[batch.mask]
    run.train_step(batch)
    row = run.recent_metrics()
    deviation = (counted - counted.mean(0)).square().sum()
    assert row["fvu"] == pytest.approx(float(error.square().sum() / deviation), rel=1e-4)
    assert row["loss"] == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert row["l0"] == pytest.approx(float((result.values[batch.mask] != 0).sum() / batch.mask.sum()))
    assert (row["step"], row["tokens"]) == (1, int(batch.mask.sum()))


# ---- what is learnt


@pytest.mark.parametrize("name", VARIANTS)
def test_training_lowers_the_error(tmp_path: Path, name: str) -> None:
    run = prepare_runs([spec(tmp_path / "start", name)], SOURCE, SITES)[0]
    before = evaluate_activations({"m": (run.spec.layer, run.finished_module())}, SOURCE)["m"]["fvu"]
    go([spec(tmp_path / "end", name, tokens=3000, k_start=0)])
    after = evaluate_activations({"m": (run.spec.layer, load(tmp_path / "end" / name))}, SOURCE)["m"]["fvu"]
    assert after < 0.8 * before


@pytest.mark.parametrize("name", VARIANTS)
def test_the_saved_module_takes_raw_activations(tmp_path: Path, name: str) -> None:
    run = go([spec(tmp_path, name)])[0]
    saved = load(tmp_path / name)
    batch = next(iter(SOURCE.batches(20)))
    raw = saved.input_from(batch.inputs[run.spec.layer], batch.outputs[run.spec.layer])
    trained, loaded = run.module(run.scaling.inputs(raw)), saved(raw)
    assert abs(run.scaling.input_scale - 1) > 0.1
    assert run.scaling.input_mean.abs().max() > 0.01
    assert torch.allclose(loaded.y, trained.y / run.scaling.output_scale, atol=1e-4)
    assert torch.equal(loaded.indices.sort(-1).values[batch.mask], trained.indices.sort(-1).values[batch.mask])
    assert torch.allclose(saved.W_O.norm(dim=1), torch.ones(saved.n_units), atol=1e-5)
    config = store.read_json(tmp_path / name / "config.json")
    assert config["train"] == json.loads(json.dumps(run.spec.train.to_dict()))
    assert config["source"] == SOURCE.identity()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_frozen_qk_stays_and_the_rest_moves(tmp_path: Path, qk_norm: bool) -> None:
    module = LORSA.replace(qk_norm=qk_norm)
    frozen = RunSpec("frozen", 0, module, TRAIN.replace(freeze_qk=True, init="random"), tmp_path / "frozen")
    run = prepare_runs([frozen], SOURCE, SITES)[0]
    before = {name: parameter.clone() for name, parameter in run.module.named_parameters()}
    run = go([frozen], resume=True)[0]
    for name, parameter in run.module.named_parameters():
        is_qk = name in ("W_Q", "W_K", "b_Q", "b_K", "q_norm", "k_norm")
        assert torch.equal(parameter, before[name]) == is_qk, name
    free = go([RunSpec("free", 0, module, TRAIN.replace(init="random"), tmp_path / "free")])[0]
    assert isinstance(free.module, Lorsa)
    assert not torch.equal(free.module.W_Q, before["W_Q"])


class Axes(ToySource):
    """Tokens that are one of 8 axes each; their SAE below has one feature an axis, the last one shadowed."""

    def __init__(self) -> None:
        super().__init__(16, 12, padded=False)
        axes = torch.randint(0, 8, (16, 12), generator=torch.Generator().manual_seed(0))
        self.outputs[0] = 4 * torch.nn.functional.one_hot(axes, D_MODEL).float()


def shadowed(folder: Path, aux_k: int) -> Run:
    """Feature 7 would be right for axis 7, but feature 0 always scores higher there: it never fires, never learns."""
    settings = TrainConfig(
        tokens=2000, batch_size=4, lr=3e-3, aux_k=aux_k, aux_weight=1.0, dead_window=60, warmup=0.0, decay=0.0
    )
    run = prepare_runs([RunSpec("sae", 0, SAEConfig(D_MODEL, 8, 1), settings, folder)], Axes(), SITES)[0]
    run.scaling = Scaling(torch.zeros(D_MODEL), 1.0, 1.0)  # the axes stay where they are
    module: Any = run.module
    with torch.no_grad():
        module.W_O.copy_(torch.eye(8, D_MODEL))
        module.W_E.copy_(module.W_O)[7] *= 0.05
        module.b_E.zero_()[0] = 0.5
        module.b_O.zero_()
    return run


def test_aux_k_revives_a_dead_feature(tmp_path: Path) -> None:
    for aux_k in (0, 1):
        run = shadowed(tmp_path / str(aux_k), aux_k)
        before = run.module.W_O[7].clone()
        while run.progress < 1:
            for batch in Axes().batches(4):
                run.train_step(batch)
        assert (int(run.since_fired[7]) < 60) == (aux_k == 1)
        assert torch.equal(run.module.W_O[7], before) == (aux_k == 0)


def test_aux_k_trains_dead_units_alone(tmp_path: Path) -> None:
    """One step with and without: live units get the same gradient, the dead one gets one only with AuxK."""
    gradients = []
    for aux_k in (0, 1):
        run = shadowed(tmp_path / str(aux_k), aux_k)
        run.since_fired[7] = 1000
        run.train_step(next(iter(Axes().batches(4))))
        assert run.module.W_O.grad is not None
        gradients.append(run.module.W_O.grad.clone())
    assert torch.allclose(gradients[0][:7], gradients[1][:7], atol=1e-7)
    assert gradients[0][7].abs().max() == 0
    assert gradients[1][7].abs().max() > 0


# ---- memory, loggers


def test_memory_does_not_grow_with_steps(tmp_path: Path) -> None:
    """After the first rows neither the number of tensors nor the process grows; one step's activations are 4 MB."""
    wide = SAEConfig(d_model=D_MODEL, n_features=16384, k=4)
    source = ToySource(40, 16, padded=False)
    settings = TRAIN.replace(tokens=40 * 4 * 15, batch_size=4, log_every=5, aux_k=8)
    tensors, resident = [], []

    def watch(name: str, row: Mapping[str, float]) -> None:
        gc.collect()
        tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        resident.append(psutil.Process().memory_info().rss)

    go([RunSpec("wide", 0, wide, settings, tmp_path / "wide")], source, logger=watch)
    assert len(tensors) == 8
    assert max(tensors[2:]) <= tensors[1]
    assert max(resident[2:]) - resident[1] < 60e6


def test_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_logger("jsonl", tmp_path) is None
    with refused(r"logger must be jsonl, tensorboard or wandb, not 'mlflow'"):
        make_logger("mlflow", tmp_path)
    for kind, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with refused(rf"'{kind}' needs a package that is missing .* pip install {kind}"):
            make_logger(kind, tmp_path)


def test_a_logger_gets_the_rows_of_every_run(tmp_path: Path) -> None:
    seen: dict[str, list[dict[str, float]]] = {"lorsa": [], "sae": []}
    go([spec(tmp_path, name) for name in seen], logger=lambda name, row: seen[name].append(dict(row)))
    for name, rows in seen.items():
        assert rows == read_log(tmp_path / name)
        assert len(rows) > 5
    with refused(r"has no metrics.jsonl; give the folder of a run"):
        read_log(tmp_path)
