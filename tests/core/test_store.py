"""Prove invariant 6: what is stored comes back bit for bit, and anything else is refused."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from focus_core.errors import ConfigError, StoreError
from focus_core.files import write_atomically
from focus_core.store.catalogue import Catalogue
from focus_core.store.database import Store
from focus_core.store.memory import Memory
from focus_core.store.segments import chunk_key
from focus_core.text.corpus import Document

TEXT = "the cat sat on the mat and the dog ate the hat. "


def kv(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"kv": torch.full((1, 2, 1, 2, 4), value)}


def test_round_trip_is_bit_exact_and_idempotent(tmp_path):
    """get(put(x)) == x for every dtype and several tensors; a second put writes nothing; facts make the key."""
    store = Store(tmp_path)
    for number, dtype in enumerate((torch.bfloat16, torch.float32, torch.int8, torch.uint8)):
        tensors = {"kv": (torch.randn(2, 2, 2, 5, 8) * 9).to(dtype), "scales": torch.rand(2, 2, 2)}
        key = chunk_key({"dtype": str(dtype)}, [1, 2])
        assert store.put(key, tensors)
        assert not store.put(key, tensors)
        back = store.get(key)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor)
        assert len(store) == number + 1
    assert len({chunk_key({"a": 1}, [1, 2]), chunk_key({"a": 2}, [1, 2]), chunk_key({"a": 1}, [12])}) == 3


def test_a_flipped_byte_is_found(tmp_path):
    """verify() names the damaged chunk and get() refuses it; an absent file too; the others are read."""
    store = Store(tmp_path)
    keys = [chunk_key({}, [index]) for index in range(3)]
    store.put_all({key: kv(index) for index, key in enumerate(keys)})
    path = store.segments.path(keys[1])
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    store.segments.path(keys[2]).unlink()
    assert store.verify() == sorted(keys[1:])
    with pytest.raises(StoreError, match="damaged"):
        store.get(keys[1])
    with pytest.raises(StoreError, match="cannot be read"):
        store.get(keys[2])
    with pytest.raises(StoreError, match="no chunk"):
        store.get("0" * 64)
    assert store.get(keys[0])["kv"].sum() == 0
    store.put_all({keys[1]: kv(1)})  # what was damaged is whole again
    assert store.verify() == [keys[2]]


def test_a_crashed_write_leaves_nothing(tmp_path):
    """A write that fails in the middle leaves the old file and no temporary one."""
    target = tmp_path / "file"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, "not bytes")
    assert target.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_the_order_of_writes(tmp_path, monkeypatch):
    """Files are synced, then renamed, then their folder is synced, and only then a row is committed."""
    store, calls = Store(tmp_path), []
    sync, rename, writing = os.fsync, os.replace, Catalogue.writing

    def synced(descriptor):
        calls.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name[-8:]))
        sync(descriptor)

    def renamed(source, target):
        calls.append(("rename", target.name[-11:]))
        rename(source, target)

    def committed(self):
        @contextmanager
        def watched():
            with writing(self) as index:
                yield index
            calls.append(("commit", ""))

        return watched()

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(Catalogue, "writing", committed)
    key = chunk_key({}, [1])
    store.put(key, kv())
    assert (
        calls
        == [
            ("sync", tmp_path.name[-8:]),  # that the folder of segments is there
            ("sync", ".partial"),
            ("sync", "kv"),  # that the segment's folder is there
            ("rename", "safetensors"),
            ("sync", key[:2]),
            ("commit", ""),
        ]
    )
    calls.clear()
    write_atomically(tmp_path / "file", b"data")
    assert [name for name, _ in calls] == ["sync", "rename", "sync"]


def test_commits_reach_the_disk(tmp_path):
    """SQLite is asked to sync at every commit; the database is in WAL mode with foreign keys."""
    store = Store(tmp_path)
    with store.catalogue.writing() as index:
        asked = [
            index.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "foreign_keys", "journal_mode")
        ]
    assert asked == [2, 1, "wal"]


def test_readers_can_write_nothing(tmp_path):
    """A reading connection refuses every statement that changes; a read-only store every change."""
    Store(tmp_path).put(chunk_key({}, [1]), kv())
    with pytest.raises(StoreError, match="cannot be opened"), Store(tmp_path).catalogue.reading() as index:
        index.execute("DELETE FROM segments")
    store = Store(tmp_path, read_only=True)
    for change in (lambda: store.put_all({"0" * 64: kv()}), store.prune, lambda: store.drop("x")):
        with pytest.raises(StoreError, match="read only"):
            change()
    assert len(store) == 1


def test_a_saved_memory_answers_equally(make_engine, tmp_path):
    """Logits and sources of a loaded memory == those of the one that was saved; nothing is computed again."""
    engine = make_engine()
    memory = engine.remember([Document("a", TEXT * 4, {"page": 3}), Document("b", TEXT[::-1])])
    memory.save(tmp_path / "m")
    before = engine.answer("who?", memory, max_tokens=4)
    engine.base.run_layer = None  # any chunk pass would now fail
    loaded = engine.load_memory(tmp_path / "m")
    del engine.base.run_layer
    after = engine.answer("who?", loaded, max_tokens=4)
    assert [token.id for token in after.tokens] == [token.id for token in before.tokens]
    assert [(item.document_id, item.start, item.end) for item in after.passages] == [
        (item.document_id, item.start, item.end) for item in before.passages
    ]
    assert loaded.documents == memory.documents
    assert loaded.fingerprint == memory.fingerprint
    for slab, other in zip(memory.state.slabs, loaded.state.slabs, strict=True):
        assert slab.rows == other.rows
        for index in range(slab.kv.size):
            assert torch.equal(slab.kv.dense(index), other.kv.dense(index))


def test_other_models_and_other_formats_are_refused(make_engine, tmp_path):
    """Other weights, another dtype, nothing there, another format, a foreign database: each has its own message."""
    engine = make_engine()
    folder = tmp_path / "m"
    engine.remember([Document("a", TEXT)]).save(folder)
    with pytest.raises(StoreError, match=r"another model or settings \(base:"):
        make_engine("qwen2").load_memory(folder)
    with pytest.raises(StoreError, match=r"dtype: 'float32' there, 'float64' here"):
        make_engine(dtype=torch.float64).load_memory(folder)
    with pytest.raises(StoreError, match="was made by another model or settings"):
        make_engine("qwen2").remember([Document("b", TEXT)]).save(folder)
    with pytest.raises(StoreError, match="no saved memory in"):
        engine.load_memory(tmp_path / "nowhere")
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as index, index:
        index.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="format 99"):
        engine.load_memory(folder)
    (folder / "catalogue.sqlite").write_bytes(b"{" * 4096)
    with pytest.raises(StoreError, match="damaged"):
        engine.load_memory(folder)
    for content in (b"", None):
        (folder / "catalogue.sqlite").unlink() if content is None else (folder / "catalogue.sqlite").write_bytes(
            content
        )
        with pytest.raises(StoreError, match="missing or empty"):
            Store(folder)


def test_a_new_adapter_keeps_the_index(make_engine, tmp_path):
    """Chunk KV is the base's: an engine with other candidate projections loads what the first one saved."""
    memory = make_engine(scale=0.1).remember([Document("a", TEXT)])
    memory.save(tmp_path)
    assert make_engine(scale=0.4).load_memory(tmp_path).fingerprint == memory.fingerprint


