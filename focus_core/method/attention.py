"""Compute softmax attention in parts and merge the parts by their log-sum-exp.

A decoding step reads a chunk's keys, the question's suffix and the candidate's own key from three places; merging
parts needs no mask, no copy and no expanded keys. Grouped queries are folded into rows, so a key is read once for all
the query heads that share it. This is the one interface behind which other kernels (Triton, varlen) can stand; it
knows nothing of chunks, layers or models.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from focus_core.hardware import is_out_of_memory

if TYPE_CHECKING:
    from focus_core.method.kv import Alike, LayerKV

HIDDEN = -1e9
"""Score of a hidden key: finite, so that a row without visible keys merges away instead of giving NaN."""


def hidden_score(dtype: torch.dtype) -> float:
    """Return the score of a hidden key in ``dtype``: float16 has no -1e9."""
    return max(HIDDEN, torch.finfo(dtype).min)


_KERNELS: tuple[str, ...] = ("cuda",)  # kinds of devices whose chunk attention is Triton's; none once it has failed
_FEW_ROWS = 64  # up to so many rows of a chunk and KV head, merging blocks costs less than gathering their keys


class Part(NamedTuple):
    """Attention over some of the keys.

    Args:
        out: (batch, heads, rows, head_dim) softmax average over this part's keys.
        lse: (batch, heads, rows) float log-sum-exp of this part's scores.
    """

    out: Tensor
    lse: Tensor


def fold_heads(query: Tensor, kv_heads: int) -> Tensor:
    """Fold (batch, heads, rows, head_dim) into (batch, kv_heads, heads / kv_heads * rows, head_dim)."""
    batch, heads, rows, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)


def by_chunk(packed: Tensor, chunks: int) -> Tensor:
    """(1, heads, chunks * rows, head_dim) -> (chunks, heads, rows, head_dim)."""
    _, heads, rows, dim = packed.shape
    return packed.reshape(heads, chunks, rows // chunks, dim).transpose(0, 1)


def packed_rows(out: Tensor) -> Tensor:
    """(chunks, heads, rows, head_dim) -> (1, chunks * rows, heads, head_dim)."""
    chunks, heads, rows, dim = out.shape
    return out.transpose(1, 2).reshape(1, chunks * rows, heads, dim)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, softcap: float | None = None, bias: Tensor | None = None
) -> Part:
    """Attend from every query row to every key.

    Args:
        query: (batch, heads, rows, head_dim).
        key: (batch, kv_heads, keys, head_dim).
        value: like ``key``.
        scale: multiplies the scores.
        softcap: if given, scores become ``softcap * tanh(score / softcap)`` (gemma2).
        bias: (batch or 1, 1, 1 or rows or heads / kv_heads * rows, keys), added to the scores; :data:`HIDDEN` hides a
            key.

    Returns:
        ``out`` in the dtype of ``query``, ``lse`` in float32 (float64 for float64 input).
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    folded = fold_heads(query, kv_heads)
    if bias is not None and bias.shape[2] not in (1, folded.shape[2]):
        bias = bias.repeat(1, 1, heads // kv_heads, 1)
    if _flash_applies(query, key, value, softcap):
        mask = None if bias is None else _narrow(bias, query.dtype).expand(batch, 1, folded.shape[2], keys)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    else:
        out, lse = _reference(folded, key, value, scale, softcap, bias)
    return Part(out.reshape(batch, heads, rows, dim), lse.reshape(batch, heads, rows))


def attend_causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, softcap: float | None = None, bias: Tensor | None = None
) -> Part:
    """Attend from row i to keys 0..i; ``query`` and ``key`` hold the same rows. Shapes as in :func:`attend`.

    ``bias`` is :func:`causal_bias` of these rows where it is at hand.
    """
    rows = query.shape[2]
    if _flash_applies(query, key, value, softcap):
        groups = query.shape[1] // key.shape[1]
        return Part(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query,
                key.repeat_interleave(groups, dim=1),
                value.repeat_interleave(groups, dim=1),
                0.0,
                True,
                attn_mask=None,
                scale=scale,
            )
        )
    bias = causal_bias(rows, rows, query.device) if bias is None else bias
    return attend(query, key, value, scale, softcap=softcap, bias=bias)


class Front(NamedTuple):
    """Attention of local rows over local keys and the candidates in front of them.

    Args:
        out: (batch, heads, rows, head_dim).
        lse: (batch, heads, rows) of all scores; of those of the local keys alone where it was not asked for.
        mass: (batch, heads, rows, candidates) share of the attention that each candidate received.
    """

    out: Tensor
    lse: Tensor
    mass: Tensor


