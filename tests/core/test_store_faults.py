"""Show that faults of earlier stores are gone: lost changes, escapes, half-written folders, damage, lost neighbours."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing

import pytest
import torch

from focus_core.errors import ConfigError, StoreError
from focus_core.model.chat import Message
from focus_core.session.corpus import index_paths
from focus_core.session.long_memory import LongMemory
from focus_core.store.database import Store
from focus_core.store.indexing import repair_collection
from focus_core.store.places import Place
from focus_core.store.segments import chunk_key
from focus_core.text.corpus import Document, load_documents

TEXT = "the cat sat on the mat and the dog ate the hat. "


def names(engine, place):
    return [document.id for document in engine.load_memory(place).documents]


def tiled(memory):
    """Whether chunks cover every document from its first character to its last."""
    for document in memory.documents:
        spans = sorted(
            (one.start, one.end) for item in memory.chunks for one in item.spans if one.document_id == document.id
        )
        reached = 0
        for start, end in spans:
            if start != reached:
                return False
            reached = end
        if reached != len(document.text):
            return False
    return True


# -- writers ----------------------------------------------------------------------------------------------------


def test_two_writers_keep_each_others_documents(make_engine, tmp_path):
    """Both begin with the same version and save at once: all three documents are there, chunks and all."""
    engine = make_engine()
    engine.remember([Document("a", TEXT)]).save(tmp_path)
    one, two = engine.load_memory(tmp_path), engine.load_memory(tmp_path)
    one.add([Document("b", "dog one")])
    two.add([Document("c", "hat two")])
    two.remove(["a"])
    threads = [threading.Thread(target=memory.save, args=(tmp_path,)) for memory in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = engine.load_memory(tmp_path)
    assert sorted(document.id for document in loaded.documents) == ["b", "c"]
    assert tiled(loaded)
    assert Store(tmp_path).verify() == []


def test_two_first_writers_of_one_folder(make_engine, tmp_path):
    """Neither has read anything there; both sets of documents are kept."""
    engine = make_engine()
    for name in ("a", "b"):
        engine.remember([Document(name, TEXT + name)]).save(tmp_path)
    assert names(engine, tmp_path) == ["a", "b"]
    engine.remember([Document("c", TEXT)]).save(tmp_path, replace=True)
    assert names(engine, tmp_path) == ["c"]


def test_a_question_writes_nothing(run, make_engine, tmp_path):
    """`ask` with a memory and further files leaves every byte of the store as it was, and undoes no `index`."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("the dog. " * 9)
    store = tmp_path / "store"
    assert run("index", tmp_path / "a.txt", "--memory", store)[0] == 0
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    code, _, err = run("ask", "who?", tmp_path / "b.txt", "--memory", store, "--max-tokens", 1)
    assert code == 0, err
    assert "b.txt" in err
    assert {path: data for path, data in before.items() if path.read_bytes() != data} == {}
    assert set(store.rglob("*.safetensors")) == {path for path in before if path.suffix == ".safetensors"}


def test_two_long_memories_on_one_folder(make_engine, tmp_path):
    """Notes of both are kept, and each sees the other's."""
    engine = make_engine()
    one, two = LongMemory(tmp_path, engine=engine), LongMemory(tmp_path, engine=engine)
    one.remember("the cat", "x")
    two.remember("the dog", "y")
    one.remember("the hat", "z")
    two.forget(["x"])
    for memory in (one, two, LongMemory(tmp_path, engine=engine)):
        assert sorted(document.id for document in memory.documents) == ["y", "z"]


def test_a_writer_waits_and_then_says_so(make_engine, tmp_path):
    """While another holds the write lock a change waits up to its limit; then one clear error, nothing changed."""
    engine = make_engine()
    engine.remember([Document("a", TEXT)]).save(tmp_path)
    store = Store(tmp_path, timeout=0.2)
    memory = engine.remember([Document("b", TEXT)])
    with Store(tmp_path).catalogue.writing():
        with pytest.raises(StoreError, match=r"another process has been writing to .* for 0.2 seconds"):
            memory.save(store)
        assert names(engine, tmp_path) == ["a"]  # readers do not wait
    memory.save(store)
    assert names(engine, tmp_path) == ["a", "b"]


def test_prune_takes_nothing_that_was_just_put(make_engine, tmp_path):
    """Chunk KV that a writer has put and not yet committed survives a prune; what is old and unreferenced goes."""
    engine, store = make_engine(), Store(tmp_path)
    memory = engine.remember([Document("a", TEXT)], store=store)
    assert store.prune() == 0
    memory.save(store)
    memory.remove(["a"])
    memory.save(store)
    assert store.prune() == 0  # a reader may still be at it
    with store.catalogue.writing() as index:
        index.execute("UPDATE segments SET touched = 0")
    assert store.prune() == len(engine.encoder.cut(Document("a", TEXT)))
    assert list(store.segments.found()) == []


