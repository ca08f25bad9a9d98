"""Read what tasks are made of: texts and JSON lines, gzipped or not, here or elsewhere. The module knows no task."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec

from focus_core.errors import DocumentNotFoundError, EmptyCorpusError, NotTextError
from focus_core.model.sources import cache_folder

_TEXT_FIELDS = ("text", "content", "context")


def local_file(place: str) -> Path:
    """Return the path of a file, fetched once and kept if ``place`` is an address that fsspec can open.

    Args:
        place: a path, ``hf://datasets/OWNER/NAME/FILE`` for a file of a hub repository, ``https://...``, or
            ``zip://MEMBER::ADDRESS`` for a file of an archive.

    Raises:
        DocumentNotFoundError: it cannot be fetched.
    """
    if "://" not in place:
        return Path(place)
    folder = cache_folder() / "data" / hashlib.sha256(place.encode()).hexdigest()[:16]
    keep = {"cache_storage": str(folder), "same_names": True}
    try:
        return Path(fsspec.open_local(f"simplecache::{place}", simplecache=keep))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DocumentNotFoundError(
            f"cannot fetch {place!r} ({error}); check the address and the network, or give a file of this machine"
        ) from error


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DocumentNotFoundError: no file at ``path``.
        NotTextError: it is not UTF-8 text.
    """
    if not path.is_file():
        raise DocumentNotFoundError(f"no file at {str(path)!r}; check the path")
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise NotTextError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file, or of a JSON array.

    Raises:
        DocumentNotFoundError: no file at ``path``.
        NotTextError: a line is not a JSON object.
        EmptyCorpusError: there is no row.
    """
    text = read_text(path)
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.split("\n") if x]
    except ValueError as error:
        raise NotTextError(f"{path} is not JSON lines ({error}); give one JSON object a line") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EmptyCorpusError(f"{path} holds no JSON objects; give one a line")
    return list(rows)


def read_long_text(path: Path) -> str:
    """Return all text of a file or of a folder's files: plain, or the ``text`` of JSON lines, in sorted order."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return "\n\n".join(text for file in files for text in read_documents(file))


def read_documents(path: Path) -> list[str]:
    """Return the texts of a file: one a JSON row, or the whole of a plain file."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        rows = read_rows(path)
        field = next((name for name in _TEXT_FIELDS if name in rows[0]), None)
        if field is None:
            raise EmptyCorpusError(f"rows of {path} have no field {' or '.join(_TEXT_FIELDS)}; give texts")
        return [str(row[field]) for row in rows]
    return [read_text(path)]


def file_facts(path: Path | None) -> str | None:
    """Return name and content hash of a file or folder, to tell runs apart."""
    if path is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return f"{path.name} sha256:{digest.hexdigest()[:16]}"
