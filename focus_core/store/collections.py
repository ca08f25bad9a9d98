"""Read and change the rows of one collection: its documents, and the chunks that they were cut into.

Functions of an open connection (see :class:`~focus_core.store.catalogue.Catalogue`). A change says what is new and
what goes; it is merged into the rows as they are now, whatever other writers have done since they were read.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from focus_core.errors import ConfigError, StoreError
from focus_core.text.chunking import Chunk, Span
from focus_core.text.corpus import Document


@dataclass(frozen=True)
class CollectionInfo:
    """A line of the list of collections.

    Args:
        name: unique within its tenant.
        facts: what its chunk KV was computed with.
        config: settings of the engine that made it.
        version: counts changes.
        digest: hash over its ordered rows; equal digests are equal contents.
        changed: seconds since the epoch.
        documents: how many.
        chunks: how many.
        nbytes: bytes of chunk KV, equal chunks once.
    """

    name: str
    facts: dict[str, Any]
    config: dict[str, Any]
    version: int
    digest: str
    changed: float
    documents: int = 0
    chunks: int = 0
    nbytes: int = 0

    @property
    def stamp(self) -> tuple[int, str]:
        """Version and digest: a collection that was dropped and made again counts its versions anew."""
        return self.version, self.digest


@dataclass(frozen=True)
class Contents:
    """Documents of a collection, in order, and their chunks with the keys of their KV."""

    info: CollectionInfo
    documents: dict[str, Document]
    chunks: list[tuple[str, Chunk]]


@dataclass(frozen=True)
class Change:
    """What a writer wants changed.

    Args:
        documents: all that the writer holds, by id, in order.
        chunks: all that the writer holds, each with the key of its KV.
        changed: ids of ``documents`` that are new or other than when the writer read them.
        removed: ids that the writer dropped.
        replace: drop everything that the writer does not hold.
    """

    documents: Mapping[str, Document]
    chunks: Sequence[tuple[str, Chunk]]
    changed: Collection[str]
    removed: Collection[str] = ()
    replace: bool = False


class MissingChunksError(Exception):
    """Chunk KV of a change is not in the store (any more)."""

    def __init__(self, keys: Collection[str]) -> None:
        super().__init__(f"{len(keys)} chunks are missing")
        self.keys = frozenset(keys)


def row_sum(document: Document) -> bytes:
    """Return the checksum of all that a document's row holds.

    Raises:
        ConfigError: the metadata hold what JSON cannot.
    """
    return _sum(_bytes(document.id), document.text_sum, _json(document).encode(), json.dumps(document.source).encode())


# -- reading ----------------------------------------------------------------------------------------------------


def list_names(index: sqlite3.Connection, tenant: str) -> list[str]:
    """Return the names of a tenant's collections, in order."""
    return [row[0] for row in index.execute("SELECT name FROM collections WHERE tenant = ? ORDER BY name", (tenant,))]


def list_collections(index: sqlite3.Connection, tenant: str) -> list[CollectionInfo]:
    """Return a tenant's collections by name."""
    return [count_collection(index, tenant, name) for name in list_names(index, tenant)]


def has_collection(index: sqlite3.Connection, tenant: str, name: str) -> bool:
    """Whether a tenant has a collection of this name."""
    query = "SELECT 1 FROM collections WHERE tenant = ? AND name = ?"
    return index.execute(query, (tenant, name)).fetchone() is not None


def count_collection(index: sqlite3.Connection, tenant: str, name: str) -> CollectionInfo:
    """Return a collection's facts and counts; raises ``StoreError`` where there is none."""
    number, info = find_collection(index, tenant, name)
    documents = index.execute("SELECT COUNT(*) FROM documents WHERE collection = ?", (number,)).fetchone()[0]
    chunks = index.execute("SELECT COUNT(*) FROM chunks WHERE collection = ?", (number,)).fetchone()[0]
    query = "SELECT COALESCE(SUM(nbytes), 0) FROM segments WHERE key IN (SELECT key FROM chunks WHERE collection = ?)"
    nbytes = index.execute(query, (number,)).fetchone()[0]
    return replace(info, documents=documents, chunks=chunks, nbytes=nbytes)