def test_a_save_after_a_prune_of_everything_puts_it_again(make_engine, tmp_path, monkeypatch):
    """A prune between put and commit, however unlikely, costs time and loses nothing."""
    engine, store = make_engine(), Store(tmp_path)
    memory, commit = engine.remember([Document("a", TEXT)]), Store.commit

    def pruned_first(self, *arguments):
        monkeypatch.setattr(Store, "commit", commit)
        self.prune(older_than=0)
        return commit(self, *arguments)

    monkeypatch.setattr(Store, "commit", pruned_first)
    memory.save(store)
    assert store.verify() == []
    assert names(engine, tmp_path) == ["a"]


@pytest.mark.slow
def test_documents_of_one_id_are_updated_as_one(make_engine, tmp_path):
    """A reader never sees a document missing while it is updated, nor a half-done bulk change."""
    engine = make_engine()
    memory = LongMemory(tmp_path, engine=engine)
    memory.remember("the cat sat", "x", {"n": 0})
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            seen.add(tuple(sorted(document.id for document in engine.load_memory(tmp_path).documents)))
            seen.add(tuple(sorted(document.id for document in memory._memory.documents)))

    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(6):
        memory.put([Document("x", "the cat sat", {"n": number}), Document("y", f"dog {number}")])
        memory.forget(["y"])
    stop.set()
    thread.join()
    assert seen <= {("x",), ("x", "y")}


# -- from elsewhere ---------------------------------------------------------------------------------------------


def test_prune_leaves_the_folder_of_no_store(make_engine, tmp_path):
    """A key that is a path is no key: nothing is deleted elsewhere, not through links either."""
    victim = tmp_path / "models"
    victim.mkdir()
    key = "ab" + "0" * 62
    for name in ("model.safetensors", f"{key}.safetensors"):
        (victim / name).write_bytes(b"weights")
    make_engine().remember([Document("a", TEXT)]).save(tmp_path / "m")
    store = Store(tmp_path / "m")
    with pytest.raises(StoreError, match="CHECK constraint"), store.catalogue.writing() as index:
        index.execute("INSERT INTO segments VALUES (?, 1, 1, '{}', 0)", (str(victim / "model"),))
    with closing(sqlite3.connect(tmp_path / "m" / "catalogue.sqlite")) as index, index:
        index.execute("PRAGMA ignore_check_constraints = ON")
        index.execute("INSERT INTO segments VALUES (?, 1, 1, '{}', 0)", (str(victim / "model"),))
    (tmp_path / "m" / "kv" / "ab").symlink_to(victim)
    store.prune(older_than=0)
    with pytest.raises(StoreError, match="is no key"):
        store.segments.delete(str(victim / "model"))
    with pytest.raises(StoreError, match="leads out of the store"):
        store.segments.delete(key)
    with pytest.raises(StoreError, match="leads out of the store"):
        store.put_all({key: {"kv": torch.zeros(1, 2)}})
    assert sorted(path.name for path in victim.iterdir()) == sorted(["model.safetensors", f"{key}.safetensors"])


def test_a_segment_that_is_no_file_is_refused(tmp_path):
    """A pipe in the place of chunk KV blocks nobody, and a link is not followed."""
    store, key = Store(tmp_path), chunk_key({}, [1])
    store.put(key, {"kv": torch.zeros(1, 2)})
    path = store.segments.path(key)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="cannot be read"):
        store.get(key)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="cannot be read"):
        store.get(key)


# -- damage and stops -------------------------------------------------------------------------------------------


def test_a_stop_before_the_commit_changes_nothing(make_engine, tmp_path, monkeypatch):
    """A save that fails between chunk KV and rows leaves the version before, whole; saving again finishes it."""
    engine = make_engine()
    engine.remember([Document("a", TEXT)]).save(tmp_path)
    memory = engine.load_memory(tmp_path)
    memory.add([Document("b", "the secret code is 42")])
    commit = Store.commit

    def full(self, *arguments):
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "commit", full)
    with pytest.raises(StoreError):
        memory.save(tmp_path)
    monkeypatch.setattr(Store, "commit", commit)
    loaded = engine.load_memory(tmp_path)
    assert names(engine, tmp_path) == ["a"]
    assert tiled(loaded)
    engine.answer("who?", loaded, max_tokens=2)
    memory.save(tmp_path)
    assert names(engine, tmp_path) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE documents SET text = CAST(REPLACE(text, 'cat', 'cot') AS BLOB) WHERE position = 0",
        "UPDATE documents SET metadata = '{\"page\": 4}' WHERE position = 0",
        "UPDATE chunks SET ids = ids || x'00000000' WHERE id = 1",
        "UPDATE chunks SET ids = x'00' WHERE id = 1",
        "UPDATE spans SET stop = stop - 1 WHERE chunk = 1",
        "UPDATE documents SET position = 9 WHERE position = 0",
        "DELETE FROM chunks WHERE id = 1",
        "DELETE FROM documents WHERE position = 0",
        "UPDATE collections SET config = '{}'",
        "UPDATE collections SET facts = '{'",
        "UPDATE collections SET version = 'x'",
        "UPDATE documents SET text = 7",
        "UPDATE documents SET name = x'ff' WHERE position = 0",
        "UPDATE spans SET document = 2 WHERE chunk = 1",
    ],
)
def test_a_changed_or_lost_row_is_noticed(make_engine, tmp_path, damage):
    """Any row that is not what was written is one clear error, never another citation."""
    engine = make_engine()
    engine.remember([Document("a", TEXT * 2, {"page": 3}), Document("b", "the dog")]).save(tmp_path)
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as index, index:
        index.execute(damage)
    with pytest.raises(StoreError, match="damaged"):
        engine.load_memory(tmp_path)


