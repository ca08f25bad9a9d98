"""Read chunk KV from disk layer by layer, and hold as many layers in memory as a budget allows.

A step reads layers one after the other, so what does not fit is read again at each step, one layer ahead of the
computation. The first layers of a memory stay: of what is read in a circle, dropping the oldest would drop what is
needed next. When a memory needs room, it takes it from the memory that was used longest ago. What is read is compared
with its checksums; where it lies changes no answer.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from focus_core.hardware import free_bytes
from focus_core.method.kv import ChunkKV, best_block, blocked
from focus_core.method.sources import FIRST, KVShape
from focus_core.store.segments import SegmentFacts, Segments

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
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are given away."""
        with self._lock:
            return sum(size for _, size in self._held.values())

    def take(self, owner: int, size: int, give_back: Callable[[], None]) -> bool:
        """Ask for room; other owners lose theirs, the one that asked longest ago first.

        Args:
            owner: who asks.
            size: bytes.
            give_back: drops what the owner holds.
        """
        with self._lock:
            held = self._held.pop(owner, (give_back, 0))[1]
            self._held[owner] = (give_back, held)
            while not self._fits(size) and next(iter(self._held)) != owner:
                _, (drop, _) = self._held.popitem(last=False)
                drop()
            if not self._fits(size):
                return False
            self._held[owner] = (give_back, held + size)
            return True

    def release(self, owner: int) -> None:
        """Forget an owner."""
        with self._lock:
            self._held.pop(owner, None)

    def room(self) -> int:
        """Bytes that may still be taken, what others hold included: they would lose theirs."""
        return self.limit if self.limit is not None else int(free_bytes(self.device) * _SHARE)

    def _fits(self, size: int) -> bool:
        if self.limit is None:
            return size <= free_bytes(self.device) * _SHARE
        return sum(held for _, held in self._held.values()) + size <= self.limit


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
        if self.budget.take(id(self), self.layer_bytes, _dropping(weakref.ref(self))):
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
        for slot, (chunk, start, length) in enumerate(zip(self.chunks, self.starts, self.lengths, strict=True)):
            stored = chunk.segments.read_layer(chunk.key, chunk.facts, index)
            for name, array in self.shape.arrays.items():
                if array.per == "chunk":
                    arrays[name][slot] = stored[name]
                else:
                    arrays[name][:, start : start + max(0, length - FIRST)] = stored[name]
        return {name: tensor.to(self.shape.device) for name, tensor in arrays.items()}


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
