"""Rotary tables, attention, top-K selection and sparse decode.

`backend` is "torch" (any device), "triton" (`kernels`, NVIDIA GPUs), "reference" (loops, for checks) or "auto": triton
where it runs, else torch. The backward pass of `sparse_attention` visits only the queries in which a head of the QK
group was kept, and needs neither the whole z nor a pattern (equations in `kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorsa_utils import kernels, reference
from lorsa_utils.config import RotaryConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.selection import Selection

BACKENDS = ("auto", "torch", "triton", "reference")


def choose_backend(backend: str, like: Tensor, *sizes: int) -> str:
    """Resolve "auto" for tensors like `like`, within the kernels' limits on `sizes` (d_qk, group size, n_units)."""
    if backend not in BACKENDS:
        raise UserError(f"There is no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend != "auto":
        return backend
    fits = like.dtype != torch.float64 and kernels.supports(*sizes)
    return "triton" if fits and kernels.available(like.device) else "torch"


def rotary_tables(
    rotary: RotaryConfig, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each [length, rotary_dim / 2], from angles in float64."""
    frequencies = torch.tensor(reference.inverse_frequencies(rotary), dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool, backend: str = "auto") -> Tensor:
    """Rotate x [..., length, d_qk] by `rotary_tables`; dimensions past rotary_dim pass through (partial RoPE)."""
    if cos.shape[-1] == 0:
        return x
    backend = choose_backend(backend, x) if x.dim() == 4 and cos.dim() == 2 else "torch"
    result: Tensor = _Rotation.apply(x, cos, sin, adjacent_pairs, backend)
    return result


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool, backend: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.options = adjacent_pairs, backend
        return _rotate(x, cos, sin, adjacent_pairs, backend)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, -sin, *ctx.options), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool, backend: str) -> Tensor:
    if backend == "triton":
        return kernels.apply_rotary(x, cos, sin, adjacent_pairs)
    out = torch.empty_like(x)
    half, end = cos.shape[-1], 2 * cos.shape[-1]
    first, second = (slice(0, end, 2), slice(1, end, 2)) if adjacent_pairs else (slice(half), slice(half, end))
    # A sequence at a time, so that the pieces of a pass stay in the CPU's caches.
    for source, target in zip(x, out, strict=True) if x.dim() == 4 and x.device.type == "cpu" else [(x, out)]:
        torch.mul(source[..., first], cos, out=target[..., first]).addcmul_(source[..., second], sin, value=-1)
        torch.mul(source[..., second], cos, out=target[..., second]).addcmul_(source[..., first], sin)
        target[..., end:] = source[..., end:]
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, as in Qwen3's QK norm."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "torch") -> Tensor:
    """Causal softmax attention: rotated q, k [batch, n_heads, length, d_qk], v [..., d_v] to [..., d_v]."""
    if choose_backend(backend, q) == "reference":
        heads = zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True)
        z = [reference.causal_attention(q_head, k_head, v_head, scale) for q_head, k_head, v_head in heads]
        return torch.stack(z).reshape(v.shape)
    d_v, d_qk = v.shape[-1], q.shape[-1]
    if v.device.type == "cpu" and d_v < d_qk:
        # The CPU's fast path wants values as wide as keys.
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, d_qk - d_v)), is_causal=True, scale=scale)[..., :d_v]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def attention_pattern(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal pattern of q, k [..., length, d_qk], [..., length, length]: rows are queries and sum to 1."""
    scores = (q @ k.transpose(-1, -2)) * scale
    length = q.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


def select_top_k(scores: Tensor, k: int, backend: str = "torch", floor: float | None = None) -> Tensor:
    """Indices [n_rows, k] of the k largest in each row of scores [n_rows, n], in no order; ties go to the lower index.

    Scores below `floor` count as `floor`.
    """
    if backend == "reference":
        return reference.select_top_k(scores if floor is None else scores.clamp_min(floor), k)
    n = scores.shape[-1]
    if k == n:
        return torch.arange(n, device=scores.device).expand(scores.shape[0], n)
    # One more than asked shows a tie at the boundary; only such rows need a stable sort.
    values, indices = _largest(scores, k + 1)
    smallest, place = values.topk(2, dim=-1, largest=False)
    last = torch.full_like(place[:, :1], k)
    indices.scatter_(1, place[:, :1], indices.gather(1, last))
    if floor is not None:
        smallest = smallest.clamp_min(floor)
    tied = (smallest[:, 0] == smallest[:, 1]).nonzero()[:, 0]
    if tied.numel():
        rows = scores[tied] if floor is None else scores[tied].clamp_min(floor)
        indices[tied, :k] = rows.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return indices[:, :k].contiguous()


def _largest(scores: Tensor, k: int, fold: int = 8) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their indices, in no order.

    On a CPU wide rows are folded: the k largest lie in the k columns with the largest maxima, so two short searches do.
    """
    n = scores.shape[-1]
    if scores.device.type != "cpu" or n % fold or n < 2 * fold * k:
        values, indices = scores.topk(k, dim=-1, sorted=False)
        return values, indices
    columns = scores.view(-1, fold, n // fold).amax(dim=1).topk(k, dim=-1, sorted=False).indices
    candidates = (columns[:, None, :] + n // fold * torch.arange(fold)[None, :, None]).flatten(1)
    values, places = scores.gather(1, candidates).topk(k, dim=-1, sorted=False)
    return values, candidates.gather(1, places)


def select_heads(z: Tensor, selection: Selection, among: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Kept units [n_rows, k], in no order, of activations z [n_rows, n].

    Only units in the mask `among` [n] compete; if they are fewer than k, others fill up.
    """
    if choose_backend(backend, z, 1, 1, z.shape[-1]) == "triton":
        return kernels.select_top_k(z, selection, among)[0]
    scores = selection.scores(z)
    if among is not None:
        scores = scores.clamp_(min=0).masked_fill_(~among, -1.0)
    return select_top_k(scores, selection.k, backend, floor=None if among is not None else 0.0)


class KeptHeads(NamedTuple):
    """Kept heads [n_rows, k], in no order, and the best dead ones for AuxK [n_rows, aux_k].

    Values are activations, zero for a kept head that is not active.
    """

    indices: Tensor
    values: Tensor
    aux_indices: Tensor
    aux_values: Tensor


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection, backend: str = "auto"
) -> KeptHeads:
    """Causal attention over QK groups, then selection; gradients flow through the kept heads.

    Args:
        q, k: [batch, n_qk, length, d_qk], rotated.
        v: [batch, n_qk, length, group size]; head g * group size + i is column i of group g.
    """
    n_heads = len(selection.norms)
    backend = choose_backend(backend, q, q.shape[-1], v.shape[-1], n_heads)
    if backend == "triton" or (backend == "torch" and q.device.type == "cpu"):
        return KeptHeads(*_SparseAttention.apply(q, k, v, scale, selection, backend))
    z = causal_attention(q, k, v, scale, backend).transpose(1, 2).reshape(-1, n_heads)
    with torch.no_grad():
        chosen, kept = _select_kept(z, selection, backend)
    values = selection.activations(z.gather(1, torch.cat(chosen, dim=1)) * (kept != 0))
    return KeptHeads(chosen[0], values[:, : selection.k], chosen[1], values[:, selection.k :])


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection, backend: str
    ) -> tuple[Tensor, ...]:
        if backend == "triton":
            z, lse = kernels.attention_forward(q, k, v, scale, _dot_precision())
            z = z.flatten(0, 1)
        else:
            z, lse = _attention_with_lse(q, k, v, scale)
        ctx.scale, ctx.backend = scale, backend
        return _keep(ctx, z, selection, backend, q, k, v, lse)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, indices, kept = ctx.saved_tensors
        arguments = q, k, v, lse, ctx.scale, indices, kept, _gradient_of_kept(ctx, grad_outputs, kept)
        if ctx.backend == "triton":
            return *kernels.attention_backward(*arguments, _dot_precision()), None, None, None
        return *_attention_backward(*arguments), None, None, None


