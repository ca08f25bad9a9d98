"""Hold the named memories of every tenant: opened when they are asked for, read anew when another process changed them.

Collections of one store (:mod:`focus_core.store`) are the memories; what only a server knows of them (pinned, time to
live, last use) stands beside them in a small database of its own. Blocking: called from threads.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_core.engine import FocusEngine
from focus_core.errors import StoreError
from focus_core.method.state import MemoryState
from focus_core.server.errors import ApiError
from focus_core.session.concurrency import Turns
from focus_core.session.documents import kept_ids
from focus_core.store.collections import CollectionInfo
from focus_core.store.database import Store
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document

Check = Callable[[], None]
Progress = Callable[[int, int], None]

_OPEN = 16  # memories that are kept open beside the pinned ones
_JOINED = 8  # unions and filtered parts that are kept


@dataclass(frozen=True)
class Keeping:
    """What a server knows of a memory besides its contents.

    Args:
        pinned: is kept open.
        ttl: seconds after its last use when it is dropped; ``None`` for never.
        created: seconds since the epoch.
        used: seconds since the epoch of the last question or change.
    """

    pinned: bool
    ttl: int | None
    created: float
    used: float


class Memories:
    """Named memories under one folder.

    Args:
        engine: reads them.
        folder: of the store; made if absent.
    """

    def __init__(self, engine: FocusEngine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._stores: dict[str, Store] = {}
        self._open: OrderedDict[tuple[str, str], Memory] = OrderedDict()
        self._joined: OrderedDict[tuple[Any, ...], tuple[list[MemoryState], Memory]] = OrderedDict()
        self._changing = Turns()
        self._lock = threading.RLock()
        self._store("")
        with self._table() as table:
            table.execute(
                "CREATE TABLE IF NOT EXISTS keeping (tenant TEXT, name TEXT, pinned INTEGER, ttl INTEGER,"
                " created REAL, used REAL, PRIMARY KEY (tenant, name))"
            )

    # -- what is there ----------------------------------------------------------------------------------------------

    def list(self, tenant: str) -> list[tuple[CollectionInfo, Keeping]]:
        """Return the tenant's memories by name; those whose time is over are dropped first."""
        self._drop_old(tenant)
        kept = self._kept(tenant)
        found = self._store(tenant).collections()
        return [(info, kept.get(info.name, Keeping(False, None, info.changed, info.changed))) for info in found]

    def require(self, tenant: str, name: str) -> tuple[CollectionInfo, Keeping]:
        """Return one memory; raises :class:`ApiError` (404) where the tenant has none of that name."""
        self.check(tenant, name)
        with self._still_there(tenant, name):
            info = self._store(tenant).counted(name)
        return info, self._kept(tenant).get(name, Keeping(False, None, info.changed, info.changed))

    def check(self, tenant: str, name: str) -> None:
        """Raise :class:`ApiError` (404) where the tenant has no memory of that name, or its time is over."""
        self._drop_old(tenant)
        if not self._store(tenant).has(name):
            raise ApiError(
                404,
                f"there is no memory {name!r}; GET /v1/memories lists them",
                param="memories",
                code="memory_not_found",
            )

    def chunks(self, tenant: str, names: Sequence[str]) -> int:
        """Return the chunks of some memories."""
        with self._still_there(tenant, *names):
            return sum(self._store(tenant).counted(name).chunks for name in set(names))

    def documents(self, tenant: str, name: str) -> dict[str, Document]:
        """Return a memory's documents, texts left out."""
        self.check(tenant, name)
        return self._store(tenant).listing(name)

    def document(self, tenant: str, name: str, key: str) -> Document:
        """Return one document; raises :class:`ApiError` (404) where it is not there."""
        self.check(tenant, name)
        if key not in self._store(tenant).listing(name):
            raise ApiError(
                404, f"there is no document {key!r} in memory {name!r}", param="document", code="document_not_found"
            )
        return self._store(tenant).read(name, [key]).documents[key]

    # -- changing -----------------------------------------------------------------------------------------------------

    def create(self, tenant: str, name: str, pinned: bool, ttl: int | None) -> tuple[CollectionInfo, Keeping]:
        """Make an empty memory; raises :class:`ApiError` (409) where there is one of that name."""
        store = self._store(tenant)
        with self._changing.of((tenant, name), lambda: None):
            if store.has(name):
                raise ApiError(409, f"there is a memory {name!r} already", param="name", code="memory_exists")
            self.engine.remember([]).save(store, name=name)
            now = time.time()
            self._keep(tenant, name, Keeping(pinned, ttl, now, now))
        return self.require(tenant, name)

    def keep(self, tenant: str, name: str, changes: Mapping[str, Any]) -> tuple[CollectionInfo, Keeping]:
        """Pin a memory or give it a time to live."""
        _, keeping = self.require(tenant, name)
        pinned, ttl = changes.get("pinned"), changes.get("ttl_seconds", keeping.ttl)
        self._keep(
            tenant,
            name,
            Keeping(keeping.pinned if pinned is None else pinned, ttl, keeping.created, time.time()),
        )
        with self._lock:
            if pinned and (tenant, name) in self._open:
                self._open[tenant, name].pin()
            elif pinned is not None:
                self._open.pop((tenant, name), None)  # opened again, it is one of many
        return self.require(tenant, name)

    def update(
        self,
        tenant: str,
        name: str,
        documents: Sequence[Document],
        remove: Sequence[str],
        progress: Progress,
        check: Check,
    ) -> None:
        """Read documents into a memory and take others out, as one change that is kept on disk at its end.

        Args:
            tenant: whose memory.
            name: of the memory.
            documents: a known id is replaced.
            remove: ids; all must be there.
            progress: called with tokens done and to do.
            check: raises to cancel; the memory is as before then.
        """
        with self._changing.of((tenant, name), check):
            self.check(tenant, name)
            memory = Memory.load(self._store(tenant), self.engine.encoder, name=name)
            missing = [key for key in remove if key not in memory]
            if missing:
                raise ApiError(
                    404, f"there is no document {missing[0]!r} in memory {name!r}", code="document_not_found"
                )
            memory.store = self._store(tenant)
            memory.update(documents, remove, progress=progress, check=check)
            check()
            memory.save(self._store(tenant), name=name)
            with self._lock:
                self._open.pop((tenant, name), None)
            self._used(tenant, [name])

    def drop(self, tenant: str, name: str) -> None:
        """Remove a memory; its chunk KV goes when nothing has used it for a day."""
        with self._changing.of((tenant, name), lambda: None):
            self.check(tenant, name)
            self._forget(tenant, name)
            self._store(tenant).drop(name)
            self._forget(tenant, name)  # a question may have opened it meanwhile
            self._store(tenant).prune()

    # -- reading ------------------------------------------------------------------------------------------------------

    def open(
        self, tenant: str, names: Sequence[str], wanted: Mapping[str, Any] | Sequence[str] | None, check: Check
    ) -> Memory:
        """Return what one question reads: the memories together, or the part of them that is wanted.

        Documents of several memories that share an id are told apart by their memory's name.
        """
        opened = [self._opened(tenant, name) for name in dict.fromkeys(names)]
        self._used(tenant, names)
        states = [memory.state for memory in opened]
        if len(opened) == 1 and wanted is None:
            return opened[0]
        key = (tenant, tuple(names), tuple(map(id, states)), repr(wanted))
        with self._lock:
            if key in self._joined:
                self._joined.move_to_end(key)
                return self._joined[key][1]
        memory = opened[0]
        if len(opened) > 1:
            memory = Memory(self.engine.encoder, self._store(tenant))
            memory.add(_together(names, opened), check=check)
        if wanted is not None:
            memory = memory.subset(kept_ids(memory.documents, wanted))
        with self._lock:
            self._joined[key] = (states, memory)  # held, so that no other state gets their ids
            while len(self._joined) > _JOINED:
                self._joined.popitem(last=False)
        return memory

    def _opened(self, tenant: str, name: str) -> Memory:
        self.check(tenant, name)
        with self._lock:
            memory = self._open.get((tenant, name))
            with self._still_there(tenant, name):
                if memory is not None:
                    memory.refresh()
                    self._open.move_to_end((tenant, name))
                    return memory
                memory = Memory.load(self._store(tenant), self.engine.encoder, name=name)
            kept = self._kept(tenant).get(name)
            if kept is not None and kept.pinned:
                memory.pin()
            self._open[tenant, name] = memory
            self._close_some()
            return memory

    def _close_some(self) -> None:
        pinned = {tenant: self._kept(tenant) for tenant in {tenant for tenant, _ in self._open}}
        loose = [key for key in self._open if key[1] not in pinned[key[0]] or not pinned[key[0]][key[1]].pinned]
        for key in loose[: max(0, len(loose) - _OPEN)]:
            del self._open[key]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _store(self, tenant: str) -> Store:
        with self._lock:
            if tenant not in self._stores:
                self._stores[tenant] = Store(self.folder, tenant=tenant)
            return self._stores[tenant]

    @contextmanager
    def _still_there(self, tenant: str, *names: str) -> Iterator[None]:
        """Say of a memory that was dropped in this moment that it is not there, not that the store failed."""
        try:
            yield
        except StoreError:
            for name in names:
                self.check(tenant, name)
            raise

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.folder / "server.sqlite3", timeout=30)
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    def _kept(self, tenant: str) -> dict[str, Keeping]:
        with self._table() as table:
            rows = table.execute("SELECT name, pinned, ttl, created, used FROM keeping WHERE tenant = ?", (tenant,))
            return {name: Keeping(bool(pinned), *rest) for name, pinned, *rest in rows}

    def _keep(self, tenant: str, name: str, keeping: Keeping) -> None:
        values = (tenant, name, int(keeping.pinned), keeping.ttl, keeping.created, keeping.used)
        with self._table() as table:
            table.execute("INSERT OR REPLACE INTO keeping VALUES (?, ?, ?, ?, ?, ?)", values)

    def _used(self, tenant: str, names: Sequence[str]) -> None:
        with self._table() as table:
            for name in names:
                table.execute("UPDATE keeping SET used = ? WHERE tenant = ? AND name = ?", (time.time(), tenant, name))

    def _forget(self, tenant: str, name: str) -> None:
        with self._lock:
            self._open.pop((tenant, name), None)
        with self._table() as table:
            table.execute("DELETE FROM keeping WHERE tenant = ? AND name = ?", (tenant, name))

    def _drop_old(self, tenant: str) -> None:
        now, store = time.time(), self._store(tenant)
        there = set(store.names())
        for name, kept in self._kept(tenant).items():
            if name not in there:  # another program has dropped it; one that is made later is none of this row's
                self._forget(tenant, name)
            elif not kept.pinned and kept.ttl is not None and kept.used + kept.ttl < now:
                store.drop(name)
                self._forget(tenant, name)


def _together(names: Sequence[str], memories: Sequence[Memory]) -> list[Document]:
    """Return the documents of several memories, those of equal ids named after their memory."""
    counts: dict[str, int] = {}
    for memory in memories:
        for document in memory.documents:
            counts[document.id] = counts.get(document.id, 0) + 1
    found = []
    for name, memory in zip(dict.fromkeys(names), memories, strict=True):
        for document in memory.documents:
            key = document.id if counts[document.id] == 1 else f"{name}/{document.id}"
            found.append(Document(key, document.text, {**document.metadata, "memory": name}))
    return found