def test_damaged_chunks_are_refused_and_can_be_indexed_again(make_engine, tmp_path):
    """What the message says to do makes the store whole: the bad entry is not read, nor kept."""
    engine, store = make_engine(), Store(tmp_path / "m")
    (tmp_path / "a.txt").write_text(TEXT * 3)
    index_paths(engine, Place(tmp_path / "m"), [tmp_path / "a.txt"])
    expected = engine.answer("who?", engine.load_memory(tmp_path / "m"), max_tokens=4).text
    path = next((tmp_path / "m" / "kv").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="verify --repair"):
        engine.answer("who?", engine.load_memory(tmp_path / "m"), max_tokens=1)
    assert repair_collection(store, "default", engine.encoder) == 1
    assert store.verify() == []
    path.unlink()
    index_paths(engine, Place(tmp_path / "m"), [tmp_path / "a.txt"])
    assert store.verify() == []
    assert engine.answer("who?", engine.load_memory(tmp_path / "m"), max_tokens=4).text == expected
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    engine.remember([Document("other", TEXT * 3)], store=store)
    assert store.verify() == []


# -- packed -----------------------------------------------------------------------------------------------------


def test_packed_neighbours_survive(make_engine):
    """Chunks (A, B1) and (B2, C): removing, replacing or filtering A leaves B and C whole."""
    engine = make_engine()
    a, b, c = Document("A", "cat"), Document("B", "zebra fox lion wolf owl\n\nrat bit ox and hen"), Document("C", "zap")

    def packed():
        memory = engine.remember([a, b, c], packed=True)
        assert [[span.document_id for span in chunk.spans] for chunk in memory.chunks] == [["A", "B"], ["B", "C"]]
        return memory

    memory = packed()
    part = memory.subset(["A", "B"])
    assert [document.id for document in part.documents] == ["A", "B"]
    assert tiled(part)
    memory.remove(["A"])
    assert [document.id for document in memory.documents] == ["B", "C"]
    assert tiled(memory)
    memory = packed()
    memory.add([Document("A", "cats")])
    assert [document.id for document in memory.documents] == ["B", "C", "A"]
    assert tiled(memory)
    part, alone = packed().subset(["B"]).chunks, engine.encoder.cut(b)
    assert [token for chunk in part for token in chunk.ids] == [token for chunk in alone for token in chunk.ids]


def test_packed_memories_are_saved_and_changed(make_engine, tmp_path):
    """Saved, loaded, changed and saved again: rows and chunks are those of the memory."""
    engine = make_engine()
    texts = {"A": "cat", "B": "zebra fox lion wolf owl\n\nrat bit ox and hen", "C": "zap", "D": "hat"}
    memory = engine.remember([Document(key, text) for key, text in texts.items()], packed=True)
    memory.save(tmp_path)
    memory.remove(["A"])
    memory.save(tmp_path)
    loaded = engine.load_memory(tmp_path)
    assert loaded.documents == memory.documents
    assert [(item.ids, item.spans) for item in loaded.chunks] == [(item.ids, item.spans) for item in memory.chunks]
    assert tiled(loaded)
    with pytest.raises(StoreError, match="shares a chunk"):
        Store(tmp_path).remove("default", ["C"])


# -- what cannot be saved ---------------------------------------------------------------------------------------


def test_a_value_that_json_cannot_hold_is_refused_before_anything_changes(make_engine, tmp_path):
    """The change that holds it raises, and every later one is saved."""
    memory = LongMemory(tmp_path, engine=make_engine())
    memory.remember("the cat", "x")
    for value in ({1, 2}, float("nan"), object()):
        with pytest.raises(ConfigError, match="cannot be saved"):
            memory.put([Document("y", "the dog"), Document("x", "the cat", {"value": value})])
    assert [document.id for document in memory.documents] == ["x"]
    memory.remember("the hat", "z")
    assert names(memory.engine, tmp_path) == ["x", "z"]


