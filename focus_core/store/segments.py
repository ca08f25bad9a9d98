"""Keep chunk KV on disk, addressed by what it was computed from.

The key of a chunk is the hash of everything its KV depends on, so equal text is stored once and other weights can never
be mistaken for the right ones. Tensors are safetensors files (no pickle), bookkeeping is SQLite; a file appears by
rename after fsync, and a row only after its file, so a crash leaves whole chunks only. The store knows no documents.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from focus_core.errors import StoreError
from focus_core.files import write_atomically

FORMAT = 1


def chunk_key(facts: dict[str, Any], ids: Iterable[int]) -> str:
    """Return the address of a chunk: sha256 of ``facts`` (weights, dtype, sink, RoPE) and its row's token ids."""
    head = json.dumps({"format": FORMAT, **facts}, sort_keys=True).encode()
    return hashlib.sha256(head + b"\0" + b",".join(str(token).encode() for token in ids)).hexdigest()


class ChunkStore(Protocol):
    """What a memory asks of a place that keeps chunk KV: :class:`Store` on disk, or a cache in memory."""

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str) -> Tensor:
        """Return one chunk's (layers, 2, kv_heads, length, head_dim)."""

    def put(self, key: str, chunk: Tensor) -> bool:
        """Keep one chunk's KV; return whether it was new."""


class Store:
    """Chunk KV under one folder; safe for several readers and writers.

    Args:
        folder: created if absent.

    Raises:
        StoreError: the folder is of another format, or its index is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._index() as index:
            index.execute("CREATE TABLE IF NOT EXISTS meta (format INTEGER NOT NULL)")
            index.execute(
                "CREATE TABLE IF NOT EXISTS chunks (key TEXT PRIMARY KEY, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL)"
            )
            row = index.execute("SELECT format FROM meta").fetchone()
            if row is None:
                index.execute("INSERT INTO meta VALUES (?)", (FORMAT,))
            elif row[0] != FORMAT:
                raise StoreError(
                    f"{self.folder} has store format {row[0]}, this version reads {FORMAT}; build it again"
                )

    def __contains__(self, key: str) -> bool:
        with self._index() as index:
            return index.execute("SELECT 1 FROM chunks WHERE key = ?", (key,)).fetchone() is not None

    def __len__(self) -> int:
        with self._index() as index:
            return int(index.execute("SELECT COUNT(*) FROM chunks").fetchone()[0])

    def keys(self) -> list[str]:
        """Return all keys, sorted."""
        with self._index() as index:
            return [row[0] for row in index.execute("SELECT key FROM chunks ORDER BY key")]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        with self._index() as index:
            return int(index.execute("SELECT COALESCE(SUM(bytes), 0) FROM chunks").fetchone()[0])

    def put(self, key: str, chunk: Tensor) -> bool:
        """Write one chunk's KV; return whether it was new. Writing a key again does nothing."""
        if key in self:
            return False
        data = save({"kv": chunk.detach().cpu().contiguous()}, metadata={"key": key})
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        with self._index() as index:
            digest = hashlib.sha256(data).hexdigest()
            index.execute("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", (key, chunk.nbytes, digest))
        return True

    def get(self, key: str) -> Tensor:
        """Return one chunk's KV (layers, 2, kv_heads, length, head_dim), bit-identical to what was put.

        Raises:
            StoreError: the chunk is absent, or its bytes are not those that were written.
        """
        with self._index() as index:
            row = index.execute("SELECT sha256 FROM chunks WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise StoreError(f"no chunk {key[:12]} in {self.folder}; index the documents again")
        try:
            data = self._path(key).read_bytes()
        except OSError as error:
            raise StoreError(f"chunk {key[:12]} of {self.folder} cannot be read ({error}); index again") from error
        if hashlib.sha256(data).hexdigest() != row[0]:
            raise StoreError(
                f"chunk {key[:12]} of {self.folder} is damaged (checksum differs); run verify() and index again"
            )
        try:
            return load(data)["kv"]
        except (SafetensorError, KeyError) as error:
            raise StoreError(f"chunk {key[:12]} of {self.folder} is not a chunk file; index again") from error

    def verify(self) -> list[str]:
        """Return the keys of damaged or missing chunks."""
        bad = []
        for key in self.keys():
            try:
                self.get(key)
            except StoreError:
                bad.append(key)
        return bad

    def prune(self, keep: Iterable[str]) -> int:
        """Delete all chunks but ``keep``; return how many went."""
        gone = sorted(set(self.keys()) - set(keep))
        with self._index() as index:
            index.executemany("DELETE FROM chunks WHERE key = ?", [(key,) for key in gone])
        for key in gone:
            self._path(key).unlink(missing_ok=True)
        return len(gone)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    @contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.folder / "index.sqlite", timeout=30.0)
        try:
            with connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"the index of {self.folder} cannot be used ({error}); index the documents again"
            ) from error
        finally:
            connection.close()
