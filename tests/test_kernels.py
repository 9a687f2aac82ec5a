"""The Triton kernels against float64, with errors at most twice those of plain PyTorch in the same dtype.

Without a GPU they run in Triton's interpreter (conftest.py switches it on), on few and small shapes; `pytest -m gpu`
runs the whole table on a device.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from scripts import run_script
from torch import Tensor
from toys import D_HEAD, D_MODEL, ROTARY, ToySource, toy_site

pytest.importorskip("triton", reason="Triton is not installed; it has no wheels for this system")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "Triton was loaded without its interpreter; set TRITON_INTERPRET=1 before Python starts",
        allow_module_level=True,
    )

from lorsa_utils import kernels, ops, reference  # noqa: E402
from lorsa_utils.config import LorsaConfig, RotaryConfig, TrainConfig  # noqa: E402
from lorsa_utils.selection import SCORES, Selection  # noqa: E402
from lorsa_utils.training import RunSpec, prepare_runs  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
LENGTHS, D_QK, GROUP_SIZES, KEPT = (1, 63, 97, 128, 257, 1000), (8, 24, 64, 128), (1, 3, 8, 64, 128), (1, 7, 64, None)
ROUNDING = 2.0**-24  # of float32; errors below it are nobody's fault


def mend_interpreter() -> None:
    """Close gaps of Triton's interpreter: loop bounds under NumPy 2.4 (up to 3.6), bfloat16 (all up to 3.9)."""
    import numpy as np
    from triton.runtime import interpreter

    builder, handle_type, tl = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl
    patch_tensor, create_dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return handle_type((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def round_to_even(self: Any, handle: Any, dtype: Any) -> Any:
        if handle.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, handle, dtype)
        bits = np.ascontiguousarray(handle.data).view(np.uint32)
        return handle_type(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    interpreter._patch_lang_tensor, builder.cast_impl = patch, round_to_even
    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widen(a), widen(b), *rest)


if INTERPRETED:
    mend_interpreter()


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN and of integers far out of range, so that what a kernel leaves unwritten is seen."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **options: Any) -> Tensor:
            buffer = allocate(*args, **options)
            return buffer.fill_(float("nan") if buffer.is_floating_point() else 2**30)

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm())


def assert_as_exact(names: str, found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for name, ours, theirs, truth in zip(names.split(), found, plain, exact, strict=True):
        assert ours.shape == truth.shape
        bound = 2 * error(theirs, truth) + ROUNDING * float(truth.norm())
        assert error(ours, truth) <= bound, f"{name}: {error(ours, truth):.2e}, allowed {bound:.2e}"


# ---- attention


class Problem(NamedTuple):
    """Inputs of an attention layer and a loss that sees the kept heads alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor
    dz: Tensor
    scale: float


def problem(
    length: int, d: int, g: int, n_kept: int | None, dtype: torch.dtype, batch: int = 1, n_groups: int = 2
) -> Problem:
    q, k = (draw(batch, length, n_groups, d, seed=seed, dtype=dtype).transpose(1, 2) for seed in (0, 1))
    v = draw(batch, length, n_groups, g, seed=2, dtype=dtype).transpose(1, 2)
    n = n_groups * g
    kept = draw(batch * length, n, seed=3).topk(min(n_kept or n, n)).indices
    return Problem(q, k, v, kept, draw(*kept.shape, seed=4), 1.5 * d**-0.5)


def plain(case: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """z and the gradients by q, k and v in plain PyTorch with a dense gradient of z."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in case[:3])
    if dtype.itemsize == 2:
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale)
    else:
        z = ops.attention_pattern(q, k, case.scale) @ v
    z = z.transpose(1, 2).flatten(2)
    dense = torch.zeros(case.kept.shape[0], z.shape[-1], dtype=torch.float64, device=z.device)
    dense.scatter_add_(1, case.kept, case.dz.double())
    return z.detach(), *torch.autograd.grad(z, (q, k, v), dense.view(z.shape).to(dtype))


def with_kernels(case: Problem, precision: str = "ieee") -> tuple[Tensor, ...]:
    z, lse = kernels.attention_forward(case.q, case.k, case.v, case.scale, precision)
    kept = z.flatten(0, 1).gather(1, case.kept)
    return z, *kernels.attention_backward(case.q, case.k, case.v, lse, case.scale, case.kept, kept, case.dz, precision)