def attend_front(
    local: Part,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    top: int = 0,
    softcap: float | None = None,
    with_lse: bool = False,
) -> Front:
    """Attend from local rows to candidates and, in the same softmax, to the local keys of ``local``.

    Args:
        local: attention of the same rows over local keys.
        query: (batch, heads, rows, head_dim).
        key: (batch, kv_heads, candidates, head_dim).
        value: like ``key``.
        bias: (batch or 1, 1, 1, candidates or 1), added to the scores; :data:`HIDDEN` hides a candidate.
        scale: multiplies the scores.
        top: candidates of the highest score that a head attends to; 0 for all.
        softcap: as in :func:`attend`.
        with_lse: whether the result's ``lse`` is wanted.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, count = key.shape[1], key.shape[2]
    folded = fold_heads(query, kv_heads).reshape(batch * kv_heads, -1, dim)
    flat = _widen(key).reshape(batch * kv_heads, count, dim)
    scores = torch.baddbmm(_zero(flat.dtype, flat.device), _widen(folded), flat.transpose(1, 2), beta=0, alpha=scale)
    best = _cap(scores, softcap).view(batch, heads, rows, count)
    best = best if bias is None else best + bias
    places = None
    if 0 < top < count:
        best, places = best.topk(top, dim=-1)
    scores = torch.cat([best, local.lse.unsqueeze(-1)], dim=-1)  # all local keys count as one
    mass = torch.softmax(scores, dim=-1)
    share = mass[..., -1:]
    mass = mass[..., :-1]
    if places is not None:
        mass = mass.new_zeros(batch, heads, rows, count).scatter(-1, places, mass)
    seen = (fold_heads(mass.to(value.dtype), kv_heads) @ value).view(batch, heads, rows, dim)
    out = (share * local.out + seen).to(query.dtype)
    return Front(out, torch.logsumexp(scores, dim=-1) if with_lse else local.lse, mass)


@lru_cache(maxsize=16)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(1, 1, 1, dtype=dtype, device=device)


def attend_self(query: Tensor, key: Tensor, value: Tensor, scale: float, *, softcap: float | None = None) -> Part:
    """Attend from row i to key i alone. Shapes as in :func:`attend_causal`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (_widen(query) * _widen(key)).sum(-1) * scale
    return Part(value, _cap(scores, softcap))


def attend_chunks(
    query: Tensor, kv: LayerKV, scale: float, *, softcap: float | None = None, others: Sequence[Part] = ()
) -> Tensor:
    """Attend from rows behind each chunk to that chunk and, in the same softmax, to what they attend to besides.

    Args:
        query: (chunks, heads, rows, head_dim).
        kv: the layer's chunk KV.
        scale: multiplies the scores.
        softcap: as in :func:`attend`.
        others: attention of the same rows over other keys.

    Returns:
        (chunks, heads, rows, head_dim).
    """
    table, (chunks, heads, rows, dim) = kv.table, query.shape
    if query.device.type in _KERNELS:
        body = _by_kernel(query, kv, scale, softcap)
        if body is not None:
            return merge([body, *others]).out
    if rows * heads > _FEW_ROWS * kv.kv_heads or not len(table.owner):
        return merge([_attend_whole(query, kv, scale, softcap), *others]).out
    keys, values = (_in_parts(tensor, len(table.owner)) for tensor in (kv.keys(), kv.values()))
    own = kv.query(query.index_select(0, table.owner), table.slots)
    body = attend(own, keys, values, scale, softcap=softcap, bias=table.bias)
    lse, out = kv.table.nothing(heads, rows, dim, body.lse.dtype, query.dtype)
    places = table.places(len(others))
    lses = torch.cat([body.lse, *(part.lse for part in others), lse]).index_select(0, places)
    outs = torch.cat([kv.format.out(body.out), *(part.out for part in others), out]).index_select(0, places)
    weights = torch.softmax(lses.view(chunks, -1, heads, rows), dim=1)  # over the parts of each chunk
    mixed = weights.unsqueeze(-1) * outs.view(chunks, -1, heads, rows, dim)
    return mixed.sum(1).to(query.dtype)


