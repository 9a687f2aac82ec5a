"""Many small modules on the same tokens: settings over seeds, every finished run kept in one Parquet file.

Runs go in parallel, each on one thread, so that results do not depend on the number of cores. The file is rewritten
atomically after every run, so a killed sweep resumes with the runs it lacks. A run is known by a hash of its settings,
its text and the code that trains it. Unlike in `training.train_runs`, nothing of a run is saved before its end, as it
takes seconds, and its module is discarded once measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils import store
from lorsa_utils.activations import ActivationBatch, ActivationSource
from lorsa_utils.config import LorsaConfig, RotaryConfig, SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.initialize import match_scale
from lorsa_utils.lorsa import Lorsa
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


@dataclass(frozen=True)
class FirstTokens:
    """The first counted tokens of one layer's activations; the rest of the last batch is masked."""

    source: ActivationSource
    layer: int
    n_tokens: int

    def batches(self, batch_size: int, layers: Sequence[int] = ()) -> Iterator[ActivationBatch]:
        """As `ActivationSource.batches`, of this layer."""
        left = self.n_tokens
        for batch in self.source.batches(batch_size, layers=(self.layer,)):
            if left <= 0:
                return
            batch = batch.up_to(left)
            left -= int(batch.mask.sum())
            yield batch


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
        module, settings = self.module, self.settings()
        row = {"factor": self.factor, "level": self.level, "seed": self.train.seed, "start": settings["start"]}
        row |= {"kind": module.kind, "units": module.n_units, "k": module.k, "parameters": module.n_parameters}
        return row | {"groups": getattr(module, "n_qk_heads", 0), "d_qk": getattr(module, "d_qk", 0)}


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
def start_run(trial: Trial, site: AttentionSite, calibration: ActivationBatch, device: torch.device) -> Run:
    """A run that starts as its trial says; nothing of it is saved."""

    def started(module: LorsaConfig | SAEConfig, init: str) -> Run:
        train = trial.train.replace(init=init)
        run = Run(RunSpec(f"{trial.factor} {trial.level}", site.layer, module, train, Path()), {}, device)
        run.start(site, calibration)
        return run

    config = trial.module
    if isinstance(config, SAEConfig) or trial.start == "random":
        run = started(config, "random")
    elif trial.start == "both" and config.d_qk == site.d_head:
        run = started(config, "mhsa")
    else:
        run = started(config, "random")
        whole = started(config.replace(d_qk=site.d_head, rotary=site.rotary, attn_scale=site.attn_scale), "mhsa").module
        kept = kept_dimensions(site.rotary, site.d_head, config.d_qk)
        for name, parameter in run.module.named_parameters():
            source, is_qk = whole.get_parameter(name), name in QK_PARAMETERS
            if trial.start in ("both", "qk" if is_qk else "ov"):
                parameter.copy_(source[..., kept] if is_qk else source)
        x, y = (side[site.layer].to(device, torch.float32) for side in (calibration.inputs, calibration.outputs))
        match_scale(run.module, run.scaling.inputs(x), run.scaling.targets(y), calibration.mask.to(device))
    if not trial.biases:
        for name, parameter in run.module.named_parameters():
            if name in BIASES:
                parameter.zero_().requires_grad_(False)
    return run


# ---- sweeps


