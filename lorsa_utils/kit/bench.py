"""How near training steps come to the hardware's floor: `lorsa bench`.

A step is forward, mean squared error, backward and Adam on a Lorsa of random weights and inputs. The floor of a step is

    max(floating-point operations / matmul rate, bytes / copy bandwidth)

with rate and bandwidth measured between the steps of the same run, so that a slow or busy machine lowers both sides.
Counted operations are those that no correct step can avoid: the projections and the gradients of their weights (none to
the frozen input), causal attention, in the backward pass for the queries in which a head of the group was kept (counted
in this run), and K rows a token in the decode and its two gradients. Counted bytes: weights are read, gradients
written, Adam reads and writes.

The baselines are plain PyTorch: SDPA and a dense decode, eager and compiled. No backend is timed before its output and
gradients agreed with a float64 computation.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorsa_utils import kernels, store
from lorsa_utils.config import LorsaConfig, RotaryConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import Lorsa


@dataclass(frozen=True)
class Shape:
    """One Lorsa and one batch."""

    d_model: int
    """Width of the residual stream."""
    n_qk: int
    """QK groups."""
    d_qk: int
    """Width of queries and keys."""
    n_heads: int
    """Lorsa heads."""
    k: int
    """Heads kept for each token."""
    batch: int
    """Sequences."""
    length: int
    """Tokens in a sequence."""

    @property
    def n_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.length

    def config(self) -> LorsaConfig:
        """The Lorsa of this shape."""
        rotary = RotaryConfig(rope_type="default", rotary_dim=self.d_qk)
        return LorsaConfig(self.d_model, self.n_heads, self.n_qk, self.d_qk, self.k, rotary=rotary)

    def small(self) -> Shape:
        """Same widths and group size, small enough for float64: what a backend is checked on."""
        groups = min(self.n_qk, 4)
        heads = self.n_heads // self.n_qk * groups
        return Shape(min(self.d_model, 96), groups, self.d_qk, heads, min(self.k, heads // 4), 2, min(self.length, 200))


SHAPES = {
    "A": Shape(576, 18, 64, 1152, 32, 8, 256),
    "B": Shape(768, 96, 64, 6144, 64, 4, 256),
    "pythia": Shape(768, 96, 64, 6144, 64, 32, 256),
    "pythia-1024": Shape(768, 96, 64, 6144, 64, 8, 1024),
    "llama": Shape(4096, 256, 128, 32768, 128, 4, 1024),
}
"""A: a small layer of the width of SmolLM2.

B: the layer that the paper trains for Pythia-160M, in a small batch; pythia and pythia-1024: in large ones. llama: the
one for Llama-3.1-8B."""


class PlainLorsa(Lorsa):
    """The baseline: what one writes first in PyTorch.

    SDPA, activations of all heads in one dense tensor, dense decode.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Output [batch, length, d_model] for x [batch, length, d_model]."""
        q, k, v = self.attention_inputs(x)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.attn_scale)
        z = z.transpose(1, 2).flatten(2).relu()
        kept = (z * self.W_O.detach().norm(dim=1)).topk(self.k, dim=-1).indices
        dense = torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept))
        return dense @ self.W_O.to(dense.dtype) + self.b_O


Forward = Callable[[Tensor], Tensor]


class OursLorsa(Lorsa):
    """The kit's own step on this device, as `train` runs it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Output [batch, length, d_model] for x [batch, length, d_model]."""
        return super().forward(x).y


class TorchLorsa(OursLorsa):
    """The kit's step without kernels."""

    backend = "torch"


def backends(device: torch.device) -> dict[str, tuple[type[Lorsa], bool]]:
    """Name to (class, whether it is compiled) of what can run on a device; the first is what the kit chooses there."""
    kernel: dict[str, tuple[type[Lorsa], bool]] = {"triton": (OursLorsa, False)} if kernels.available(device) else {}
    return {**kernel, "torch": (TorchLorsa, False), "plain": (PlainLorsa, False), "plain-compiled": (PlainLorsa, True)}


@dataclass
class Candidate:
    """One backend under test: its module, optimizer and timings in milliseconds."""

    name: str
    module: Lorsa
    run: Forward
    optimizer: torch.optim.Optimizer
    times: dict[str, list[float]]


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _fill(module: Lorsa, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * module.config.d_model**-0.5)


def _make(name: str, shape: Shape, device: torch.device) -> Candidate:
    cls, compiled = backends(device)[name]
    with torch.device(device):
        module = cls(shape.config())
    _fill(module, seed=0)
    run: Forward = torch.compile(module) if compiled else module
    return Candidate(name, module, run, torch.optim.Adam(module.parameters(), lr=1e-4, fused=True), {})


def _batch(shape: Shape, device: torch.device, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape.batch, shape.length, shape.d_model, generator=generator).to(device) for _ in range(2))
    return x, y


