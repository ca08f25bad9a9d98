"""Read chunk KV from disk layer by layer, and hold as many layers in memory as a budget allows.

A step reads layers one after the other, so what does not fit is read again at each step, one layer ahead of the
computation. The first layers of a memory stay: of what is read in a circle, dropping the oldest would drop what is
needed next. When a memory needs room, it takes it from the memory that was used longest ago and is not pinned. What
questions add (suffixes, openings) is counted, and so are the layers that pass through. What is read is compared with
its checksums; where it lies changes no answer.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch import Tensor

from focus_core.hardware import free_bytes
from focus_core.method.kv import ChunkKV, best_block, blocked
from focus_core.method.sources import FIRST, KVShape
from focus_core.store.segments import SegmentFacts, Segments

STAGED_LAYERS = 2
"""Of a memory of which a part stays on disk: the layer that is read from, and the one that is read ahead."""
_SHARE = 0.7  # of free memory that chunk KV takes where no budget is given
_readers: dict[int, ThreadPoolExecutor] = {}


class Budget:
    """Bytes of memory that the chunk KV of several memories shares.

    Args:
        limit: most bytes; a share of what is free on the device when it is asked for if not given.
    """

    def __init__(self, limit: int | None, device: torch.device) -> None:
        self.limit, self.device = limit, device
        self._held: OrderedDict[int, tuple[Callable[[], None], int]] = OrderedDict()
        self._beside: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._numbers = count()
        self._lock = threading.RLock()  # what is counted may be let go of while another is taken

    @property
    def used(self) -> int:
        """Bytes that are given away or counted."""
        with self._lock:
            held = [size for _, size in list(self._held.values())]
            return sum(held) + sum(list(self._beside.values()))  # copies: what dies meanwhile takes itself out

    def take(self, owner: int, size: int, give_back: Callable[[], None], beside: int = 0) -> bool:
        """Ask for room; other owners lose theirs, the one that asked longest ago first, but for the pinned ones.

        Args:
            owner: who asks.
            size: bytes.
            give_back: drops what the owner holds.
            beside: bytes that must be free besides, because they will be needed for a while.
        """
        with self._lock:
            held = self._held.pop(owner, (give_back, 0))[1]
            self._held[owner] = (give_back, held)
            self._drop_until(size + beside, owner)
            if not self._fits(size + beside):
                return False
            self._held[owner] = (give_back, held + size)
            return True

    def count(self, holder: object, size: int) -> None:
        """Count bytes that must lie somewhere as long as ``holder`` lives; owners make room for them."""
        number = next(self._numbers)
        with self._lock:
            self._drop_until(size)
            self._beside[number] = size
        weakref.finalize(holder, self._uncount, number)

    def pin(self, owner: int) -> None:
        """Let an owner lose nothing to the others."""
        with self._lock:
            self._pinned.add(owner)

    def release(self, owner: int) -> None:
        """Forget an owner."""
        with self._lock:
            self._held.pop(owner, None)
            self._pinned.discard(owner)

    def room(self) -> int:
        """Bytes that may still be taken, what others hold included: they would lose theirs."""
        return self.limit if self.limit is not None else int(free_bytes(self.device) * _SHARE)

    def _uncount(self, number: int) -> None:
        with self._lock:
            self._beside.pop(number, None)

    def _drop_until(self, size: int, owner: int | None = None) -> None:
        for other in [one for one in list(self._held) if one not in self._pinned and one != owner]:
            if self._fits(size):
                return
            self._held.pop(other, (_nothing, 0))[0]()

    def _fits(self, size: int) -> bool:
        return size <= free_bytes(self.device) * _SHARE if self.limit is None else self.used + size <= self.limit


@dataclass(frozen=True)
class StoredChunk:
    """Where one chunk's arrays lie on disk."""

    segments: Segments
    key: str
    facts: SegmentFacts


