"""Lay chunk KV out in slabs: batches of chunks of like length.

A step runs slab by slab, so few large ones are fast; a change copies the slabs that it touches, so none may be too
large. Chunks are put together by length class (the longest of one is at most 1.4 times the shortest), which bounds the
padding, up to a number of bytes. Slabs are immutable; small ones of a class are joined as documents gather, each at
most doubling, so a memory that grew document by document has about as few as one that was read at once, and a chunk is
copied a number of times that grows with the logarithm of the memory. The module knows no documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from focus_core.method.kv import ChunkBatch
from focus_core.text.chunking import Chunk

_SPREAD = 1.4
_SHORT = 8  # tokens that do not count as padding: short chunks need no classes of their own

Alike = tuple[Chunk, ...]
"""Equal chunks: their KV and what a question adds are equal, so they share a row."""


@dataclass(frozen=True)
class Slab:
    """Chunks whose KV lies in one batch.

    Args:
        chunks: in the order of their rows.
        batch: KV of the distinct ones.
        rows: of each chunk, its row in ``batch``.
    """

    chunks: tuple[Chunk, ...]
    batch: ChunkBatch
    rows: tuple[int, ...]

    @classmethod
    def of(cls, groups: Sequence[Alike], batch: ChunkBatch) -> Slab:
        """Lay groups of equal chunks over the rows of a batch."""
        placed = [(chunk, row) for row, alike in enumerate(groups) for chunk in alike]
        return cls(tuple(chunk for chunk, _ in placed), batch, tuple(row for _, row in placed))

    def between(self, start: int, stop: int) -> Iterator[tuple[Chunk, int]]:
        """Yield the chunks of batch rows ``start`` to ``stop``, each with its row counted from ``start``."""
        for chunk, row in zip(self.chunks, self.rows, strict=True):
            if start <= row < stop:
                yield chunk, row - start

    def tensors(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield each chunk with its KV, (layers, 2, kv_heads, length, head_dim), as a view."""
        for chunk, row in zip(self.chunks, self.rows, strict=True):
            yield chunk, self.batch.chunk(row)

    def without(self, lost: set[int]) -> Slab | None:
        """Return the slab without the chunks of these ``id``s; itself if every row stays, ``None`` if none does."""
        kept: dict[int, list[Chunk]] = {}
        for chunk, row in zip(self.chunks, self.rows, strict=True):
            if id(chunk) not in lost:
                kept.setdefault(row, []).append(chunk)
        groups = [tuple(alike) for alike in kept.values()]
        if len(kept) == self.batch.size:
            return Slab.of(groups, self.batch)
        return Slab.of(groups, self.batch.choose(list(kept))) if kept else None


@dataclass(frozen=True)
class Layout:
    """Which chunks lie together.

    Args:
        longest: tokens of the longest chunk.
        token_bytes: bytes of one token's KV.
        slab_bytes: most bytes of a slab; a chunk that is larger has one of its own.
    """

    longest: int
    token_bytes: int
    slab_bytes: int

    def groups(self, chunks: Iterable[Chunk]) -> list[list[Alike]]:
        """Return the rows of each slab that these chunks need: equal chunks together, longest first."""
        groups: list[list[Alike]] = []
        for alike in _equal(chunks):
            tokens, longest = len(alike[0].ids), len(groups[-1][0][0].ids) if groups else 0
            if groups and self._class(longest) == self._class(tokens) and self._fits(len(groups[-1]) + 1, longest):
                groups[-1].append(alike)
            else:
                groups.append([alike])
        return groups

    def joined(self, slabs: Sequence[Slab]) -> tuple[Slab, ...]:
        """Join small slabs of a class; those that stay as they are keep their tensors."""
        runs: list[list[Slab]] = []
        for slab in sorted(slabs, key=lambda slab: (self._class(_longest(slab)), slab.batch.size)):
            if runs and self._belongs(slab, runs[-1]):
                runs[-1].append(slab)
            else:
                runs.append([slab])
        return tuple(run[0] if len(run) == 1 else self._join(run) for run in runs)

    def _belongs(self, slab: Slab, run: Sequence[Slab]) -> bool:
        rows = sum(other.batch.size for other in run)
        longest = max(map(_longest, (*run, slab)))
        alike = self._class(_longest(slab)) == self._class(_longest(run[0]))
        return alike and slab.batch.size <= 2 * rows and self._fits(slab.batch.size + rows, longest)

    def _join(self, slabs: Sequence[Slab]) -> Slab:
        found = {chunk.ids: tensor for slab in slabs for chunk, tensor in slab.tensors()}
        groups = _equal(chunk for slab in slabs for chunk in slab.chunks)
        return Slab.of(groups, ChunkBatch.gather([found[alike[0].ids] for alike in groups]))

    def _fits(self, rows: int, longest: int) -> bool:
        return rows * longest * self.token_bytes <= self.slab_bytes

    def _class(self, tokens: int) -> int:
        """Number of the class of a length, 0 for the longest; the last ones hold what is shorter than ``_SHORT``."""
        return int(math.log((self.longest + _SHORT) / (tokens + _SHORT), _SPREAD)) if tokens < self.longest else 0


def _equal(chunks: Iterable[Chunk]) -> list[Alike]:
    """Put equal chunks together, longest first."""
    equal: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in chunks:
        equal.setdefault(chunk.ids, []).append(chunk)
    return [tuple(equal[ids]) for ids in sorted(equal, key=len, reverse=True)]


def _longest(slab: Slab) -> int:
    return max(len(chunk.ids) for chunk in slab.chunks)