def check(name: str, shape: Shape, device: torch.device) -> None:
    """Compare a backend's output and gradients with float64 on a small batch of the same widths.

    Raises:
        UserError: it is further away than twice what plain PyTorch is in the same precision.
    """
    small = shape.small()
    exact = PlainLorsa(small.config()).double()
    _fill(exact, seed=0)
    x, y = _batch(small, torch.device("cpu"))
    (exact(x.double()) - y.double()).square().mean().backward()
    wanted = {key: parameter.grad for key, parameter in exact.named_parameters() if parameter.grad is not None}
    errors = {}
    for candidate in dict.fromkeys((name, "plain")):
        made = _make(candidate, small, device)
        with _autocast(device):
            loss = (made.run(x.to(device)).float() - y.to(device)).square().mean()
        loss.backward()
        found = {
            key: parameter.grad.double().cpu()
            for key, parameter in made.module.named_parameters()
            if parameter.grad is not None
        }
        errors[candidate] = max(
            float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted if key in found
        )
        if found.keys() != wanted.keys():
            raise UserError(
                f"The backend {candidate} gives no gradient for {sorted(wanted.keys() - found.keys())}; it is not timed."
            )
    # One kept head more or less, where bf16 rounding decides a near tie, moves single rows: hence a factor.
    if not errors[name] <= 2 * errors["plain"] + 1e-5:
        raise UserError(
            f"The backend {name} is off by {errors[name]:.2e} (plain PyTorch: {errors['plain']:.2e}) on {device}; it is not timed."
        )


class Clock:
    """Milliseconds of a piece of work, with the device's queue drained on both sides."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        """Time in milliseconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    def of(self, work: Callable[[], Any]) -> float:
        """How long `work` takes."""
        began = self.now()
        work()
        return self.now() - began


def _step(candidate: Candidate, x: Tensor, y: Tensor, clock: Clock) -> dict[str, float]:
    """One training step; milliseconds of its parts."""
    marks = [clock.now()]
    with _autocast(clock.device):
        loss = (candidate.run(x).float() - y).square().mean()
    marks.append(clock.now())
    loss.backward()
    marks.append(clock.now())
    candidate.optimizer.step()
    candidate.optimizer.zero_grad(set_to_none=True)
    marks.append(clock.now())
    parts = dict(
        zip(
            ("forward_ms", "backward_ms", "adam_ms"),
            (b - a for a, b in zip(marks, marks[1:], strict=False)),
            strict=True,
        )
    )
    return {**parts, "step_ms": marks[-1] - marks[0]}


class Ceilings:
    """The machine's matmul rate and copy bandwidth, sampled between steps."""

    def __init__(self, shape: Shape, clock: Clock) -> None:
        self.clock = clock
        on_gpu = clock.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        rows, width = min(shape.n_tokens, 8192), min(shape.n_heads, 8192)
        self.left = torch.randn(rows, shape.d_model, device=clock.device).to(dtype)
        self.right = torch.randn(shape.d_model, width, device=clock.device).to(dtype)
        self.flops = 2.0 * rows * shape.d_model * width
        # Far more than the caches hold.
        self.source = torch.empty((2048 if on_gpu else 256) << 20, dtype=torch.uint8, device=clock.device).fill_(1)
        self.target = torch.empty_like(self.source).fill_(2)
        self.rates: list[float] = []
        self.bandwidths: list[float] = []

    def sample(self) -> None:
        """One product and one copy."""
        repeats = 20 if self.clock.device.type == "cuda" else 3

        def products() -> None:
            for _ in range(repeats):
                torch.mm(self.left, self.right)

        self.rates.append(repeats * self.flops / self.clock.of(products) * 1e3)
        self.bandwidths.append(2 * self.source.numel() / self.clock.of(lambda: self.target.copy_(self.source)) * 1e3)

    def values(self) -> tuple[float, float]:
        """Medians: operations per second and bytes per second."""
        return statistics.median(self.rates), statistics.median(self.bandwidths)


def visited_pairs(indices: Tensor, shape: Shape) -> tuple[float, int]:
    """Share of (query, QK group) pairs in which a head was kept, and the number of query-key pairs these see.

    Args:
        indices: kept heads, [batch, length, k].
    """
    group = indices // (shape.n_heads // shape.n_qk)
    visited = torch.zeros(shape.batch, shape.length, shape.n_qk, dtype=torch.bool, device=indices.device).scatter_(
        2, group, True
    )
    seen = torch.arange(1, shape.length + 1, device=indices.device)[None, :, None]
    return float(visited.double().mean()), int((visited * seen).sum())


def count_flops(shape: Shape, pairs: int) -> float:
    """Floating-point operations that no correct step avoids; `pairs` as in `visited_pairs`."""
    size = shape.n_heads // shape.n_qk
    width = 2 * shape.n_qk * shape.d_qk + shape.n_heads
    projections = 2 * 2 * shape.n_tokens * shape.d_model * width
    causal = shape.batch * shape.n_qk * shape.length * (shape.length + 1) // 2
    attention = 2 * (shape.d_qk + size) * causal + 2 * (3 * shape.d_qk + 2 * size) * pairs
    return float(projections + attention + 3 * 2 * shape.n_tokens * shape.k * shape.d_model)


