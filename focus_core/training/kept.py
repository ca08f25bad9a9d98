"""Keep the chunk KV of training texts between steps, where the same cuts come again.

Chunk KV depends on the base and the chunk's tokens alone, never on what is trained, so a kept one is the one that would
be computed (to the last bits of arithmetic that a batch of other lengths rounds otherwise). The least recently used
goes first when the bound is reached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from focus_core.method.encoding import encode_chunks, kv_shape
from focus_core.method.kv import ChunkKV
from focus_core.model.families import BaseDecoder

Ids = tuple[int, ...]


class KeptChunks:
    """Chunk KV by tokens, up to a number of bytes.

    Args:
        most_bytes: 0 keeps nothing.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self.asked = self.found = 0
        self._kept: OrderedDict[Ids, dict[str, Tensor]] = OrderedDict()

    def encode(self, base: BaseDecoder, rows: Sequence[Ids]) -> ChunkKV:
        """Return the chunk KV of ``rows`` (sinks included); only those that are not kept run."""
        if not self.most_bytes:
            return encode_chunks(base, rows)
        self.asked, found = self.asked + len(rows), {row: self._kept[row] for row in rows if row in self._kept}
        self.found += sum(row in found for row in rows)
        missing = list(dict.fromkeys(row for row in rows if row not in found))
        if missing:
            made = encode_chunks(base, missing)
            found |= {row: made.get(index) for index, row in enumerate(missing)}
        for row in dict.fromkeys(rows):
            self._keep(row, found[row])
        kv = ChunkKV.allocate(kv_shape(base), [len(row) for row in rows])
        for index, row in enumerate(rows):
            kv.put(index, found[row])
        return kv

    def _keep(self, row: Ids, data: dict[str, Tensor]) -> None:
        if row in self._kept:
            self._kept.move_to_end(row)
            return
        self._kept[row] = data
        self.nbytes += _nbytes(data)
        while self.nbytes > self.most_bytes:
            self.nbytes -= _nbytes(self._kept.popitem(last=False)[1])


def _nbytes(arrays: dict[str, Tensor]) -> int:
    return sum(array.nbytes for array in arrays.values())