def test_a_failed_save_is_not_kept_in_the_process(make_engine, tmp_path, monkeypatch):
    """A bulk change that cannot be saved has changed nothing, on disk or in memory."""
    memory = LongMemory(tmp_path, engine=make_engine())
    memory.put([Document("x", "the cat"), Document("y", "the dog")])

    def full(self, items):
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_all", full)
        with pytest.raises(StoreError, match="full"):
            memory.put([Document("x", "the cats"), Document("z", "the hat")])
    assert [document.text for document in memory.documents] == ["the cat", "the dog"]
    memory.remember("the mat", "w")
    assert names(memory.engine, tmp_path) == ["x", "y", "w"]


def test_names_of_any_bytes_are_saved(make_engine, tmp_path):
    """A file name that is not UTF-8 is read, saved, loaded and printed."""
    (tmp_path / os.fsdecode(b"weird\xff.txt")).write_bytes(TEXT.encode())
    engine = make_engine()
    engine.remember(load_documents([tmp_path])).save(tmp_path / "m")
    (document,) = engine.load_memory(tmp_path / "m").documents
    assert document.id.endswith("weird\\xff.txt")
    document.id.encode()


# -- conversations ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_conversation_is_not_written_into_the_users_memory(make_engine, tmp_path):
    """Twelve turns that outgrow the window leave the store's chunks and documents as they were."""
    engine = make_engine()
    engine.remember([Document("a", TEXT)]).save(tmp_path)
    memory, before = engine.load_memory(tmp_path), Store(tmp_path).keys()
    turns = []
    for number in range(12):
        turns.append(Message("user", f"private secret number {number} is {number * 7919} the cat sat"))
        turns.append(Message("assistant", engine.chat(turns, memory, max_tokens=8).answer.text or "x"))
    assert any(
        item.document_id.startswith("turn-") for item in engine.chat(turns[:-1], memory, max_tokens=2).answer.evidence
    )
    assert Store(tmp_path).keys() == before
    assert [document.id for document in memory.documents] == ["a"]


def test_turns_replace_no_documents_of_their_names(make_engine):
    """Documents called prompt and turn-N are still there, as their user wrote them, beside the conversation's."""
    engine = make_engine()
    memory = engine.remember([Document("prompt", "USER FILE alpha"), Document("turn-1", "USER FILE beta")])
    turns = [Message("user" if number % 2 == 0 else "assistant", f"turn {number} " + TEXT * 3) for number in range(9)]
    with engine.chat(turns, memory, max_tokens=2) as stream:
        texts = {key: document.text for key, document in stream.documents.items()}
    assert texts["prompt"] == "USER FILE alpha"
    assert texts["turn-1"] == "USER FILE beta"
    assert "turn-1#2" in texts


def test_a_folder_is_not_read_into_its_own_memory(run, tmp_path, monkeypatch):
    """`focusllm index --memory mem .` three times: the same documents, the same tokens."""
    (tmp_path / "a.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        code, _, err = run("index", ".", "--memory", "mem")
        assert code == 0, err
    assert "1 unchanged" in err
    assert [item.documents for item in Store("mem").collections()] == [1]


# -- disks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_error(make_engine, tmp_path, monkeypatch, call):
    """Whichever write fails: a StoreError, what was there is there, no temporary file stays, and then it goes on."""
    engine = make_engine()
    engine.remember([Document("a", TEXT)]).save(tmp_path)
    original, memory = getattr(os, call), engine.load_memory(tmp_path)
    memory.add([Document("b", " ".join(map(str, range(200))))])
    for failing in range(1, 5):
        count = 0

        def full(*arguments, limit=failing):
            nonlocal count
            count += 1
            if count == limit:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(StoreError, match="No space left"):
                memory.save(tmp_path)
        assert names(engine, tmp_path) == ["a"]
        assert not list((tmp_path / "kv").glob(".*"))
    memory.save(tmp_path)
    assert names(engine, tmp_path) == ["a", "b"]


def test_a_folder_that_cannot_be_made_is_one_error(run, tmp_path):
    """A store below a file: exit code 3, one message, no traceback; and a question names what is missing."""
    (tmp_path / "a.txt").write_text(TEXT)
    code, _, err = run("index", tmp_path / "a.txt", "--memory", tmp_path / "a.txt" / "m")
    assert code == 3
    assert "cannot be used" in err
    assert "Traceback" not in err
    code, _, err = run("ask", "who?", "--memory", tmp_path / "nothing")
    assert code == 3
    assert "no saved memory in" in err
