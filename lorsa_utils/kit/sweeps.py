"""Many small modules on the same tokens: grids of settings over seeds, every finished run kept in one Parquet file.

    data = HeldTokens(cache, layer, 40_000)                     # activations of one layer, in memory where they fit
    sweep = Sweep(trials, site, data, held_out, "ablations.parquet")
    print(sweep.plan())                                         # how many runs, how long, from a timed trial of the
                                                                first steps
    table = sweep.run()                                         # one row a trial; finished runs are never run again

Several runs go on at once, each on one thread, so that what a run computes does not depend on how many cores there are.
The Parquet file is written anew, whole or not at all, after every run: a killed sweep goes on with the runs that it
lacks. A run is known by a hash of its settings, its text and the code that trains it.

Modules are trained by the steps of `train.Run`, and thrown away once they are measured. Unlike `train.train_runs`
nothing of a run is saved before its end, as it takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils import store
from lorsa_utils.activations import ActivationBatch, ActivationSource, Part
from lorsa_utils.config import LorsaConfig, RotaryConfig, SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.initialize import initialize, match_scale
from lorsa_utils.lorsa import Lorsa, Scaling
from lorsa_utils.metrics import evaluate_activations
from lorsa_utils.models import AttentionSite
from lorsa_utils.stats import t_interval
from lorsa_utils.training import QK_PARAMETERS, Run, RunSpec, training_sources

Start = Literal["both", "qk", "ov", "random"]
STARTS: tuple[Start, ...] = ("both", "qk", "ov", "random")
"""What is taken from the MHSA: QK circuits and the heads' output space, QK alone, output space alone, nothing."""
CALIBRATION_SEQUENCES = 16
BIASES = ("b_Q", "b_K", "b_V", "b_E")
START_VERSION = 1
"""To be raised when `start_run` changes what it does: runs of before are then run again."""


# ---- data


class HeldTokens:
    """The first counted tokens of one layer's activations, in memory where they fit, else read from the source again and again."""

    def __init__(self, source: ActivationSource, layer: int, n_tokens: int, *, memory_share: float = 0.5) -> None:
        """Read the sequences that hold the first `n_tokens` counted tokens.

        Args:
            source: activations, as an `ActivationCache`.
            layer: the one that is replaced.
            n_tokens: counted tokens; exactly so many are used.
            memory_share: of the free memory that may be taken.

        Raises:
            UserError: the source does not hold the layer or so many tokens.
        """
        if layer not in source.layers:
            raise UserError(f"The activations are of layers {list(source.layers)}, not {layer}; cache that layer.")
        if not 0 < n_tokens <= source.n_tokens:
            raise UserError(
                f"{n_tokens:,} tokens are asked for and {source.n_tokens:,} are cached; cache more or ask for fewer."
            )
        self.source, self.layer, self.n_tokens = source, layer, n_tokens
        self.layers: tuple[int, ...] = (layer,)
        self.context, self.n_sequences = source.context, source.n_sequences
        self._held: ActivationBatch | None = None
        first = next(iter(source.batches(1, layers=(layer,))))
        about = first.inputs[layer].nbytes * 2 * math.ceil(n_tokens / max(1, int(first.mask.sum())))
        # Reading takes the pieces and the whole for a moment.
        if 2 * about <= memory_share * psutil.virtual_memory().available:
            self._held = _together(list(self._cut(source.batches(8, layers=(layer,)))), layer)
            self.n_sequences = len(self._held.mask)

    @property
    def n_bytes(self) -> int:
        """Bytes of activations in memory; 0 when they are read from the source."""
        return self._held.inputs[self.layer].nbytes * 2 if self._held else 0

    def first(self, n_tokens: int) -> HeldTokens:
        """The same activations up to fewer tokens; nothing is copied.

        Raises:
            UserError: there are not so many.
        """
        if not 0 < n_tokens <= self.n_tokens:
            raise UserError(
                f"A run asks for {n_tokens:,} tokens and the sweep holds {self.n_tokens:,}; hold more or ask for fewer."
            )
        part = object.__new__(HeldTokens)
        part.__dict__ |= self.__dict__ | {"n_tokens": n_tokens}
        return part

    def batches(
        self, batch_size: int, start: int = 0, layers: Sequence[int] | None = None, part: Part = (0, 1)
    ) -> Iterator[ActivationBatch]:
        """See `ActivationSource.batches`; one process, from the first sequence."""
        if start or part != (0, 1) or tuple(layers or self.layers) != self.layers:
            raise UserError(f"Held activations are read from the start, by one process, for layer {self.layer} alone.")
        held = self._held
        yield from self._cut(
            self._slices(held, batch_size) if held else self.source.batches(batch_size, layers=self.layers)
        )

    def identity(self) -> dict[str, Any]:
        """See `ActivationSource.identity`."""
        return {**self.source.identity(), "layer": self.layer}

    def _slices(self, held: ActivationBatch, batch_size: int) -> Iterator[ActivationBatch]:
        for first in range(0, self.n_sequences, batch_size):
            rows = slice(first, first + batch_size)
            inputs, outputs = ({self.layer: side[self.layer][rows]} for side in (held.inputs, held.outputs))
            yield ActivationBatch(held.tokens[rows], held.mask[rows], inputs, outputs, held.mask[rows])

    def _cut(self, batches: Iterator[ActivationBatch]) -> Iterator[ActivationBatch]:
        """Batches until the tokens are used up; what is over in the last one is masked."""
        left = self.n_tokens
        for batch in batches:
            if left <= 0:
                return
            batch = batch.up_to(left)
            left -= int(batch.mask.sum())
            yield batch


