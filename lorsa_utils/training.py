"""Train Lorsa layers and SAE baselines on the same tokens in one pass over the activations.

Each step predicts the layer's output from its input (the SAE: from itself); mean squared error over counted tokens,
Adam. Unlike the paper (Sec. 3: no auxiliary loss), heads silent for `dead_window` tokens also learn, through AuxK
(Gao et al. 2024), to rebuild the error that the live ones leave; `aux_k=0` switches that off. Modules in training see
scaled activations (`lorsa.Scaling`); saved ones take raw activations.

Run folder: `config.json`, `model.safetensors` (at the end), `metrics.jsonl`, `state/` (training weights, Adam's
moments, counters). A resumed run equals an uninterrupted one, on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lorsa_utils import store
from lorsa_utils.activations import ActivationBatch, ActivationSource, prepared_ahead
from lorsa_utils.config import SCHEMA_VERSION, LorsaConfig, SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.initialize import CALIBRATION_SEQUENCES, initialize
from lorsa_utils.lorsa import SAE, Lorsa, Scaling, SparseOutput
from lorsa_utils.metrics import evaluate_activations
from lorsa_utils.models import AttentionSite, LanguageModel
from lorsa_utils.processes import ALONE, World

QK_PARAMETERS = ("W_Q", "W_K", "b_Q", "b_K", "q_norm", "k_norm")

Logger = Callable[[str, Mapping[str, float]], None]
"""Takes a run's name and one row of metrics."""


def learning_rate_factor(progress: float, warmup: float, decay: float) -> float:
    """Warm-up, stable, decay; all arguments are shares of the budget."""
    rising = progress / warmup if warmup else 1.0
    falling = (1 - progress) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def kept_heads(progress: float, k: int, k_start: int, k_warmup: float) -> int:
    """Heads kept: from k_start down to k, exponentially, over the first `k_warmup` of the budget."""
    if k_start <= k or progress >= k_warmup:
        return k
    return round(k_start * (k / k_start) ** (progress / k_warmup))


@dataclass(frozen=True)
class RunSpec:
    """One module to train."""

    name: str
    layer: int
    module: LorsaConfig | SAEConfig
    train: TrainConfig
    folder: Path


