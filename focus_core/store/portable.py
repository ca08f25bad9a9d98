"""Carry a collection in one file to another store or machine, chunk KV and all.

The file is an uncompressed zip: ``collection.json``, and one safetensors member a chunk. Nothing of it is trusted: a
member is found by a key, never by a path, and its tensors and every row are compared with their checksums before
anything is committed.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from focus_core.errors import ConfigError, FocusError, StoreError
from focus_core.files import sync_folder
from focus_core.store.catalogue import translated
from focus_core.store.collections import Change, CollectionInfo, row_sum
from focus_core.store.database import Store
from focus_core.store.segments import Tensors, chunk_key, describe, is_key
from focus_core.text.chunking import Chunk, Span
from focus_core.text.corpus import Document

FORMAT = 1
_MANIFEST = "collection.json"
_BATCH_BYTES = 256 << 20

Progress = Callable[[int, int], None]


def export_collection(
    store: Store, name: str, path: Path, progress: Progress = lambda done, total: None
) -> CollectionInfo:
    """Write a collection to a file, which appears whole or not at all.

    Raises:
        StoreError: there is none, it is damaged, or the file cannot be written.
    """
    contents = store.read(name)
    keys = {address: plain_key(contents.info.facts, chunk) for address, chunk in contents.chunks}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    sums: dict[str, Any] = {}
    with translated(path.parent):
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
                for done, (address, key) in enumerate(keys.items(), start=1):
                    tensors = store.read_segment(address)
                    sums[key] = {name: describe(tensor) for name, tensor in tensors.items()}
                    file.writestr(f"kv/{key}.safetensors", save(dict(tensors), metadata={"key": key}))
                    progress(done, len(keys))
                manifest = {
                    "format": FORMAT,
                    "name": name,
                    "facts": contents.info.facts,
                    "config": contents.info.config,
                    "documents": [asdict(one) for one in contents.documents.values()],
                    "sums": {one: row_sum(document).hex() for one, document in contents.documents.items()},
                    "chunks": [
                        {"key": keys[address], "ids": chunk.ids, "spans": [asdict(span) for span in chunk.spans]}
                        for address, chunk in contents.chunks
                    ],
                    "segments": sums,
                }
                file.writestr(_MANIFEST, json.dumps(manifest))
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)  # noqa: PTH105 (tests record the calls of os)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    return contents.info


def import_collection(
    store: Store, path: Path, name: str | None = None, progress: Progress = lambda done, total: None
) -> CollectionInfo:
    """Read a file that :func:`export_collection` wrote into a store; nothing is computed.

    Args:
        store: where to; chunk KV that it has is not read again.
        path: the file.
        name: of the collection; the one it had if not given.
        progress: called with chunks done and to do.

    Raises:
        StoreError: the file is damaged, or no export.
        ConfigError: there is a collection of this name already.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                raise StoreError(f"{path} is no export of focusllm (its members are compressed)")
            manifest = json.loads(file.read(_MANIFEST))
            if manifest["format"] != FORMAT:
                raise StoreError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}")
            change, keys = _change(store, path, manifest)
            name = name or str(manifest["name"])
            if store.has(name):
                raise ConfigError(f"there is a collection {name!r} already; give another name with --name")
            _put(store, file, keys, manifest["segments"], progress)
            return store.commit(name, manifest["facts"], manifest["config"], change)
    except FocusError:
        raise
    except FileNotFoundError as error:
        raise StoreError(f"no file at {path}; check the path") from error
    except (OSError, zipfile.BadZipFile, zlib.error, SafetensorError, *_ODD) as error:
        raise StoreError(
            f"{path} is damaged or no export of focusllm ({error}); export the collection again"
        ) from error


_ODD = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, NotImplementedError, EOFError)


def _change(store: Store, path: Path, manifest: Mapping[str, Any]) -> tuple[Change, list[str]]:
    documents = {one["id"]: Document(**one) for one in manifest["documents"]}
    for one, document in documents.items():
        if row_sum(document).hex() != manifest["sums"][one]:
            raise StoreError(f"document {one!r} in {path} is not what was written; export the collection again")
    chunks = []
    for item in manifest["chunks"]:
        chunk = Chunk(tuple(item["ids"]), tuple(Span(**span) for span in item["spans"]))
        if not is_key(item["key"]) or item["key"] != plain_key(manifest["facts"], chunk):
            raise StoreError(f"a chunk in {path} is not what its key says; export the collection again")
        chunks.append((item["key"], chunk))
    rows = [(store.address(key), chunk) for key, chunk in chunks]
    return Change(documents, rows, set(documents)), list(dict.fromkeys(key for key, _ in chunks))


def _put(store: Store, file: zipfile.ZipFile, keys: list[str], sums: Mapping[str, Any], progress: Progress) -> None:
    held, size = store.holds(keys), 0
    waiting: dict[str, Tensors] = {}
    for done, key in enumerate(keys, start=1):
        if key not in held:
            tensors = load(file.read(f"kv/{key}.safetensors"))
            if {name: describe(tensor) for name, tensor in tensors.items()} != sums[key]:
                raise StoreError(f"chunk {key[:12]} in {file.filename} is damaged; export the collection again")
            waiting[key] = tensors
            size += sum(tensor.nbytes for tensor in tensors.values())
        if size >= _BATCH_BYTES:
            store.put_all(waiting)
            waiting, size = {}, 0
        progress(done, len(keys))
    store.put_all(waiting)


def plain_key(facts: Mapping[str, Any], chunk: Chunk) -> str:
    """Return the key of a chunk's KV without the salt of a tenant."""
    sink = facts.get("sink")
    return chunk_key(facts, ([] if sink is None else [sink]) + list(chunk.ids))