def count_bytes(shape: Shape) -> float:
    """Bytes that no correct step avoids: weights read, gradients written, and Adam's four reads and three writes."""
    return 9 * 4.0 * shape.config().n_parameters


def _quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def peak_mb(name: str, shape_name: str, device: torch.device) -> float:
    """Peak memory of training steps in MB: weights, optimizer and step, without the program itself.

    On a CPU that is asked of a process of its own, where nothing ran before.
    """
    if device.type == "cuda":
        return _peak_here(name, shape_name, device)
    script = f"import torch; from lorsa_utils.kit import bench; print(bench._peak_here({name!r}, {shape_name!r}, torch.device('cpu')))"
    search_path = os.pathsep.join([str(store.CHECKOUT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search_path}
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    return float(answer.stdout.split()[-1]) if answer.returncode == 0 else float("nan")


def _peak_here(name: str, shape_name: str, device: torch.device) -> float:
    shape, clock = SHAPES[shape_name], Clock(device)
    x, y = _batch(shape, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 1e6
    else:
        before = psutil.Process().memory_info().rss / 1e6
    candidate = _make(name, shape, device)
    for _ in range(3):
        _step(candidate, x, y, clock)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6 - before
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # only Linux tells the peak of this program alone
        return float("nan")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6 - before


def measure(
    shape_name: str, device: str | torch.device = "cpu", names: Sequence[str] | None = None, rounds: int = 15
) -> pd.DataFrame:
    """Time every backend on a shape, in alternating order.

    Args:
        shape_name: key of `SHAPES`.
        device: where.
        names: backends, all of `backends` by default.
        rounds: timed steps of each backend.

    Returns:
        one row a backend.

    Raises:
        UserError: unknown shape or backend, or a backend that fails its check.
    """
    if shape_name not in SHAPES:
        raise UserError(f"There is no shape {shape_name!r}; choose one of {', '.join(SHAPES)}.")
    place, shape = torch.device(device), SHAPES[shape_name]
    known = backends(place)
    names = list(names or known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"There is no backend {unknown[0]!r} on {place.type}; choose from {', '.join(known)}.")
    for name in names:
        check(name, shape, place)
    clock = Clock(place)
    x, y = _batch(shape, place)
    peaks = {name: peak_mb(name, shape_name, place) for name in names}
    made = [_make(name, shape, place) for name in names]
    for candidate in made:
        for _ in range(2):
            _step(candidate, x, y, clock)
    ceilings = Ceilings(shape, clock)
    ceilings.sample()
    ceilings.rates.clear()
    ceilings.bandwidths.clear()
    for number in tqdm(range(rounds), desc=f"bench {shape_name}", unit="round"):
        turn = number % len(made)
        for candidate in made[turn:] + made[:turn]:
            ceilings.sample()
            for part, milliseconds in _step(candidate, x, y, clock).items():
                candidate.times.setdefault(part, []).append(milliseconds)
    return pd.DataFrame([_row(candidate, shape_name, x, ceilings, peaks[candidate.name]) for candidate in made])


def _row(candidate: Candidate, shape_name: str, x: Tensor, ceilings: Ceilings, peak_mb: float) -> dict[str, Any]:
    shape, device = SHAPES[shape_name], ceilings.clock.device
    rate, bandwidth = ceilings.values()
    with torch.no_grad(), _autocast(device):
        share, pairs = visited_pairs(Lorsa.encode(candidate.module, x)[0], shape)
    floor = 1e3 * max(count_flops(shape, pairs) / rate, count_bytes(shape) / bandwidth)
    times = candidate.times
    step = statistics.median(times["step_ms"])
    return {
        "backend": candidate.name,
        "shape": shape_name,
        "device": device_name(device),
        "dtype": "bf16 autocast" if device.type == "cuda" else "fp32",
        "step_ms_p20": _quantile(times["step_ms"], 0.2),
        "step_ms_p50": step,
        "step_ms_p80": _quantile(times["step_ms"], 0.8),
        "forward_ms": statistics.median(times["forward_ms"]),
        "backward_ms": statistics.median(times["backward_ms"]),
        "adam_ms": statistics.median(times["adam_ms"]),
        "floor_ms": floor,
        "step_over_floor": step / floor,
        "tokens_per_s": shape.n_tokens / step * 1e3,
        "peak_mb": peak_mb,
        "visited_share": share,
        "matmul_gflop_per_s": rate / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "rounds": len(times["step_ms"]),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__ if kernels.triton else "",
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def append_rows(rows: pd.DataFrame, file: str | Path) -> None:
    """Add rows to a CSV of earlier ones."""
    path = Path(file)
    both = pd.concat([pd.read_csv(path), rows]) if path.is_file() else rows
    store.write_text(path, both.to_csv(index=False, float_format="%.6g"))
