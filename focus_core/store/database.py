"""Join catalogue and segments into a store: a folder with collections of documents and their chunk KV.

Segments are written and synced before the write lock is taken, moved to their places under it, and a row is committed
only after its file, so a crash leaves whole chunks only. What a prune removes it removes under the same lock, and only
what nothing has referred to or used for a while: a chunk that another writer has just put is safe. Opening a store
reads rows, never chunk KV.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from focus_core.errors import ConfigError, FocusError, StoreError
from focus_core.files import CATALOGUE
from focus_core.store.catalogue import BUSY_SECONDS, Catalogue, translated
from focus_core.store.collections import (
    Change,
    CollectionInfo,
    Contents,
    commit_change,
    count_collection,
    document_sums,
    drop_collection,
    find_collection,
    has_collection,
    list_collections,
    list_names,
    read_collection,
    text_sums,
    touch,
)
from focus_core.store.filters import select_documents
from focus_core.store.migration import migrate
from focus_core.store.segments import MEND, SegmentFacts, Segments, StagedSegment, Tensors
from focus_core.store.tiers import StoredChunk
from focus_core.text.corpus import Document

PRUNE_AGE = 24 * 3600.0
"""Seconds that chunk KV without a document is kept: a stopped run finds it again, a running one cannot lose it."""

_NAME = re.compile(r"\w[\w.-]{0,99}")
_ODD = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)  # of rows that are damaged


class ChunkStore(Protocol):
    """What a memory asks of a place that keeps chunk KV: :class:`Store` on disk, or a cache in memory."""

    def holds(self, keys: Iterable[str]) -> set[str]:
        """Return which keys have chunk KV here."""

    def get(self, key: str) -> dict[str, Tensor]:
        """Return one chunk's tensors, (layers, ...) each."""

    def put_all(self, items: Mapping[str, Tensors]) -> None:
        """Keep the tensors of some chunks, by key, instead of what is kept under the same keys."""


