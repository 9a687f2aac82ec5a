"""Triton kernels for NVIDIA GPUs: attention, top-K selection, sparse decode, rotation, and gradients.

All are deterministic: no atomics, and float32 sums have a fixed order.

For one sequence and QK group with pattern A (rows sum to 1), values V [length, G], outputs Z = A V and the loss
gradient dZ, for each query i

    dV   = A^T dZ
    dA   = dZ V^T
    dS_i = A_i * (dA_i - delta_i),   delta_i = A_i . dA_i = dZ_i . Z_i       (softmax)
    dQ   = scale * dS K,   dK = scale * dS^T Q

dZ is zero outside the K kept heads of each token. Three things follow.
1. A query in which no head of the group was kept has dZ_i = dS_i = 0: it adds nothing to dV and dK, and its dQ is zero.
   Each (sequence, group) packs the positions of the other ("visited") queries, ascending, and works on those.
2. delta_i is the sum of dz z over the kept heads of the group, so neither Z nor a dense dZ is needed: a tile of dZ is
   built in registers from the sorted kept entries.
3. The first packed query that may see a block of keys is the number of visited queries before that block, so the causal
   skip is exact for dK and dV too.

The pattern is recomputed from the forward's log-sum-exp, block by block (Dao, "FlashAttention-2", 2023).
"""
# Arguments of Triton kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.selection import Selection

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for macOS and Windows
    triton = None

LOG2_E = math.log2(math.e)
_WIDEST = 256
_MOST_UNITS = 65536
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CHUNK = 512  # tokens that one program sums for a row of dW; hot heads have several chunks
# Queries, keys, warps and stages by the bytes of the widest row, chosen from the compiler's report: at most 100 KB of
# shared memory and next to no spilled registers. 64 rows (queries; keys in "keys") for each four warps reach Hopper's
# warpgroup products; rows of 512 bytes and more leave no registers for that in the backward. Products in full float32
# ("ieee") run on the ordinary cores with operands in registers.
_TILES = {
    "forward": {128: (128, 64, 4, 3), 256: (128, 64, 8, 2), 512: (64, 32, 4, 2), 1024: (32, 32, 8, 1)},
    "queries": {128: (64, 64, 4, 2), 256: (64, 32, 4, 2), 512: (32, 32, 8, 1), 1024: (16, 16, 4, 1)},
    "keys": {128: (32, 64, 4, 2), 256: (32, 128, 8, 2), 512: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
    "ieee": {128: (32, 64, 8, 1), 256: (32, 32, 8, 1), 512: (16, 32, 8, 1), 1024: (16, 16, 8, 1)},
}
_DECODE_BLOCKS = {"BLOCK_K": 16, "BLOCK_D": 128, "num_warps": 4}
_L2_BYTES = 24 * 2**20  # of W that stay in the cache (50 MB on an H100) while the tokens pass over them


def _jit(function: Callable[..., Any]) -> Any:
    # Nothing is gained by compiling anew for a multiple of 16 of these.
    general = ("length", "n_groups", "n_kept", "n_chunks", "n_rows")
    return function if triton is None else triton.jit(function, do_not_specialize=general)


def available(device: torch.device | str) -> bool:
    """Whether the compiled kernels run on `device`: NVIDIA of capability 8.0 (A100) or newer."""
    device = torch.device(device)
    if triton is None or _INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def supports(d_qk: int = 1, group_size: int = 1, n_units: int = 1) -> bool:
    """Whether the kernels take a layer: widths up to 256 and up to 65536 units."""
    return d_qk <= _WIDEST and group_size <= _WIDEST and n_units <= _MOST_UNITS


def _launch(kernel: Any, n_programs: int | tuple[int, int], *args: Any, **options: Any) -> None:
    like = args[0]
    if triton is None or not (like.is_cuda or _INTERPRETED):
        raise UserError(f'The Triton kernels need an NVIDIA GPU, not {like.device}; use backend "torch" here.')
    if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
        raise UserError('The Triton kernels compute in float32; use backend "torch" for float64.')
    grid = (n_programs,) if isinstance(n_programs, int) else n_programs
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **options)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(width: int) -> int:
    """Power of two, at least 16 for tl.dot."""
    return max(16, 1 << (width - 1).bit_length())