class Run:
    """A module under training: weights in training space, optimizer, counters, schedules."""

    def __init__(self, spec: RunSpec, source: Mapping[str, Any], device: torch.device, world: World = ALONE) -> None:
        self.spec, self.source, self.device, self.world = spec, dict(source), device, world
        module = Lorsa(spec.module) if isinstance(spec.module, LorsaConfig) else SAE(spec.module)
        self.module: Lorsa | SAE = module.to(device)
        self.scaling = Scaling(torch.zeros(spec.module.d_model, device=device), 1.0, 1.0)
        self.step = self.tokens_seen = self.resumed_at = 0
        self.seconds = 0.0
        self.since_fired = torch.zeros(self.module.n_units, dtype=torch.long, device=device)
        self.broken = torch.zeros((), device=device)
        self._recent: list[dict[str, Tensor | float]] = []
        train, qk, rest = spec.train, [], []
        for name, parameter in self.module.named_parameters():
            if name not in QK_PARAMETERS:
                rest.append(parameter)
            elif parameter.requires_grad_(not train.freeze_qk).requires_grad:
                qk.append(parameter)
        self.parameters = [*qk, *rest]
        groups = [{"params": rest, "lr_factor": 1.0}, {"params": qk, "lr_factor": train.qk_lr_factor}]
        self._forward = DistributedDataParallel(self.module) if world.size > 1 else self.module
        self.optimizer = torch.optim.Adam(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)

    @property
    def progress(self) -> float:
        """Share of the token budget used."""
        return self.tokens_seen / self.spec.train.tokens

    @property
    def state_file(self) -> Path:
        """What a run is continued from."""
        return self.spec.folder / "state" / "state.safetensors"

    def start(self, site: AttentionSite, batch: ActivationBatch) -> None:
        """Initialise from raw calibration activations."""
        layer, train = self.spec.layer, self.spec.train
        x, y = (side[layer].to(self.device, torch.float32) for side in (batch.inputs, batch.outputs))
        self.scaling = initialize(self.module, site, x, y, batch.mask.to(self.device), train.init, train.seed)

    def train_step(self, batch: ActivationBatch) -> None:
        """One optimizer step on raw activations.

        Raises:
            UserError: the loss or a gradient is not finite; the weights are those before this step. On a GPU such
                steps are skipped until `require_finite` is called.
        """
        train, layer = self.spec.train, self.spec.layer
        read = self.module.input_from(batch.inputs[layer], batch.outputs[layer])
        x = self.scaling.inputs(read.to(self.device, torch.float32))
        y = self.scaling.targets(batch.outputs[layer].to(self.device, torch.float32))
        n_tokens = int(batch.whole_mask.sum())
        mask = batch.mask.to(self.device, non_blocking=True)
        # The middle of the step rather than its start, so that no step has a rate of exactly zero.
        progress = (self.tokens_seen + n_tokens / 2) / train.tokens
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * group["lr_factor"] * learning_rate_factor(progress, train.warmup, train.decay)
        k = kept_heads(self.progress, self.module.k, train.k_start, train.k_warmup)
        dead = self.since_fired >= train.dead_window
        # On a GPU asking whether any is dead would wait for it.
        aux_k = train.aux_k if self.device.type == "cuda" or dead.any() else 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self._forward(x, self.module.selection(k, dead, aux_k))
            error = torch.where(mask[..., None], output.y.float() - y, 0.0)
            total = squares = error.square().sum()
            if output.aux_indices.numel():
                rebuilt = self.module.decode(output.aux_indices, output.aux_values, bias=False) + error.detach()
                total = squares + train.aux_weight * torch.where(mask[..., None], rebuilt, 0.0).square().sum()
            # Processes average their gradients; times their number, that is the sum over all sequences.
            total = self.world.size / (max(1, n_tokens) * y.shape[-1]) * total
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.clip or float("inf"))
        fired, sums = self._summed_over_processes(output, squares, y, mask)
        broken = 1.0 - torch.isfinite(sums[0] + norm).float()
        self.broken += broken
        if self.device.type == "cpu":  # a GPU is asked when the log is written
            self.require_finite()
        # Adam skips a step marked like this, as mixed precision does on overflow.
        self.optimizer.found_inf = broken  # type: ignore[attr-defined]
        self.optimizer.step()
        self.since_fired = torch.where(fired > 0, 0, self.since_fired + n_tokens)
        self.step += 1
        self.tokens_seen += n_tokens
        row = dict(zip(("error", "deviation", "active"), sums, strict=True))
        self._recent.append(row | {"n_tokens": n_tokens, "grad_norm": norm, "k": k})

    @torch.no_grad()
    def _summed_over_processes(
        self, output: SparseOutput, squares: Tensor, y: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How often every unit fired in this step; its squared error, squared deviation and active units."""
        weight = mask[..., None].float()
        fired = (output.values != 0) * weight
        counts = torch.zeros(self.module.n_units, device=self.device)
        counts.index_add_(0, output.indices.flatten(), fired.flatten())
        moments = torch.stack((squares.detach(), (y.square() * weight).sum(), fired.sum(), weight.sum()))
        together = torch.cat((counts, moments, (y * weight).sum(dim=(0, 1))))
        if self.world.size > 1:
            torch.distributed.all_reduce(together)
        counts, (error, energy, active, n), total = together.split([len(counts), 4, y.shape[-1]])
        return counts, torch.stack((error, energy - total.square().sum() / n.clamp_min(1), active))

    def require_finite(self) -> None:
        """UserError if the loss or a gradient was not finite; the weights are the last good ones."""
        if self.broken:
            raise UserError(
                f"The loss of {self.spec.name} is no longer finite at step {self.step}; "
                f"the last good state is kept in {self.state_file.parent}: start again with a lower --lr."
            )

    def recent_metrics(self) -> dict[str, float]:
        """A row of metrics.jsonl; ratios are of sums since the last call."""
        rows, self._recent = self._recent, []
        sums = {name: float(sum(torch.as_tensor(row[name]).double() for row in rows)) for name in rows[0]}
        n_tokens, dead_window = max(1.0, sums["n_tokens"]), self.spec.train.dead_window
        return {
            "step": self.step,
            "tokens": self.tokens_seen,
            "loss": sums["error"] / (n_tokens * self.module.b_O.shape[0]),
            "fvu": sums["error"] / max(sums["deviation"], 1e-30),
            "l0": sums["active"] / n_tokens,
            "grad_norm": sums["grad_norm"] / len(rows),
            "k": sums["k"] / len(rows),
            "lr": self.optimizer.param_groups[0]["lr"],
            "dead_fraction": float((self.since_fired >= dead_window).double().mean()),
            "dead_window": dead_window,
            "seconds": self.seconds,
        }

    def config(self) -> dict[str, Any]:
        """What config.json holds, to rebuild and resume the run."""
        return {
            "schema_version": SCHEMA_VERSION,
            "module": {**self.spec.module.to_dict(), "kind": self.spec.module.kind},
            "layer": self.spec.layer,
            "train": self.spec.train.to_dict(),
            "processes": self.world.size,
            "source": self.source,
        }

    def save_state(self) -> None:
        """Write state/ atomically (first process only)."""
        if self.world.rank > 0:
            return
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        tensors |= {"since_fired": self.since_fired, "input_mean": self.scaling.input_mean}
        counters: dict[str, Any] = {"step": self.step, "tokens_seen": self.tokens_seen, "seconds": self.seconds}
        counters |= {"input_scale": self.scaling.input_scale, "output_scale": self.scaling.output_scale}
        counters["recent"] = [{name: float(value) for name, value in row.items()} for row in self._recent]
        # Counters go into the same file's header, so that one rename replaces the whole state.
        store.write_tensors(self.state_file, tensors, {"counters": json.dumps(counters)})

    def load_state(self) -> None:
        """Continue from state/; UserError if it is damaged."""
        file = self.state_file
        tensors = store.read_tensors(file, self.device)
        try:
            counters = json.loads(store.read_tensor_metadata(file)["counters"])
            self.module.load_state_dict({name: tensors[f"module.{name}"] for name in self.module.state_dict()})
            for index, parameter in enumerate(self.parameters):
                prefix = f"adam.{index}."
                # Adam's step counter lives on the CPU when unfused, beside the weights when fused; take it where it is.
                state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
                if state:
                    self.optimizer.state[parameter] = state
            self.since_fired, self._recent = tensors["since_fired"], counters["recent"]
            self.step, self.tokens_seen, self.seconds = counters["step"], counters["tokens_seen"], counters["seconds"]
            self.scaling = Scaling(tensors["input_mean"], counters["input_scale"], counters["output_scale"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{file} does not belong to this run; restore a copy or start again in an empty folder."
            ) from error
        self.resumed_at = self.tokens_seen

    def finished_module(self) -> Lorsa | SAE:
        """A copy for raw activations: scales folded in, write directions of norm 1."""
        module = copy.deepcopy(self.module)
        module.fold(self.scaling)
        module.fold_norms()
        return module.requires_grad_(False)


def module_config(
    site: AttentionSite, kind: str, n_heads: int | None, n_qk: int | None, k: int
) -> LorsaConfig | SAEConfig:
    """Shape of a module for an attention layer; what is None follows from the layer."""
    n_heads = n_heads or 8 * site.d_model
    if kind != "lorsa":
        return SAEConfig(d_model=site.d_model, n_features=n_heads, k=k, kind=kind)  # type: ignore[arg-type]
    default = next(n for n in range(max(1, n_heads // site.d_head), 0, -1) if n_heads % n == 0)
    return Lorsa.config_for_site(site, n_heads, n_qk or default, k)


def train(
    specs: Sequence[RunSpec],
    source: ActivationSource,
    held_out: ActivationSource | None,
    model: LanguageModel,
    *,
    resume: bool = False,
    logger: Logger | None = None,
    world: World = ALONE,
) -> dict[str, dict[str, float]]:
    """`train_runs`, then measure the modules on held-out activations and write results.json.

    Returns by run name the keys of `metrics.Reconstruction.result`, `tokens_per_s` and `seconds`. Empty without
    held-out activations, and in all processes but the first.

    Raises:
        UserError: the disk is too small; see also `train_runs`.
    """
    store.require_free_bytes(specs[0].folder, _disk_bytes(specs), "The run")
    began = time.perf_counter()
    sites = {spec.layer: model.site(spec.layer) for spec in specs}
    runs = train_runs(specs, source, sites, device=model.device, resume=resume, logger=logger, world=world)
    seconds = time.perf_counter() - began
    if world.rank > 0 or held_out is None:
        return {}
    modules = {run.spec.name: (run.spec.layer, run.finished_module()) for run in runs}
    measured = evaluate_activations(modules, held_out, specs[0].train.batch_size)
    speed = {"tokens_per_s": (runs[0].tokens_seen - runs[0].resumed_at) / seconds, "seconds": seconds}
    for spec in specs:
        store.write_json(spec.folder / "results.json", measured[spec.name] | speed)
    return {name: result | speed for name, result in measured.items()}


def cost(specs: Sequence[RunSpec], source: ActivationSource, model: LanguageModel) -> str | None:
    """What training takes, in a sentence, if over a minute; timed on the second of two batches."""
    how, disk = specs[0].train, _disk_bytes(specs)
    if how.tokens < 100_000:
        return None
    batches = source.batches(how.batch_size, layers=sorted({spec.layer for spec in specs}))
    first = next(batches)
    began = time.perf_counter()
    second = next(batches, first)
    seconds = time.perf_counter() - began
    for spec in specs:
        run = Run(spec, {}, model.device)
        run.start(model.site(spec.layer), first)
        run.train_step(first)
        began = time.perf_counter()
        run.train_step(second)
        seconds += time.perf_counter() - began
    seconds *= how.tokens / max(1, int(second.mask.sum()))
    if seconds < 60:
        return None
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    units = max(spec.module.n_units for spec in specs)
    memory = weights + disk + 16 * how.batch_size * source.context * units
    return (
        f"Training on {how.tokens:,} tokens: about {seconds / 60:.1f} minutes, {memory / 1e9:.1f} GB of memory, "
        f"{disk / 1e9:.2f} GB on disk."
    )


def _disk_bytes(specs: Sequence[RunSpec]) -> int:
    """Weights, and a state of weights and two moments."""
    return 4 * 4 * sum(spec.module.n_parameters for spec in specs)


def prepare_runs(
    specs: Sequence[RunSpec],
    source: ActivationSource,
    sites: Mapping[int, AttentionSite],
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    world: World = ALONE,
) -> list[Run]:
    """Initialise runs on the first sequences, or resume them from their folders.

    Raises:
        UserError: a folder holds a run (without `resume`) or one with other settings.
    """
    runs = [Run(spec, source.identity(), torch.device(device), world) for spec in specs]
    problem: UserError | None = None
    if world.rank == 0:
        try:
            _start_or_load(runs, source, sites, resume)
        except UserError as error:
            problem = error
    if world.size > 1:
        told = [problem is not None]
        torch.distributed.broadcast_object_list(told)
        if told[0] and world.rank > 0:
            raise SystemExit(1)  # the first process says why
    if problem:
        raise problem
    if world.rank > 0:  # all continue from what the first process started or found
        for run in runs:
            run.load_state()
    return runs


def _start_or_load(
    runs: Sequence[Run], source: ActivationSource, sites: Mapping[int, AttentionSite], resume: bool
) -> None:
    fresh = []
    for run in runs:
        folder = store.require_writable(run.spec.folder)
        if (folder / "config.json").is_file():
            if not resume:
                raise UserError(f"{folder} holds a run already; add --resume to continue it or choose another --out.")
            _require_same_config(folder, run.config())
            if run.state_file.is_file():
                store.remove_leftovers(folder / "state")
                run.load_state()
                continue
        fresh.append(run)
    if fresh:
        batch = next(iter(source.batches(CALIBRATION_SEQUENCES, layers=sorted({run.spec.layer for run in fresh}))))
        for run in fresh:
            run.start(sites[run.spec.layer], batch)
            store.write_json(run.spec.folder / "config.json", run.config())
            run.save_state()


def _check(specs: Sequence[RunSpec], source: ActivationSource, world: World) -> None:
    batch_size, folders = specs[0].train.batch_size, [spec.folder.resolve() for spec in specs]
    if len({(spec.train.batch_size, spec.train.tokens) for spec in specs}) != 1:
        raise UserError("Runs trained together must have the same batch_size and tokens; train them in separate calls.")
    if world.size > batch_size:
        raise UserError(
            f"{world.size} processes cannot share a batch of {batch_size} sequences; start fewer or raise --batch-size."
        )
    for spec in specs:
        if folders.count(spec.folder.resolve()) > 1:
            raise UserError(f"Two runs would write to {spec.folder}; give each its own folder.")
        k_start, units = spec.train.k_start, spec.module.n_units
        if k_start > units:
            raise UserError(f"k_start ({k_start}) must not exceed the number of heads or features ({units}).")
    if source.n_sequences == 0 or source.n_tokens == 0:
        raise UserError("There is not one token to train on; give a longer text.")


def _require_same_config(folder: Path, config: Mapping[str, Any]) -> None:
    configs = store.read_json(folder / "config.json"), json.loads(json.dumps(config))
    saved, asked = (pd.json_normalize(nested).to_dict("records")[0] for nested in configs)
    # Files may move, as hashes tell what was read; logging and saving do not change what is computed.
    free = {"source.text", "train.log_every", "train.save_every_seconds"}
    if saved.get("source.model_sha256") == asked.get("source.model_sha256"):
        free |= {"source.model", "source.revision"}
    for name in sorted({*saved, *asked} - free):
        if saved.get(name) != asked.get(name):
            raise UserError(
                f"{folder} was started with {name} = {saved.get(name)!r}, not {asked.get(name)!r}; "
                "resume with the same settings or choose another --out."
            )


def train_runs(
    specs: Sequence[RunSpec],
    source: ActivationSource,
    sites: Mapping[int, AttentionSite],
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: bool = True,
    logger: Logger | None = None,
    stop_after_steps: int | None = None,
    world: World = ALONE,
) -> list[Run]:
    """Train modules on the same batches, with equal batch size and budget to be fair; save those that finish.

    A source smaller than the budget is read again. `sites`, by layer, are for initialisation; `resume` continues each
    existing run from where it was. `stop_after_steps` saves the state and stops after so many more steps (to show or
    test resuming). All processes of `world` call this with the same arguments.

    Raises:
        UserError: settings do not fit together, the source is empty, or the loss is not finite; see `prepare_runs`.
    """
    _check(specs, source, world)
    runs = prepare_runs(specs, source, sites, device=device, resume=resume, world=world)
    progress = progress and world.rank == 0
    try:
        while len(steps := sorted({run.step for run in runs})) > 1:  # some were killed before they were saved
            behind = [run for run in runs if run.step == steps[0]]
            _loop(behind, source, progress, logger, steps[1] - steps[0])
        _loop(runs, source, progress, logger, stop_after_steps)
    except (KeyboardInterrupt, UserError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError)
        if lost and world.size == 1:
            raise
        for run in runs:
            run.save_state()
        if not lost:
            raise
        raise UserError(
            f"Another process of this training has ended ({str(error).splitlines()[0]}); "
            f"the last good state is kept in {runs[0].state_file.parent}: "
            "go on with --resume and as many processes."
        ) from error
    for run in runs:
        run.save_state()
        if run.progress >= 1 and world.rank == 0:
            store.write_tensors(run.spec.folder / "model.safetensors", run.finished_module().state_dict())
    return runs


def _loop(
    runs: Sequence[Run], source: ActivationSource, progress: bool, logger: Logger | None, stop_after_steps: int | None
) -> None:
    train, world = runs[0].spec.train, runs[0].world
    layers = sorted({run.spec.layer for run in runs})
    for run in runs:
        _cut_log(run)
    bar = tqdm(
        total=train.tokens, initial=runs[0].tokens_seen, unit="tok", unit_scale=True, desc="train", disable=not progress
    )
    last_save = time.monotonic()
    done = 0
    while runs[0].progress < 1:
        per_epoch = -(-source.n_sequences // train.batch_size)
        start = runs[0].step % per_epoch * train.batch_size
        batches = source.batches(train.batch_size, start, layers, world)
        # On a CPU all cores are busy with the step itself.
        for batch in prepared_ahead(batches, runs[0].device) if runs[0].device.type == "cuda" else batches:
            batch = batch.up_to(train.tokens - runs[0].tokens_seen, world)
            with _interrupt_waits():
                for run in runs:
                    began = time.perf_counter()
                    run.train_step(batch)
                    run.seconds += time.perf_counter() - began
                done += 1
                bar.update(int(batch.whole_mask.sum()))
                if runs[0].step % train.log_every == 0 or runs[0].progress >= 1:
                    bar.set_postfix({"fvu": f"{_log(runs, logger):.3f}"})
            finished = runs[0].progress >= 1 or done == stop_after_steps
            if time.monotonic() - last_save > train.save_every_seconds:
                for run in runs:
                    run.save_state()
                last_save = time.monotonic()
            if finished:
                bar.close()
                return


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block: what is saved then is one whole step of every run."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _log(runs: Sequence[Run], logger: Logger | None) -> float:
    """Append a row to each run's metrics.jsonl and return the mean training FVU."""
    total = 0.0
    for run in runs:
        run.require_finite()
        row = run.recent_metrics()
        total += row["fvu"]
        if run.world.rank > 0:
            continue
        file = run.spec.folder / "metrics.jsonl"
        try:
            with open(file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"Cannot write {file} ({error.strerror}); free some space, then continue with --resume."
            ) from error
        if logger:
            logger(run.spec.name, row)
    return total / len(runs)


def _cut_log(run: Run) -> None:
    """Drop rows after the last saved state of a killed run: they will be written again."""
    if run.world.rank > 0:
        return
    file = run.spec.folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= run.step]
    store.write_text(file, "".join(line + "\n" for line in lines))


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl."""
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder} has no metrics.jsonl; give the folder of a run.")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def make_logger(kind: str, folder: str | Path) -> Logger | None:
    """`jsonl` (nothing beside metrics.jsonl), `tensorboard` or `wandb`.

    Raises:
        UserError: the logger is unknown, or its package is not installed.
    """
    if kind == "jsonl":
        return None
    if kind not in ("tensorboard", "wandb"):
        raise UserError(f"logger must be jsonl, tensorboard or wandb, not {kind!r}.")
    try:
        if kind == "wandb":
            import wandb

            session = wandb.init(project="lorsa", dir=str(folder))
            return lambda name, row: session.log({f"{name}/{key}": value for key, value in row.items()})
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"The logger {kind!r} needs a package that is missing ({error.name}); install it with pip install {kind}."
        ) from error
    writer = SummaryWriter(str(folder))

    def log(name: str, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            writer.add_scalar(f"{name}/{key}", value, int(row["tokens"]))
        writer.flush()

    return log


@functools.cache
def training_sources() -> list[str]:
    """Hashes of the files that decide what a trained module is, to tell runs of other code apart."""
    folder = Path(__file__).parent
    return [store.sha256_file(folder / f"{name}.py") for name in ("ops", "lorsa", "initialize", "training")]
