"""Hold keys and values of chunks and suffixes, and move rotary keys to new positions.

A :class:`ChunkBatch` is read-only once encoded; what a question adds lives in a :class:`Suffix` of its own. The last
layer's chunk KV is never read by any candidate, so ``layers`` here is the base's number minus one. The module runs no
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_core.method.attention import HIDDEN


@dataclass(frozen=True)
class ChunkBatch:
    """Chunk KV of some chunks, padded to the longest.

    Args:
        data: (layers, 2, chunks, kv_heads, length, head_dim); index 0 of the second axis is K, 1 is V.
        lengths: tokens of each chunk row, the sink included.
    """

    data: Tensor
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chunks."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the padded tensors."""
        return self.data.nbytes

    def bias(self) -> Tensor | None:
        """Return (chunks, 1, 1, length) float32 with padding hidden, or ``None`` when nothing is padded."""
        longest = self.data.shape[4]
        if all(length == longest for length in self.lengths):
            return None
        lengths = torch.tensor(self.lengths, device=self.data.device)
        padding = torch.arange(longest, device=self.data.device) >= lengths[:, None]
        return torch.zeros(padding.shape, device=self.data.device).masked_fill_(padding, HIDDEN)[:, None, None]

    def rows(self, start: int, stop: int) -> ChunkBatch:
        """Return chunks ``start`` to ``stop`` as a view, cut to their longest: no copy."""
        lengths = self.lengths[start:stop]
        return ChunkBatch(self.data[:, :, start:stop, :, : max(lengths)], lengths)

    def choose(self, indices: Sequence[int]) -> ChunkBatch:
        """Return some chunks as a batch of their own: a copy, cut to their longest."""
        return ChunkBatch.gather([self.chunk(index) for index in indices])

    def chunk(self, index: int) -> Tensor:
        """Return one chunk's (layers, 2, kv_heads, length, head_dim) without padding, as a view."""
        return self.data[:, :, index, :, : self.lengths[index]]

    @staticmethod
    def empty(
        layers: int, kv_heads: int, head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> ChunkBatch:
        """Allocate zeroed KV for chunks of these lengths (zero, so that padding never holds NaN)."""
        shape = (layers, 2, len(lengths), kv_heads, max(lengths), head_dim)
        return ChunkBatch(torch.zeros(shape, dtype=dtype, device=device), lengths)

    @staticmethod
    def gather(chunks: list[Tensor]) -> ChunkBatch:
        """Pad and stack single chunks, each (layers, 2, kv_heads, length, head_dim)."""
        lengths = tuple(chunk.shape[3] for chunk in chunks)
        layers, _, kv_heads, _, head_dim = chunks[0].shape
        batch = ChunkBatch.empty(layers, kv_heads, head_dim, lengths, chunks[0].dtype, chunks[0].device)
        for index, chunk in enumerate(chunks):
            batch.chunk(index).copy_(chunk)
        return batch


class GrowingKV:
    """Keys and values that grow in place while an answer is decoded.

    Args:
        data: (layers, 2, batch, kv_heads, capacity, head_dim).
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.used = 0

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, rows, head_dim) behind what is committed; return all of K and V of the layer."""
        stop = self.used + key.shape[2]
        if stop > self.data.shape[4]:
            grown = self.data.new_empty(*self.data.shape[:4], 2 * stop, self.data.shape[5])
            grown[..., : self.used, :] = self.data[..., : self.used, :]
            self.data = grown
        if stop > self.used:  # a pass without new rows must not touch what autograd has saved
            self.data[layer, 0, :, :, self.used : stop] = key
            self.data[layer, 1, :, :, self.used : stop] = value
        return self.data[layer, 0, :, :, :stop], self.data[layer, 1, :, :, :stop]

    def write_all(self, data: Tensor) -> None:
        """Begin with KV of all layers that was computed before: (layers, 2, batch, kv_heads, rows, head_dim)."""
        self.data[..., : data.shape[4], :] = data
        self.used = data.shape[4]

    def commit(self, rows: int) -> None:
        """Keep the last ``rows`` written rows of all layers."""
        self.used += rows


class Suffix(GrowingKV):
    """The (chunk, question) KV that a question appends behind every chunk.

    Args:
        like: the chunks it stands behind.
        capacity: tokens it can hold before it has to grow.
    """

    def __init__(self, like: ChunkBatch, capacity: int) -> None:
        layers, _, chunks, kv_heads, _, head_dim = like.data.shape
        super().__init__(like.data.new_empty(layers, 2, chunks, kv_heads, max(capacity, 1), head_dim))

    def choose(self, chunks: Sequence[int]) -> Suffix:
        """Return a copy that stands behind some of the chunks alone."""
        chosen = copy(self)
        chosen.data = self.data[:, :, list(chunks)]
        return chosen


def rotation(inverse_frequencies: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (rows, rotary_dim) cosine and sine that move keys by ``delta`` (rows,) positions."""
    angles = delta.to(inverse_frequencies.dtype)[:, None] * inverse_frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def move_keys(keys: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate keys to new positions: RoPE of a sum of positions is the product of the rotations.

    Args:
        keys: (..., rows, head_dim), rotated for their present positions.
        turn: from :func:`rotation`, one row a key; ``None`` leaves keys as they are (learned positions).

    Returns:
        Keys at their new positions, same shape and dtype.
    """
    if turn is None:
        return keys
    cos, sin = turn
    dim = cos.shape[-1]
    part = keys[..., :dim].to(cos.dtype)
    half = torch.cat([-part[..., dim // 2 :], part[..., : dim // 2]], dim=-1)
    moved = (part * cos + half * sin).to(keys.dtype)
    return moved if dim == keys.shape[-1] else torch.cat([moved, keys[..., dim:]], dim=-1)