def tile_sizes(kernel: str, d: int, g: int, length: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Tile sizes (M of queries, N of keys), warps and pipeline stages; UserError for widths above 256."""
    if (width := max(d, g)) > _WIDEST:
        raise UserError(
            f'The Triton attention takes queries and groups up to {_WIDEST} wide, not {width}; use backend "torch".'
        )
    row_bytes = max(_block(d), _block(g)) * dtype.itemsize
    table = _TILES["ieee" if dtype == torch.float32 and precision == "ieee" else kernel]
    m, n, warps, stages = table[max(128, row_bytes)]
    blocks = {"BLOCK_M": min(m, _block(length)), "BLOCK_N": min(n, _block(length))}
    options = {**blocks, "num_warps": warps, "num_stages": stages}
    # A third program fits into the registers of a multiprocessor, for two spills.
    return {**options, "maxnreg": 168} if kernel != "forward" and warps == 4 and row_bytes <= 128 else options


def _attention_options(kernel: str, q: Tensor, v: Tensor, precision: str) -> dict[str, Any]:
    (length, d), g = q.shape[2:], v.shape[-1]
    precision = precision if q.dtype == torch.float32 else "ieee"
    widths = {"D": d, "G": g, "BLOCK_D": _block(d), "BLOCK_G": _block(g)}
    return tile_sizes(kernel, d, g, length, q.dtype, precision) | widths | {"PRECISION": precision}


# ---- attention, forward


@_jit
def _load_rows(base, rows, row_stride, columns, n_columns, mask):
    """Tile [rows, columns]; rows outside `mask` and columns past `n_columns` are zero."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(base + offsets, mask=mask[:, None] & (columns < n_columns)[None, :], other=0.0)


@_jit
def _store_rows(base, rows, row_stride, columns, n_columns, mask, tile):
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=mask[:, None] & (columns < n_columns)[None, :])


@_jit
def _rounded(tile, PRECISION: tl.constexpr):
    """Round to tf32: tensor cores truncate instead, which triples the error."""
    if PRECISION == "tf32":
        tile = ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tile