def find_collection(index: sqlite3.Connection, tenant: str, name: str) -> tuple[int, CollectionInfo]:
    """Return a collection's row number and facts; raises ``StoreError`` where there is none."""
    row = index.execute(
        "SELECT id, facts, config, version, digest, changed FROM collections WHERE tenant = ? AND name = ?",
        (tenant, name),
    ).fetchone()
    if row is None:
        known = list_names(index, tenant)
        there = f"there are {', '.join(known[:20])}" if known else "there is none yet"
        raise StoreError(f"no collection {name!r}; {there}; make one with `focusllm index PATH --name {name}`")
    try:
        facts, config = json.loads(row[1]), json.loads(row[2])
    except (ValueError, RecursionError) as error:
        raise damaged(name, f"its settings cannot be read: {error}") from error
    return int(row[0]), CollectionInfo(name, facts, config, int(row[3]), bytes(row[4]).hex(), float(row[5]))


def read_collection(index: sqlite3.Connection, tenant: str, name: str, ids: Collection[str] | None = None) -> Contents:
    """Return a collection, or some of its documents and those that share chunks with them, after checking every row.

    Raises:
        StoreError: there is none, or a row is lost or changed.
        ConfigError: an id is not there.
    """
    number, info = find_collection(index, tenant, name)
    if _digest(index, number) != bytes.fromhex(info.digest):
        raise damaged(name, "the hash over its rows differs: a row is lost or changed")
    wanted = None if ids is None else {_bytes(one) for one in _with_sharing(index, number, ids)}
    documents: dict[str, Document] = {}
    by_row: dict[int, str] = {}
    query = "SELECT id, name, text, metadata, source, checksum FROM documents WHERE collection = ? ORDER BY position"
    for row, key, text, metadata, source, checksum in index.execute(query, (number,)):
        if wanted is not None and key not in wanted:
            continue
        document = _document(name, key, text, metadata, source)
        if row_sum(document) != checksum:
            raise damaged(name, f"document {document.id!r} is not what was written")
        documents[document.id] = document
        by_row[row] = document.id
    if ids is not None and len(documents) < len(set(ids)):
        unknown = next(one for one in ids if one not in documents)
        raise ConfigError(f"no document {unknown!r} in collection {name!r}; `focusllm show {name}` lists them")
    return Contents(info, documents, _chunks(index, name, number, by_row))


def document_sums(index: sqlite3.Connection, tenant: str, name: str) -> dict[str, Document]:
    """Return a collection's documents without their texts: ids, metadata and source facts, in order."""
    number, _ = find_collection(index, tenant, name)
    query = "SELECT name, metadata, source FROM documents WHERE collection = ? ORDER BY position"
    rows = [_document(name, key, b"", metadata, source) for key, metadata, source in index.execute(query, (number,))]
    return {document.id: document for document in rows}


def text_sums(index: sqlite3.Connection, tenant: str, name: str) -> dict[str, bytes]:
    """Return the checksum of each document's text."""
    number, _ = find_collection(index, tenant, name)
    return {
        _text(key): one
        for key, one in index.execute("SELECT name, text_sum FROM documents WHERE collection = ?", (number,))
    }


def _document(name: str, key: bytes, text: bytes, metadata: str, source: str) -> Document:
    try:
        return Document(_text(key), _text(text), json.loads(metadata), json.loads(source))
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        raise damaged(name, f"a document cannot be read: {error}") from error


