"""Keep the chunk KV of one chunk in one file, addressed by what it was computed from.

A segment is a safetensors file of named tensors whose first axis is the layer, so that one layer is one run of bytes.
Its name is its key, 64 hex digits, and nothing else makes a path: no entry of a catalogue can lead out of the folder.
A segment appears by rename after fsync, and its folder is synced before anybody is told of it. Nothing here knows
documents or SQL.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, uint8

from focus_core.errors import StoreError
from focus_core.files import sync_folder, write_durably
from focus_core.hardware import dtype_name

ENGINE_FORMAT = 1
"""Part of every key: raised when the same ids through the same weights would give other KV."""

Tensors = Mapping[str, Tensor]
"""Chunk KV of one chunk: named tensors, (layers, ...) each."""

_KEY = re.compile(r"[0-9a-f]{64}")
MEND = "mend it with `focusllm verify --repair`"
"""What a message says where chunk KV, or an index of the catalogue, can be made anew."""

_STALE = 24 * 3600.0
_numbers = itertools.count()


def chunk_key(facts: Mapping[str, Any], ids: Iterable[int]) -> str:
    """Return the address of a chunk: sha256 of ``facts`` (weights, KV format, sink, RoPE) and its row's token ids."""
    head = json.dumps({"format": ENGINE_FORMAT, **facts}, sort_keys=True).encode()
    return hashlib.sha256(head + b"\0" + b",".join(str(token).encode() for token in ids)).hexdigest()


def is_key(key: str) -> bool:
    """Whether a text can name a segment."""
    return _KEY.fullmatch(key) is not None


@dataclass(frozen=True)
class SegmentFacts:
    """What a catalogue keeps of a segment.

    Args:
        size: bytes of the file.
        nbytes: bytes of the tensors.
        tensors: of each, its dtype, shape and a checksum a layer.
    """

    size: int
    nbytes: int
    tensors: dict[str, dict[str, Any]]

    def to_json(self) -> str:
        """Return the tensors' facts as a catalogue keeps them."""
        return json.dumps(self.tensors, sort_keys=True)


@dataclass(frozen=True)
class StagedSegment:
    """A segment that is written and synced, but not in its place."""

    key: str
    partial: Path
    facts: SegmentFacts


class Segments:
    """The files of chunk KV under one folder.

    Args:
        folder: of the segments alone; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Return where a segment lies; raises ``StoreError`` for what is no key."""
        if not is_key(key):
            raise StoreError(f"{key[:80]!r} is no key of chunk KV (64 hex digits); {self.folder} is not to be trusted")
        return self.folder / key[:2] / f"{key}.safetensors"

    def stage(self, key: str, tensors: Tensors) -> StagedSegment:
        """Write a segment beside its place and wait until the disk has it."""
        self.path(key)
        data, facts = pack_segment(key, tensors)
        self._make(self.folder)
        partial = self.folder / f".{key}.{os.getpid()}-{threading.get_ident()}-{next(_numbers)}.partial"
        try:
            write_durably(partial, data)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return StagedSegment(key, partial, facts)

    def publish(self, staged: Iterable[StagedSegment]) -> None:
        """Move staged segments to their places and wait until the disk knows; the caller holds the write lock."""
        folders = set()
        for item in staged:
            path = self.path(item.key)
            self._make(path.parent)
            os.replace(item.partial, path)  # noqa: PTH105 (tests record the calls of os)
            folders.add(path.parent)
        for folder in sorted(folders):
            sync_folder(folder)

    def prepare(self, wanted: Sequence[tuple[str, SegmentFacts]]) -> None:
        """Take note that these will be read one after the other; what lies in this folder needs nothing."""

    def whole(self, key: str, size: int) -> bool:
        """Whether a file of this size is there; its bytes are not read."""
        try:
            found = self.path(key).lstat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == size

    def read(self, key: str, facts: SegmentFacts) -> dict[str, Tensor]:
        """Return a segment's tensors, bit-identical to what was put.

        Raises:
            StoreError: it is absent, or not what was written.
        """
        try:
            data = self._bytes(self.path(key))
        except OSError as error:
            raise StoreError(f"chunk {key[:12]} of {self.folder} cannot be read ({error}); {MEND}") from error
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise StoreError(f"chunk {key[:12]} of {self.folder} is damaged ({error}); {MEND}") from error
        same = {name: describe(tensor) for name, tensor in tensors.items()} == facts.tensors
        if not same or len(data) != facts.size:
            raise StoreError(f"chunk {key[:12]} of {self.folder} is damaged (checksum differs); {MEND}")
        return tensors

    def read_layer(self, key: str, facts: SegmentFacts, layer: int) -> dict[str, Tensor]:
        """Return one layer of a segment's tensors, (...) each, without reading the others.

        Raises:
            StoreError: it is absent, or not what was written.
        """
        try:
            if not self.whole(key, facts.size):
                raise OSError(errno.EINVAL, "it is lost or cut")
            self._inside(self.path(key).parent)
            with safe_open(self.path(key), framework="pt") as file:
                found = {name: file.get_slice(name)[layer].contiguous() for name in facts.tensors}
            sums = {name: describe(tensor.unsqueeze(0))["sums"][0] for name, tensor in found.items()}
            same = all(sums[name] == facts.tensors[name]["sums"][layer] for name in sums)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, IndexError) as error:
            raise StoreError(f"chunk {key[:12]} of {self.folder} cannot be read ({error}); {MEND}") from error
        if not same:
            raise StoreError(f"chunk {key[:12]} of {self.folder} is damaged (checksum differs); {MEND}")
        return found

    def delete(self, key: str) -> None:
        """Remove a segment; the caller holds the write lock."""
        path = self.path(key)
        self._inside(path.parent)
        path.unlink(missing_ok=True)

    def found(self) -> Iterator[str]:
        """Yield the keys of all files that are there, catalogued or not."""
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if len(folder.name) == 2 and folder.is_dir() and not folder.is_symlink():
                for file in sorted(folder.glob("*.safetensors")):
                    if is_key(file.stem) and file.stem[:2] == folder.name:
                        yield file.stem

    def sweep(self) -> None:
        """Remove what stopped writers left of segments that never came to be."""
        for file in self.folder.glob(".*.partial") if self.folder.is_dir() else []:
            try:
                if time.time() - file.lstat().st_mtime > _STALE:
                    file.unlink()
            except FileNotFoundError:
                continue  # its writer is at work

    def _make(self, folder: Path) -> None:
        self._inside(folder)
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)

    def _inside(self, folder: Path) -> None:
        for part in (self.folder, folder):
            if part.is_symlink():
                raise StoreError(f"{part} is a link that leads out of the store; nothing is written or removed there")

    def _bytes(self, path: Path) -> bytes:
        self._inside(path.parent)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no file")
            return file.read()


def pack_segment(key: str, tensors: Tensors) -> tuple[bytes, SegmentFacts]:
    """Return the bytes of a segment's file, and what a catalogue keeps of it."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(plain, metadata={"key": key})
    nbytes = sum(tensor.nbytes for tensor in plain.values())
    return data, SegmentFacts(len(data), nbytes, {name: describe(plain[name]) for name in plain})


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return dtype, shape and a checksum a layer (xxh3, 128 bits) of a contiguous tensor whose first axis is layers."""
    layers = tensor.unsqueeze(0) if tensor.dim() == 0 else tensor
    sums = [xxhash.xxh3_128_hexdigest(layer.reshape(-1).view(uint8).numpy().data) for layer in layers]
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "sums": sums}
