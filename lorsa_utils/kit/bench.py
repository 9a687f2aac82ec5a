"""How close training steps come to the hardware's floor: `lorsa bench`.

A step is forward, mean squared error, backward and Adam on a Lorsa of random weights and inputs. Its floor is

    max(floating-point operations / matmul rate, bytes / copy bandwidth)

with rate and bandwidth measured between the steps, so that a slow or busy machine affects both sides. A backend is
timed only after its gradients agreed with float64.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """One Lorsa and a batch of `batch` sequences of `length` tokens."""

    d_model: int
    n_qk: int
    d_qk: int
    n_heads: int
    k: int
    batch: int
    length: int

    @property
    def n_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.length

    def config(self) -> LorsaConfig:
        """The Lorsa of this shape."""
        rotary = RotaryConfig(rope_type="default", rotary_dim=self.d_qk)
        return LorsaConfig(self.d_model, self.n_heads, self.n_qk, self.d_qk, self.k, rotary=rotary)


SHAPES = {
    "A": Shape(576, 18, 64, 1152, 32, 8, 256),
    "B": Shape(768, 96, 64, 6144, 64, 4, 256),
    "pythia": Shape(768, 96, 64, 6144, 64, 32, 256),
    "pythia-1024": Shape(768, 96, 64, 6144, 64, 8, 1024),
    "llama": Shape(4096, 256, 128, 32768, 128, 4, 1024),
}
"""A: a layer of SmolLM2's width. B: the paper's for Pythia-160M, in a small batch; pythia and pythia-1024: in large
ones. llama: the paper's for Llama-3.1-8B."""


# ---- counts


def visited_pairs(indices: Tensor, shape: Shape) -> tuple[float, int]:
    """Share of (query, QK group) pairs with a kept head (`indices`, [batch, length, k]), and the keys they see."""
    group = indices // (shape.n_heads // shape.n_qk)
    visited = torch.zeros(shape.batch, shape.length, shape.n_qk, dtype=torch.bool, device=indices.device)
    visited.scatter_(2, group, True)
    seen = torch.arange(1, shape.length + 1, device=indices.device)[None, :, None]
    return float(visited.double().mean()), int((visited * seen).sum())


def count_flops(shape: Shape, pairs: int) -> float:
    """Floating-point operations that no correct step avoids; `pairs` are the keys of `visited_pairs`.

    Projections and their weight gradients (the input is frozen), causal attention (backward only for queries with a
    kept head in the group), and K rows per token in the decode and its two gradients.
    """
    size = shape.n_heads // shape.n_qk
    width = 2 * shape.n_qk * shape.d_qk + shape.n_heads
    projections = 2 * 2 * shape.n_tokens * shape.d_model * width
    causal = shape.batch * shape.n_qk * shape.length * (shape.length + 1) // 2
    attention = 2 * (shape.d_qk + size) * causal + 2 * (3 * shape.d_qk + 2 * size) * pairs
    return float(projections + attention + 3 * 2 * shape.n_tokens * shape.k * shape.d_model)


def count_bytes(shape: Shape) -> float:
    """Bytes that no correct step avoids: weights read, gradients written, Adam's four reads and three writes."""
    return 9 * 4.0 * shape.config().n_parameters


# ---- backends


Forward = Callable[[Lorsa, Tensor], Tensor]


def plain(module: Lorsa, x: Tensor) -> Tensor:
    """What one would write first in PyTorch: SDPA, all activations in a dense tensor, a dense decode."""
    q, k, v = module.attention_inputs(x)
    z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=module.attn_scale)
    z = z.transpose(1, 2).flatten(2).relu()
    kept = (z * module.W_O.detach().norm(dim=1)).topk(module.k, dim=-1).indices
    dense = torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept))
    return dense @ module.W_O.to(dense.dtype) + module.b_O


def ours(module: Lorsa, x: Tensor) -> Tensor:
    """The kit's own step, as `train` runs it."""
    return module(x).y