def _dot_precision() -> str:
    """Of the kernels' float32 products, as in PyTorch."""
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # set through the newer switches, which this one does not read
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _select_kept(z: Tensor, selection: Selection, backend: str) -> tuple[list[Tensor], Tensor]:
    """Indices of both selections from z [n_rows, n], and z at them, [n_rows, k + aux_k]."""
    first, dead = select_heads(z, selection, backend=backend), selection.dead
    if dead is None or not selection.aux_k:
        return [first, first[:, :0]], z.gather(1, first)
    if z.device.type == "cpu":
        numbers = dead.nonzero()[:, 0]
        among = Selection(min(selection.aux_k, len(numbers)), selection.norms[numbers], selection.score)
        second = numbers[select_heads(z[:, numbers], among, backend=backend)]
    else:  # the number of dead units is not asked for: that would wait for the GPU
        second = select_heads(z, selection._replace(k=selection.aux_k), dead, backend)
    return [first, second], torch.cat((z.gather(1, first), z.gather(1, second) * dead[second]), dim=1)


def _keep(ctx: Any, z: Tensor, selection: Selection, backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The fields of `KeptHeads`; saves the inputs, the kept units and z at them for the backward pass."""
    chosen, kept = _select_kept(z, selection, backend)
    ctx.save_for_backward(*inputs, torch.cat(chosen, dim=1), kept)
    ctx.selection = selection
    ctx.mark_non_differentiable(*chosen)
    values = selection.activations(kept)
    return chosen[0], values[:, : selection.k].contiguous(), chosen[1], values[:, selection.k :].contiguous()


def _gradient_of_kept(ctx: Any, grad_outputs: tuple[Tensor, ...], kept: Tensor) -> Tensor:
    """Gradient of z at the kept units."""
    return torch.cat((grad_outputs[1], grad_outputs[3]), dim=1) * (ctx.selection.activations(kept) != 0)


def _attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """z, [batch * length, n_ov], and the log-sum-exp of every query's scores, [batch, n_qk, length]."""
    size, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    # The CPU's flash attention wants values as wide as keys; zeros change neither scores nor the other columns of z.
    q, k, v = (F.pad(side, (0, width - side.shape[-1])) if side.shape[-1] < width else side for side in (q, k, v))
    z, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return z[..., :size].transpose(1, 2).flatten(2).flatten(0, 1), lse


class _Visits(NamedTuple):
    """The queries that the backward pass visits, packed by (sequence, QK group), ascending by position."""

    pairs: Tensor  # sequence * n_qk + group of the non-empty pairs, [n_pairs]
    counts: list[int]  # visited queries of each pair, descending
    starts: Tensor  # where each pair's rows begin, [n_pairs]
    positions: Tensor  # in the sequence, [n_visits]
    delta: Tensor  # as in `kernels`, [n_visits]
    grads: Tensor  # gradient by z of the QK group, [n_visits + 1, group size]; the last row is zero, for padding


def _pack_visits(
    indices: Tensor, kept: Tensor, grad: Tensor, batch: int, length: int, groups: int, size: int
) -> _Visits:
    group = indices // size
    row, place = (grad != 0).nonzero(as_tuple=True)
    touched = torch.zeros(batch * length, groups, dtype=torch.bool, device=indices.device)
    touched[row, group[row, place]] = True
    pair, position = touched.view(batch, length, groups).transpose(1, 2).reshape(-1, length).nonzero(as_tuple=True)
    sequence, of_group = pair // groups, pair % groups
    # Visit of every (token, group); tokens without one point at the padding row and have zero gradient.
    visit = torch.full((batch * length, groups), len(pair), device=indices.device)
    visit[sequence * length + position, of_group] = torch.arange(len(pair), device=indices.device)
    places = visit.gather(1, group)
    delta = grad.new_zeros(len(pair) + 1).index_add_(0, places.flatten(), (grad * kept).flatten())
    grads = grad.new_zeros((len(pair) + 1) * size).index_add_(
        0, (places * size + indices % size).flatten(), grad.flatten()
    )
    counts = torch.bincount(pair, minlength=batch * groups)
    starts = counts.cumsum(0) - counts
    sorted_counts, order = counts.sort(descending=True, stable=True)
    order = order[sorted_counts > 0]
    return _Visits(order, counts[order].tolist(), starts[order], position, delta[:-1], grads.view(-1, size))


PAIRS_AT_A_TIME = 24
QUERIES_AT_A_TIME = 96


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, indices: Tensor, kept: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as in `kernels.attention_backward`, but lse to base e."""
    batch, groups, length, _ = q.shape
    visits = _pack_visits(indices, kept, grad, batch, length, groups, v.shape[-1])
    # [batch * length * n_qk, width], as in memory; gradients have one row more, for padding. Pairs write all their keys
    # and values, so only absent ones need zeros.
    tables = [side.transpose(1, 2).reshape(-1, side.shape[-1]) for side in (q, k, v)]
    grads = [table.new_empty(len(table) + 1, table.shape[1]) for table in tables]
    grads[0].zero_()
    absent = torch.ones(batch, groups, dtype=torch.bool, device=q.device)
    absent.view(-1)[visits.pairs] = False
    for sequence, group in absent.nonzero().tolist():
        for table in grads[1:]:
            table[:-1].view(batch, length, groups, -1)[sequence, :, group] = 0
    for first in range(0, len(visits.counts), PAIRS_AT_A_TIME):
        chosen = slice(first, first + PAIRS_AT_A_TIME)
        _backward_of_pairs(tables, lse, scale, visits, chosen, grads)
    q_grad, k_grad, v_grad = (table[:-1].view(batch, length, groups, -1).transpose(1, 2) for table in grads)
    return q_grad, k_grad, v_grad


def _backward_of_pairs(
    tables: Sequence[Tensor], lse: Tensor, scale: float, visits: _Visits, chosen: slice, grads: Sequence[Tensor]
) -> None:
    """Write the gradients of the chosen pairs, of which the first has the most visits."""
    (_, groups, length), counts = lse.shape, visits.counts[chosen]
    n, spare = len(counts), len(grads[0]) - 1
    pair = visits.pairs[chosen]
    # Row of position 0 of each pair; positions are `groups` rows apart.
    origin = (pair // groups * length * groups + pair % groups)[:, None]
    every = (origin + groups * torch.arange(length, device=pair.device)).flatten()
    keys, values = (table.index_select(0, every).view(n, length, -1) for table in tables[1:])
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    levels = lse.reshape(-1, length).index_select(0, pair)
    lengths = torch.tensor(counts, device=pair.device)[:, None]
    for begin in range(0, counts[0], QUERIES_AT_A_TIME):
        slot = torch.arange(begin, min(begin + QUERIES_AT_A_TIME, counts[0]), device=pair.device)
        real = slot < lengths
        # Padding repeats the last visit of a pair, with gradient and delta zero.
        visit = visits.starts[chosen, None] + torch.minimum(slot, lengths - 1)
        position = visits.positions[visit]
        reach = int(position.max()) + 1
        rows = origin + groups * position
        queries = tables[0].index_select(0, rows.flatten()).view(n, len(slot), -1)
        upstream = visits.grads.index_select(0, torch.where(real, visit, len(visits.grads) - 1).flatten()).view(
            n, len(slot), -1
        )
        p = torch.baddbmm(
            levels.gather(1, position)[..., None], queries, keys[:, :reach].transpose(1, 2), beta=-1, alpha=scale
        ).exp_()
        p.masked_fill_(torch.arange(reach, device=pair.device) > position[..., None], 0.0)
        delta = torch.where(real, visits.delta[visit], 0.0)[..., None]
        ds = torch.baddbmm(delta, upstream, values[:, :reach].transpose(1, 2), beta=-scale, alpha=scale).mul_(p)
        grads[0].index_copy_(0, torch.where(real, rows, spare).flatten(), (ds @ keys[:, :reach]).flatten(0, 1))
        grad_keys[:, :reach].baddbmm_(ds.transpose(1, 2), queries)
        grad_values[:, :reach].baddbmm_(p.transpose(1, 2), upstream)
    grads[1].index_copy_(0, every, grad_keys.flatten(0, 1))
    grads[2].index_copy_(0, every, grad_values.flatten(0, 1))


def _sum_rows_by_unit(indices: Tensor, weights: Tensor, rows: Tensor, n_units: int) -> Tensor:
    """Row h of [n_units, d] sums weight * row over the rows [n_rows, d] that chose unit h."""
    units, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(units, torch.arange(n_units, device=units.device))
    ordered = weights.flatten()[order].to(rows.dtype)
    tokens = order // indices.shape[1]
    return F.embedding_bag(tokens, rows.contiguous(), offsets, per_sample_weights=ordered, mode="sum")


class _DecodeWeightGradient(torch.autograd.Function):
    """Passes y through and adds the gradient of `weight`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values)
        ctx.n_units = weight.shape[0]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        grad = grad_outputs[0].contiguous()
        indices, values = ctx.saved_tensors
        needed = ctx.needs_input_grad[3]
        return grad, None, None, _sum_rows_by_unit(indices, values, grad, ctx.n_units) if needed else None