class Staged:
    """A source whose arrays lie in segments on disk; layers are read when they are asked for.

    Args:
        shape: of the chunk KV.
        chunks: in the order of their places.
        lengths: tokens of each chunk row.
        budget: for the layers that stay in memory.
    """

    def __init__(self, shape: KVShape, chunks: Sequence[StoredChunk], lengths: Sequence[int], budget: Budget) -> None:
        self.shape, self.chunks, self.lengths, self.budget = shape, tuple(chunks), tuple(lengths), budget
        self.block = best_block(lengths)
        takes = [blocked(length, self.block) for length in lengths]
        self.starts = list(accumulate(takes, initial=0))[: len(lengths)]
        self.tokens = sum(takes)
        self.layer_bytes = shape.nbytes(self.tokens, len(chunks)) // shape.layers
        self._resident: dict[int, Mapping[str, Tensor]] = {}
        self._coming: dict[int, Future[Mapping[str, Tensor]]] = {}
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.budget.release(id(self))

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """Return a layer's arrays, read ahead where it is not in memory; raises ``StoreError`` where it is damaged."""
        with self._lock:
            held = self._resident.get(index)
            if held is None:
                coming = self._coming.pop(index, None) or _reader().submit(self._read, index)
            following = (index + 1) % self.shape.layers
            if following not in self._resident and following not in self._coming and following != index:
                self._coming = {following: _reader().submit(self._read, following)}
        if held is not None:
            return held
        arrays = coming.result()
        others = min(STAGED_LAYERS, self.shape.layers - len(self._resident) - 1)
        give_back = _dropping(weakref.ref(self))
        if self.budget.take(id(self), self.layer_bytes, give_back, others * self.layer_bytes):
            with self._lock:
                self._resident[index] = arrays
        return arrays

    def chunk(self, slot: int) -> dict[str, list[Tensor]]:
        """Return one chunk's arrays, one a layer, reading nothing else."""
        stored = self.chunks[slot].segments.read(self.chunks[slot].key, self.chunks[slot].facts)
        return {name: list(tensor.to(self.shape.device).unbind(0)) for name, tensor in stored.items()}

    @property
    def resident(self) -> int:
        """Layers that are in memory."""
        return len(self._resident)

    @property
    def room(self) -> int | None:
        """The budget's bytes; see :class:`~focus_core.method.sources.Source`."""
        return self.budget.limit

    def count(self, holder: object, size: int) -> None:
        """Count bytes against the budget; see :class:`~focus_core.method.sources.Source`."""
        self.budget.count(holder, size)

    def pin(self) -> None:
        """Keep what is in memory there when other memories need room."""
        self.budget.pin(id(self))

    def stay(self, room: int) -> int:
        """Return how many layers stay in memory where there are ``room`` bytes; the others pass through the rest."""
        if self.layer_bytes * self.shape.layers <= room:
            return self.shape.layers
        return max(0, room // max(1, self.layer_bytes) - STAGED_LAYERS)

    def drop(self) -> None:
        """Let go of what is in memory."""
        with self._lock:
            self._resident = {}

    def _read(self, index: int) -> Mapping[str, Tensor]:
        arrays = {
            name: torch.zeros(  # so that what is hidden never holds NaN
                ((len(self.chunks),) if array.per == "chunk" else (self.shape.kv_heads, self.tokens)) + array.shape,
                dtype=array.dtype,
            )
            for name, array in self.shape.arrays.items()
        }
        self.chunks[0].segments.prepare([(chunk.key, chunk.facts) for chunk in self.chunks])
        for slot, (chunk, start, length) in enumerate(zip(self.chunks, self.starts, self.lengths, strict=True)):
            stored = chunk.segments.read_layer(chunk.key, chunk.facts, index)
            for name, array in self.shape.arrays.items():
                if array.per == "chunk":
                    arrays[name][slot] = stored[name]
                else:
                    arrays[name][:, start : start + max(0, length - FIRST)] = stored[name]
        return {name: tensor.to(self.shape.device) for name, tensor in arrays.items()}


def _nothing() -> None:
    """Give nothing back."""


def _dropping(source: weakref.ref[Staged]) -> Callable[[], None]:
    def drop() -> None:
        held = source()
        if held is not None:
            held.drop()

    return drop


def _reader() -> ThreadPoolExecutor:
    """Return the thread that reads ahead; a forked process has one of its own."""
    own = _readers.get(os.getpid())
    return own or _readers.setdefault(os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="focusllm-read"))


def staged_kv(shape: KVShape, chunks: Sequence[StoredChunk], lengths: Sequence[int], budget: Budget) -> ChunkKV | None:
    """Return chunk KV that is read from disk when it is asked for, or ``None`` where it was written in another form."""
    if any(set(chunk.facts.tensors) != set(shape.arrays) for chunk in chunks):
        return None
    source = Staged(shape, chunks, lengths, budget)
    return ChunkKV(shape, source, source.starts, range(len(lengths)), lengths)