def _together(batches: Sequence[ActivationBatch], layer: int) -> ActivationBatch:
    tokens, mask, x, y = (
        torch.cat(side)
        for side in zip(
            *((batch.tokens, batch.mask, batch.inputs[layer], batch.outputs[layer]) for batch in batches), strict=True
        )
    )
    return ActivationBatch(tokens, mask, {layer: x}, {layer: y}, mask)


# ---- trials


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. Two trials that differ in their labels alone are one run."""

    factor: str
    """Label: what is varied."""
    level: str
    """Label: its value."""
    module: LorsaConfig | SAEConfig
    """Shape."""
    train: TrainConfig
    """How it is trained; the seed is that of the start, `init` is not read (see `start`)."""
    start: Start = "both"
    """What a Lorsa takes from the MHSA; SAEs have one start."""
    biases: bool = True
    """Whether read biases and QK biases are trained; otherwise they stay 0. The output bias always is."""

    def over_seeds(self, n: int) -> list[Trial]:
        """The trial with `n` seeds, starting from its own."""
        return [
            Trial(
                self.factor,
                self.level,
                self.module,
                self.train.replace(seed=self.train.seed + i),
                self.start,
                self.biases,
            )
            for i in range(n)
        ]

    def settings(self) -> dict[str, Any]:
        """What the run computes depends on, without text and code."""
        is_lorsa = isinstance(self.module, LorsaConfig)
        free = ("log_every", "save_every_seconds", "init")
        return {
            "module": {**self.module.to_dict(), "kind": self.module.kind},
            "train": {name: value for name, value in self.train.to_dict().items() if name not in free},
            "start": self.start if is_lorsa else "dictionary",
            "biases": self.biases,
        }

    def labels(self) -> dict[str, Any]:
        """Columns of the table that say what was run."""
        module = self.module
        row = {
            "factor": self.factor,
            "level": self.level,
            "k": module.k,
            "parameters": module.n_parameters,
            "seed": self.train.seed,
        }
        if isinstance(module, LorsaConfig):
            shape = {"groups": module.n_qk_heads, "group_size": module.group_size, "d_qk": module.d_qk}
            return row | {"kind": "lorsa", "units": module.n_ov_heads, "start": self.start} | shape
        return row | {
            "kind": module.kind,
            "units": module.n_features,
            "start": "dictionary",
            "groups": 0,
            "group_size": 0,
            "d_qk": 0,
        }


def lorsa_shape(site: AttentionSite, n_heads: int, n_qk: int, k: int, d_qk: int = 0) -> LorsaConfig:
    """A Lorsa for a layer, with queries and keys as wide as the MHSA's or narrower.

    A narrower one keeps every second (fourth, ...) frequency of the rotation: with the same base these are the
    frequencies of a rotation of that width, so that copied weights keep their meaning.

    Raises:
        UserError: the MHSA's width is not a multiple of d_qk, or its rotation cannot be thinned out so.
    """
    width = d_qk or site.d_head
    step = site.d_head // width if width else 0
    if not step or site.d_head % width or site.rotary.rotary_dim % (2 * step):
        raise UserError(
            f"Queries and keys of width {width} cannot be cut from heads of width {site.d_head}; choose a half, a quarter, ..."
        )
    config = Lorsa.config_for_site(site, n_heads, n_qk, k)
    rotary: RotaryConfig = site.rotary.replace(rotary_dim=site.rotary.rotary_dim // step)
    return config.replace(d_qk=width, rotary=rotary, attn_scale=site.attn_scale * step**0.5)


def kept_dimensions(rotary: RotaryConfig, d_head: int, d_qk: int) -> Tensor:
    """Dimensions of a head of width d_head that a narrower copy keeps, [d_qk], in the order in which its rotation pairs them."""
    step, half = d_head // d_qk, rotary.rotary_dim // 2
    pairs = torch.arange(0, half, step)
    turned = (
        torch.stack((2 * pairs, 2 * pairs + 1), dim=1).flatten()
        if rotary.adjacent_pairs
        else torch.cat((pairs, pairs + half))
    )
    return torch.cat((turned, torch.arange(rotary.rotary_dim, d_head, step)))


@torch.no_grad()
def start_run(run: Run, trial: Trial, site: AttentionSite, calibration: ActivationBatch) -> None:
    """Initialise a run as its trial says; see `STARTS`."""
    layer = run.spec.layer
    if isinstance(run.module, Lorsa):
        x, y = (side[layer].to(run.device, torch.float32) for side in (calibration.inputs, calibration.outputs))
        run.scaling = _start_lorsa(run.module, trial, site, x, y, calibration.mask.to(run.device))
    else:
        run.start(site, calibration)
    if not trial.biases:
        for name, parameter in run.module.named_parameters():
            if name in BIASES:
                parameter.zero_().requires_grad_(False)


def _start_lorsa(module: Lorsa, trial: Trial, site: AttentionSite, x: Tensor, y: Tensor, mask: Tensor) -> Scaling:
    config, seed = module.config, trial.train.seed
    if trial.start == "both" and config.d_qk == site.d_head:
        return initialize(module, site, x, y, mask, "mhsa", seed)
    scaling = initialize(module, site, x, y, mask, "random", seed)
    if trial.start == "random":
        return scaling
    copied = Lorsa(config.replace(d_qk=site.d_head, rotary=site.rotary, attn_scale=site.attn_scale)).to(x.device)
    initialize(copied, site, x, y, mask, "mhsa", seed)
    kept = kept_dimensions(site.rotary, site.d_head, config.d_qk)
    for name, parameter in module.named_parameters():
        source = copied.get_parameter(name)
        if name in QK_PARAMETERS and trial.start in ("both", "qk"):
            parameter.copy_(source[..., kept])
        elif name not in QK_PARAMETERS and trial.start in ("both", "ov"):
            parameter.copy_(source)
    match_scale(module, scaling.inputs(x), scaling.targets(y), mask)
    return scaling


def operations(module: LorsaConfig | SAEConfig, context: int) -> float:
    """Floating-point operations of one forward pass for one token; a training step counts three times as many."""
    d, k = module.d_model, module.k
    if isinstance(module, SAEConfig):
        return 2.0 * d * (module.n_features + k)
    width = max(module.d_qk, module.group_size)
    projections = 2 * d * (2 * module.n_qk_heads * module.d_qk + module.n_ov_heads + k)
    return float(projections + 2 * context / 2 * module.n_qk_heads * (module.d_qk + width))


# ---- sweeps


class Plan(NamedTuple):
    """What a sweep is about to do."""

    runs: int
    """Different runs."""
    done: int
    """Of them found in the file."""
    seconds: float
    """Estimate for the others."""
    timed: int
    """Training steps that were timed for it."""
    workers: int
    """Runs at once."""
    n_bytes: int
    """Activations in memory."""

    def __str__(self) -> str:
        where = (
            f"{self.n_bytes / 1e6:,.0f} MB of activations in memory"
            if self.n_bytes
            else "activations read from the disk"
        )
        text = f"{self.runs} runs, {self.done} of them finished before; {where}"
        if self.done == self.runs:
            return text
        return f"{text}; about {_duration(self.seconds)} for the others, {self.workers} at a time (from {self.timed} timed steps)"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


class Sweep:
    """Trials on one layer's activations and the file that keeps their results."""

    def __init__(
        self,
        trials: Sequence[Trial],
        site: AttentionSite,
        data: HeldTokens,
        held_out: HeldTokens,
        file: str | Path,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        """Check the trials and read what the file holds.

        Args:
            trials: what to run.
            site: the attention layer that is replaced.
            data: training activations; every run takes its first `train.tokens` tokens.
            held_out: activations that finished modules are measured on.
            file: Parquet file of results, one row a run; made when it is missing.
            device: where modules are trained.
            workers: runs at once; as many as torch has threads when 0, and one on a GPU.

        Raises:
            UserError: there are no trials, one of them cannot be run, or the file is damaged.
        """
        self.trials, self.site, self.data, self.held_out = list(trials), site, data, held_out
        self.file, self.device = Path(file), torch.device(device)
        self.workers = 1 if self.device.type != "cpu" else workers or torch.get_num_threads()
        if not self.trials:
            raise UserError("A sweep needs at least one trial.")
        for trial in self.trials:
            self._check(trial)
        identity = {
            "code": training_sources(),
            "start": START_VERSION,
            "train": data.identity(),
            "held_out": held_out.identity(),
        }
        identity["held_out_tokens"] = held_out.n_tokens
        self.keys = [store.sha256_json({**identity, **trial.settings()}) for trial in self.trials]
        self.rows: dict[str, dict[str, Any]] = read_results(self.file)

    def _check(self, trial: Trial) -> None:
        module, name = trial.module, f"Trial {trial.factor} {trial.level}"
        if module.d_model != self.site.d_model:
            raise UserError(
                f"{name} is for a width of {module.d_model}, the layer has {self.site.d_model}; use `lorsa_shape`."
            )
        if trial.start not in STARTS:
            raise UserError(f"{name}: start must be one of {', '.join(STARTS)}, not {trial.start!r}.")
        units = module.n_units
        if trial.train.k_start > units:
            raise UserError(
                f"{name}: k_start ({trial.train.k_start}) must not exceed the number of heads or features ({units})."
            )
        if isinstance(module, LorsaConfig) and trial.start != "random":
            wanted = lorsa_shape(self.site, module.n_ov_heads, module.n_qk_heads, module.k, module.d_qk)
            if (module.rotary, module.qk_norm) != (wanted.rotary, wanted.qk_norm):
                raise UserError(
                    f"{name} has another rotation than the layer, so nothing can be copied; use `lorsa_shape`."
                )
        self.data.first(trial.train.tokens)

    def pending(self) -> dict[str, Trial]:
        """Runs that the file does not hold: key to trial."""
        return {key: trial for key, trial in zip(self.keys, self.trials, strict=True) if key not in self.rows}

    def plan(self) -> Plan:
        """Count the runs and time the first steps of the smallest and the largest one of each kind."""
        todo, runs = list(self.pending().values()), len(set(self.keys))
        timed, seconds = 0, 0.0
        for is_lorsa in (True, False):
            kind = sorted((t for t in todo if isinstance(t.module, LorsaConfig) == is_lorsa), key=self._operations)
            if kind:
                ends = (
                    [kind[0], kind[-1]]
                    if self._step_operations(kind[-1]) > 1.2 * self._step_operations(kind[0])
                    else [kind[-1]]
                )
                timed += 2 * len(ends) * self.workers
                seconds += self._estimate(kind, ends)
        return Plan(runs, runs - len(todo), seconds, timed, self.workers, self.data.n_bytes + self.held_out.n_bytes)

    def _operations(self, trial: Trial) -> float:
        """Counted for a whole run: start, training, measuring."""
        calibration = CALIBRATION_SEQUENCES * self.data.context
        passes = 3 * trial.train.tokens + self.held_out.n_tokens + 2 * min(calibration, self.data.n_tokens)
        return operations(trial.module, self.data.context) * passes

    def _step_operations(self, trial: Trial) -> float:
        return 3 * operations(trial.module, self.data.context) * trial.train.batch_size * self.data.context

    def _estimate(self, trials: Sequence[Trial], ends: Sequence[Trial]) -> float:
        """Seconds for all trials of one kind: a step costs so much and so much for each operation, from the two timed ends."""
        cost = [(self._step_operations(trial), self._time_step(trial)) for trial in ends]
        if len(cost) == 1:
            per_step, per_operation = 0.0, cost[0][1] / cost[0][0]
        else:
            per_operation = max(0.0, (cost[1][1] - cost[0][1]) / (cost[1][0] - cost[0][0]))
            per_step = max(0.0, cost[0][1] - per_operation * cost[0][0])
        total = 0.0
        for trial in trials:
            steps = self._operations(trial) / self._step_operations(trial)
            total += steps * per_step + per_operation * self._operations(trial)
        return total / self.workers

    def _time_step(self, trial: Trial) -> float:
        """Seconds of a training step while all workers are busy with the same; the second and third one are timed."""

        def work() -> float:
            run = self._new_run(trial)
            batch = next(iter(self.data.batches(trial.train.batch_size)))
            run.scaling = Scaling(torch.zeros(trial.module.d_model, device=self.device), 1.0, 1.0)
            # Random weights will do: what a step costs does not depend on them.
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in run.module.parameters():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            run.train_step(batch)
            run.require_finite()  # waits for a GPU
            began = time.perf_counter()
            for _ in range(2):
                run.train_step(batch)
            run.require_finite()
            return (time.perf_counter() - began) / 2

        with one_thread_each(self.workers, self.device), ThreadPoolExecutor(self.workers) as pool:
            return max(future.result() for future in [pool.submit(work) for _ in range(self.workers)])

    def run(self, progress: bool = True) -> pd.DataFrame:
        """Run what is missing; a finished run is in the file at once.

        Returns:
            see `table`.
        """
        for leftover in self.file.parent.glob(f".{self.file.name}.*.tmp"):  # of a sweep that was killed while it wrote
            leftover.unlink(missing_ok=True)
        todo, stop = self.pending(), threading.Event()
        scale = {key: self._operations(trial) / 1e9 for key, trial in todo.items()}
        bar = tqdm(
            total=sum(scale.values()), unit="GFLOP", unit_scale=True, desc="sweep", disable=not progress or not todo
        )
        finished = 0
        with one_thread_each(self.workers, self.device), ThreadPoolExecutor(self.workers) as pool:
            # Longest first, so that the last run does not go on alone for long.
            order = sorted(todo, key=lambda key: -scale[key])
            futures: dict[Future[dict[str, Any]], str] = {
                pool.submit(self._measure, todo[key], stop): key for key in order
            }
            try:
                waiting = set(futures)
                while waiting:
                    ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in ready:
                        key = futures[future]
                        self.rows[key] = {
                            "key": key,
                            **future.result(),
                            "settings": json.dumps(todo[key].settings(), sort_keys=True),
                        }
                        write_results(self.file, self.rows)
                        finished += 1
                        bar.update(scale[key])
                        bar.set_postfix({"runs": f"{finished}/{len(todo)}"})
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
                bar.close()
        return self.table()

    def table(self) -> pd.DataFrame:
        """One row a trial that is finished, in the order of the trials.

        Returns:
            labels (`factor`, `level`, `kind`, `units`, `groups`, `group_size`, `d_qk`, `k`, `parameters`, `start`,
            `seed`) and results (`status`, done or diverged; `tokens`, `seconds`, and the keys of
            `metrics.Reconstruction.result`, NaN after divergence).
        """
        rows = [
            {
                **trial.labels(),
                **{name: value for name, value in self.rows[key].items() if name not in ("key", "settings")},
            }
            for key, trial in zip(self.keys, self.trials, strict=True)
            if key in self.rows
        ]
        return pd.DataFrame(rows)

    def _new_run(self, trial: Trial) -> Run:
        train = trial.train.replace(init="random")
        spec = RunSpec(f"{trial.factor} {trial.level}", self.data.layer, trial.module, train, self.file.parent)
        return Run(spec, self.data.identity(), self.device)

    @functools.cached_property
    def _calibration(self) -> ActivationBatch:
        return next(iter(self.data.batches(CALIBRATION_SEQUENCES)))

    def _measure(self, trial: Trial, stop: threading.Event) -> dict[str, Any]:
        """Train one module and measure it."""
        began = time.perf_counter()
        run = self._new_run(trial)
        start_run(run, trial, self.site, self._calibration)
        try:
            for batch in self.data.first(trial.train.tokens).batches(trial.train.batch_size):
                if stop.is_set():
                    raise KeyboardInterrupt
                run.train_step(batch)
            run.require_finite()
        except UserError:
            if not run.broken:
                raise
            return {"status": "diverged", "tokens": run.tokens_seen, "seconds": time.perf_counter() - began}
        module = run.finished_module()
        result = evaluate_activations({"module": (self.data.layer, module)}, self.held_out)["module"]
        result.pop("n_tokens")
        return {"status": "done", "tokens": run.tokens_seen, **result, "seconds": time.perf_counter() - began}


@contextlib.contextmanager
def one_thread_each(workers: int, device: torch.device) -> Iterator[None]:
    """One torch thread for each of several workers on a CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Finished runs of a results file: key to row; empty when there is no file.

    Raises:
        UserError: the file is not one of a sweep.
    """
    if not file.is_file():
        return {}
    try:
        rows = pd.read_parquet(file).to_dict("records")
        return {str(row["key"]): {str(name): value for name, value in row.items()} for row in rows}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} is not the results file of a sweep ({error}); move it away, and its runs are made again."
        ) from error


