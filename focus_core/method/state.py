"""Hold one version of what is read: documents, chunks, where their KV lies. A state is replaced, never changed.

Only what questions begin with (:class:`KeptOpenings`) is filled in while a state is read; it is a cache that changes no
answer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from focus_core.method.slabs import Slab
from focus_core.text.chunking import Chunk
from focus_core.text.corpus import Document


class KeptOpenings:
    """The KV that runs of tokens have behind every chunk of a memory: questions begin alike.

    It holds several, the last used ones, up to a number of bytes; each only where that is small beside the chunks.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ids: Sequence[int]) -> list[Tensor] | None:
        """Return (layers, 2, chunks, kv_heads, len(ids), head_dim) of each slab, if it is kept for ``ids``."""
        with self._lock:
            kept = self._kept.get(tuple(ids))
            if kept is not None:
                self._kept.move_to_end(tuple(ids))
            return kept

    def put(self, ids: Sequence[int], tensors: list[Tensor], limit: int) -> None:
        """Keep tensors; those that were used longest ago go when all have more than ``limit`` bytes."""
        with self._lock:
            self._kept[tuple(ids)] = tensors
            self._kept.move_to_end(tuple(ids))
            while len(self._kept) > 1 and self._nbytes() > limit:
                self._kept.popitem(last=False)

    def _nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self._kept.values() for tensor in tensors)


@dataclass(frozen=True)
class MemoryState:
    """One immutable version of a memory.

    Args:
        documents: by id, in order of addition.
        chunks: of all documents, in memory order.
        slabs: where KV lies.
        openings: what questions began with and its KV behind every chunk, for the next one that begins so.
    """

    documents: dict[str, Document]
    chunks: tuple[Chunk, ...]
    slabs: tuple[Slab, ...]
    openings: KeptOpenings = field(default_factory=KeptOpenings, compare=False, repr=False)
