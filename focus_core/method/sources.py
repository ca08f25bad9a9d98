"""Hold the arrays of chunk KV: their shape, and where they lie.

A source gives a layer's arrays by name, ready to be read; :class:`Resident` is memory of the device that reads them.
Which chunk is where is not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from focus_core.config import KVFormat
from focus_core.method.formats import Array, format_of

FIRST = 4
"""Tokens at the head of a chunk that stay in the base's dtype."""


@dataclass(frozen=True)
class KVShape:
    """What chunk KV of one base looks like.

    Args:
        layers: of the base, but the last.
        kv_heads: of a layer.
        head_dim: of a head.
        dtype: of the base.
        device: where it is read.
        format: how it is written.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    format: KVFormat = "base"

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """All arrays of a layer, those of the first tokens included."""
        first = {
            name: Array("chunk", (self.kv_heads, FIRST, self.head_dim), self.dtype)
            for name in ("first_keys", "first_values")
        }
        return {**format_of(self.format).arrays(self.kv_heads, self.head_dim, self.dtype), **first}

    def nbytes(self, tokens: int, chunks: int) -> int:
        """Bytes of so many tokens in blocks and so many chunks."""
        total = 0
        for array in self.arrays.values():
            entry = array.dtype.itemsize * int(torch.Size(array.shape).numel())
            total += entry * (chunks if array.per == "chunk" else tokens * self.kv_heads)
        return total * self.layers


class Source(Protocol):
    """Where the arrays of chunk KV lie, in blocks of ``block`` tokens."""

    block: int

    @property
    def room(self) -> int | None:
        """Bytes that it may take together with what is counted beside it, ``None`` without a bound."""

    def count(self, holder: object, size: int) -> None:
        """Count ``size`` bytes that lie beside it as long as ``holder`` lives, and make room for them."""

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """Return a layer's arrays by name: (kv_heads, tokens, ...) or (chunks, ...), ready to be read."""


class Resident:
    """Arrays in the memory of the device that reads them, with room that is given away once.

    Args:
        shape: of the chunk KV.
        tokens: room, a multiple of ``block``.
        chunks: room.
        block: tokens of a block.
    """

    def __init__(self, shape: KVShape, tokens: int, chunks: int, block: int) -> None:
        self.tokens, self.chunks, self.block = tokens, chunks, block
        self._lock, self._taken = threading.Lock(), (0, 0)
        self._layers = [
            {  # zeroed, so that what is hidden never holds NaN
                name: torch.zeros(
                    ((chunks,) if array.per == "chunk" else (shape.kv_heads, tokens)) + array.shape,
                    dtype=array.dtype,
                    device=shape.device,
                )
                for name, array in shape.arrays.items()
            }
            for _ in range(shape.layers)
        ]

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """Return a layer's arrays."""
        return self._layers[index]

    @property
    def room(self) -> int | None:
        """There is no bound but the device's memory."""
        return None

    def count(self, holder: object, size: int) -> None:
        """Nothing here could make room."""

    def take(self, tokens: int, chunks: int) -> tuple[int, int] | None:
        """Give away room; return where it begins, or ``None`` if there is not so much."""
        with self._lock:
            start, slot = self._taken
            if start + tokens > self.tokens or slot + chunks > self.chunks:
                return None
            self._taken = (start + tokens, slot + chunks)
            return start, slot