def _chunks(index: sqlite3.Connection, name: str, number: int, documents: Mapping[int, str]) -> list[tuple[str, Chunk]]:
    """Return the chunks that lie in these documents alone, in order; those that others share are left out."""
    query = (
        "SELECT c.id, c.key, c.ids, c.checksum, s.document, s.start, s.stop FROM chunks c"
        " JOIN spans s ON s.chunk = c.id WHERE c.collection = ? ORDER BY c.id, s.number"
    )
    found: dict[int, tuple[str, bytes, bytes, list[tuple[int, int, int]]]] = {}
    for row, key, ids, checksum, document, start, stop in index.execute(query, (number,)):
        found.setdefault(row, (key, ids, checksum, []))[3].append((document, start, stop))
    place = {row: position for position, row in enumerate(documents)}
    held: list[tuple[tuple[int, int], str, Chunk]] = []
    for key, ids, checksum, spans in found.values():
        if not all(document in documents for document, _, _ in spans):
            continue
        numbers = array("i")
        if len(ids) % numbers.itemsize:
            raise damaged(name, "the tokens of a chunk are cut")
        numbers.frombytes(ids)
        chunk = Chunk(tuple(numbers), tuple(Span(documents[one], start, stop) for one, start, stop in spans))
        if _chunk_sum(key, chunk) != checksum:
            raise damaged(name, f"a chunk of {chunk.document_id!r} is not what was written")
        held.append(((place[spans[0][0]], spans[0][1]), key, chunk))
    return [(key, chunk) for _, key, chunk in sorted(held, key=lambda item: item[0])]


# -- changing ---------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """A collection's documents as they are now: id -> (row, checksum of the text, checksum)."""

    number: int
    documents: dict[str, tuple[int, bytes, bytes]] = field(default_factory=dict)


def commit_change(
    index: sqlite3.Connection,
    tenant: str,
    name: str,
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    change: Change,
) -> CollectionInfo:
    """Merge a change into a collection, which is made if absent; the caller holds the write transaction.

    Raises:
        StoreError: the collection was made by another model, or another writer has changed documents that share a
            chunk with those of this change.
        ConfigError: metadata hold what JSON cannot.
        MissingChunksError: chunk KV is to be put first.
    """
    rows = _rows(index, tenant, name, facts, config)
    removed = set(change.removed) & set(rows.documents)
    if change.replace:
        removed = set(rows.documents) - set(change.documents)
    fresh, again = [], []
    for one in change.documents:
        if one not in (change.documents if change.replace else change.changed):
            continue
        document, held = change.documents[one], rows.documents.get(one)
        if held is None or held[1] != document.text_sum:
            fresh.append(document)
        elif held[2] != row_sum(document):
            again.append(document)
    cut = _sharing(index, rows, change, removed, {document.id for document in fresh})
    _delete(index, rows, removed, {document.id for document in fresh}, cut)
    for document in again:
        index.execute(
            "UPDATE documents SET metadata = ?, source = ?, checksum = ? WHERE id = ?",
            (_json(document), json.dumps(document.source), row_sum(document), rows.documents[document.id][0]),
        )
    _insert(
        index, rows, fresh, [item for item in change.chunks if any(one.document_id in cut for one in item[1].spans)]
    )
    return _stamp(index, tenant, name, rows.number)


def drop_collection(index: sqlite3.Connection, tenant: str, name: str) -> None:
    """Remove a collection with its documents; raises ``StoreError`` where there is none."""
    number, _ = find_collection(index, tenant, name)
    touch(index, [row[0] for row in index.execute("SELECT key FROM chunks WHERE collection = ?", (number,))])
    index.execute("DELETE FROM collections WHERE id = ?", (number,))


def touch(index: sqlite3.Connection, keys: Iterable[str]) -> None:
    """Note that segments are in use now, or were until now."""
    now = time.time()
    index.executemany("UPDATE segments SET touched = ? WHERE key = ?", [(now, key) for key in keys])