def check_attention(case: Problem, precision: str = "ieee") -> None:
    found, exact = with_kernels(case, precision), plain(case, torch.float64)
    assert not any(x.isnan().any() for x in found)
    names = "z dq dk dv"
    if case.q.shape[2] == 1:  # one key: its weight is 1, and dq and dk are zero but for rounding
        size = (2.0**-9 if precision == "tf32" else 2.0**-20) * case.dz.norm() * exact[0].norm() * case.k.norm()
        assert max(found[1].norm(), found[2].norm()) <= size
        names, found, exact = "z dv", found[::3], exact[::3]
    if precision == "ieee" or not INTERPRETED:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        theirs = plain(case, case.q.dtype)
        assert_as_exact(names, found, theirs if names == "z dq dk dv" else theirs[::3], exact)
    for ours, truth in zip(found, exact, strict=True):  # CPUs have no tf32 to compare with
        assert error(ours, truth) <= 2.0**-6 * float(truth.norm())


# Every length, width, group size and number of kept heads of the table, and both sides of each tile's edge.
@pytest.mark.parametrize(
    ("length", "d", "g", "n_kept", "batch"),
    [
        *[(1, 8, 1, 1, 2), (63, 24, 3, 7, 2), (63, 64, 128, 64, 1), (97, 64, 8, 64, 2), (97, 128, 64, 7, 1)],
        *[(128, 24, 1, None, 2), (257, 128, 3, 1, 1), (257, 24, 8, 64, 1), (1000, 8, 1, 1, 1)],
    ],
)
def test_attention_equals_float64(length: int, d: int, g: int, n_kept: int | None, batch: int) -> None:
    check_attention(problem(length, d, g, n_kept, torch.float32, batch, n_groups=1 if length == 1000 else 2))


@pytest.mark.parametrize(
    ("kind", "length", "d", "g", "n_kept"),
    [
        *[("bfloat16", 63, 24, 3, 1), ("bfloat16", 97, 128, 128, 64), ("bfloat16", 128, 8, 8, None)],
        *[("tf32", 97, 64, 64, 64), ("tf32", 140, 24, 3, 1), ("tf32", 20, 256, 256, 7), ("float16", 97, 24, 8, 7)],
    ],
)
def test_attention_of_other_precisions(kind: str, length: int, d: int, g: int, n_kept: int | None) -> None:
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    check_attention(problem(length, d, g, n_kept, dtype), "tf32" if kind == "tf32" else "ieee")


def test_layout_of_gradients_and_strides_of_inputs() -> None:
    case = problem(70, 24, 3, 4, torch.float32, batch=2)
    first = with_kernels(case)
    assert first[0].is_contiguous()
    for gradient in first[1:]:
        assert gradient.transpose(1, 2).is_contiguous()
    fused = torch.cat([x.transpose(1, 2) for x in case[:3]], dim=-1).transpose(1, 2)  # rows with gaps between them
    backwards = [x.mT.contiguous().mT for x in case[:3]]  # the last dimension is not the dense one
    for inputs in ([x.contiguous() for x in case[:3]], fused.split([24, 24, 3], dim=-1), backwards):
        q, k, v = inputs
        again = with_kernels(case._replace(q=q, k=k, v=v))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


def test_gradients_of_a_head_that_was_kept_twice_add() -> None:
    case = problem(70, 8, 8, 6, torch.float32)
    case.kept[:, 3] = case.kept[:, 0]
    case.kept[::2, 5] = case.kept[::2, 1]
    check_attention(case)


def test_queries_in_which_a_group_was_not_kept_have_no_gradient() -> None:
    case = problem(140, 16, 4, 3, torch.float32, n_groups=3)
    case.kept[:] = torch.tensor([8, 9, 10])
    case.kept[70:90, 0] = 1
    _, dq, dk, dv = with_kernels(case)
    assert dq[0, 1].abs().max() == dk[0, 1].abs().max() == dv[0, 1].abs().max() == 0
    assert dq[0, 0, :70].abs().max() == dq[0, 0, 90:].abs().max() == dk[0, 0, 90:].abs().max() == 0
    assert dq[0, 0, 70:90].abs().min() > 0
    check_attention(case)


def test_two_calls_give_the_same_bits() -> None:
    case = problem(97, 24, 8, 9, torch.float32)
    tokens = decode_problem(40, 20, 7, 33)
    calls = ((*with_kernels(case), *kernels.sparse_decode_backward(*tokens)) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(*calls, strict=True))


