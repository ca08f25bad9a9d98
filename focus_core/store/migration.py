"""Bring folders of an earlier version to this one, without computing anything.

Format 1 was ``documents.jsonl``, ``memory.json`` and ``kv/index.sqlite`` beside the files of chunk KV, or the files and
``index.sqlite`` alone. The new catalogue is filled under another name and appears by rename, so a stop at any moment
leaves the old folder or the new one; the old files go afterwards. What was left half-written is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from focus_core.errors import FocusError, StoreError
from focus_core.files import sync_folder
from focus_core.store.catalogue import Catalogue
from focus_core.store.collections import Change, commit_change
from focus_core.store.segments import SegmentFacts, Segments, describe, is_key
from focus_core.text.chunking import Chunk, Span
from focus_core.text.corpus import Document

DEFAULT_NAME = "default"
"""Of the collection in a folder that is saved and loaded without a name."""

_OLD = ("memory.json", "documents.jsonl", "index.sqlite", "kv/index.sqlite")
_AGAIN = "index the documents again into another folder"


def migrate(folder: Path, catalogue: Catalogue, segments: Segments) -> None:
    """Make a catalogue from files of an earlier version, if they are there and it is not.

    Raises:
        StoreError: the folder was left half-written, is damaged, or another process has been at it for too long.
    """
    if catalogue.path.exists() or not any((folder / name).is_file() for name in _OLD):
        return
    with catalogue.alone():
        for rest in folder.glob(".migrating-*"):
            rest.unlink()  # of one that was killed
        if not catalogue.path.exists():
            _migrate(folder, catalogue, segments)


def _migrate(folder: Path, catalogue: Catalogue, segments: Segments) -> None:
    partial = Catalogue(folder / f".migrating-{os.getpid()}.sqlite", catalogue.timeout)
    try:
        change, facts, config = _read_memory(folder) if (folder / "memory.json").is_file() else (None, {}, {})
        partial.create()
        with partial.writing() as index:
            known = _segments(folder, segments)
            for key, found in known.items():
                _add(index, key, found)
            if change is not None:
                for key, _ in change.chunks:
                    if key not in known:
                        _add(index, key, SegmentFacts(0, 0, {}))  # lost: reading it says so, and verify can repair it
                commit_change(index, "", DEFAULT_NAME, facts, config, change)
        with closing(sqlite3.connect(partial.path)) as index:
            index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            index.execute("PRAGMA journal_mode = DELETE")  # one file, so that a rename is all
        with partial.path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial.path, catalogue.path)  # noqa: PTH105 (tests record the calls of os)
        sync_folder(folder)
    finally:
        for rest in folder.glob(f"{partial.path.name}*"):
            rest.unlink(missing_ok=True)
    with closing(sqlite3.connect(catalogue.path)) as index:
        index.execute("PRAGMA journal_mode = WAL")
    for name in _OLD:
        (folder / name).unlink(missing_ok=True)


def _read_memory(folder: Path) -> tuple[Change, dict[str, Any], dict[str, Any]]:
    path = folder / "memory.json"
    try:
        manifest = json.loads(path.read_bytes())
        if manifest.get("format") != 1:
            raise StoreError(f"{path} has format {manifest.get('format')!r}, which this version cannot read; {_AGAIN}")
        lines = (folder / "documents.jsonl").read_text(encoding="utf-8").split("\n")
        documents = [Document(**json.loads(line)) for line in lines if line]
        chunks = [
            (str(item["key"]), Chunk(tuple(item["ids"]), tuple(Span(**span) for span in item["spans"])))
            for item in manifest["chunks"]
        ]
        facts, config = dict(manifest["facts"]), dict(manifest["config"])
        _check_whole(folder, documents, [chunk for _, chunk in chunks])
    except FocusError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{folder} is damaged ({error}); {_AGAIN}") from error
    held = {document.id: document for document in documents}
    bad = [key for key, _ in chunks if not is_key(key)]
    if bad:
        raise StoreError(f"{path} names {bad[0][:80]!r}, which is no key of chunk KV; {folder} is not to be trusted")
    return Change(held, chunks, set(held)), facts, config


def _check_whole(folder: Path, documents: Iterable[Document], chunks: Iterable[Chunk]) -> None:
    """Refuse a folder whose documents are not covered by chunks from their first character to their last."""
    spans: dict[str, list[tuple[int, int]]] = {document.id: [] for document in documents}
    for chunk in chunks:
        for span in chunk.spans:
            spans.setdefault(span.document_id, []).append((span.start, span.end))
    lengths = {document.id: len(document.text) for document in documents}
    for name, found in spans.items():
        reached = 0
        for start, end in sorted(found):
            reached = end if start == reached and end >= start else -1
        if name not in lengths or reached != lengths[name]:
            raise StoreError(
                f"{folder} was left half-written by an earlier version: document {name!r} and its chunks do not belong "
                f"together; {_AGAIN}"
            )


def _segments(folder: Path, segments: Segments) -> dict[str, SegmentFacts]:
    """Return what the old index knows of chunk KV; files are moved to where this version looks for them."""
    alone = (folder / "index.sqlite").is_file()
    path = folder / "index.sqlite" if alone else folder / "kv" / "index.sqlite"
    if not path.is_file():
        return {}
    with closing(sqlite3.connect(path)) as index:
        if index.execute("SELECT format FROM meta").fetchone() != (1,):
            raise StoreError(f"{path} has a format that this version cannot read; {_AGAIN}")
        rows = index.execute("SELECT key, sha256 FROM chunks").fetchall()
    found = {}
    for key, digest in rows:
        if not isinstance(key, str) or not is_key(key):
            continue
        old, new = folder / key[:2] / f"{key}.safetensors", segments.path(key)
        if alone and old.is_file() and not old.is_symlink() and not new.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            os.replace(old, new)  # noqa: PTH105
            sync_folder(new.parent)
        found[key] = _described(new, digest)
    if alone:
        for place in folder.iterdir():
            if re.fullmatch("[0-9a-f]{2}", place.name) and place.is_dir() and not any(place.iterdir()):
                place.rmdir()
    return found


def _described(path: Path, digest: str) -> SegmentFacts:
    """Return a segment's facts if its bytes are those that the old index knows."""
    try:
        data = path.read_bytes()
        tensors = load(data)
    except (OSError, SafetensorError, ValueError, KeyError):
        return SegmentFacts(0, 0, {})
    if hashlib.sha256(data).hexdigest() != digest:
        return SegmentFacts(0, 0, {})
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return SegmentFacts(len(data), nbytes, {name: describe(tensor) for name, tensor in tensors.items()})


def _add(index: sqlite3.Connection, key: str, facts: SegmentFacts) -> None:
    row = (key, facts.size, facts.nbytes, facts.to_json(), time.time())
    index.execute("INSERT OR IGNORE INTO segments VALUES (?,?,?,?,?)", row)
