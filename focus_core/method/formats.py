"""Write chunk keys and values in few bits, and read them back.

A chunk's keys and values are written once and read at every step, so its scales come from the whole chunk. Each format
is a set of named arrays, some with one entry a token and some with one a chunk; which memory they lie in, and what is
computed from them, is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from focus_core.config import KVFormat
from focus_core.errors import ConfigError

Arrays = Mapping[str, Tensor]
_GROUP = 32  # channels of a value that share a scale in 4 bits


@dataclass(frozen=True)
class Array:
    """One named array of a format.

    Args:
        per: whether there is one entry a ``token``, (kv_heads, tokens, *shape), or a ``chunk``, (chunks, *shape).
        shape: of an entry.
        dtype: of its numbers.
    """

    per: Literal["token", "chunk"]
    shape: tuple[int, ...]
    dtype: torch.dtype


class BaseFormat:
    """Keys and values as the base computes them."""

    name: KVFormat = "base"

    def arrays(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Array]:
        """Return the arrays of a layer."""
        return {name: Array("token", (head_dim,), dtype) for name in ("keys", "values")}

    def write(self, keys: Tensor, values: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """Return the arrays of some chunks.

        Args:
            keys: (chunks, kv_heads, tokens, head_dim), rotated.
            values: like ``keys``.
            seen: (chunks, tokens) which of them are tokens and which are padding.

        Returns:
            (chunks, kv_heads, tokens, ...) of arrays by token, (chunks, ...) of those by chunk.
        """
        return {"keys": keys, "values": values}

    def query(self, query: Tensor, arrays: Arrays, owner: Tensor) -> Tensor:
        """Return the queries that score :meth:`keys` as ``query`` scores the keys that were written.

        Args:
            query: (blocks, heads, rows, head_dim).
            arrays: of the layer.
            owner: (blocks,) entry of the arrays by chunk that each block belongs to.
        """
        return query

    def keys(self, arrays: Arrays, dtype: torch.dtype) -> Tensor:
        """Return (kv_heads, tokens, head_dim) for :meth:`query` to score."""
        return arrays["keys"]

    def values(self, arrays: Arrays, dtype: torch.dtype) -> Tensor:
        """Return (kv_heads, tokens, head_dim) to average; :meth:`out` then makes the average."""
        return arrays["values"]

    def out(self, out: Tensor) -> Tensor:
        """Return the average of the values that were written, from the one over :meth:`values`."""
        return out

    def plain(self, arrays: Arrays, slot: int) -> tuple[Tensor, Tensor]:
        """Return one chunk's keys and values as they were written, but for rounding: (kv_heads, tokens, head_dim)."""
        return arrays["keys"], arrays["values"]


