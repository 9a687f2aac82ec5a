"""Many small modules on the same tokens: settings over seeds, every finished run kept in one Parquet file.

    data = HeldTokens(cache, layer, 40_000)
    sweep = Sweep(trials, site, data, held_out, "ablations.parquet")
    print(sweep.plan())
    table = sweep.run()

Runs go in parallel, each on one thread, so that results do not depend on the number of cores. The file is rewritten
atomically after every run, so a killed sweep resumes with the runs it lacks. A run is known by a hash of its settings,
its text and the code that trains it. Unlike in `training.train_runs`, nothing of a run is saved before its end, as it
takes seconds, and its module is discarded once measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

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
from lorsa_utils.training import QK_PARAMETERS, Run, RunSpec, training_sources

Start = Literal["both", "qk", "ov", "random"]
"""What is taken from the MHSA: QK circuits and the heads' output space, QK alone, output space alone, nothing."""
STARTS: tuple[Start, ...] = get_args(Start)
CALIBRATION_SEQUENCES = 16
BIASES = ("b_Q", "b_K", "b_V", "b_E")
START_VERSION = 1
"""Raise it when `start_run` changes what it does: earlier runs are then run again."""


# ---- data


def first_tokens(batches: Iterator[ActivationBatch], n_tokens: int) -> Iterator[ActivationBatch]:
    """Batches up to `n_tokens` counted tokens; the rest of the last batch is masked."""
    left = n_tokens
    for batch in batches:
        if left <= 0:
            return
        batch = batch.up_to(left)
        left -= int(batch.mask.sum())
        yield batch


class HeldTokens:
    """The first counted tokens of one layer's activations, in memory where they fit."""

    def __init__(self, source: ActivationSource, layer: int, n_tokens: int, *, memory_share: float = 0.5) -> None:
        """Read the sequences that hold the first `n_tokens` counted tokens; `memory_share` is of the free memory.

        Raises:
            UserError: the source does not hold the layer or that many tokens.
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
        self._held: list[Tensor] | None = None  # tokens, mask, inputs, outputs
        first = next(iter(source.batches(1, layers=self.layers)))
        n_bytes = first.inputs[layer].nbytes * 2 * math.ceil(n_tokens / max(1, int(first.mask.sum())))
        if 2 * n_bytes <= memory_share * psutil.virtual_memory().available:  # it is briefly held twice
            pieces = [
                (batch.tokens, batch.mask, batch.inputs[layer], batch.outputs[layer])
                for batch in first_tokens(source.batches(8, layers=self.layers), n_tokens)
            ]
            self._held = [torch.cat(tensors) for tensors in zip(*pieces, strict=True)]
            self.n_sequences = len(self._held[0])

    @property
    def n_bytes(self) -> int:
        """Bytes of activations in memory; 0 when read from the source."""
        return self._held[2].nbytes * 2 if self._held else 0

    def batches(
        self, batch_size: int, start: int = 0, layers: Sequence[int] | None = None, part: Part = (0, 1)
    ) -> Iterator[ActivationBatch]:
        """As `ActivationSource.batches`, for one process and from the first sequence."""
        if start or part != (0, 1) or tuple(layers or self.layers) != self.layers:
            raise UserError(f"Held activations are read from the start, by one process, for layer {self.layer} alone.")
        if self._held is None:
            yield from first_tokens(self.source.batches(batch_size, layers=self.layers), self.n_tokens)
            return
        for tokens, mask, x, y in zip(*(tensor.split(batch_size) for tensor in self._held), strict=True):
            yield ActivationBatch(tokens, mask, {self.layer: x}, {self.layer: y}, mask)

    def identity(self) -> dict[str, Any]:
        """As `ActivationSource.identity`, with the layer."""
        return {**self.source.identity(), "layer": self.layer}


# ---- trials


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. Trials that differ only in their labels are one run."""

    factor: str
    """Label: what is varied."""
    level: str
    """Label: its value."""
    module: LorsaConfig | SAEConfig
    train: TrainConfig
    """Its seed is that of the start; `init` is not read (see `start`)."""
    start: Start = "both"
    """Of a Lorsa; SAEs have one start."""
    biases: bool = True
    """Whether read and QK biases are trained; otherwise they stay 0. The output bias is always trained."""

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise UserError(f"start must be one of {', '.join(STARTS)}, not {self.start!r}.")

    def over_seeds(self, n: int) -> list[Trial]:
        """The trial with `n` seeds, from its own on."""
        return [replace(self, train=self.train.replace(seed=self.train.seed + i)) for i in range(n)]

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, besides text and code."""
        free = ("log_every", "save_every_seconds", "init")
        return {
            "module": {**self.module.to_dict(), "kind": self.module.kind},
            "train": {name: value for name, value in self.train.to_dict().items() if name not in free},
            "start": self.start if isinstance(self.module, LorsaConfig) else "dictionary",
            "biases": self.biases,
        }

    def labels(self) -> dict[str, Any]:
        """Columns of the table that say what was run."""
        module = self.module
        row = {"factor": self.factor, "level": self.level, "k": module.k, "parameters": module.n_parameters}
        row |= {"seed": self.train.seed, "kind": module.kind, "units": module.n_units}
        if isinstance(module, LorsaConfig):
            shape = {"groups": module.n_qk_heads, "group_size": module.group_size, "d_qk": module.d_qk}
            return row | {"start": self.start} | shape
        return row | {"start": "dictionary", "groups": 0, "group_size": 0, "d_qk": 0}


def lorsa_shape(site: AttentionSite, n_heads: int, n_qk: int, k: int, d_qk: int = 0) -> LorsaConfig:
    """A Lorsa for a layer, with queries and keys as wide as the MHSA's (`d_qk` 0) or narrower.

    A narrower one keeps every second (fourth, ...) frequency of the rotation: with the same base these are the
    frequencies of a rotation of that width, so copied weights keep their meaning.

    Raises:
        UserError: the MHSA's width is not a multiple of d_qk, or its rotation cannot be thinned out so.
    """
    width = d_qk or site.d_head
    step = site.d_head // width
    if not step or site.d_head % width or site.rotary.rotary_dim % (2 * step):
        raise UserError(
            f"Queries and keys of width {width} cannot be cut from heads of width {site.d_head}; "
            "choose a half, a quarter, ..."
        )
    rotary = site.rotary.replace(rotary_dim=site.rotary.rotary_dim // step)
    config = Lorsa.config_for_site(site, n_heads, n_qk, k)
    return config.replace(d_qk=width, rotary=rotary, attn_scale=site.attn_scale * step**0.5)


def kept_dimensions(rotary: RotaryConfig, d_head: int, d_qk: int) -> Tensor:
    """Dimensions of a head that a copy of width d_qk keeps, [d_qk], in the order of its rotation's pairs."""
    step, half = d_head // d_qk, rotary.rotary_dim // 2
    pairs = torch.arange(0, half, step)
    adjacent = torch.stack((2 * pairs, 2 * pairs + 1), dim=1).flatten()
    turned = adjacent if rotary.adjacent_pairs else torch.cat((pairs, pairs + half))
    return torch.cat((turned, torch.arange(rotary.rotary_dim, d_head, step)))