class _KernelDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values, weight)
        return kernels.sparse_decode(indices, values, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor, Tensor]:
        indices, values, weight = ctx.saved_tensors
        grad_values, grad_weight = kernels.sparse_decode_backward(indices, values, weight, grad_outputs[0])
        return None, grad_values.to(values.dtype), grad_weight.to(weight.dtype)


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """Weighted sum of chosen rows, distinct in each: [n_rows, k], [n_rows, k], [n, d] to [n_rows, d]."""
    backend = choose_backend(backend, weight)
    if backend == "reference":
        return reference.sparse_decode(indices, values, weight)
    if backend == "triton":
        decoded: Tensor = _KernelDecode.apply(indices, values, weight)
        return decoded
    # The bag's own gradient of the values is fast; that of the weight is slow and comes from the function above.
    y = F.embedding_bag(indices, weight.detach(), per_sample_weights=values.to(weight.dtype), mode="sum")
    result: Tensor = _DecodeWeightGradient.apply(y, indices, values.detach(), weight)
    return result


def sparse_encode(x: Tensor, weight: Tensor, bias: Tensor, selection: Selection, backend: str = "auto") -> KeptHeads:
    """Features of x [n_rows, d] by weight [n, d] and bias [n], selected; gradients touch only rows of kept ones."""
    return KeptHeads(*_SparseEncoding.apply(x, weight, bias, selection, choose_backend(backend, x)))


class _SparseEncoding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, selection: Selection, backend: str
    ) -> tuple[Tensor, ...]:
        return _keep(ctx, F.linear(x, weight, bias), selection, backend, x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices, kept = ctx.saved_tensors
        grad, grad_x = _gradient_of_kept(ctx, grad_outputs, kept).to(x.dtype), None
        if ctx.needs_input_grad[0]:
            grad_x = F.embedding_bag(indices, weight, per_sample_weights=grad.to(weight.dtype), mode="sum")
        grad_weight = _sum_rows_by_unit(indices, grad, x, len(weight)).to(weight.dtype)
        grad_bias = weight.new_zeros(len(weight)).index_add_(0, indices.flatten(), grad.flatten().to(weight.dtype))
        return grad_x, grad_weight, grad_bias, None, None
