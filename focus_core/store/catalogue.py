"""Keep collections, documents and chunks in one SQLite database, changed in transactions.

Rows only: where chunk KV lies is :mod:`~focus_core.store.segments`' business. Readers open the database read-only;
writers wait for each other up to a time limit. Text, metadata, ids and spans carry checksums, and a collection carries
a hash over its ordered rows, so that a row that is lost or changed is noticed. The schema is compared before anything
is trusted: a database from elsewhere can bring no triggers or views.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from focus_core.errors import StoreError
from focus_core.store.segments import MEND

FORMAT = 2
"""Of the folder: 1 was documents.jsonl, memory.json and kv/index.sqlite."""

BUSY_SECONDS = 60.0

_IS_KEY = "length(key) = 64 AND key NOT GLOB '*[^0-9a-f]*'"
_TABLES = (
    "CREATE TABLE tenants (name TEXT PRIMARY KEY, salt BLOB NOT NULL)",
    "CREATE TABLE collections (id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, facts TEXT NOT NULL,"
    " config TEXT NOT NULL, version INTEGER NOT NULL, digest BLOB NOT NULL, changed REAL NOT NULL,"
    " UNIQUE (tenant, name))",
    "CREATE TABLE documents (id INTEGER PRIMARY KEY, collection INTEGER NOT NULL REFERENCES collections (id)"
    " ON DELETE CASCADE, name BLOB NOT NULL, position INTEGER NOT NULL, text BLOB NOT NULL, metadata TEXT NOT NULL,"
    " source TEXT NOT NULL, text_sum BLOB NOT NULL, checksum BLOB NOT NULL, UNIQUE (collection, name),"
    " UNIQUE (collection, position))",
    f"CREATE TABLE segments (key TEXT PRIMARY KEY CHECK ({_IS_KEY}),"
    " size INTEGER NOT NULL, nbytes INTEGER NOT NULL, tensors TEXT NOT NULL, touched REAL NOT NULL)",
    "CREATE TABLE chunks (id INTEGER PRIMARY KEY, collection INTEGER NOT NULL REFERENCES collections (id)"
    " ON DELETE CASCADE, key TEXT NOT NULL REFERENCES segments (key), ids BLOB NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE spans (chunk INTEGER NOT NULL REFERENCES chunks (id) ON DELETE CASCADE, number INTEGER NOT NULL,"
    " document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE, start INTEGER NOT NULL,"
    " stop INTEGER NOT NULL, PRIMARY KEY (chunk, number)) WITHOUT ROWID",
    "CREATE INDEX chunks_of_collection ON chunks (collection)",
    "CREATE INDEX chunks_by_key ON chunks (key)",
    "CREATE INDEX spans_of_document ON spans (document)",
)


class Catalogue:
    """The database of a store.

    Args:
        path: of the file.
        timeout: seconds that a writer waits for another.
    """

    def __init__(self, path: Path, timeout: float = BUSY_SECONDS) -> None:
        self.path, self.timeout = path, timeout

    def create(self) -> None:
        """Make the tables where there are none; raises ``StoreError`` for another format or a foreign schema."""
        with self._connected(f"file:{quote(str(self.path.absolute()))}") as index:
            index.execute("PRAGMA journal_mode = WAL")
            with _transaction(index):
                if not _schema(index):
                    for statement in _TABLES:
                        index.execute(statement)
                    index.execute(f"PRAGMA user_version = {FORMAT}")
            self._check(index)

    def ready(self) -> bool:
        """Whether there are tables; a file without any is one that is being made, or was emptied."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return False
        with self._connected(f"file:{quote(str(self.path.absolute()))}?mode=ro") as index:
            return bool(_schema(index)) or index.execute("PRAGMA user_version").fetchone()[0] != 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one process at a time make the catalogue; raises ``StoreError`` where another takes too long."""
        lock = self.path.parent / ".making.lock"
        try:
            with FileLock(lock, timeout=self.timeout):
                yield
        except Timeout as error:
            raise StoreError(
                f"another process has been making {self.path} for {self.timeout:g} seconds; try again when it is done"
            ) from error
        lock.unlink(missing_ok=True)  # who waited for it looks again whether there is anything to do

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection that sees one version and can write nothing."""
        name = f"file:{quote(str(self.path.absolute()))}?mode=ro"
        with self._connected(name) as index:
            index.execute("PRAGMA query_only = ON")
            index.execute("BEGIN")
            self._check(index)
            yield index

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give a connection inside a transaction that no other writer shares; it commits at the end, or not at all."""
        with self._connected(f"file:{quote(str(self.path.absolute()))}?mode=rw") as index:
            self._check(index)
            with _transaction(index):
                yield index

    def check(self) -> None:
        """Read every page and compare tables with their indexes; raises ``StoreError`` where they differ."""
        with self._connected(f"file:{quote(str(self.path.absolute()))}?mode=ro") as index:
            found = index.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreError(f"the catalogue of {self.path.parent} is damaged ({found}); {MEND}")

    def mend(self) -> None:
        """Make damaged indexes anew from their tables, and leave one row a segment where they let two in.

        What a chunk refers to may be lost by it, and is computed again by whoever repairs the collections.

        Raises:
            StoreError: the tables themselves are damaged.
        """
        try:
            self.check()
            return
        except StoreError:  # what cannot be mended is raised by the second look
            pass
        with self._connected(f"file:{quote(str(self.path.absolute()))}?mode=rw") as index:
            self._check(index)
            index.execute("PRAGMA foreign_keys = OFF")  # so that a table is emptied without a look at its indexes
            with _transaction(index):
                index.execute(
                    "CREATE TEMP TABLE held AS SELECT * FROM segments NOT INDEXED WHERE rowid IN"
                    " (SELECT MAX(rowid) FROM segments NOT INDEXED GROUP BY key)"
                )
                index.execute("DELETE FROM segments")
                index.execute(f"INSERT INTO segments SELECT * FROM held WHERE {_IS_KEY}")
                index.execute("REINDEX")
        self.check()

    @contextmanager
    def _connected(self, name: str) -> Iterator[sqlite3.Connection]:
        with translated(self.path.parent, self.timeout):
            index = sqlite3.connect(name, uri=True, timeout=self.timeout, isolation_level=None)
            try:
                for pragma in ("trusted_schema = OFF", "foreign_keys = ON", "synchronous = FULL"):
                    index.execute(f"PRAGMA {pragma}")
                yield index
            finally:
                index.close()

    def _check(self, index: sqlite3.Connection) -> None:
        found = _schema(index)
        version = index.execute("PRAGMA user_version").fetchone()[0]
        if found and version != FORMAT:
            raise StoreError(
                f"{self.path} has format {version}, this version reads {FORMAT}; use the version that wrote it, or "
                "index the documents again into another folder"
            )
        if found != set(_TABLES):
            raise StoreError(
                f"{self.path} is damaged or no catalogue of focusllm (its tables are not ours); restore it from a "
                "copy, or delete the folder and index the documents again"
            )


@contextmanager
def translated(folder: Path, timeout: float = BUSY_SECONDS) -> Iterator[None]:
    """Turn errors of disk and database into one clear error."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            raise StoreError(
                f"another process has been writing to {folder} for {timeout:g} seconds; try again when it is done"
            ) from error
        if "full" in text:
            raise StoreError(f"the disk of {folder} is full; nothing was changed, free some space") from error
        if "readonly" in text or "unable to open" in text:
            raise StoreError(
                f"the catalogue of {folder} cannot be opened ({error}); check that the folder exists and its "
                "permissions"
            ) from error
        raise _damaged(folder, error) from error
    except sqlite3.ProgrammingError:
        raise  # ours, not the folder's
    except sqlite3.DatabaseError as error:
        raise _damaged(folder, error) from error
    except OSError as error:
        raise StoreError(f"{folder} cannot be used ({error}); nothing was changed") from error


def _damaged(folder: Path, error: Exception) -> StoreError:
    return StoreError(
        f"the catalogue of {folder} is damaged ({error}); restore it from a copy, or delete the folder and index the "
        "documents again"
    )


def _schema(index: sqlite3.Connection) -> set[str]:
    rows = index.execute("SELECT sql, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
    return {sql if isinstance(sql, str) else f"{name}?" for sql, name in rows}


@contextmanager
def _transaction(index: sqlite3.Connection) -> Iterator[None]:
    index.execute("BEGIN IMMEDIATE")
    try:
        yield
        index.execute("COMMIT")
    except BaseException:
        if index.in_transaction:
            index.execute("ROLLBACK")
        raise