def test_layers_past_the_limits_are_refused() -> None:
    case = problem(4, 257, 1, 1, torch.float32)
    with refused("up to 256 wide, not 257"):
        kernels.attention_forward(case.q, case.k, case.v, 1.0)
    assert kernels.supports(256, 256, 65536)
    assert not any(kernels.supports(*sizes) for sizes in [(257, 1, 8), (8, 257, 514), (8, 1, 65537)])


# ---- selection


def check_selection(z: Tensor, norms: Tensor, k: int, score: str = "relu", among: Tensor | None = None) -> None:
    indices, values = kernels.select_top_k(z, Selection(k, norms, score), among)
    scores = {"relu": z.float().clamp_min(0), "abs": z.float().abs()}[score] * norms
    if among is not None:
        scores = scores.masked_fill(~among, -1.0)
    assert torch.equal(indices, reference.select_top_k(scores, k))
    assert torch.equal(values, z.gather(1, indices))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 64), (300, 7), (2500, 2500), (33000, 128)])
def test_selection_equals_a_full_sort(n: int, k: int, score: str) -> None:
    check_selection(draw(2, n), draw(n, seed=1).abs(), k, score)


# Few levels, so that ties and zeros of both signs are everywhere.
levels = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 1e-30, 0.5, 1.0, 3.0])


@given(data=st.data(), n=st.integers(1, 40), score=st.sampled_from(list(SCORES)))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_selection_is_exact_and_breaks_ties_by_index(data: st.DataObject, n: int, score: str) -> None:
    z = torch.tensor(data.draw(st.lists(st.lists(levels, min_size=n, max_size=n), min_size=1, max_size=2)))
    norms = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n)))
    among = data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    mask = None if among is None else torch.tensor(among).to(DEVICE)
    check_selection(z.to(DEVICE), norms.to(DEVICE), data.draw(st.integers(1, n)), score, mask)


def test_selection_where_chunks_are_full_of_ties() -> None:
    z = draw(2, 3000).round()
    for k in (1, 500, 2999):
        check_selection(z, torch.ones(3000, device=DEVICE), k, "abs")
    check_selection(torch.zeros(1, 3000, device=DEVICE), torch.ones(3000, device=DEVICE), 10)


def test_selection_among_some_units_and_of_other_layouts() -> None:
    z, norms, among = draw(3, 200), draw(200, seed=1).abs(), draw(200, seed=2) > 1
    for k in (5, 150):  # more than there are
        check_selection(z, norms, k, "relu", among)
    check_selection(z.T.contiguous().T, norms, 9)
    check_selection(z[:, 20:90], norms[20:90], 9)
    check_selection(z.bfloat16(), norms, 9)


@pytest.mark.parametrize(
    ("n", "k", "dtype", "fix"),
    [
        *[(8, k, torch.float32, "choose k from 1 to 8") for k in (0, 9)],
        *[(65537, 1, torch.float32, 'backend "torch"'), (8, 2, torch.float64, '"torch" for float64')],
    ],
)
def test_impossible_selections_are_refused(n: int, k: int, dtype: torch.dtype, fix: str) -> None:
    with refused(fix):
        kernels.select_top_k(torch.zeros(1, n, device=DEVICE, dtype=dtype), Selection(k, torch.ones(n, device=DEVICE)))


# ---- decode


