"""Bring folders of the first format to this one: nothing computed, nothing lost, half-written ones refused."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from contextlib import closing, suppress
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save

from focus_core.errors import StoreError
from focus_core.store.database import Store
from focus_core.text.corpus import Document

TEXT = "the cat sat on the mat and the dog ate the hat. "
DOCUMENTS = [Document("a", TEXT * 4, {"page": 3}), Document("b", TEXT[::-1])]


def old_store(folder, memory):
    """Write chunk KV as the first format did."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / "index.sqlite")) as index, index:
        index.execute("CREATE TABLE meta (format INTEGER NOT NULL)")
        index.execute("CREATE TABLE chunks (key TEXT PRIMARY KEY, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL)")
        index.execute("INSERT INTO meta VALUES (1)")
        for slab in memory.state.slabs:
            for chunk, number in slab.between(0, slab.kv.size):
                tensor = slab.kv.dense(number)
                key = memory.encoder.key(chunk)
                data = save({"kv": tensor.contiguous()}, metadata={"key": key})
                (folder / key[:2]).mkdir(exist_ok=True)
                (folder / key[:2] / f"{key}.safetensors").write_bytes(data)
                row = (key, tensor.nbytes, hashlib.sha256(data).hexdigest())
                index.execute("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", row)


def old_memory(folder, memory):
    """Write a memory as the first format did."""
    old_store(folder / "kv", memory)
    rows = [{"id": one.id, "text": one.text, "metadata": one.metadata} for one in memory.documents]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    entries = [
        {"key": memory.encoder.key(chunk), "ids": chunk.ids, "spans": [asdict(span) for span in chunk.spans]}
        for chunk in memory.chunks
    ]
    manifest = {"facts": memory.encoder.facts(), "config": memory.encoder.config.to_dict(), "chunks": entries}
    (folder / "memory.json").write_text(json.dumps({"format": 1, **manifest}))


@pytest.fixture
def engine(make_engine):
    return make_engine()


def test_a_folder_is_brought_along(engine, tmp_path):
    """Documents, chunks and chunk KV are those that were; nothing is computed; the old files are gone."""
    memory = engine.remember(DOCUMENTS)
    old_memory(tmp_path, memory)
    engine.base.run_layer = None
    loaded = engine.load_memory(tmp_path)
    del engine.base.run_layer
    assert loaded.documents == memory.documents
    assert loaded.chunks == memory.chunks
    assert engine.answer("who?", loaded, max_tokens=4).text == engine.answer("who?", memory, max_tokens=4).text
    assert sorted(item.name for item in tmp_path.iterdir() if item.suffix not in (".sqlite-shm", ".sqlite-wal")) == [
        "catalogue.sqlite",
        "kv",
    ]
    assert Store(tmp_path).verify() == []


def test_a_store_without_documents_is_brought_along(engine, tmp_path):
    """Chunk KV that a pipeline left in a folder is found again."""
    memory = engine.remember(DOCUMENTS)
    old_store(tmp_path, memory)
    store = Store(tmp_path)
    keys = [engine.encoder.key(chunk) for chunk in memory.chunks]
    assert store.holds(keys) == set(keys)
    assert store.verify() == []


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
def test_a_torn_migration_is_repeated(engine, tmp_path, monkeypatch, call):
    """Stopped at any write: the next opening finds the old folder or the new one, whole."""
    memory = engine.remember(DOCUMENTS)
    for failing in range(1, 6):
        folder = tmp_path / str(failing)
        old_memory(folder, memory)
        original, count = getattr(os, call), 0

        def stopped(*arguments, limit=failing, original=original, **options):
            nonlocal count
            count += 1
            if count == limit:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, stopped)
            with suppress(KeyboardInterrupt):
                Store(folder)
        assert engine.load_memory(folder).documents == memory.documents
        assert Store(folder).verify() == []


def test_two_processes_migrate_one_folder(engine, tmp_path):
    """Four threads open it at once; all of them see everything, and a change of one is not undone by another."""
    memory = engine.remember(DOCUMENTS)
    old_memory(tmp_path, memory)
    failed = []

    def opened(number):
        try:
            found = engine.load_memory(tmp_path)
            found.add([Document(f"new-{number}", f"the dog {number}")])
            found.save(tmp_path)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=opened, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(engine.load_memory(tmp_path).documents) == 6


def test_half_written_and_damaged_folders_are_refused(engine, tmp_path):
    """A save that stopped between its two files, cut files, foreign keys: one clear error, the files untouched."""
    memory = engine.remember(DOCUMENTS)
    manifest = json.loads((_made(tmp_path / "m", memory) / "memory.json").read_text())

    def refused(name, message, **files):
        folder = _made(tmp_path / name, memory)
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        with pytest.raises(StoreError, match=message):
            engine.load_memory(folder)
        assert (folder / "memory.json").exists()
        assert not (folder / "catalogue.sqlite").exists()

    more = "".join(json.dumps({"id": name, "text": TEXT, "metadata": {}}) + "\n" for name in "abc")
    refused("more", "half-written by an earlier version: document", documents_jsonl=more)
    refused("less", "half-written", documents_jsonl=json.dumps({"id": "a", "text": TEXT * 4, "metadata": {}}) + "\n")
    refused("cut", "is damaged", memory_json="{")
    refused("list", "is damaged", memory_json="[]")
    refused("future", "format 99", memory_json=json.dumps(manifest | {"format": 99}))
    chunks = [{**chunk, "key": "/etc/passwd"} for chunk in manifest["chunks"]]
    refused("path", "is no key of chunk KV", memory_json=json.dumps(manifest | {"chunks": chunks}))


def test_damaged_chunk_kv_is_brought_along_as_damaged(engine, tmp_path):
    """A flipped byte in an old file is refused when it is read, and can be mended from the tokens."""
    from focus_core.store.indexing import repair_collection

    memory = engine.remember(DOCUMENTS)
    old_memory(tmp_path, memory)
    path = next((tmp_path / "kv").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="damaged"):
        engine.load_memory(tmp_path)
    assert repair_collection(Store(tmp_path), "default", engine.encoder) == 1
    loaded = engine.load_memory(tmp_path)
    for slab, other in zip(memory.state.slabs, loaded.state.slabs, strict=True):
        for number in range(slab.kv.size):
            torch.testing.assert_close(slab.kv.dense(number), other.kv.dense(number))


def _made(folder, memory):
    old_memory(folder, memory)
    return folder