def _by_kernel(query: Tensor, kv: LayerKV, scale: float, softcap: float | None) -> Part | None:
    """Attend to the chunks' blocks in one Triton kernel; ``None`` where that cannot be done here."""
    global _KERNELS
    wants_grad = torch.is_grad_enabled() and query.requires_grad
    if query.dtype == torch.float64 or (wants_grad and kv.format.name == "int4"):
        return None
    try:
        from focus_core.method import kernels

        return kernels.attend_body(query, kv, scale, softcap)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _KERNELS = ()
        warnings.warn(f"attention goes on without Triton kernels ({error})", stacklevel=2)
        return None


def _attend_whole(query: Tensor, kv: LayerKV, scale: float, softcap: float | None) -> Part:
    """Attend chunk by chunk, those with equally many blocks together."""
    keys, values = kv.keys(), kv.values()
    parts = [_attend_alike(query, kv, alike, keys, values, scale, softcap) for alike in kv.table.alike]
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([alike.rows for alike in kv.table.alike]).argsort()
    return Part(torch.cat([part.out for part in parts])[order], torch.cat([part.lse for part in parts])[order])


def _attend_alike(
    query: Tensor, kv: LayerKV, alike: Alike, keys: Tensor, values: Tensor, scale: float, softcap: float | None
) -> Part:
    whole = len(alike.rows) == len(query)
    own, count = query if whole else query.index_select(0, alike.rows), len(alike.rows)
    if not alike.pieces:
        return Part(torch.zeros_like(own), own.new_full(own.shape[:3], HIDDEN, dtype=_widen(own).dtype))
    bias, blocks = kv.table.bias, len(kv.table.owner)
    bias = bias[alike.blocks].reshape(count, 1, 1, -1)
    keys, values = (_in_parts(_chosen(tensor, alike.blocks, blocks), count) for tensor in (keys, values))
    part = attend(kv.query(own, alike.slots), keys, values, scale, softcap=softcap, bias=bias)
    return part._replace(out=kv.format.out(part.out))


def _in_parts(tensor: Tensor, parts: int) -> Tensor:
    """(kv_heads, parts * size, width) -> (parts, kv_heads, size, width), a view where it can be."""
    heads, tokens, width = tensor.shape
    return tensor.reshape(heads, parts, tokens // parts, width).transpose(0, 1)


def _chosen(tensor: Tensor, chosen: Tensor | slice, blocks: int) -> Tensor:
    """(kv_heads, blocks * size, width) -> (kv_heads, chosen * size, width); a view for a slice."""
    size = tensor.shape[1] // blocks
    if isinstance(chosen, slice):
        return tensor[:, chosen.start * size : chosen.stop * size]
    return tensor.reshape(tensor.shape[0], blocks, size, -1).index_select(1, chosen).flatten(1, 2)


def merge(parts: list[Part]) -> Part:
    """Merge attention over disjoint keys: ``sum_i exp(lse_i - lse) out_i`` with ``lse = logsumexp_i lse_i``."""
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack([part.lse for part in parts])
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse)
    out = sum(weight.unsqueeze(-1) * _widen(part.out) for weight, part in zip(weights, parts, strict=True))
    return Part(out.to(parts[0].out.dtype), lse)


def causal_bias(rows: int, keys: int, device: torch.device) -> Tensor:
    """Return a (1, 1, rows, keys) float32 bias in which the last row sees every key, the row before it one less."""
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=device).triu(keys - rows + 1)
    return torch.zeros(1, 1, rows, keys, device=device).masked_fill_(hidden, HIDDEN)


def scores_of(query: Tensor, key: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Return (batch, heads, rows, keys) scores in float32 or wider; for reading attention, not for computing it."""
    batch, heads, rows, _ = query.shape
    folded = _widen(fold_heads(query, key.shape[1]))
    return _cap(folded @ _widen(key).transpose(-1, -2) * scale, softcap).reshape(batch, heads, rows, -1)


def _flash_applies(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
    wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.device.type == "cpu" and softcap is None and not wants_grad


def _reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    before = 2.0 ** round(math.log2(scale))  # a power of two loses no bit, and float16 holds the scaled products
    scores = _cap(_widen((query * before) @ key.transpose(-1, -2)) * (scale / before), softcap)
    if bias is not None:
        scores = scores + bias
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    return torch.exp(scores - lse).to(value.dtype) @ value, lse.squeeze(-1)


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _narrow(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bias in ``dtype``, hidden keys still finite."""
    return bias if bias.dtype == dtype else bias.clamp_min(hidden_score(dtype)).to(dtype)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