def _rows(
    index: sqlite3.Connection, tenant: str, name: str, facts: Mapping[str, Any], config: Mapping[str, Any]
) -> _Rows:
    query = "SELECT id, facts, digest FROM collections WHERE tenant = ? AND name = ?"
    row = index.execute(query, (tenant, name)).fetchone()
    written = json.dumps(dict(facts), sort_keys=True)
    if row is None:
        cursor = index.execute(
            "INSERT INTO collections (tenant, name, facts, config, version, digest, changed) VALUES (?,?,?,?,0,?,0)",
            (tenant, name, written, json.dumps(dict(config)), b""),
        )
        return _Rows(int(cursor.lastrowid or 0))
    if _digest(index, row[0]) != row[2]:  # else the change would be signed with the damage
        raise damaged(name, "the hash over its rows differs: a row is lost or changed")
    if json.loads(row[1]) != json.loads(written):
        raise StoreError(
            f"collection {name!r} was made by another model or settings; index into another collection, or remove "
            f"this one first: `focusllm remove {name}`"
        )
    query = "SELECT name, id, text_sum, checksum FROM documents WHERE collection = ?"
    return _Rows(row[0], {_text(key): (one, text, whole) for key, one, text, whole in index.execute(query, (row[0],))})


def _sharing(index: sqlite3.Connection, rows: _Rows, change: Change, removed: set[str], fresh: set[str]) -> set[str]:
    """Return the documents whose chunks are written anew: the changed ones, and all that share a chunk with them."""
    names = {row: name for name, (row, _, _) in rows.documents.items()}
    there: dict[int, list[str]] = {}
    query = "SELECT s.chunk, s.document FROM spans s JOIN chunks c ON c.id = s.chunk WHERE c.collection = ?"
    for chunk, document in index.execute(query, (rows.number,)):
        there.setdefault(chunk, []).append(names[document])
    groups = [set(group) for group in there.values()]
    groups += [{span.document_id for span in chunk.spans} for _, chunk in change.chunks]
    cut = _reached(groups, fresh | removed) - removed
    for name in cut - fresh:
        held = change.documents.get(name)
        if held is None or name not in rows.documents or rows.documents[name][1] != held.text_sum:
            raise StoreError(
                f"document {name!r} shares a chunk with a document of this change, and is not known here as it is now; "
                "nothing was changed, load the memory (FocusEngine.load_memory), change it there and save it"
            )
    return cut


def _reached(groups: Iterable[set[str]], begun: set[str]) -> set[str]:
    """Return ``begun`` and all that share a group with one of them, or with one that does."""
    shared, reached, grown = [group for group in groups if len(group) > 1], set(begun), True
    while grown:
        touched = [group for group in shared if group & reached]
        grown = any(group - reached for group in touched)
        reached.update(*touched)
    return reached


def _with_sharing(index: sqlite3.Connection, number: int, ids: Collection[str]) -> set[str]:
    query = (
        "SELECT s.chunk, d.name FROM spans s JOIN documents d ON d.id = s.document WHERE d.collection = ?"
        " AND s.chunk IN (SELECT chunk FROM spans WHERE number > 0)"
    )
    groups: dict[int, set[str]] = {}
    for chunk, name in index.execute(query, (number,)):
        groups.setdefault(chunk, set()).add(_text(name))
    return _reached(groups.values(), set(ids))


def _delete(index: sqlite3.Connection, rows: _Rows, removed: set[str], fresh: set[str], cut: set[str]) -> None:
    gone = [rows.documents[name][0] for name in (removed | cut) & set(rows.documents)]
    doomed = [
        chunk
        for row in gone
        for chunk in index.execute(
            "SELECT DISTINCT c.id, c.key FROM chunks c JOIN spans s ON s.chunk = c.id WHERE s.document = ?", (row,)
        )
    ]
    touch(index, [key for _, key in doomed])
    index.executemany("DELETE FROM chunks WHERE id = ?", [(chunk,) for chunk, _ in doomed])
    lost = [rows.documents[name][0] for name in (removed | fresh) & set(rows.documents)]
    index.executemany("DELETE FROM documents WHERE id = ?", [(row,) for row in lost])