def decode_problem(n_rows: int, n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    indices = draw(n_rows, n, seed=3).topk(k).indices
    return indices, draw(n_rows, k, seed=4), draw(n, d, seed=5, dtype=dtype), draw(n_rows, d, seed=6, dtype=dtype)


def plain_decode(indices: Tensor, values: Tensor, weight: Tensor, dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    values, weight = (x.detach().to(dtype).requires_grad_() for x in (values, weight))
    dense = torch.zeros(values.shape[0], weight.shape[0], dtype=dtype, device=values.device)
    y = dense.scatter_add(1, indices, values) @ weight
    return y.detach(), *torch.autograd.grad(y, (values, weight), dy.to(dtype))


def check_decode(tokens: tuple[Tensor, ...]) -> None:
    found = (kernels.sparse_decode(*tokens[:3]), *kernels.sparse_decode_backward(*tokens))
    assert_as_exact("y dvalues dW", found, plain_decode(*tokens, tokens[2].dtype), plain_decode(*tokens, torch.float64))
    never = torch.ones(tokens[2].shape[0], dtype=torch.bool, device=DEVICE)
    never[tokens[0].unique()] = False
    assert not found[2][never].any()


@pytest.mark.parametrize(
    "problem",
    [
        *[(1, 1, 1, 1), (13, 40, 7, 24), (9, 64, 64, 130), (33, 300, 1, 16), (5, 70, 17, 257), (30, 20, 20, 8)],
        (20, 40, 7, 48, torch.bfloat16),
    ],
)
def test_decode_equals_float64(problem: tuple[Any, ...]) -> None:
    check_decode(decode_problem(*problem))


@pytest.mark.parametrize("n_rows", [8, 9, 16, 17, 40])
def test_heads_that_many_tokens_chose_are_summed_in_chunks(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CHUNK", 8)
    indices, *rest = decode_problem(n_rows, 12, 3, 20)
    indices[:, 0], indices[:, 1], indices[:, 2] = 4, 11, torch.arange(n_rows, device=DEVICE) % 3
    check_decode((indices, *rest))


def test_gradient_of_values_in_spans_of_a_weight_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_L2_BYTES", 20000)
    check_decode(decode_problem(7, 30, 5, 400))


# ---- rotation


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize(("d", "rotary_dim"), [(8, 8), (24, 10), (64, 16), (128, 128)])
def test_rotation_equals_plain(d: int, rotary_dim: int, adjacent: bool) -> None:
    rotary = RotaryConfig(rope_type="default", rotary_dim=rotary_dim, theta=1e4, adjacent_pairs=adjacent)
    cos, sin = ops.rotary_tables(rotary, 19, DEVICE)
    for x in (draw(2, 19, 3, d).transpose(1, 2), draw(2, 3, 19, d), draw(2, 19, 3, 2 * d)[..., d:].transpose(1, 2)):
        found = kernels.apply_rotary(x, cos, sin, adjacent)
        assert (found - ops.apply_rotary(x, cos, sin, adjacent)).abs().max() < 1e-6
        assert (kernels.apply_rotary(found, cos, -sin, adjacent) - x).abs().max() < 1e-6
        assert found.stride() == torch.empty_like(x).stride()
    half = draw(2, 3, 19, d, dtype=torch.bfloat16)
    rotated = kernels.apply_rotary(half, cos, sin, adjacent)
    assert rotated.dtype == torch.bfloat16
    assert torch.allclose(rotated.float(), ops.apply_rotary(half.float(), cos, sin, adjacent), rtol=2.0**-8, atol=1e-6)


# ---- a whole step


@pytest.mark.parametrize("score", SCORES)
def test_a_training_step_through_ops_equals_float64(score: str) -> None:
    batch, length, n_groups, d, g, n_keep, aux_k = 2, 45, 3, 16, 4, 4, 2
    n, scale = n_groups * g, 0.4
    cos, sin = ops.rotary_tables(RotaryConfig(rope_type="default", rotary_dim=8), length, DEVICE, torch.float64)
    leaves = [draw(batch, length, n_groups, width, seed=seed) for seed, width in enumerate((d, d, g))]
    leaves, dead = [*leaves, draw(n, 24, seed=3)], draw(n, seed=4) > 0.3
    targets = draw(2, batch * length, 24, seed=5)

    def step(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        q, k, v, weight = inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        q, k = (ops.apply_rotary(x.transpose(1, 2), cos.to(dtype), sin.to(dtype), False, backend) for x in (q, k))
        selection = Selection(n_keep, weight.detach().norm(dim=1), score, dead, aux_k)
        kept = ops.sparse_attention(q, k, v.transpose(1, 2), scale, selection, backend)
        y = ops.sparse_decode(kept.indices, kept.values, weight, backend)
        aux = ops.sparse_decode(kept.aux_indices, kept.aux_values, weight, backend)
        loss = (y - targets[0].to(dtype)).square().mean() + (aux - targets[1].to(dtype)).square().mean()
        chosen = torch.cat((kept.indices.sort().values, kept.aux_indices.sort().values), dim=1)
        return chosen, y.detach(), aux.detach(), *torch.autograd.grad(loss, inputs)

    found, plain_step, exact = step(torch.float32, "triton"), step(torch.float32, "torch"), step(torch.float64, "torch")
    assert torch.equal(found[0], exact[0])
    assert_as_exact("y aux dq dk dv dW", found[1:], plain_step[1:], exact[1:])


@pytest.mark.slow
def test_a_hundred_steps_by_loops_and_by_kernels_stay_together(tmp_path: Path) -> None:
    source, settings = ToySource(6, 7), TrainConfig(tokens=10**6, batch_size=1, lr=3e-3, aux_k=0, warmup=0.0)
    config = LorsaConfig(D_MODEL, 8, 2, D_HEAD, 2, rotary=ROTARY)
    runs = {}
    for backend in ("reference", "torch", "triton"):
        spec = RunSpec(backend, 0, config, settings, tmp_path / backend)
        runs[backend] = prepare_runs([spec], source, {0: toy_site(0)}, device=DEVICE)[0]
        runs[backend].module.backend = backend
    batches = list(source.batches(1))
    losses = torch.zeros(3, 100)
    for step in range(100):
        for row, run in zip(losses, runs.values(), strict=True):
            run.train_step(batches[step % len(batches)])
            row[step] = run.recent_metrics()["loss"]
    assert losses[0, -6:].mean() < 0.7 * losses[0, :6].mean(), "nothing was learnt"
    assert (losses - losses[0]).abs().max() < 5e-3 * losses[0, 0]
    for backend, run in runs.items():
        for name, expected in runs["reference"].module.state_dict().items():
            gap = (run.module.state_dict()[name] - expected).abs().max()
            assert gap < 1e-2 * max(0.1, float(expected.abs().max())), (backend, name)


# ---- where kernels do not run


def run_python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter without this process's switch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        done = run_script(code)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_module_loads_without_triton_and_says_what_to_do() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from lorsa_utils import kernels
assert not kernels.available("cpu") and not kernels.available("cuda")
try:
    kernels.select_top_k(torch.zeros(1, 4), kernels.Selection(2, torch.ones(4)))
except kernels.UserError as sentence:
    print(sentence)
"""
    assert run_python(code).strip() == 'The Triton kernels need an NVIDIA GPU, not cpu; use backend "torch" here.'


COMPILE = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from lorsa_utils import kernels

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def compile_only(kernel, programs, *args, **options):
    compiled = kernel.warmup(*args, grid=(1,), **options)
    print(json.dumps([kernel.__name__, compiled.metadata.shared, "cubin" in compiled.asm]))

driver.set_active(Hopper())
kernels._launch = compile_only
ieee, tf32, bfloat16 = (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")
cases = [(256, 64, 64, ieee), (256, 64, 64, tf32), (256, 64, 64, bfloat16), (1, 8, 1, bfloat16), (1000, 24, 3, ieee)]
cases += [(257, 256, 256, bfloat16), (1024, 128, 128, tf32), (1024, 128, 128, bfloat16)]
for length, d, g, (dtype, precision) in cases:
    q = torch.zeros(1, length, 2, d, dtype=dtype).transpose(1, 2)
    v = torch.zeros(1, length, 2, g, dtype=dtype).transpose(1, 2)
    _, lse = kernels.attention_forward(q, q, v, 0.5, precision)
    kept = torch.zeros(length, 2, dtype=torch.int64)
    kernels.attention_backward(q, q, v, lse, 0.5, kept, kept.float(), kept.float(), precision)
    kernels.apply_rotary(q, torch.zeros(length, d // 4), torch.zeros(length, d // 4), d == 8)
for n, k, d, dtype in [(6144, 64, 768, torch.float32), (65536, 1, 48, torch.bfloat16), (1000, 1000, 576,
torch.float32)]:
    z = torch.zeros(600, n)
    selection = kernels.Selection(k, z[0], "abs" if k == 1 else "relu")
    kernels.select_top_k(z, selection, z[0] == 0 if k == 64 else None)
    indices, weight = torch.zeros(600, k, dtype=torch.int64), torch.zeros(n, d, dtype=dtype)
    kernels.sparse_decode(indices, indices.float(), weight)
    kernels.sparse_decode_backward(indices, indices.float(), weight, torch.zeros(600, d, dtype=dtype))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in run_python(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()]
    attention = {"_attention_forward", "_pack_queries", "_attention_backward_q", "_attention_backward_kv"}
    decode = {"_decode", "_decode_backward_values", "_decode_backward_hot", "_decode_backward_weight"}
    assert {name for name, _, _ in rows} == {*attention, *decode, "_select_top_k", "_rotate"}
    for name, shared_bytes, compiled in rows:
        assert compiled, name
        assert shared_bytes <= 100 * 1024, f"{name} asks for {shared_bytes} bytes of shared memory"


# ---- on a device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and Triton without its interpreter")
    assert kernels.available("cuda")
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ieee", "tf32", "bfloat16"])
@pytest.mark.parametrize("g", GROUP_SIZES)
@pytest.mark.parametrize("d", D_QK)
def test_the_whole_table_on_a_device(d: int, g: int, kind: str, gpu: None) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    for length, n_kept in itertools.product(LENGTHS, KEPT):
        check_attention(problem(length, d, g, n_kept, dtype, batch=2, n_groups=3), "tf32" if kind == "tf32" else "ieee")


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "g"), [(256, 256), (8, 256), (256, 1), (96, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_widths_on_a_device(d: int, g: int, dtype: torch.dtype, gpu: None) -> None:
    check_attention(problem(500, d, g, 64, dtype, batch=2, n_groups=3))


@pytest.mark.gpu
def test_training_shapes_on_a_device(gpu: None) -> None:
    check_attention(problem(256, 64, 64, 64, torch.bfloat16, batch=4, n_groups=96))
    check_selection(draw(500, 6144), draw(6144, seed=1).abs(), 64)
    check_selection(draw(100, 32768), draw(32768, seed=1).abs(), 128, "abs")
    check_decode(decode_problem(2048, 6144, 64, 768))
    check_decode(decode_problem(2048, 6144, 64, 768, torch.bfloat16))
    indices, *rest = decode_problem(4096, 64, 8, 192)
    indices[:, 0] = 5  # one head that every token chose: many chunks
    check_decode((indices, *rest))


def large(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype, generator=torch.Generator(DEVICE).manual_seed(0))


@pytest.fixture
def large_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 48e9:
        pytest.skip("needs 48 GB of GPU memory")
    monkeypatch.undo()  # no poison


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length", "n_groups"), [(40, 512, 1024), (1, 20480, 1024)])
def test_offsets_past_32_bits_in_attention(batch: int, length: int, n_groups: int, large_gpu: None) -> None:
    d, last = 128, n_groups - 1
    q, k = (large(batch, length, n_groups, d, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    v = large(batch, length, n_groups, 1, dtype=torch.bfloat16).transpose(1, 2)
    assert q.numel() > 2**31
    kept = torch.full((batch * length, 1), last, device=DEVICE)
    dz = large(batch * length, 1, dtype=torch.float32)
    z, *gradients = with_kernels(Problem(q, k, v, kept, dz, 0.1))
    part = Problem(*(x[-1:, last:].clone() for x in (q, k, v)), kept[-length:] - last, dz[-length:], 0.1)
    alone = with_kernels(part)
    assert torch.equal(z[-1:, :, last:], alone[0])
    for ours, theirs in zip(gradients, alone[1:], strict=True):
        assert torch.equal(ours[-1:, last:], theirs)
        assert not ours[-1:, :last].any()


@pytest.mark.gpu
def test_offsets_past_32_bits_in_selection_and_decode(large_gpu: None) -> None:
    z = large(66000, 32768, dtype=torch.float32)
    selection = Selection(3, z[0].abs())
    found = kernels.select_top_k(z, selection)
    for ours, exact in zip(found, kernels.select_top_k(z[-9:].clone(), selection), strict=True):
        assert torch.equal(ours[-9:], exact)
    weight = z.view(32768, 66000)
    indices = torch.tensor([[32767, 5], [32766, 32767]], device=DEVICE)
    values, dy = large(2, 2, dtype=torch.float32), large(2, 66000, dtype=torch.float32)
    exact = (values[..., None].double() * weight[indices].double()).sum(1)
    assert error(kernels.sparse_decode(indices, values, weight), exact) < 1e-6 * float(exact.norm())
    d_values, d_weight = kernels.sparse_decode_backward(indices, values, weight, dy)
    exact = (weight[indices].double() * dy[:, None].double()).sum(-1)
    assert error(d_values, exact) < 1e-5 * float(exact.norm())
    exact = values[0, 0].double() * dy[0].double() + values[1, 1].double() * dy[1].double()
    assert error(d_weight[32767], exact) < 1e-6 * float(exact.norm())