@torch.no_grad()
def start_run(run: Run, trial: Trial, site: AttentionSite, calibration: ActivationBatch) -> None:
    """Initialise a run as its trial says."""
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
    whole = Lorsa(config.replace(d_qk=site.d_head, rotary=site.rotary, attn_scale=site.attn_scale)).to(x.device)
    initialize(whole, site, x, y, mask, "mhsa", seed)
    kept = kept_dimensions(site.rotary, site.d_head, config.d_qk)
    for name, parameter in module.named_parameters():
        source = whole.get_parameter(name)
        if name in QK_PARAMETERS and trial.start in ("both", "qk"):
            parameter.copy_(source[..., kept])
        elif name not in QK_PARAMETERS and trial.start in ("both", "ov"):
            parameter.copy_(source)
    match_scale(module, scaling.inputs(x), scaling.targets(y), mask)
    return scaling


# ---- sweeps


class Sweep:
    """Trials on one layer's activations, and their results file."""

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

        Every run takes the first `train.tokens` tokens of `data` and is measured on `held_out`. `file` is Parquet, one
        row per run. `workers` runs go at once; as many as torch has threads when 0, and always one on a GPU.

        Raises:
            UserError: a trial asks for more tokens or another rotation than there is, or the file is damaged.
        """
        self.trials, self.site, self.data, self.held_out = list(trials), site, data, held_out
        self.file, self.device = Path(file), torch.device(device)
        self.workers = 1 if self.device.type != "cpu" else workers or torch.get_num_threads()
        for trial in self.trials:
            self._check(trial)
        identity = {"code": training_sources(), "start": START_VERSION, "held_out_tokens": held_out.n_tokens}
        identity |= {"train": data.identity(), "held_out": held_out.identity()}
        self.keys = [store.sha256_json({**identity, **trial.settings()}) for trial in self.trials]
        self.rows: dict[str, dict[str, Any]] = read_results(self.file)

    def _check(self, trial: Trial) -> None:
        module = trial.module
        if trial.train.tokens > self.data.n_tokens:
            raise UserError(
                f"A run asks for {trial.train.tokens:,} tokens and the sweep holds {self.data.n_tokens:,}; "
                "hold more or ask for fewer."
            )
        if isinstance(module, LorsaConfig) and trial.start != "random":
            shape = lorsa_shape(self.site, module.n_ov_heads, module.n_qk_heads, module.k, module.d_qk)
            if (module.rotary, module.qk_norm) != (shape.rotary, shape.qk_norm):
                raise UserError(
                    f"Trial {trial.factor} {trial.level} has another rotation than the layer, so nothing can be "
                    "copied; use `lorsa_shape`."
                )

    def pending(self) -> dict[str, Trial]:
        """Runs missing from the file: key to trial."""
        return {key: trial for key, trial in zip(self.keys, self.trials, strict=True) if key not in self.rows}

    def plan(self) -> str:
        """How many runs, how many of them finished before, and where activations are."""
        n_runs, n_bytes = len(set(self.keys)), self.data.n_bytes + self.held_out.n_bytes
        where = f"{n_bytes / 1e6:,.0f} MB of activations in memory" if n_bytes else "activations read from the disk"
        done = f"{n_runs - len(self.pending())} of them finished before"
        return f"{n_runs} runs, {done}; {self.workers} at a time, {where}"

    def run(self, progress: bool = True) -> pd.DataFrame:
        """Run what is missing, saving each run at once; returns `table`."""
        for leftover in self.file.parent.glob(f".{self.file.name}.*.tmp"):  # of a sweep killed while writing
            leftover.unlink(missing_ok=True)
        todo, stop = self.pending(), threading.Event()
        # Longest first, so that no long run is left alone at the end.
        order = sorted(todo, key=lambda key: -todo[key].module.n_parameters * todo[key].train.tokens)
        bar = tqdm(total=len(todo), unit="run", desc="sweep", disable=not progress or not todo)
        with one_thread_each(self.device), ThreadPoolExecutor(self.workers) as pool, bar:
            futures = {pool.submit(self._measure, todo[key], stop): key for key in order}
            try:
                for future in as_completed(futures):
                    key = futures[future]
                    settings = json.dumps(todo[key].settings(), sort_keys=True)
                    self.rows[key] = {"key": key, **future.result(), "settings": settings}
                    write_results(self.file, self.rows)
                    bar.update()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        return self.table()

    def table(self) -> pd.DataFrame:
        """One row per finished trial, in the order of the trials.

        Columns are those of `Trial.labels`, `status` (done or diverged), `tokens`, `seconds` and the keys of
        `metrics.Reconstruction.result`, NaN after divergence.
        """
        finished = [
            (trial, self.rows[key]) for key, trial in zip(self.keys, self.trials, strict=True) if key in self.rows
        ]
        rows = pd.DataFrame([trial.labels() | row for trial, row in finished])
        return rows.drop(columns=["key", "settings"], errors="ignore")

    @functools.cached_property
    def _calibration(self) -> ActivationBatch:
        return next(iter(self.data.batches(CALIBRATION_SEQUENCES)))

    def _measure(self, trial: Trial, stop: threading.Event) -> dict[str, Any]:
        began, train = time.perf_counter(), trial.train.replace(init="random")
        spec = RunSpec(f"{trial.factor} {trial.level}", self.data.layer, trial.module, train, self.file.parent)
        run = Run(spec, self.data.identity(), self.device)
        start_run(run, trial, self.site, self._calibration)
        try:
            for batch in first_tokens(self.data.batches(train.batch_size), train.tokens):
                if stop.is_set():
                    raise KeyboardInterrupt
                run.train_step(batch)
            run.require_finite()
        except UserError:
            if not run.broken:
                raise
            return {"status": "diverged", "tokens": run.tokens_seen, "seconds": time.perf_counter() - began}
        module = {"module": (self.data.layer, run.finished_module())}
        result = evaluate_activations(module, self.held_out)["module"]
        del result["n_tokens"]
        return {"status": "done", "tokens": run.tokens_seen, **result, "seconds": time.perf_counter() - began}


@contextlib.contextmanager
def one_thread_each(device: torch.device) -> Iterator[None]:
    """One torch thread per worker on a CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Finished runs of a results file: key to row; empty without a file.

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
    """Write the results file atomically, sorted by key."""
    with store.atomic_path(file) as temporary:
        pd.DataFrame([rows[key] for key in sorted(rows)]).to_parquet(temporary, index=False)
