"""Say which chunk's KV lies where: a slab is chunks of any length over one :class:`ChunkKV`.

A memory has one slab, however its documents came, as long as there is room to copy it when it outgrows its source; a
memory too large for that goes on in a second one. Slabs are immutable: a change makes new ones, whose chunk KV stays
where it is. Equal chunks share a row. The module knows no documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from focus_core.method.kv import ChunkKV
from focus_core.text.chunking import Chunk

Alike = tuple[Chunk, ...]
"""Equal chunks: their KV and what a question adds are equal, so they share a row."""


@dataclass(frozen=True)
class Slab:
    """Chunks whose KV lies in one place.

    Args:
        chunks: in the order of their rows.
        kv: of the distinct ones.
        rows: of each chunk, its row in ``kv``.
    """

    chunks: tuple[Chunk, ...]
    kv: ChunkKV
    rows: tuple[int, ...]

    @classmethod
    def of(cls, groups: Sequence[Alike], kv: ChunkKV) -> Slab:
        """Lay groups of equal chunks over the rows of chunk KV."""
        placed = [(chunk, row) for row, alike in enumerate(groups) for chunk in alike]
        return cls(tuple(chunk for chunk, _ in placed), kv, tuple(row for _, row in placed))

    def groups(self) -> list[Alike]:
        """Return the equal chunks of each row."""
        held: list[list[Chunk]] = [[] for _ in self.kv.lengths]
        for chunk, row in zip(self.chunks, self.rows, strict=True):
            held[row].append(chunk)
        return [tuple(alike) for alike in held]

    def between(self, start: int, stop: int) -> Iterator[tuple[Chunk, int]]:
        """Yield the chunks of rows ``start`` to ``stop``, each with its row counted from ``start``."""
        for chunk, row in zip(self.chunks, self.rows, strict=True):
            if start <= row < stop:
                yield chunk, row - start

    def without(self, lost: set[int]) -> Slab | None:
        """Return the slab without the chunks of these ``id``s; itself if every row stays, ``None`` if none does."""
        groups = [tuple(chunk for chunk in alike if id(chunk) not in lost) for alike in self.groups()]
        kept = [row for row, alike in enumerate(groups) if alike]
        if not kept:
            return None
        kv = self.kv if len(kept) == self.kv.size else self.kv.choose(kept)
        return Slab.of([groups[row] for row in kept], kv)


def equal_chunks(chunks: Iterable[Chunk]) -> list[Alike]:
    """Put equal chunks together, longest first."""
    equal: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in chunks:
        equal.setdefault(chunk.ids, []).append(chunk)
    return [tuple(equal[ids]) for ids in sorted(equal, key=len, reverse=True)]