def backends(device: torch.device) -> dict[str, Forward]:
    """What can run on a device; the kit's own choice first."""
    kernel = {"triton": ours} if kernels.available(device) else {}
    return {**kernel, "torch": ours, "plain": plain, "plain-compiled": torch.compile(plain)}


class Candidate:
    """One backend on a shape: a random Lorsa with its optimizer."""

    def __init__(self, name: str, shape: Shape, device: torch.device) -> None:
        self.name, self.device, self.forward = name, device, backends(device)[name]
        self.module = random_lorsa(shape, device)
        self.module.backend = "torch" if name == "torch" else "auto"
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-4, fused=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error in the precision of training."""
        with _autocast(self.device):
            return (self.forward(self.module, x).float() - y).square().mean()

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Do one training step; milliseconds of its parts and of the whole."""
        began = _now(self.device)
        loss = self.loss(x, y)
        predicted = _now(self.device)
        loss.backward()
        derived = _now(self.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moved = _now(self.device)
        parts = {"forward_ms": predicted - began, "backward_ms": derived - predicted, "adam_ms": moved - derived}
        return {**parts, "step_ms": moved - began}


def random_lorsa(shape: Shape, device: torch.device) -> Lorsa:
    """A Lorsa of random weights; biases are 0."""
    with torch.device(device):
        module = Lorsa(shape.config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * shape.d_model**-0.5)
    return module


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _batch(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(shape.batch, shape.length, shape.d_model, generator=generator).to(device) for _ in range(2))
    return x, y


def check(name: str, shape: Shape, device: torch.device) -> None:
    """Compare a backend's gradients with float64 on a small batch of the same widths.

    Raises:
        UserError: a gradient is missing, or its error is more than twice that of plain PyTorch in the same precision.
    """
    groups = min(shape.n_qk, 4)
    heads = shape.n_heads // shape.n_qk * groups
    sizes = {"d_model": min(shape.d_model, 96), "n_qk": groups, "n_heads": heads, "k": min(shape.k, heads // 4)}
    small = replace(shape, **sizes, batch=2, length=min(shape.length, 200))
    exact = random_lorsa(small, torch.device("cpu")).double()
    x, y = _batch(small, torch.device("cpu"))
    (plain(exact, x.double()) - y.double()).square().mean().backward()
    reference = _gradients(exact)
    errors = {}
    for backend in dict.fromkeys((name, "plain")):
        candidate = Candidate(backend, small, device)
        candidate.loss(x.to(device), y.to(device)).backward()
        gradients = _gradients(candidate.module)
        if missing := sorted(reference.keys() - gradients.keys()):
            raise UserError(f"The backend {backend} gives no gradient for {missing}; it is not timed.")
        errors[backend] = max(float((gradients[key] - grad).norm() / grad.norm()) for key, grad in reference.items())
    # One kept head more or less, where bf16 rounding decides a near tie, moves single rows: hence a factor.
    if not errors[name] <= 2 * errors["plain"] + 1e-5:
        raise UserError(
            f"The backend {name} is off by {errors[name]:.2e} (plain PyTorch: {errors['plain']:.2e}) on {device}; "
            "it is not timed."
        )


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.double().cpu() for key, p in module.named_parameters() if p.grad is not None}


# ---- measuring


def _now(device: torch.device) -> float:
    """Milliseconds, with the device's queue drained."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def ceilings(shape: Shape, device: torch.device) -> Callable[[], dict[str, float]]:
    """Samples what the machine can do at this moment on matrices of a shape.

    `rate` are operations per second of matrix products, `bandwidth` bytes per second of copies.
    """
    on_gpu, rows, width = device.type == "cuda", min(shape.n_tokens, 8192), min(shape.n_heads, 8192)
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
    left, right = torch.randn(rows, shape.d_model, **like), torch.randn(shape.d_model, width, **like)
    repeats, megabytes = (20, 2048) if on_gpu else (3, 256)  # far more than the caches hold
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.full_like(source, 2)

    def sample() -> dict[str, float]:
        began = _now(device)
        for _ in range(repeats):
            torch.mm(left, right)
        multiplied = _now(device)
        target.copy_(source)
        taken, flops = _now(device) - multiplied, 2e3 * repeats * left.numel() * width
        return {"rate": flops / (multiplied - began), "bandwidth": 2e3 * len(source) / taken}

    return sample


def peak_mb(name: str, shape_name: str, device: torch.device, here: bool = False) -> float:
    """Peak memory of training steps in MB: weights, optimizer and step, without the program itself.

    On a CPU it is measured in a fresh process, unless `here`, from what Linux reports; NaN elsewhere.
    """
    on_gpu, shape = device.type == "cuda", SHAPES[shape_name]
    if not (on_gpu or here):
        call = f"bench.peak_mb({name!r}, {shape_name!r}, bench.torch.device('cpu'), here=True)"
        script = f"from lorsa_utils.kit import bench; print({call})"
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        return float(answer.stdout.split()[-1]) if answer.returncode == 0 else float("nan")
    x, y = _batch(shape, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    candidate = Candidate(name, shape, device)
    for _ in range(3):
        candidate.step(x, y)
    if on_gpu:
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return (int(status.split("VmHWM:")[1].split()[0]) * 1024 - before) / 1e6


def measure(
    shape_name: str, device: str | torch.device = "cpu", names: Sequence[str] | None = None, rounds: int = 15
) -> pd.DataFrame:
    """Time backends (all of them by default) in alternating order: one row per backend.

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
    peaks = {name: peak_mb(name, shape_name, place) for name in names}
    x, y = _batch(shape, place)
    candidates, sample, samples = [Candidate(name, shape, place) for name in names], ceilings(shape, place), []
    for number in tqdm(range(-2, rounds), desc=f"bench {shape_name}", unit="round"):  # two rounds warm up
        turn = number % len(candidates)
        for candidate in candidates[turn:] + candidates[:turn]:
            samples.append({"round": number, "name": candidate.name, **sample(), **candidate.step(x, y)})
    timed = pd.DataFrame(samples).query("round >= 0")
    about = [{"backend": c.name, "shape": shape_name} | _row(c, shape, x, timed, peaks[c.name]) for c in candidates]
    return pd.DataFrame(about)


def _row(candidate: Candidate, shape: Shape, x: Tensor, timed: pd.DataFrame, peak: float) -> dict[str, Any]:
    rate, bandwidth = timed[["rate", "bandwidth"]].median()
    times = timed[timed["name"] == candidate.name]
    with torch.no_grad(), _autocast(candidate.device):
        share, pairs = visited_pairs(Lorsa.encode(candidate.module, x)[0], shape)
    floor = 1e3 * max(count_flops(shape, pairs) / rate, count_bytes(shape) / bandwidth)
    low, step, high = times["step_ms"].quantile([0.2, 0.5, 0.8])
    return {
        "device": device_name(candidate.device),
        "dtype": "bf16 autocast" if candidate.device.type == "cuda" else "fp32",
        "step_ms_p20": low,
        "step_ms_p50": step,
        "step_ms_p80": high,
        **times[["forward_ms", "backward_ms", "adam_ms"]].median(),
        "floor_ms": floor,
        "step_over_floor": step / floor,
        "tokens_per_s": shape.n_tokens / step * 1e3,
        "peak_mb": peak,
        "visited_share": share,
        "matmul_gflop_per_s": rate / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "rounds": len(times),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__ if kernels.triton else "",
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{[*names, platform.processor() or platform.machine()][0]}, {torch.get_num_threads()} threads"


def append_rows(rows: pd.DataFrame, file: str | Path) -> None:
    """Append rows to a CSV."""
    path = Path(file)
    both = pd.concat([pd.read_csv(path), rows]) if path.is_file() else rows
    store.write_text(path, both.to_csv(index=False, float_format="%.6g"))
