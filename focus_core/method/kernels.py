"""Attend to chunk KV in one kernel a layer, in Triton: ragged lengths, 16, 8 or 4 bits, one online softmax.

A program serves one chunk and KV head: all rows behind the chunk (ordinary and candidate, of every question, by the
heads that share the key) read each key once. Lengths come from the device, so padding costs nothing; what is in few
bits is widened in registers. Chunk KV has no gradient, so the backward pass is one kernel for the queries; own keys
are merged outside, where autograd sees them. The module needs Triton and is imported only where it is to be used; with
``TRITON_INTERPRET=1`` it runs on any machine, which is how it is tested.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (constants of a kernel are its capital arguments)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from focus_core.method.attention import HIDDEN, Part, hidden_score
from focus_core.method.formats import hadamard
from focus_core.method.kv import LayerKV

_BITS = {"base": 16, "int8": 8, "int4": 4}
_BLOCK = 64  # keys of a step of the loop
_LEAST = 16  # rows and channels of the smallest tile that tensor cores take


@triton.jit
def _key_tile(keys, token, column, live, head, stride, DIM: tl.constexpr, HALF: tl.constexpr, HIGH: tl.constexpr):
    """Load (tokens, channels): numbers, or the low or high half of packed codes."""
    width: tl.constexpr = DIM // 2 if HALF else DIM
    place = head * stride + token[:, None] * width + column[None, :]
    tile = tl.load(keys + place, mask=live[:, None] & (column[None, :] < width), other=0)
    if HALF:
        tile = (tile >> 4) if HIGH else (tile & 15)
    return tile


@triton.jit
def _value_tile(
    values, scales, token, column, live, head, stride, scale_stride,
    DIM: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Load (tokens, channels) of values as float32, widened."""
    tile = _key_tile(values, token, column, live, head, stride, DIM, BITS == 4, HIGH).to(tl.float32)
    if BITS == 8:
        scale = tl.load(scales + head * scale_stride + token, mask=live, other=0.0)
        tile = tile * scale[:, None]
    if BITS == 4:
        channel = column + (DIM // 2 if HIGH else 0)
        group = channel // (DIM // GROUPS)
        place = head * scale_stride + token[:, None] * (2 * GROUPS) + group[None, :]
        shown = live[:, None] & (column[None, :] < DIM // 2)
        scale = tl.load(scales + place, mask=shown, other=0.0)
        tile = tile * scale + tl.load(scales + place + GROUPS, mask=shown, other=0.0)
    return tile


@triton.jit
def _scores(
    query, query_high, offset, keys, token, column, live, head, stride, scale, cap,
    DIM: tl.constexpr, BITS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return (rows, tokens) scores, hidden where no token is."""
    tile = _key_tile(keys, token, column, live, head, stride, DIM, BITS == 4, False).to(query.dtype)
    score = tl.dot(query, tl.trans(tile), input_precision="ieee")
    if BITS == 4:
        high = _key_tile(keys, token, column, live, head, stride, DIM, True, True).to(query.dtype)
        score = score + tl.dot(query_high, tl.trans(high), input_precision="ieee") + offset[:, None]
    score = score * scale
    if CAPPED:
        score = cap * (2 * tl.sigmoid(2 * score / cap) - 1)
    return tl.where(live[None, :], score, -1e30)


@triton.jit
def _forward(
    query_at, offset_at, keys, values, scales, starts, lengths, out_at, lse_at,
    key_stride, value_stride, scale_stride, scale, cap,
    ROWS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr, BITS: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, column, span = tl.arange(0, TILE), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    shown = row < ROWS
    half: tl.constexpr = DIM // 2 if BITS == 4 else DIM
    base = ((chunk * KV_HEADS + head) * ROWS + row) * DIM
    wanted = shown[:, None] & (column[None, :] < half)
    query = tl.load(query_at + base[:, None] + column[None, :], mask=wanted, other=0.0)
    query_high, offset = query, tl.zeros([TILE], tl.float32)
    if BITS == 4:
        query_high = tl.load(query_at + base[:, None] + half + column[None, :], mask=wanted, other=0.0)
        offset = tl.load(offset_at + (chunk * KV_HEADS + head) * ROWS + row, mask=shown, other=0.0)
    start, length = tl.load(starts + chunk), tl.load(lengths + chunk)
    most, total = tl.full([TILE], -1e30, tl.float32), tl.zeros([TILE], tl.float32)
    mean, mean_high = tl.zeros([TILE, WIDTH], tl.float32), tl.zeros([TILE, WIDTH], tl.float32)
    for first in range(0, length, BLOCK):
        token, live = start + first + span, first + span < length
        score = _scores(
            query, query_high, offset, keys, token, column, live, head, key_stride, scale, cap, DIM, BITS, CAPPED
        )
        higher = tl.maximum(most, tl.max(score, 1))
        share, kept = tl.exp(score - higher[:, None]), tl.exp(most - higher)
        total = total * kept + tl.sum(share, 1)
        value = _value_tile(
            values, scales, token, column, live, head, value_stride, scale_stride, DIM, GROUPS, BITS, False
        )
        mean = mean * kept[:, None] + tl.dot(share.to(query.dtype), value.to(query.dtype), input_precision="ieee")
        if BITS == 4:
            value = _value_tile(
                values, scales, token, column, live, head, value_stride, scale_stride, DIM, GROUPS, BITS, True
            )
            mean_high = mean_high * kept[:, None] + tl.dot(
                share.to(query.dtype), value.to(query.dtype), input_precision="ieee"
            )
        most = higher
    safe = tl.where(total > 0, total, 1.0)
    place = out_at + base[:, None] + column[None, :]
    tl.store(place, (mean / safe[:, None]).to(query.dtype), mask=wanted)
    if BITS == 4:
        tl.store(place + half, (mean_high / safe[:, None]).to(query.dtype), mask=wanted)
    lse = tl.where(total > 0, most + tl.log(safe), -1e9)
    tl.store(lse_at + (chunk * KV_HEADS + head) * ROWS + row, lse, mask=shown)


@triton.jit
def _backward(
    query_at, grad_at, delta_at, lse_at, keys, values, scales, starts, lengths, out_at,
    key_stride, value_stride, scale_stride, scale, cap,
    ROWS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr,
    BITS: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    row, column, span = tl.arange(0, TILE), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    row = row + tl.program_id(2) * TILE
    shown = row < ROWS
    line = (chunk * KV_HEADS + head) * ROWS + row
    wanted = shown[:, None] & (column[None, :] < DIM)
    place = line[:, None] * DIM + column[None, :]
    query = tl.load(query_at + place, mask=wanted, other=0.0)
    grad = tl.load(grad_at + place, mask=wanted, other=0.0)
    delta, lse = tl.load(delta_at + line, mask=shown, other=0.0), tl.load(lse_at + line, mask=shown, other=0.0)
    start, length = tl.load(starts + chunk), tl.load(lengths + chunk)
    zero, found = tl.zeros([TILE], tl.float32), tl.zeros([TILE, WIDTH], tl.float32)
    for first in range(0, length, BLOCK):
        token, live = start + first + span, first + span < length
        score = _scores(query, query, zero, keys, token, column, live, head, key_stride, scale, cap, DIM, BITS, CAPPED)
        value = _value_tile(values, scales, token, column, live, head, value_stride, scale_stride, DIM, 1, BITS, False)
        share = tl.exp(score - lse[:, None])
        slope = share * (tl.dot(grad, tl.trans(value).to(grad.dtype), input_precision="ieee") - delta[:, None]) * scale
        if CAPPED:
            bent = tl.where(live[None, :], score / cap, 0.0)
            slope = slope * (1 - bent * bent)
        slope = tl.where(live[None, :], slope, 0.0)
        tile = _key_tile(keys, token, column, live, head, key_stride, DIM, False, False).to(query.dtype)
        found += tl.dot(slope.to(query.dtype), tile, input_precision="ieee")
    tl.store(out_at + place, found.to(query.dtype), mask=wanted)


def _tiles(rows: int, dim: int, bits: int) -> tuple[int, int]:
    """Return the padded rows and channels of a tile."""
    width = dim // 2 if bits == 4 else dim
    return max(_LEAST, triton.next_power_of_2(rows)), max(_LEAST, triton.next_power_of_2(width))


def _run_forward(query: Tensor, offset: Tensor, kv: LayerKV, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """(chunks, kv_heads, rows, head_dim) -> the same shape, and (chunks, kv_heads, rows) float32."""
    chunks, heads, rows, dim = query.shape
    bits, arrays = _BITS[kv.format.name], kv.arrays
    scales = arrays.get("value_scale", arrays["values"])
    out = torch.empty_like(query)
    lse = torch.empty(chunks, heads, rows, dtype=torch.float32, device=query.device)
    tile, width = _tiles(rows, dim, bits)
    _forward[chunks, heads](
        query, offset, arrays["keys"], arrays["values"], scales, kv.table.starts, kv.table.bodies, out, lse,
        arrays["keys"].stride(0), arrays["values"].stride(0), scales.stride(0), scale, cap or 1.0,
        ROWS=rows, TILE=tile, DIM=dim, WIDTH=width, KV_HEADS=heads,
        GROUPS=scales.shape[-1] if bits == 4 else 1, BITS=bits, CAPPED=cap > 0, BLOCK=_BLOCK,
    )  # fmt: skip
    return out, lse


class _Body(torch.autograd.Function):
    """Attention over the blocks of chunks; gradients flow into the queries alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, kv: LayerKV, scale: float, cap: float) -> tuple[Tensor, Tensor]:
        offset = query
        if kv.format.name == "int8":
            query = (query * kv.arrays["key_scale"].index_select(0, kv.table.chunk_slots).unsqueeze(2)).to(query.dtype)
        if kv.format.name == "int4":
            factors = kv.arrays["key_scale"].index_select(0, kv.table.chunk_slots)
            turned = query.float() @ hadamard(query.shape[-1], query.device)
            offset = (turned * factors[:, 1].unsqueeze(2)).sum(-1).contiguous()
            query = (turned * factors[:, 0].unsqueeze(2)).to(query.dtype)
        query = query.contiguous()
        out, lse = _run_forward(query, offset, kv, scale, cap)
        if kv.format.name == "int4":
            out = (out.float() @ hadamard(out.shape[-1], out.device).T).to(out.dtype)
        ctx.save_for_backward(query, out, lse)
        ctx.kv, ctx.scale, ctx.cap = kv, scale, cap
        return out, lse

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        query, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        kv, scale, cap = ctx.kv, ctx.scale, ctx.cap  # type: ignore[attr-defined]
        if kv.format.name == "int4":
            raise NotImplementedError("chunk KV in 4 bits has no backward pass; train with kv_format='base'")
        chunks, heads, rows, dim = query.shape
        bits, arrays = _BITS[kv.format.name], kv.arrays
        scales = arrays.get("value_scale", arrays["values"])
        grad = grads[0].contiguous().to(query.dtype)
        delta = ((grad.float() * out.float()).sum(-1) - grads[1].float()).contiguous()
        found = torch.empty_like(query)
        tile, width = _tiles(min(rows, 64), dim, bits)
        _backward[chunks, heads, triton.cdiv(rows, tile)](
            query, grad, delta, lse, arrays["keys"], arrays["values"], scales, kv.table.starts, kv.table.bodies, found,
            arrays["keys"].stride(0), arrays["values"].stride(0), scales.stride(0), scale, cap or 1.0,
            ROWS=rows, TILE=tile, DIM=dim, WIDTH=width, KV_HEADS=heads, BITS=bits, CAPPED=cap > 0, BLOCK=_BLOCK,
        )  # fmt: skip
        if kv.format.name == "int8":
            factors = arrays["key_scale"].index_select(0, kv.table.chunk_slots).unsqueeze(2)
            found = (found * factors).to(found.dtype)
        return found, None, None, None


def attend_body(query: Tensor, kv: LayerKV, scale: float, softcap: float | None = None) -> Part:
    """Attend from rows behind each chunk to its blocks.

    Args:
        query: (chunks, heads, rows, head_dim).
        kv: the layer's chunk KV.
        scale: multiplies the scores.
        softcap: as in :func:`~focus_core.method.attention.attend`.
    """
    chunks, heads, rows, dim = query.shape
    folded = query.reshape(chunks, kv.kv_heads, -1, dim)
    if not len(kv.table.owner):
        lse = folded.new_full(folded.shape[:3], hidden_score(torch.float32), dtype=torch.float32)
        return Part(torch.zeros_like(query), lse.view(chunks, heads, rows))
    out, lse = _Body.apply(folded, kv, scale, softcap or 0.0)
    return Part(out.view(chunks, heads, rows, dim), lse.view(chunks, heads, rows))


assert HIDDEN == -1e9  # written out in the kernels, which see no names of this module