def _insert(
    index: sqlite3.Connection, rows: _Rows, fresh: Sequence[Document], chunks: Sequence[tuple[str, Chunk]]
) -> None:
    keys = {key for key, _ in chunks}
    known = {key for key in keys if index.execute("SELECT 1 FROM segments WHERE key = ?", (key,)).fetchone()}
    if known != keys:
        raise MissingChunksError(keys - known)
    touch(index, keys)
    last = index.execute("SELECT MAX(position) FROM documents WHERE collection = ?", (rows.number,)).fetchone()[0]
    numbers = {name: row for name, (row, _, _) in rows.documents.items()}
    for position, document in enumerate(fresh, start=0 if last is None else last + 1):
        cursor = index.execute(
            "INSERT INTO documents (collection, name, position, text, metadata, source, text_sum, checksum)"
            " VALUES (?,?,?,?,?,?,?,?)",
            (
                rows.number,
                _bytes(document.id),
                position,
                _bytes(document.text),
                _json(document),
                json.dumps(document.source),
                document.text_sum,
                row_sum(document),
            ),
        )
        numbers[document.id] = int(cursor.lastrowid or 0)
    for key, chunk in chunks:
        cursor = index.execute(
            "INSERT INTO chunks (collection, key, ids, checksum) VALUES (?,?,?,?)",
            (rows.number, key, array("i", chunk.ids).tobytes(), _chunk_sum(key, chunk)),
        )
        spans = [(numbers[one.document_id], one.start, one.end) for one in chunk.spans]
        together = [(cursor.lastrowid, number, *span) for number, span in enumerate(spans)]
        index.executemany("INSERT INTO spans VALUES (?,?,?,?,?)", together)


def _stamp(index: sqlite3.Connection, tenant: str, name: str, number: int) -> CollectionInfo:
    index.execute(
        "UPDATE collections SET version = version + 1, digest = ?, changed = ? WHERE id = ?",
        (_digest(index, number), time.time(), number),
    )
    return find_collection(index, tenant, name)[1]


# -- checksums --------------------------------------------------------------------------------------------------


def damaged(name: str, why: str) -> StoreError:
    """Return the error for rows that are not what was written."""
    return StoreError(
        f"collection {name!r} is damaged ({why}); restore the store from a copy, or remove the collection and index "
        "the documents again"
    )


def _digest(index: sqlite3.Connection, number: int) -> bytes:
    """Return the hash over a collection's settings and the checksums of its ordered rows."""
    own = index.execute("SELECT name, tenant, facts, config FROM collections WHERE id = ?", (number,)).fetchone()
    digest = hashlib.sha256(json.dumps(own).encode())
    for (checksum,) in index.execute(
        "SELECT checksum FROM documents WHERE collection = ? ORDER BY position", (number,)
    ):
        digest.update(checksum)
    query = (
        "SELECT c.checksum FROM chunks c JOIN spans s ON s.chunk = c.id AND s.number = 0 JOIN documents d"
        " ON d.id = s.document WHERE c.collection = ? ORDER BY d.position, s.start"
    )
    digest.update(b"\0")
    for (checksum,) in index.execute(query, (number,)):
        digest.update(checksum)
    return digest.digest()


def _chunk_sum(key: str, chunk: Chunk) -> bytes:
    spans = [(_bytes(one.document_id).hex(), one.start, one.end) for one in chunk.spans]
    return _sum(key.encode(), array("i", chunk.ids).tobytes(), json.dumps(spans).encode())


def _sum(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _json(document: Document) -> str:
    try:
        return json.dumps(document.metadata, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the metadata of document {document.id!r} cannot be saved ({error}); metadata must be what JSON can hold"
        ) from error


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # names of files may hold bytes that are no text


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