def test_a_database_with_triggers_is_refused(make_engine, tmp_path):
    """A catalogue from elsewhere can bring nothing that runs when it is read or changed."""
    make_engine().remember([Document("a", TEXT)]).save(tmp_path)
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as index, index:
        index.execute("CREATE TRIGGER t AFTER INSERT ON documents BEGIN DELETE FROM collections; END")
    with pytest.raises(StoreError, match="its tables are not ours"):
        make_engine().load_memory(tmp_path)


def test_an_interrupted_read_resumes_from_the_store(make_engine, tmp_path, monkeypatch):
    """After a stop in the middle, reading again computes only the chunks that are missing."""
    from focus_core.store import memory as module

    engine = make_engine()
    monkeypatch.setitem(module._BATCH_TOKENS, "cpu", 33)
    counted: list[int] = []
    original = module.encode_chunks
    monkeypatch.setattr(
        module, "encode_chunks", lambda base, rows, *rest: counted.append(len(rows)) or original(base, rows, *rest)
    )
    words = " ".join(str(number) for number in range(120))

    def stop():
        if sum(counted) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.remember([Document("a", words)], store=tmp_path, check=stop)
    done = len(Store(tmp_path))
    assert done == sum(counted) - 1 == 2  # the third was stopped between its layers
    counted.clear()
    memory = engine.remember([Document("a", words)], store=tmp_path)
    assert sum(counted) == len(memory) - done > 0
    assert isinstance(memory, Memory)


def test_collections_lie_beside_each_other(make_engine, tmp_path):
    """Two collections of one store share chunk KV; each is listed, read and removed alone; odd names are refused."""
    engine = make_engine()
    one = engine.remember([Document("a", TEXT), Document("b", TEXT * 2)])
    one.save(tmp_path, name="one")
    one.subset(["a"]).save(tmp_path, name="two")
    store = Store(tmp_path)
    assert [(item.name, item.documents) for item in store.collections()] == [("one", 2), ("two", 1)]
    assert len(store) == len({chunk.ids for chunk in one.chunks})
    store.drop("one")
    store.prune(older_than=0)
    assert [item.id for item in engine.load_memory(tmp_path, name="two").documents] == ["a"]
    assert [item.id for item in engine.load_memory(tmp_path).documents] == ["a"]  # the only one there
    with pytest.raises(StoreError, match="no collection 'one'; there are two"):
        engine.load_memory(tmp_path, name="one")
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(ConfigError, match="collection's name"):
            one.save(tmp_path, name=name)


def test_one_collection_is_looked_up_by_its_name(make_engine, tmp_path):
    """Its facts and counts are those of the list, and looking for one reads no other."""
    engine = make_engine()
    for name in ("one", "two"):
        engine.remember([Document(name, TEXT * 3), Document("b", TEXT)]).save(tmp_path, name=name)
    store = Store(tmp_path, read_only=True)
    assert [store.counted(info.name) for info in store.collections()] == store.collections()
    assert store.counted("one").documents == 2
    assert (store.has("one"), store.has("three")) == (True, False)
    with pytest.raises(StoreError, match="there are one, two"):
        store.counted("three")
    assert not Store(tmp_path, tenant="other", read_only=True).has("one")