class Store:
    """Collections and chunk KV under one folder; safe for several readers and writers, processes and threads.

    Args:
        folder: created if absent, unless ``read_only``; a folder of an earlier version is brought to this one.
        tenant: sees its own collections and chunk KV alone; its keys are salted, so equal text of two tenants is
            computed and stored twice, and neither can tell what the other has.
        read_only: every change is refused.
        timeout: seconds that a change waits for another writer.

    Raises:
        StoreError: there is no store, it is of another format, or its catalogue is damaged.
    """

    def __init__(
        self, folder: str | Path, *, tenant: str = "", read_only: bool = False, timeout: float = BUSY_SECONDS
    ) -> None:
        self.folder, self.tenant, self.read_only = Path(folder), tenant, read_only
        self.catalogue = Catalogue(self.folder / CATALOGUE, timeout)
        self.segments = Segments(self.folder / "kv")
        self._salt: bytes | None = None
        with translated(self.folder, timeout):
            self._open()

    def _open(self) -> None:
        migrate(self.folder, self.catalogue, self.segments)
        if not self.catalogue.ready():
            if self.read_only and not any(self.segments.found()):
                raise StoreError(f"no saved memory in {self.folder}; make one with `focusllm index`")
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.catalogue.alone():
                self._make()
        with self.catalogue.reading():
            pass

    def _make(self) -> None:
        if self.catalogue.ready():
            return
        if any(self.segments.found()):
            raise StoreError(
                f"{self.catalogue.path} is missing or empty, but {self.segments.folder} holds chunk KV; restore it "
                "from a copy, or delete the folder and index the documents again"
            )
        self._refuse_if_read_only()
        self.catalogue.create()

    # -- chunk KV -----------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return bool(self.holds([key]))

    def __len__(self) -> int:
        with self.catalogue.reading() as index:
            return int(index.execute("SELECT COUNT(*) FROM segments").fetchone()[0])

    def keys(self) -> list[str]:
        """Return the addresses of all chunks, sorted."""
        with self.catalogue.reading() as index:
            return [row[0] for row in index.execute("SELECT key FROM segments ORDER BY key")]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        with self.catalogue.reading() as index:
            return int(index.execute("SELECT COALESCE(SUM(nbytes), 0) FROM segments").fetchone()[0])

    def holds(self, keys: Iterable[str]) -> set[str]:
        """Return which keys have chunk KV here; files are looked for, not read."""
        with self.catalogue.reading() as index:
            return {key for key in keys if self._whole(index, self.address(key))}

    def address(self, key: str) -> str:
        """Return the key under which this tenant's chunk lies."""
        return hashlib.sha256(self._salted() + key.encode()).hexdigest() if self.tenant else key

    def get(self, key: str) -> dict[str, Tensor]:
        """Return one chunk's tensors, bit-identical to what was put.

        Raises:
            StoreError: the chunk is absent, or its bytes are not those that were written.
        """
        return self.read_segment(self.address(key))

    def read_segment(self, address: str) -> dict[str, Tensor]:
        """Return the tensors that lie under an address, as :meth:`get` does."""
        with self.catalogue.reading() as index:
            facts = _facts(index, address)
        if facts is None:
            raise _lost(address, self.folder)
        return self.segments.read(address, facts)

    def stored(self, keys: Iterable[str]) -> list[StoredChunk]:
        """Return where the chunks of these keys lie, without reading them.

        Raises:
            StoreError: one is not here.
        """
        found = []
        with self.catalogue.reading() as index:
            for address in map(self.address, keys):
                facts = _facts(index, address)
                if facts is None:
                    raise _lost(address, self.folder)
                found.append(StoredChunk(self.segments, address, facts))
        return found

    def put(self, key: str, tensors: Tensors) -> bool:
        """Write one chunk's KV unless it is there; return whether it was not."""
        if key in self:
            return False
        self.put_all({key: tensors})
        return True

    def put_all(self, items: Mapping[str, Tensors]) -> None:
        """Write the KV of some chunks, in place of what is there: what was damaged is whole again.

        Raises:
            StoreError: the disk is full, the store cannot be written, or another writer held it for too long.
        """
        with self.changing() as change:
            change.stage({self.address(key): tensors for key, tensors in items.items()})

    def verify(self) -> list[str]:
        """Return the addresses of damaged or missing chunks, after reading every byte.

        Raises:
            StoreError: the catalogue itself is damaged.
        """
        self.catalogue.check()
        with self.catalogue.reading() as index:
            facts = {key: _facts(index, key) for (key,) in index.execute("SELECT key FROM segments ORDER BY key")}
        bad = []
        for key, known in facts.items():
            try:
                self.segments.read(key, known or SegmentFacts(0, 0, {}))
            except StoreError:
                bad.append(key)
        return bad

    def mend(self) -> None:
        """Make damaged indexes of the catalogue anew, and forget damaged chunk KV that no collection refers to.

        What a collection refers to is computed again by :func:`~focus_core.store.indexing.repair_collection`.

        Raises:
            StoreError: the tables of the catalogue are damaged.
        """
        self._refuse_if_read_only()
        self.catalogue.mend()
        bad = self.verify()
        with self.catalogue.writing() as index:
            index.executemany(
                "DELETE FROM segments WHERE key = ? AND key NOT IN (SELECT key FROM chunks)", [(key,) for key in bad]
            )

    def prune(self, older_than: float = PRUNE_AGE) -> int:
        """Delete chunk KV that no collection refers to and nothing has used for ``older_than`` seconds.

        Returns:
            How many chunks went.
        """
        self._refuse_if_read_only()
        with translated(self.folder, self.catalogue.timeout):
            with self.catalogue.writing() as index:
                rows = index.execute(
                    "SELECT key FROM segments WHERE touched <= ? AND key NOT IN (SELECT key FROM chunks)",
                    (time.time() - older_than,),
                ).fetchall()
                index.executemany("DELETE FROM segments WHERE key = ?", rows)
            gone = {row[0] for row in rows}
            with self.catalogue.writing() as index:  # no file goes before its row is gone for good
                for key in self.segments.found():
                    if not index.execute("SELECT 1 FROM segments WHERE key = ?", (key,)).fetchone():
                        self.segments.delete(key)
            self.segments.sweep()
        return len(gone)

    # -- collections --------------------------------------------------------------------------------------------

    def collections(self) -> list[CollectionInfo]:
        """Return the collections by name."""
        with self._rows() as index:
            return list_collections(index, self.tenant)

    def collection(self, name: str) -> CollectionInfo:
        """Return a collection's facts, counts left out; raises ``StoreError`` where there is none."""
        with self._rows() as index:
            return find_collection(index, self.tenant, name)[1]

    def counted(self, name: str) -> CollectionInfo:
        """Return a collection's facts and counts; raises ``StoreError`` where there is none."""
        with self._rows() as index:
            return count_collection(index, self.tenant, name)

    def names(self) -> list[str]:
        """Return the names of the collections, in order."""
        with self._rows() as index:
            return list_names(index, self.tenant)

    def has(self, name: str) -> bool:
        """Whether there is a collection of this name."""
        with self._rows() as index:
            return has_collection(index, self.tenant, name)

    def read(self, name: str, ids: Collection[str] | None = None) -> Contents:
        """Return a collection's documents and chunks, every row checked; chunk KV is not read.

        Raises:
            StoreError: there is none, or it is damaged.
            ConfigError: one of ``ids`` is not there.
        """
        with self._rows() as index:
            return read_collection(index, self.tenant, name, ids)

    def listing(self, name: str) -> dict[str, Document]:
        """Return a collection's documents without their texts."""
        with self._rows() as index:
            return document_sums(index, self.tenant, name)

    def select(self, name: str, where: Mapping[str, Any]) -> list[str]:
        """Return the ids of the documents whose metadata fit, in order; see :func:`~.filters.select_documents`."""
        with self._rows() as index:
            number, _ = find_collection(index, self.tenant, name)
            return [key.decode("utf-8", "surrogatepass") for key in select_documents(index, number, where)]

    def text_sums(self, name: str) -> dict[str, bytes]:
        """Return the checksum of each document's text in a collection."""
        with self._rows() as index:
            return text_sums(index, self.tenant, name)

    def commit(self, name: str, facts: Mapping[str, Any], config: Mapping[str, Any], change: Change) -> CollectionInfo:
        """Merge a change into a collection in one transaction; see :func:`~.collections.commit_change`."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"a collection's name is letters, digits, '.', '-' and '_', at most 100; got {name!r}")
        self._refuse_if_read_only()
        with self._odd(), self.catalogue.writing() as index:
            return commit_change(index, self.tenant, name, facts, config, change)

    def remove(self, name: str, ids: Collection[str]) -> CollectionInfo:
        """Take documents out of a collection, all or none.

        Raises:
            ConfigError: one is not there.
            StoreError: one shares a chunk with a document that stays; :meth:`Memory.remove` computes what is left.
        """
        known = self.listing(name)
        unknown = [one for one in ids if one not in known]
        if unknown:
            raise ConfigError(f"no document {unknown[0]!r} in collection {name!r}; `focusllm show {name}` lists them")
        info = self.collection(name)
        return self.commit(name, info.facts, info.config, Change({}, (), (), set(ids)))

    def drop(self, name: str) -> None:
        """Remove a collection; its chunk KV goes at a later :meth:`prune`."""
        self._refuse_if_read_only()
        with self.catalogue.writing() as index:
            drop_collection(index, self.tenant, name)

    # -- inside -------------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[_Staging]:
        """Collect segments, and put all of them in their places with their rows at the end."""
        self._refuse_if_read_only()
        staging = _Staging(self.segments)
        try:
            with translated(self.folder, self.catalogue.timeout):
                yield staging
                if staging.items:
                    with self.catalogue.writing() as index:
                        self.segments.publish(staging.items)
                        index.executemany(
                            "INSERT INTO segments VALUES (?,?,?,?,?) ON CONFLICT (key) DO UPDATE SET"
                            " size = excluded.size, nbytes = excluded.nbytes, tensors = excluded.tensors,"
                            " touched = excluded.touched",
                            [_row(item) for item in staging.items],
                        )
        finally:
            for item in staging.items:
                item.partial.unlink(missing_ok=True)

    def keep(self, keys: Iterable[str]) -> None:
        """Note that chunks are about to be used, so that no prune takes them."""
        with self.catalogue.writing() as index:
            touch(index, [self.address(key) for key in keys])

    @contextmanager
    def _rows(self) -> Iterator[sqlite3.Connection]:
        with self._odd(), self.catalogue.reading() as index:
            yield index

    @contextmanager
    def _odd(self) -> Iterator[None]:
        """Say of rows that cannot be what was written that the catalogue is damaged."""
        try:
            yield
        except FocusError:
            raise
        except _ODD as error:
            raise StoreError(
                f"the catalogue of {self.folder} is damaged ({error}); restore it from a copy, or delete the folder "
                "and index the documents again"
            ) from error

    def _whole(self, index: sqlite3.Connection, key: str) -> bool:
        row = index.execute("SELECT size FROM segments WHERE key = ?", (key,)).fetchone()
        return row is not None and self.segments.whole(key, row[0])

    def _salted(self) -> bytes:
        if self._salt is None:
            with self.catalogue.reading() as index:
                row = index.execute("SELECT salt FROM tenants WHERE name = ?", (self.tenant,)).fetchone()
            if row is None and self.read_only:
                return os.urandom(32)  # nothing lies under it
            if row is None:
                with self.catalogue.writing() as index:
                    index.execute("INSERT OR IGNORE INTO tenants VALUES (?, ?)", (self.tenant, os.urandom(32)))
                    row = index.execute("SELECT salt FROM tenants WHERE name = ?", (self.tenant,)).fetchone()
            self._salt = bytes(row[0])
        return self._salt

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise StoreError(f"{self.folder} was opened to be read only; open it with read_only=False to change it")


class _Staging:
    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self.items: list[StagedSegment] = []

    def stage(self, items: Mapping[str, Tensors]) -> None:
        for key, tensors in items.items():
            self.items.append(self.segments.stage(key, tensors))


def _row(item: StagedSegment) -> tuple[str, int, int, str, float]:
    return item.key, item.facts.size, item.facts.nbytes, item.facts.to_json(), time.time()


def _lost(address: str, folder: Path) -> StoreError:
    return StoreError(f"no chunk {address[:12]} in {folder}; {MEND}")


def _facts(index: sqlite3.Connection, key: str) -> SegmentFacts | None:
    query = "SELECT size, nbytes, CAST(tensors AS BLOB) FROM segments WHERE key = ?"
    row = index.execute(query, (key,)).fetchone()
    if row is None:
        return None
    try:
        return SegmentFacts(row[0], row[1], dict(json.loads(row[2])))
    except (ValueError, TypeError, RecursionError):
        return SegmentFacts(0, 0, {})  # equal to no segment, so reading says that it is damaged
