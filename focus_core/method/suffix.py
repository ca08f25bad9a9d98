"""Hold the keys and values that grow while an answer is decoded: behind every chunk, and of the local context.

They grow in place and are committed when a whole pass has succeeded. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from focus_core.method.kv import ChunkKV
from focus_core.method.sources import FIRST, KVShape

_GROWTH = 32  # tokens by which a suffix grows: it stands behind every chunk of a memory


class GrowingKV:
    """Keys and values that grow in place while an answer is decoded, each layer when it is written.

    Args:
        layers: (2, batch, kv_heads, front + capacity, head_dim) of each layer.
        front: entries before those that grow.
    """

    def __init__(self, layers: Sequence[Tensor], front: int = 0) -> None:
        self._layers, self.front = list(layers), front
        self.used = 0

    @property
    def layers(self) -> int:
        """How many layers it holds."""
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes held, those in reserve included."""
        return sum(data.nbytes for data in self._layers)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, rows, head_dim) behind what is committed; return all of K and V of the layer."""
        start = self.front + self.used
        stop = start + key.shape[2]
        data = self._layers[layer]
        if stop > data.shape[3]:
            grown = data.new_empty(*data.shape[:3], self._room(stop), data.shape[4])
            grown[..., :start, :] = data[..., :start, :]
            self._take(grown.nbytes - data.nbytes)
            self._layers[layer] = data = grown
        if stop > start:
            data[0, :, :, start:stop] = key
            data[1, :, :, start:stop] = value
        return data[0, :, :, :stop], data[1, :, :, :stop]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what is committed of a layer's K and V, what lies in front included."""
        keys, values = self._layers[layer][:, :, :, : self.front + self.used]
        return keys, values

    def _room(self, rows: int) -> int:
        """Return the rows to make room for when ``rows`` are needed."""
        return 2 * rows

    def _take(self, nbytes: int) -> None:
        """Hear of bytes that are held from now on."""

    def read(self) -> Tensor:
        """Return what is committed, (layers, 2, batch, kv_heads, rows, head_dim)."""
        return torch.stack([data[..., self.front : self.front + self.used, :] for data in self._layers])

    def write_all(self, data: Tensor) -> None:
        """Begin with what :meth:`read` of another one returned."""
        for layer, (key, value) in enumerate(data):
            self.write(layer, key, value)
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
        capacity: tokens to make room for at once; it grows in blocks of :data:`_GROWTH`.
        questions: that put something behind each chunk, side by side; what is behind the end of a shorter one is
            hidden by whoever reads it.
    """

    def __init__(self, like: ChunkKV, capacity: int, questions: int = 1) -> None:
        shape, rows = like.shape, suffix_rows(capacity)
        self._source, layers = like.source, []
        for layer in range(shape.layers):
            data = torch.empty(
                (2, like.size * questions, shape.kv_heads, rows, shape.head_dim), dtype=shape.dtype, device=shape.device
            )
            for index, first in enumerate(like.first(layer)):
                data[index, :, :, :FIRST] = first.repeat_interleave(questions, dim=0)
            layers.append(data)
        super().__init__(layers, FIRST)
        self._take(self.nbytes)

    def _room(self, rows: int) -> int:
        return suffix_rows(rows - FIRST)

    def _take(self, nbytes: int) -> None:
        self._source.count(self, nbytes)

    def choose(self, chunks: Sequence[int]) -> Suffix:
        """Return a copy of one question's that stands behind some of the chunks alone."""
        chosen = copy(self)
        chosen._layers = [data[:, list(chunks)] for data in self._layers]
        return chosen


def suffix_bytes(shape: KVShape, chunks: int, tokens: int) -> int:
    """Return the bytes of a question's suffix of ``tokens`` tokens behind ``chunks`` chunks."""
    row = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    return chunks * suffix_rows(tokens) * row