class Sweep:
    """Trials on one layer's activations, and their results file."""

    def __init__(
        self,
        trials: Sequence[Trial],
        site: AttentionSite,
        data: ActivationSource,
        held_out: ActivationSource,
        held_out_tokens: int,
        file: Path,
        device: torch.device | str = "cpu",
    ) -> None:
        """Check the trials and read what `file` (Parquet, one row per run) holds.

        Every run takes the first `train.tokens` tokens of `data` and is measured on the first `held_out_tokens` of
        `held_out`. As many go at once as torch has threads; on a GPU one.

        Raises:
            UserError: a trial asks for more tokens or another rotation than there is, or the file is damaged.
        """
        self.trials, self.site, self.data, self.file = list(trials), site, data, file
        self.held_out, self.device = FirstTokens(held_out, site.layer, held_out_tokens), torch.device(device)
        self.workers = torch.get_num_threads() if self.device.type == "cpu" else 1
        wanted = [(trial.train.tokens, data) for trial in self.trials]
        for n_tokens, source in [*wanted, (held_out_tokens, held_out)]:
            if not 0 < n_tokens <= source.n_tokens:
                raise UserError(
                    f"{n_tokens:,} tokens are asked for and {source.n_tokens:,} are cached; "
                    "cache more or ask for fewer."
                )
        for trial in self.trials:
            self._check(trial)
        identity = {"code": training_sources(), "start": START_VERSION, "held_out_tokens": held_out_tokens}
        for name, source in (("train", data), ("held_out", held_out)):
            identity[name] = {**source.identity(), "layer": site.layer}
        self.keys = [store.sha256_json({**identity, **trial.settings()}) for trial in self.trials]
        self.rows = self._read()

    def _check(self, trial: Trial) -> None:
        module = trial.module
        if isinstance(module, LorsaConfig) and trial.start != "random":
            shape = lorsa_shape(self.site, module.n_ov_heads, module.n_qk_heads, module.k, module.d_qk)
            if (module.rotary, module.qk_norm) != (shape.rotary, shape.qk_norm):
                raise UserError(
                    f"Trial {trial.factor} {trial.level} has another rotation than the layer, so nothing can be "
                    "copied; use `lorsa_shape`."
                )

    def _read(self) -> dict[str, dict[str, Any]]:
        """Finished runs of the file: key to row."""
        if not self.file.is_file():
            return {}
        try:
            return pd.read_parquet(self.file).set_index("key", drop=False).to_dict("index")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.file} is not the results file of a sweep ({error}); move it away, and its runs are made again."
            ) from error

    def pending(self) -> dict[str, Trial]:
        """Runs missing from the file: key to trial."""
        return {key: trial for key, trial in zip(self.keys, self.trials, strict=True) if key not in self.rows}

    def plan(self) -> str:
        """How many runs, and how many of them finished before."""
        n_runs = len(set(self.keys))
        return f"{n_runs} runs, {n_runs - len(self.pending())} of them finished before; {self.workers} at a time"

    def run(self) -> pd.DataFrame:
        """Run what is missing, saving each run at once; returns `table`."""
        for leftover in self.file.parent.glob(f".{self.file.name}.*.tmp"):  # of a sweep killed while writing
            leftover.unlink(missing_ok=True)
        todo, stop = self.pending(), threading.Event()
        # Longest first, so that no long run is left alone at the end.
        order = sorted(todo, key=lambda key: -todo[key].module.n_parameters * todo[key].train.tokens)
        bar = tqdm(total=len(todo), unit="run", desc="sweep", disable=not todo)
        with one_thread_each(self.device), ThreadPoolExecutor(self.workers) as pool, bar:
            futures = {pool.submit(self._measure, todo[key], stop): key for key in order}
            try:
                for future in as_completed(futures):
                    key = futures[future]
                    settings = json.dumps(todo[key].settings(), sort_keys=True)
                    self.rows[key] = {"key": key, **future.result(), "settings": settings}
                    with store.atomic_path(self.file) as temporary:
                        rows = pd.DataFrame([row for _, row in sorted(self.rows.items())])
                        rows.to_parquet(temporary, index=False)
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
        pairs = zip(self.keys, self.trials, strict=True)
        rows = pd.DataFrame([trial.labels() | self.rows[key] for key, trial in pairs if key in self.rows])
        return rows.drop(columns=["key", "settings"], errors="ignore")

    @functools.cached_property
    def _calibration(self) -> ActivationBatch:
        return next(iter(self.data.batches(CALIBRATION_SEQUENCES, layers=(self.site.layer,))))

    def _measure(self, trial: Trial, stop: threading.Event) -> dict[str, Any]:
        began, layer, train = time.perf_counter(), self.site.layer, trial.train
        run = start_run(trial, self.site, self._calibration, self.device)
        try:
            for batch in FirstTokens(self.data, layer, train.tokens).batches(train.batch_size):
                if stop.is_set():
                    raise KeyboardInterrupt
                run.train_step(batch)
            run.require_finite()
        except UserError:
            if not run.broken:
                raise
            return {"status": "diverged", "tokens": run.tokens_seen, "seconds": time.perf_counter() - began}
        held_out = cast(ActivationSource, self.held_out)
        result = evaluate_activations({"": (layer, run.finished_module())}, held_out)[""]
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
