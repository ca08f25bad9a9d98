"""Keep chunk KV in memory between trials, so that a fixed haystack is read once and a trial adds one chunk.

A trial's memory takes the KV that it needs out of the cache and gives its slabs back when it is done with, so hardly a
chunk is held twice. Chunks are addressed as in a store on disk, by everything that their KV depends on, so a
hit is exact whatever made it. A full cache takes no more and drops nothing: trials walk through the same
haystack in the same order, which is the one order that dropping the oldest never serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from focus_core.hardware import free_bytes
from focus_core.method.kv import ChunkKV
from focus_core.store.encoder import ChunkEncoder
from focus_core.store.memory import Memory
from focus_core.store.segments import Tensors
from focus_core.text.corpus import Document


class ChunkCache:
    """Chunk KV by address; what a memory asks of a store.

    Args:
        limit: most bytes to hold; half of what is free on the base's device at the first trial if not
            given.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.nbytes = 0
        self.encoded = 0
        """Chunks that had to be computed so far."""
        self._chunks: dict[str, tuple[ChunkKV, int]] = {}

    def holds(self, keys: Iterable[str]) -> set[str]:
        """Return which keys have chunk KV here."""
        return self._chunks.keys() & set(keys)

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, key: str) -> dict[str, Tensor]:
        """Take one chunk's arrays out."""
        kv, row = self._chunks.pop(key)
        self.nbytes -= kv.rows(row, row + 1).nbytes
        return kv.get(row)

    def put_all(self, items: Mapping[str, Tensors]) -> None:
        """Count chunks that were computed; their KV comes when their memory is given back."""
        self.encoded += len(items)

    @contextmanager
    def memory(self, encoder: ChunkEncoder, documents: Iterable[Document]) -> Iterator[Memory]:
        """Lend a memory of these documents; it is empty once it is given back."""
        if self.limit is None:
            self.limit = free_bytes(encoder.base.device) // 2
        memory = Memory(encoder, self)
        memory.add(documents)
        self._let_go()
        try:
            yield memory
        finally:
            for slab in memory.state.slabs:
                self._keep([encoder.key(alike[0]) for alike in slab.groups()], slab.kv, self.limit)
            memory.remove([document.id for document in memory.documents])

    def _keep(self, keys: Sequence[str], kv: ChunkKV, limit: int) -> None:
        """Hold the first chunks that there is room for: where they lie if that is all of them, else a copy."""
        kept: list[int] = []
        for row, key in enumerate(keys):
            more = kv.rows(row, row + 1).nbytes
            if key in self._chunks or self.nbytes + more > limit:
                continue
            self.nbytes += more
            kept.append(row)
        held = kv if len(kept) == kv.size else kv.select(kept).copied()
        self._chunks |= {keys[row]: (held, number) for number, row in enumerate(kept)}

    def _let_go(self) -> None:
        """Copy what a trial did not take, so that it no longer keeps alive what lay beside it."""
        left: dict[int, list[str]] = {}
        for key, (kv, _) in self._chunks.items():
            left.setdefault(id(kv), []).append(key)
        for keys in left.values():
            kv = self._chunks[keys[0]][0]
            if len(keys) < kv.size:
                copied = kv.select([self._chunks[key][1] for key in keys]).copied()
                self._chunks |= {key: (copied, number) for number, key in enumerate(keys)}
