"""Hold the keys and values that grow while an answer is decoded: behind every chunk, and of the local context.

They grow in place and are committed when a whole pass has succeeded. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from focus_core.method.kv import ChunkKV
from focus_core.method.sources import FIRST

_GROWTH = 32  # tokens by which a suffix grows: it stands behind every chunk of a memory


class GrowingKV:
    """Keys and values that grow in place while an answer is decoded.

    Args:
        data: (layers, 2, batch, kv_heads, front + capacity, head_dim).
        front: entries before those that grow.
    """

    def __init__(self, data: Tensor, front: int = 0) -> None:
        self.data, self.front = data, front
        self.used = 0

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, rows, head_dim) behind what is committed; return all of K and V of the layer."""
        start = self.front + self.used
        stop = start + key.shape[2]
        if stop > self.data.shape[4]:
            grown = self.data.new_empty(*self.data.shape[:4], self._room(stop), self.data.shape[5])
            grown[..., :start, :] = self.data[..., :start, :]
            self.data = grown
        if stop > start:
            self.data[layer, 0, :, :, start:stop] = key
            self.data[layer, 1, :, :, start:stop] = value
        return self.data[layer, 0, :, :, :stop], self.data[layer, 1, :, :, :stop]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what is committed of a layer's K and V, what lies in front included."""
        keys, values = self.data[layer, :, :, :, : self.front + self.used]
        return keys, values

    @property
    def layers(self) -> int:
        """How many layers it holds."""
        return self.data.shape[0]

    def _room(self, rows: int) -> int:
        """Return the rows to make room for when ``rows`` are needed."""
        return 2 * rows

    def read(self) -> Tensor:
        """Return what is committed, (layers, 2, batch, kv_heads, rows, head_dim)."""
        return self.data[..., self.front : self.front + self.used, :]

    def write_all(self, data: Tensor) -> None:
        """Begin with what :meth:`read` of another one returned."""
        self.data[..., self.front : self.front + data.shape[4], :] = data
        self.used = data.shape[4]

    def commit(self, rows: int) -> None:
        """Keep the first ``rows`` written rows of all layers."""
        self.used += rows


def suffix_rows(tokens: int) -> int:
    """Return the rows that ``tokens`` of a question and its answer take behind a chunk."""
    return -(-(FIRST + tokens) // _GROWTH) * _GROWTH


class Suffix(GrowingKV):
    """The (chunk, question) KV that a question appends behind every chunk; the chunks' first tokens lie in front.

    Args:
        like: the chunks it stands behind.
        capacity: tokens that are certain to come; it grows in blocks of :data:`_GROWTH`.
        questions: that put something behind each chunk, side by side; what is behind the end of a shorter one is
            hidden by whoever reads it.
    """

    def __init__(self, like: ChunkKV, capacity: int, questions: int = 1) -> None:
        shape = like.shape
        data = torch.empty(
            (shape.layers, 2, like.size * questions, shape.kv_heads, self._room(FIRST + capacity), shape.head_dim),
            dtype=shape.dtype,
            device=shape.device,
        )
        like.source.count(self, data.nbytes)
        for layer in range(shape.layers):
            for index, first in enumerate(like.first(layer)):
                data[layer, index, :, :, :FIRST] = first.repeat_interleave(questions, dim=0)
        super().__init__(data, FIRST)

    def _room(self, rows: int) -> int:
        return suffix_rows(rows - FIRST)

    def choose(self, chunks: Sequence[int]) -> Suffix:
        """Return a copy of one question's that stands behind some of the chunks alone."""
        chosen = copy(self)
        chosen.data = self.data[:, :, list(chunks)]
        return chosen