@_jit
def _attention_forward(
    q, k, v, z, lse, scale_log2, length, n_groups, q_strides, k_strides, v_strides,
    D: tl.constexpr, G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    n_blocks = tl.cdiv(length, BLOCK_M)
    pair = tl.program_id(0) // n_blocks  # batch and group
    batch = (pair // n_groups).to(tl.int64)
    group = (pair % n_groups).to(tl.int64)
    # The longest rows first: what is left at the end is short.
    start = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    queries = start + tl.arange(0, BLOCK_M)
    in_d = tl.arange(0, BLOCK_D)
    in_g = tl.arange(0, BLOCK_G)
    q += batch * q_strides[0] + group * q_strides[1]
    k += batch * k_strides[0] + group * k_strides[1]
    v += batch * v_strides[0] + group * v_strides[1]
    q_tile = _rounded(_load_rows(q, queries, q_strides[2], in_d, D, queries < length), PRECISION)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    for first in range(0, tl.minimum(start + BLOCK_M, length), BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = _rounded(_load_rows(k, keys, k_strides[2], in_d, D, keys < length), PRECISION)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        scores = tl.where(queries[:, None] >= keys[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        pattern = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(pattern, 1)
        v_tile = _rounded(_load_rows(v, keys, v_strides[2], in_g, G, keys < length), PRECISION)
        sums = tl.dot(
            _rounded(pattern.to(v_tile.dtype), PRECISION), v_tile, sums * shrink[:, None], input_precision=PRECISION
        )
        highest = new_highest
    z += batch * length * n_groups * G + group * G
    _store_rows(z, queries, n_groups * G, in_g, G, queries < length, sums / total[:, None])
    tl.store(lse + pair.to(tl.int64) * length + queries, highest + tl.log2(total), mask=queries < length)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """Causal softmax attention of every QK group, without storing the pattern.

    q, k are [batch, n_groups, length, d_qk], rotated, and v [batch, n_groups, length, G], in float32, bfloat16 or
    float16; `precision` of float32 products is "ieee" or "tf32". Returns z [batch, length, n_groups * G] and the base-2
    log of the sum of exp(scores), [batch, n_groups, length], always float32: rounding z to bfloat16 would create ties
    in the selection.
    """
    batch, n_groups, length, _ = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    z = torch.empty((batch, length, n_groups * v.shape[-1]), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, n_groups, length), dtype=torch.float32, device=q.device)
    options = _attention_options("forward", q, v, precision)
    arguments = (q, k, v, z, lse, scale * LOG2_E, length, n_groups, q.stride(), k.stride(), v.stride())
    n_blocks = batch * n_groups * -(-length // options["BLOCK_M"])
    _launch(_attention_forward, n_blocks, *arguments, **options)
    return z, lse


# ---- attention, backward


@_jit
def _pack_queries(edges, packed, before, length, n_groups, n_chunks, CHUNK: tl.constexpr):
    """For one (batch, group): visited queries, ascending, then the others; how many are visited before each chunk."""
    pair = tl.program_id(0)
    edges += (pair // n_groups).to(tl.int64) * length * (n_groups + 1) + pair % n_groups
    packed += pair.to(tl.int64) * length
    before += pair.to(tl.int64) * (n_chunks + 1)
    n_visited = 0
    for chunk in range(0, n_chunks):
        queries = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = queries < length
        edge = edges + queries.to(tl.int64) * (n_groups + 1)
        visited = tl.load(edge + 1, mask=inside, other=0) > tl.load(edge, mask=inside, other=0)
        rank = n_visited + tl.cumsum(visited.to(tl.int32), 0)
        slot = tl.where(visited, rank - 1, length - 1 - (queries - rank))
        tl.store(packed + slot, queries, mask=inside)
        tl.store(before + chunk, n_visited)
        n_visited += tl.sum(visited.to(tl.int32), 0)
    tl.store(before + n_chunks, n_visited)


@_jit
def _kept_gradient(
    heads, z, dz, edges, tokens, visited, group, n_groups, n_kept,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Tile of dZ^T [BLOCK_G, BLOCK_M] from a group's kept entries at `tokens`, and delta [BLOCK_M]."""
    edge = edges + tokens * (n_groups + 1) + group
    first = tl.load(edge, mask=visited, other=0)
    count = tl.load(edge + 1, mask=visited, other=0) - first
    entries = tokens * n_kept + first
    columns = group * G + tl.arange(0, BLOCK_G)
    # Queries along a warp's lanes: each lane loads the entries of its own queries and no others.
    tile = tl.zeros([BLOCK_G, BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, tl.max(count, 0), 4):
        for i in tl.static_range(4):  # four loads under way at a time
            here = start + i < count
            entry = entries + start + i
            head = tl.load(heads + entry, mask=here, other=-1)
            # As the products below will see it: rows of dS then sum to zero, and a mean that all keys share stays out
            # of dQ.
            gradient = _rounded(tl.load(dz + entry, mask=here, other=0.0).to(DTYPE).to(tl.float32), PRECISION)
            delta += gradient * tl.load(z + entry, mask=here, other=0.0)
            tile += tl.where(head[None, :] == columns[:, None], gradient[None, :], 0.0)
    return tile.to(DTYPE), delta


@_jit
def _attention_backward_q(
    q, k, v, lse, heads, z, dz, edges, packed, before, dq, scale, scale_log2, length, n_groups, n_kept, n_chunks,
    q_strides, k_strides, v_strides,
    D: tl.constexpr, G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    n_blocks = tl.cdiv(length, BLOCK_M)
    pair = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch = pair // n_groups
    group = pair % n_groups
    slots = (tl.program_id(0) % n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    visited = slots < tl.load(before + pair * (n_chunks + 1) + n_chunks)
    queries = tl.load(packed + pair * length + slots, mask=slots < length, other=0)
    in_d = tl.arange(0, BLOCK_D)
    in_g = tl.arange(0, BLOCK_G)
    q += batch * q_strides[0] + group * q_strides[1]
    k += batch * k_strides[0] + group * k_strides[1]
    v += batch * v_strides[0] + group * v_strides[1]
    q_tile = _rounded(_load_rows(q, queries, q_strides[2], in_d, D, visited), PRECISION)
    log_sums = tl.load(lse + pair * length + queries, mask=visited, other=0.0)
    tokens = batch * length + queries
    dz_tile, delta = _kept_gradient(
        heads, z, dz, edges, tokens, visited, group, n_groups, n_kept, G, BLOCK_M, BLOCK_G, q.dtype.element_ty,
        PRECISION
    )  # fmt: skip
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # A block without visited queries has nothing to loop over and writes zeros.
    for first in range(0, tl.max(tl.where(visited, queries + 1, 0), 0), BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = _rounded(_load_rows(k, keys, k_strides[2], in_d, D, keys < length), PRECISION)
        v_tile = _rounded(_load_rows(v, keys, v_strides[2], in_g, G, keys < length), PRECISION)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        pattern = tl.where(queries[:, None] >= keys[None, :], tl.exp2(scores - log_sums[:, None]), 0.0)
        d_pattern = tl.dot(tl.trans(dz_tile), tl.trans(v_tile), input_precision=PRECISION)
        d_scores = pattern * (d_pattern - delta[:, None])
        dq_tile = tl.dot(_rounded(d_scores.to(k_tile.dtype), PRECISION), k_tile, dq_tile, input_precision=PRECISION)
    dq += batch * length * n_groups * D + group * D
    _store_rows(dq, queries, n_groups * D, in_d, D, slots < length, dq_tile * scale)


@_jit
def _attention_backward_kv(
    q, k, v, lse, heads, z, dz, edges, packed, before, dk, dv, scale, scale_log2, length, n_groups, n_kept,
    q_strides, k_strides, v_strides,
    D: tl.constexpr, G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    n_blocks = tl.cdiv(length, BLOCK_N)
    pair = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    batch = pair // n_groups
    group = pair % n_groups
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_d = tl.arange(0, BLOCK_D)
    in_g = tl.arange(0, BLOCK_G)
    q += batch * q_strides[0] + group * q_strides[1]
    k += batch * k_strides[0] + group * k_strides[1]
    v += batch * v_strides[0] + group * v_strides[1]
    k_tile = _rounded(_load_rows(k, keys, k_strides[2], in_d, D, keys < length), PRECISION)
    v_tile = _rounded(_load_rows(v, keys, v_strides[2], in_g, G, keys < length), PRECISION)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    before += pair * (n_blocks + 1)
    end = tl.load(before + n_blocks)
    for first in range(tl.load(before + block), end, BLOCK_M):
        slots = first + tl.arange(0, BLOCK_M)
        visited = slots < end  # of the others dZ and delta are zero below, so they add nothing
        queries = tl.load(packed + pair * length + slots, mask=visited, other=0)
        q_tile = _rounded(_load_rows(q, queries, q_strides[2], in_d, D, visited), PRECISION)
        log_sums = tl.load(lse + pair * length + queries, mask=visited, other=0.0)
        tokens = batch * length + queries
        dz_tile, delta = _kept_gradient(
            heads, z, dz, edges, tokens, visited, group, n_groups, n_kept, G, BLOCK_M, BLOCK_G, q.dtype.element_ty,
            PRECISION
        )  # fmt: skip
        # Transposed, keys by queries: the sums over queries need no transpose then.
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
        pattern = tl.where(queries[None, :] >= keys[:, None], tl.exp2(scores - log_sums[None, :]), 0.0)
        dv_tile = tl.dot(
            _rounded(pattern.to(dz_tile.dtype), PRECISION), tl.trans(dz_tile), dv_tile, input_precision=PRECISION
        )
        d_pattern = tl.dot(v_tile, dz_tile, input_precision=PRECISION)
        d_scores = pattern * (d_pattern - delta[None, :])
        dk_tile = tl.dot(_rounded(d_scores.to(q_tile.dtype), PRECISION), q_tile, dk_tile, input_precision=PRECISION)
    dk += batch * length * n_groups * D + group * D
    dv += batch * length * n_groups * G + group * G
    _store_rows(dk, keys, n_groups * D, in_d, D, keys < length, dk_tile * scale)
    _store_rows(dv, keys, n_groups * G, in_g, G, keys < length, dv_tile)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float,
    indices: Tensor, z: Tensor, dz: Tensor, precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `attention_forward` when dz is zero outside the kept heads.

    `lse` is its second result. `indices`, `z` and `dz` are kept heads, in any order, their z (not rectified) and its
    gradient, each [batch * length, n_kept]; gradients of a repeated head add. dq, dk and dv are in memory [batch,
    length, n_groups, width], which suits the gradients of weights.
    """
    (batch, n_groups, length, _), g = q.shape, v.shape[-1]
    q, k, v = _rows(q), _rows(k), _rows(v)
    options, key_options = (_attention_options(kernel, q, v, precision) for kernel in ("queries", "keys"))
    heads, order = indices.to(torch.int32).sort(dim=1, stable=True)
    kept = (heads, z.gather(1, order).float(), dz.gather(1, order).float())
    # Entries of group g in a token's sorted row are those from edge g to edge g + 1.
    first_heads = torch.arange(0, (n_groups + 1) * g, g, dtype=torch.int32, device=q.device)
    edges = torch.searchsorted(heads, first_heads.repeat(heads.shape[0], 1), out_int32=True)
    chunk = key_options["BLOCK_N"]
    n_chunks = -(-length // chunk)
    packed = torch.empty((batch * n_groups, length), dtype=torch.int32, device=q.device)
    before = torch.empty((batch * n_groups, n_chunks + 1), dtype=torch.int32, device=q.device)
    sizes = (length, n_groups, n_chunks)
    _launch(_pack_queries, batch * n_groups, edges, packed, before, *sizes, CHUNK=chunk, num_warps=2)
    dq, dk, dv = (
        torch.empty((batch, length, n_groups, x.shape[-1]), dtype=x.dtype, device=q.device) for x in (q, k, v)
    )
    inputs = (q, k, v, lse.contiguous(), *kept, edges, packed, before)
    strides = (q.stride(), k.stride(), v.stride())
    scales = (scale, scale * LOG2_E, length, n_groups, heads.shape[1])
    n_blocks = batch * n_groups * -(-length // options["BLOCK_M"])
    _launch(_attention_backward_q, n_blocks, *inputs, dq, *scales, n_chunks, *strides, **options)
    _launch(_attention_backward_kv, batch * n_groups * n_chunks, *inputs, dk, dv, *scales, *strides, **key_options)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# ---- top-K selection


@_jit
def _score_keys(z, norms, among, columns, n, RECTIFIES: tl.constexpr, MASKED: tl.constexpr):
    """Integers that sort as the scores do (floats from 0 on sort as their bits); -1 for score -1, -2 past the end."""
    inside = columns < n
    score = tl.load(z + columns, mask=inside, other=0.0).to(tl.float32)
    score = tl.maximum(score, 0.0) if RECTIFIES else tl.abs(score)
    score *= tl.load(norms + columns, mask=inside, other=0.0)
    key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if MASKED:
        key = tl.where(tl.load(among + columns, mask=inside, other=0) != 0, key, -1)
    return tl.where(inside, key, -2)


@_jit
def _select_top_k(
    z, norms, among, indices, values, n, n_kept, z_row,
    RECTIFIES: tl.constexpr, MASKED: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * z_row
    # Of the row dealt out into at least k segments, k keys reach the least of the segments' largest ones.
    dealt = tl.arange(0, BLOCK // SEGMENTS)[:, None] * SEGMENTS + tl.arange(0, SEGMENTS)[None, :]
    largest = tl.max(_score_keys(z, norms, among, dealt, n, RECTIFIES, MASKED), 0)
    low = tl.maximum(tl.min(largest, 0), -1)
    high = tl.max(largest, 0)
    # Between these two bisect on the largest `low` that at least k keys reach, and stop early when exactly k do.
    key = _score_keys(z, norms, among, tl.arange(0, BLOCK), n, RECTIFIES, MASKED)
    count = tl.sum((key >= low).to(tl.int32), 0)
    while (low < high) & (count != n_kept):
        middle = low + ((high - low) >> 1) + ((high - low) & 1)
        reach = tl.sum((key >= middle).to(tl.int32), 0)
        high = tl.where(reach >= n_kept, high, middle - 1)
        low = tl.where(reach >= n_kept, middle, low)
        count = tl.where(reach >= n_kept, reach, count)
    room = n_kept - tl.sum((key > low).to(tl.int32), 0)  # for keys equal to `low`, lower indices first
    n_above = 0
    n_tied = 0
    for first in range(0, n, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        chunk = _score_keys(z, norms, among, columns, n, RECTIFIES, MASKED)
        # Both running counts in one scan, 16 bits each.
        counts = tl.cumsum((chunk > low).to(tl.int32) + ((chunk == low).to(tl.int32) << 16), 0)
        tied = n_tied + (counts >> 16)
        kept = (chunk > low) | ((chunk == low) & (tied <= room))
        slot = row * n_kept + n_above + (counts & 0xFFFF) + tl.minimum(tied, room) - 1
        tl.store(indices + slot, columns.to(tl.int64), mask=kept)
        tl.store(values + slot, tl.load(z + columns, mask=kept, other=0.0), mask=kept)
        last = tl.max(counts, 0)  # neither half ever falls, so the last is the largest
        n_above += last & 0xFFFF
        n_tied += last >> 16


def select_top_k(z: Tensor, selection: Selection, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k units with the largest scores in each row of z [n_rows, n], without NaN; ties go to the lower index.

    Units outside the mask `among` [n] have score -1. Returns int64 indices, ascending, and z at them, not rectified,
    each [n_rows, k]. UserError if k is not between 1 and n, or n is more than 65536.
    """
    (n_rows, n), k = z.shape, selection.k
    if not 1 <= k <= n:
        raise UserError(f"Cannot keep {k} of {n} units; choose k from 1 to {n}.")
    if n > _MOST_UNITS:
        raise UserError(f'The Triton selection takes at most {_MOST_UNITS} units, not {n}; use backend "torch".')
    z, norms = _rows(z), selection.norms.float().contiguous()
    indices = torch.empty((n_rows, k), dtype=torch.int64, device=z.device)
    values = torch.empty((n_rows, k), dtype=z.dtype, device=z.device)
    block = _block(n)
    warps = min(32, max(1, block // 1024))  # 32 numbers of the row for each thread
    arguments = (z, norms, norms if among is None else among.contiguous(), indices, values, n, k, z.stride(0))
    modes = {"RECTIFIES": selection.rectifies, "MASKED": among is not None, "SEGMENTS": 1 << (k - 1).bit_length()}
    blocks = {"BLOCK": block, "CHUNK": min(block, 256 * warps), "num_warps": warps}
    _launch(_select_top_k, n_rows, *arguments, **modes, **blocks)
    return indices, values


# ---- sparse decode


@_jit
def _decode(indices, values, weight, y, d, n_kept, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token, one block of columns. All tokens of a block run before the next block: W's slice stays in L2."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, n_kept, BLOCK_K):
        entries = first + tl.arange(0, BLOCK_K)
        rows = tl.load(indices + token * n_kept + entries, mask=entries < n_kept, other=0)
        value = tl.load(values + token * n_kept + entries, mask=entries < n_kept, other=0.0).to(tl.float32)
        sums += value[:, None] * _load_rows(weight, rows, d, columns, d, entries < n_kept)
    tl.store(y + token * d + columns, tl.sum(sums, 0), mask=columns < d)


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """As `ops.sparse_decode`, in float32."""
    (n_rows, k), d = indices.shape, weight.shape[1]
    y = torch.empty((n_rows, d), dtype=torch.float32, device=weight.device)
    arguments = (indices.contiguous(), values.contiguous(), weight.contiguous(), y, d, k)
    _launch(_decode, (n_rows, -(-d // 128)), *arguments, **_DECODE_BLOCKS)
    return y


@_jit
def _decode_backward_values(
    indices, weight, dy, parts, n_rows, d, n_kept, span, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Products of dy with the chosen rows over one span of columns, in the order of `_decode`."""
    n_blocks = tl.cdiv(n_kept, BLOCK_K)
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    entries = (tl.program_id(0) % n_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * span
    rows = tl.load(indices + token * n_kept + entries, mask=entries < n_kept, other=0)
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, tl.minimum(begin + span, d), BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        gradient = tl.load(dy + token * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        sums += gradient[None, :] * _load_rows(weight, rows, d, columns, d, entries < n_kept)
    place = (tl.program_id(1).to(tl.int64) * n_rows + token) * n_kept + entries
    tl.store(parts + place, tl.sum(sums, 1), mask=entries < n_kept)


@_jit
def _sum_tokens(tokens, values, dy, begin, end, columns, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_K):
        entries = first + tl.arange(0, BLOCK_K)
        rows = tl.load(tokens + entries, mask=entries < end, other=0)
        value = tl.load(values + entries, mask=entries < end, other=0.0).to(tl.float32)
        sums += value[:, None] * _load_rows(dy, rows, d, columns, d, entries < end)
    return tl.sum(sums, 0)


@_jit
def _decode_backward_hot(
    tokens, values, dy, offsets, item_heads, item_ends, parts, n, d,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Sums of the chunks after a head's first."""
    item = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = tl.load(item_heads + item)
    if head < n:
        end = tl.load(offsets + head + 1)
        # Counted from the last item, which ends where the head ends.
        n_items = (end - tl.load(offsets + head) - 1) // CHUNK
        begin = tl.load(offsets + head) + (item - tl.load(item_ends + head) + n_items + 1) * CHUNK
        sums = _sum_tokens(tokens, values, dy, begin, tl.minimum(begin + CHUNK, end), columns, d, BLOCK_K, BLOCK_D)
        tl.store(parts + item * d + columns, sums, mask=columns < d)


@_jit
def _decode_backward_weight(
    tokens, values, dy, offsets, item_ends, parts, d_weight, d,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One head's row of dW, one block of columns: the first chunk of tokens plus the sums of the others."""
    head = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets + head)
    end = tl.load(offsets + head + 1)
    sums = _sum_tokens(tokens, values, dy, begin, tl.minimum(begin + CHUNK, end), columns, d, BLOCK_K, BLOCK_D)
    last = tl.load(item_ends + head)
    for item in range(last - tl.maximum(end - begin - 1, 0) // CHUNK, last):
        sums += tl.load(parts + item * d + columns, mask=columns < d, other=0.0)
    tl.store(d_weight + head * d + columns, sums, mask=columns < d)


def sparse_decode_backward(indices: Tensor, values: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 gradients of `sparse_decode` by values [n_rows, k] and weight [n, d], given dy [n_rows, d]."""
    indices, weight, dy = indices.contiguous(), weight.contiguous(), dy.contiguous()
    (n_rows, k), (n, d), device = indices.shape, weight.shape, weight.device
    n_parts = min(16, -(-d // 128), -(-weight.nbytes // _L2_BYTES))
    span = 128 * -(-d // (128 * n_parts))
    parts = torch.empty((n_parts, n_rows, k), dtype=torch.float32, device=device)
    grid = (n_rows * -(-k // 16), n_parts)
    _launch(_decode_backward_values, grid, indices, weight, dy, parts, n_rows, d, k, span, **_DECODE_BLOCKS)
    d_values = parts[0] if n_parts == 1 else parts.sum(0)

    # Row h of dW sums over the tokens that chose h: sort the choices by head. Nothing here waits for the GPU.
    heads, order = indices.flatten().to(torch.int32).sort(stable=True)
    tokens, weights = (order // k).to(torch.int32), values.flatten()[order]
    offsets = torch.searchsorted(heads, torch.arange(n + 1, dtype=torch.int32, device=device))
    n_items = (offsets.diff() - 1).clamp_min(0).div(_CHUNK, rounding_mode="floor")
    item_ends = n_items.cumsum(0)
    most_items = n_rows * k // _CHUNK
    sums = torch.empty((most_items, d), dtype=torch.float32, device=device)
    n_blocks = -(-d // 128)
    if most_items:
        item_heads = torch.searchsorted(item_ends, torch.arange(most_items, device=device), right=True, out_int32=True)
        grid = (most_items, n_blocks)
        inputs = (tokens, weights, dy, offsets, item_heads, item_ends, sums, n, d)
        _launch(_decode_backward_hot, grid, *inputs, CHUNK=_CHUNK, **_DECODE_BLOCKS)
    d_weight = torch.empty((n, d), dtype=torch.float32, device=device)
    outputs = (tokens, weights, dy, offsets, item_ends, sums, d_weight, d)
    _launch(_decode_backward_weight, (n, n_blocks), *outputs, CHUNK=_CHUNK, **_DECODE_BLOCKS)
    return d_values, d_weight


# ---- rotation


@_jit
def _rotate(
    x, cos, sin, out, length, n_groups, x_strides, out_strides,
    D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    vectors = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # group fastest, as in memory
    rows = (vectors // n_groups).to(tl.int64)
    groups = (vectors % n_groups).to(tl.int64)
    inside = (rows < length)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    x += batch * x_strides[0] + (rows * x_strides[2] + groups * x_strides[1])[:, None]
    out += batch * out_strides[0] + (rows * out_strides[2] + groups * out_strides[1])[:, None]
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    mask = inside & (pairs < HALF)
    c = tl.load(cos + rows[:, None] * HALF + pairs, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + rows[:, None] * HALF + pairs, mask=mask, other=0.0).to(tl.float32)
    first = 2 * pairs if ADJACENT else pairs
    second = first + 1 if ADJACENT else first + HALF
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + first, a * c - b * s, mask=mask)
    tl.store(out + second, b * c + a * s, mask=mask)
    if D > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(out + rest, tl.load(x + rest, mask=inside & (rest < D), other=0.0), mask=inside & (rest < D))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    """Rotate x [batch, n_groups, length, d_qk] by `ops.rotary_tables`, keeping its memory layout."""
    (batch, n_groups, length, d), half = x.shape, cos.shape[-1]
    x = _rows(x)
    out = torch.empty_like(x)
    block = max(1, 2048 // _block(d))
    arguments = (x, cos.contiguous(), sin.contiguous(), out, length, n_groups, x.stride(), out.stride())
    modes = {"D": d, "HALF": half, "ADJACENT": adjacent_pairs}
    blocks = {"BLOCK_HALF": _block(half), "BLOCK_REST": _block(max(1, d - 2 * half)), "BLOCK": block}
    _launch(_rotate, (-(-length * n_groups // block), batch), *arguments, **modes, **blocks, num_warps=4)
    return out
