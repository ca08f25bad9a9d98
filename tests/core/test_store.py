"""Prove invariant 6: what is stored comes back bit for bit, and anything else is refused."""

from __future__ import annotations

import json

import pytest
import torch

from focus_core.errors import StoreError
from focus_core.files import write_atomically
from focus_core.store.memory import Memory
from focus_core.store.segments import Store, chunk_key
from focus_core.text.corpus import Document

TEXT = "the cat sat on the mat and the dog ate the hat. "


def test_round_trip_is_bit_exact_and_idempotent(tmp_path):
    """get(put(x)) == x for bfloat16 and float32; a second put writes nothing; facts make the key."""
    store = Store(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        tensor = torch.randn(2, 2, 2, 5, 8).to(dtype)
        key = chunk_key({"dtype": str(dtype)}, [1, 2])
        assert store.put(key, tensor)
        assert not store.put(key, tensor)
        back = store.get(key)
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
    assert len(store) == 2
    assert len({chunk_key({"a": 1}, [1, 2]), chunk_key({"a": 2}, [1, 2]), chunk_key({"a": 1}, [12])}) == 3


def test_a_flipped_byte_is_found(tmp_path):
    """verify() names the damaged chunk and get() refuses it; an absent file too; the others are read."""
    store = Store(tmp_path)
    keys = [chunk_key({}, [index]) for index in range(3)]
    for index, key in enumerate(keys):
        store.put(key, torch.full((1, 2, 1, 2, 4), float(index)))
    path = store._path(keys[1])
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    store._path(keys[2]).unlink()
    assert store.verify() == sorted(keys[1:])
    with pytest.raises(StoreError, match="damaged"):
        store.get(keys[1])
    with pytest.raises(StoreError, match="cannot be read"):
        store.get(keys[2])
    with pytest.raises(StoreError, match="no chunk"):
        store.get("0" * 64)
    assert store.get(keys[0]).sum() == 0
    assert store.prune([keys[0]]) == 2
    assert store.keys() == [keys[0]]


def test_a_crashed_write_leaves_nothing(tmp_path):
    """A write that fails in the middle leaves the old file and no temporary one."""
    target = tmp_path / "file"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, "not bytes")
    assert target.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


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
        for index in range(slab.batch.size):
            assert torch.equal(slab.batch.chunk(index), other.batch.chunk(index))


def test_other_weights_dtype_and_damage_are_refused(make_engine, tmp_path):
    """A memory of other weights, of another dtype, half-written, of another format: each has its own message."""
    engine = make_engine()
    folder = tmp_path / "m"
    engine.remember([Document("a", TEXT)]).save(folder)
    with pytest.raises(StoreError, match=r"another model or settings \(base:"):
        make_engine("qwen2").load_memory(folder)
    with pytest.raises(StoreError, match=r"dtype: 'float32' there, 'float64' here"):
        make_engine(dtype=torch.float64).load_memory(folder)
    with pytest.raises(StoreError, match=r"memory\.json is missing"):
        engine.load_memory(tmp_path / "nowhere")
    manifest = json.loads((folder / "memory.json").read_text())
    (folder / "memory.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(StoreError, match="format 99"):
        engine.load_memory(folder)
    (folder / "memory.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        engine.load_memory(folder)


def test_an_interrupted_read_resumes_from_the_store(make_engine, tmp_path, monkeypatch):
    """After a stop in the middle, reading again computes only the chunks that are missing."""
    from focus_core.store import memory as module

    engine = make_engine()
    monkeypatch.setitem(module._BATCH_TOKENS, "cpu", 33)
    counted: list[int] = []
    original = module.encode_chunks
    monkeypatch.setattr(
        module, "encode_chunks", lambda base, rows, check: counted.append(len(rows)) or original(base, rows, check)
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