class Int8Format(BaseFormat):
    """Eight bits: keys by channel and chunk, values by token and head, both symmetric."""

    name: KVFormat = "int8"

    def arrays(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Array]:
        """Return the arrays of a layer."""
        scale = torch.promote_types(dtype, torch.float32)
        return {
            "keys": Array("token", (head_dim,), torch.int8),
            "values": Array("token", (head_dim,), torch.int8),
            "key_scale": Array("chunk", (kv_heads, head_dim), scale),
            "value_scale": Array("token", (1,), scale),
        }

    def write(self, keys: Tensor, values: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """See :meth:`BaseFormat.write`."""
        shown = seen[:, None, :, None]
        key_scale = _positive((keys.abs() * shown).amax(2, keepdim=True).float() / 127)
        value_scale = _positive(values.abs().amax(3, keepdim=True).float() / 127)
        return {
            "keys": _rounded(keys, key_scale),
            "values": _rounded(values, value_scale),
            "key_scale": key_scale.squeeze(2),
            "value_scale": value_scale,
        }

    def query(self, query: Tensor, arrays: Arrays, owner: Tensor) -> Tensor:
        """Fold the scales of the keys into the query: the keys need a cast only."""
        scale = arrays["key_scale"].index_select(0, owner)
        blocks, heads, rows, dim = query.shape
        grouped = query.reshape(blocks, scale.shape[1], -1, dim) * scale.unsqueeze(2)
        return grouped.reshape(blocks, heads, rows, dim).to(query.dtype)

    def keys(self, arrays: Arrays, dtype: torch.dtype) -> Tensor:
        """See :meth:`BaseFormat.keys`."""
        return arrays["keys"].to(dtype)

    def values(self, arrays: Arrays, dtype: torch.dtype) -> Tensor:
        """See :meth:`BaseFormat.values`."""
        return (arrays["values"] * arrays["value_scale"]).to(dtype)

    def plain(self, arrays: Arrays, slot: int) -> tuple[Tensor, Tensor]:
        """See :meth:`BaseFormat.plain`."""
        scale = arrays["key_scale"][slot].unsqueeze(1)
        return arrays["keys"] * scale, arrays["values"] * arrays["value_scale"]


class Int4Format(BaseFormat):
    """Four bits behind a Hadamard rotation, which spreads outliers: keys by channel and chunk, values by token and
    group of channels, both with an offset."""

    name: KVFormat = "int4"

    def arrays(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Array]:
        """Return the arrays of a layer."""
        scale = torch.promote_types(dtype, torch.float32)
        if head_dim % 2:
            raise ConfigError(f"int4 packs two channels in a byte, so head_dim must be even; got {head_dim}")
        return {
            "keys": Array("token", (head_dim // 2,), torch.uint8),
            "values": Array("token", (head_dim // 2,), torch.uint8),
            "key_scale": Array("chunk", (2, kv_heads, head_dim), scale),
            "value_scale": Array("token", (2, _groups(head_dim)), scale),
        }

    def write(self, keys: Tensor, values: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """See :meth:`BaseFormat.write`."""
        turn = hadamard(keys.shape[-1], keys.device)
        keys, values = keys.float() @ turn, values.float() @ turn
        hidden = ~seen[:, None, :, None]
        low = keys.masked_fill(hidden, math.inf).amin(2, keepdim=True)
        high = keys.masked_fill(hidden, -math.inf).amax(2, keepdim=True)
        low, high = torch.where(low > high, 0.0, low), torch.where(low > high, 0.0, high)
        key_scale = _positive((high - low) / 15)
        grouped = _grouped(values, _groups(values.shape[-1]))
        value_low = grouped.amin(-1, keepdim=True)
        value_scale = _positive((grouped.amax(-1, keepdim=True) - value_low) / 15)
        return {
            "keys": _nibbles((keys - low) / key_scale),
            "values": _nibbles(((grouped - value_low) / value_scale).flatten(-2)),
            "key_scale": torch.stack([key_scale.squeeze(2), low.squeeze(2)], dim=1),
            "value_scale": torch.stack([value_scale.squeeze(-1), value_low.squeeze(-1)], dim=-2),
        }

    def query(self, query: Tensor, arrays: Arrays, owner: Tensor) -> Tensor:
        """Rotate the query as the keys were, and fold their scales into it.

        The offset of the keys adds the same to all scores of a chunk, but not to those of its other parts, so it is a
        column of its own (and what rounding leaves of it another), which :meth:`keys` answers with ones.
        """
        scale = arrays["key_scale"].index_select(0, owner)  # (blocks, 2, kv_heads, head_dim)
        blocks, heads, rows, dim = query.shape
        turned = query.float() @ hadamard(dim, query.device)
        grouped = turned.reshape(blocks, scale.shape[2], -1, dim)
        scaled, offset = grouped * scale[:, 0].unsqueeze(2), (grouped * scale[:, 1].unsqueeze(2)).sum(-1, keepdim=True)
        coarse = offset.to(query.dtype)
        rest, none = (offset - coarse).to(query.dtype), coarse.new_zeros(*coarse.shape[:-1], _PAD - 2)
        wide = torch.cat([scaled.to(query.dtype), coarse, rest, none], dim=-1)
        return wide.reshape(blocks, heads, rows, dim + _PAD)

    def keys(self, arrays: Arrays, dtype: torch.dtype) -> Tensor:
        """See :meth:`BaseFormat.keys`."""
        keys = _from_nibbles(arrays["keys"]).to(dtype)
        return torch.cat([keys, keys.new_ones(*keys.shape[:-1], _PAD)], dim=-1)

    def values(self, arrays: Arrays, dtype: torch.dtype) -> Tensor:
        """See :meth:`BaseFormat.values`."""
        scale = arrays["value_scale"]
        codes = _grouped(_from_nibbles(arrays["values"]), scale.shape[-1])
        values = (codes * scale[..., 0, :, None] + scale[..., 1, :, None]).flatten(-2)
        return torch.cat([values, values.new_zeros(*values.shape[:-1], _PAD)], dim=-1).to(dtype)

    def out(self, out: Tensor) -> Tensor:
        """Rotate back."""
        out = out[..., :-_PAD]
        return (out.float() @ hadamard(out.shape[-1], out.device).T).to(out.dtype)

    def plain(self, arrays: Arrays, slot: int) -> tuple[Tensor, Tensor]:
        """See :meth:`BaseFormat.plain`."""
        scale = arrays["key_scale"][slot].unsqueeze(2)  # (2, kv_heads, 1, head_dim)
        keys = _from_nibbles(arrays["keys"]) * scale[0] + scale[1]
        return keys @ hadamard(keys.shape[-1], keys.device).T, self.out(self.values(arrays, torch.float32))


_PAD = 8  # columns that carry the offset of 4-bit keys
FORMATS: dict[str, BaseFormat] = {item.name: item for item in (BaseFormat(), Int8Format(), Int4Format())}


def format_of(name: str) -> BaseFormat:
    """Return a format; raises :class:`ConfigError` with the known names."""
    if name not in FORMATS:
        raise ConfigError(f"kv_format must be one of {', '.join(get_args(KVFormat))}; got {name!r}")
    return FORMATS[name]


@lru_cache(maxsize=16)
def hadamard(dim: int, device: torch.device) -> Tensor:
    """Return an orthogonal (dim, dim) matrix of Hadamard blocks, 64 wide or the largest power of two that divides."""
    width = math.gcd(dim, 64)
    block = torch.ones(1, 1)
    while len(block) < width:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.kron(torch.eye(dim // width), block / math.sqrt(width)).to(device)


def _groups(head_dim: int) -> int:
    return head_dim // _GROUP if head_dim % _GROUP == 0 else 1


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:-1], groups, tensor.shape[-1] // groups)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _rounded(tensor: Tensor, scale: Tensor) -> Tensor:
    return (tensor.float() / scale).round_().clamp_(-127, 127).to(torch.int8)


def _nibbles(codes: Tensor) -> Tensor:
    """(..., 2 n) codes 0..15 -> (..., n) bytes: the first half in the low bits, the second in the high ones."""
    whole = codes.round().clamp(0, 15).to(torch.uint8)
    low, high = whole.chunk(2, dim=-1)
    return low | (high << 4)


def _from_nibbles(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)