def write_results(file: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the results file, whole or not at all; rows are in the order of their keys."""
    with store.atomic_path(file) as temporary:
        pd.DataFrame([rows[key] for key in sorted(rows)]).to_parquet(temporary, index=False)


# ---- intervals


def effects(table: pd.DataFrame, base: pd.DataFrame, value: str = "fvu", least: float = 0.0) -> pd.DataFrame:
    """What every level changes against a base, seed by seed.

    Args:
        table: rows of `Sweep.table`.
        base: rows of the base, one a seed.
        value: the column that is compared; smaller is better.
        least: changes smaller than this share of the base's mean are called small however sure they are.

    Returns:
        one row for each factor and level: `mean` of the value, `change` against the base with the same seed, `low` and
        `high` of its 95 % interval over seeds, `seeds`, and `verdict`: `worse`, `better`, `no difference shown`,
        `small`, or `diverged`.

    Raises:
        UserError: a level has a seed that the base lacks.
    """
    reference = base.set_index("seed")[value]
    rows = []
    for (factor, level), part in table.groupby(["factor", "level"], sort=False):
        if missing := sorted(set(part["seed"]) - set(reference.index)):
            raise UserError(
                f"{factor} {level} has seed {missing[0]}, which the base has not; run both over the same seeds."
            )
        change, low, high = t_interval([float(row[value] - reference[row["seed"]]) for _, row in part.iterrows()])
        rows.append(
            {
                "factor": factor,
                "level": level,
                "mean": float(part[value].mean(skipna=False)),
                "change": change,
                "low": low,
            }
        )
        rows[-1] |= {
            "high": high,
            "seeds": len(part),
            "verdict": _verdict(change, low, high, least * float(reference.mean())),
        }
    return pd.DataFrame(rows)


def _verdict(change: float, low: float, high: float, least: float) -> str:
    if not math.isfinite(change):
        return "diverged"
    if not (low > 0 or high < 0):
        return "no difference shown"
    return "small" if abs(change) < least else "worse" if change > 0 else "better"
