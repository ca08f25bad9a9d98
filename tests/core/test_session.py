"""Check what frameworks stand on: documents as they are handed over, memories that calls share, long memory."""

from __future__ import annotations

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest

from focus_core import Document
from focus_core.errors import ConfigError, EmptyCorpusError
from focus_core.session.documents import fingerprint, kept_ids, to_documents, written
from focus_core.session.engines import MemoryHolder, asked, engine_fingerprint, shared_memory
from focus_core.session.long_memory import LongMemory
from focus_core.store.database import Store
from focus_core.text.corpus import canonical, distinct

LONG = "the cat sat on the mat. " * 600


def _page(text, **metadata):
    return SimpleNamespace(page_content=text, metadata=metadata)


# -- documents --------------------------------------------------------------------------------------------------


def test_the_identity_of_a_document_covers_its_metadata():
    """Same id and text with other metadata is another document, whatever the values' types; equal ones are one."""
    one, other = Document("x", "text", {"title": "One"}), Document("x", "text", {"title": "Two"})
    assert [document.id for document in distinct([one, other], ())] == ["x", "x#2"]
    assert distinct([one], [Document("x", "text", {"title": "One"})]) == []
    assert fingerprint([one]) != fingerprint([other])
    values = [1, True, 1.0, "1", None, [1], (1,), {1}, {"a": 1}, {"a": "1"}, {1: "a"}, b"1", 1j]
    assert len({canonical({"k": value}) for value in values}) == len(values)
    assert canonical({"a": 1, "b": {"c": 2, "d": 3}}) == canonical({"b": {"d": 3, "c": 2}, "a": 1})


def test_documents_share_nothing_with_what_was_handed_over():
    """Metadata that are changed afterwards, however deep, change no document that was made before."""
    page, own = _page("text", tags=["a"]), Document("own", "text", {"tags": ["a"]})
    made = to_documents([page, own])
    page.metadata["tags"].append("b")
    own.metadata["tags"].append("b")
    assert [document.metadata for document in made] == [{"tags": ["a"]}] * 2


def test_blank_documents_are_left_out():
    """One blank page among others is left out; blank pages alone are an error; none at all is none."""
    assert [document.text for document in to_documents(["a text\nof two", _page(" \n"), Document("x", "")])] == [
        "a text\nof two"
    ]
    assert written([_page(" "), _page("a")])[0].page_content == "a"
    with pytest.raises(EmptyCorpusError, match="empty"):
        to_documents([_page(" ")])
    assert to_documents([]) == []


# -- memory -----------------------------------------------------------------------------------------------------


def test_new_metadata_of_a_known_text_cost_nothing(make_engine, monkeypatch):
    """The same text with new metadata is not read again: filters and citations see the new ones at once."""
    engine = make_engine()
    memory, holder = engine.remember([Document("x", "the cat sat", {"year": 1})]), MemoryHolder()
    monkeypatch.setattr("focus_core.store.memory.encode_chunks", None)
    memory.add([Document("x", "the cat sat", {"year": 2})])
    assert memory.documents[0].metadata == {"year": 2}
    assert holder.hold(engine, None, memory, wanted={"year": 1}).memory.documents == []
    held = holder.hold(engine, None, memory, wanted={"year": 2}).memory
    assert held.documents[0].metadata == {"year": 2}
    assert engine.stream("who?", held, max_tokens=1).documents["x"].metadata == {"year": 2}


def test_a_subset_is_of_one_moment(make_engine):
    """While documents come and go, a subset holds what it was asked for, and a filter finds what it chose."""
    engine = make_engine()
    memory = engine.remember([Document(name, f"text {name}") for name in "abcd"])
    long = LongMemory(engine=engine)
    long.put(memory.documents)
    stop, failures = threading.Event(), []

    def change() -> None:
        while not stop.is_set():
            memory.remove(["b"])
            memory.add([Document("b", "text b")])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            part = memory.subset(["a", "c"])
            if [document.id for document in part.documents] != ["a", "c"] or len(part) != 2:
                failures.append(part.documents)
    finally:
        stop.set()
        thread.join()
    assert failures == []

    def meanwhile(document: Document) -> bool:
        if document.id == "a":
            long.forget(["b"])
        return True

    assert len(MemoryHolder().hold(engine, None, long.memory, wanted=meanwhile).memory.documents) == 4
    long.put([Document("b", "text b")])
    assert len(long.recall("who?", 9, meanwhile)) == 4
    assert len(long.documents) == 3


# -- long memory ------------------------------------------------------------------------------------------------


def test_long_memory_takes_documents_of_frameworks(make_engine):
    """Pages are kept under their ids, sources or texts; nothing is lost where one of them cannot be kept."""
    memory = LongMemory(engine=make_engine())
    page = SimpleNamespace(id="p", page_content="by id", metadata={"source": "s"})
    memory.put([page, _page("by source", source="s"), _page("first"), _page("second"), "third"])
    assert [one.text for one in memory.documents] == ["by id", "by source", "first", "second", "third"]
    assert [one.id for one in memory.documents][:2] == ["p", "s"]
    assert len({one.id for one in memory.documents}) == 5
    memory.put([_page("first"), SimpleNamespace(id="p", page_content="by id", metadata={"v": 2})])
    assert len(memory.documents) == 5
    assert next(one for one in memory.documents if one.id == "p").metadata == {"v": 2}
    with pytest.raises(EmptyCorpusError):
        memory.put([SimpleNamespace(id="p", page_content="by id", metadata={"v": 3}), Document("q", " ")])
    assert next(one for one in memory.documents if one.id == "p").metadata == {"v": 2}


def test_long_questions_ask_with_their_tail(make_engine):
    """What is longer than the window asks with its tail; a memory without anything recalls nothing."""
    engine = make_engine()
    memory = LongMemory(engine=engine)
    assert memory.recall(LONG) == []
    memory.remember("the dog ate", "note")
    assert asked(engine, "who?") == "who?"
    assert LONG.endswith(asked(engine, LONG))
    assert [one.document.id for one in memory.recall(LONG)] == ["note"]
    assert memory.recall("who?", wanted=lambda document: False) == []


# -- trust ------------------------------------------------------------------------------------------------------


def test_a_filter_changes_no_metadata(make_engine):
    """A function that takes a value out of what it is shown has changed a copy."""
    memory = make_engine().remember([Document("a", "text", {"tags": ["x"]}), Document("b", "text", {})])
    assert kept_ids(memory.documents, lambda one: one.metadata.setdefault("tags", []).append("y") is None) == ["a", "b"]
    assert kept_ids(memory.documents, lambda one: one.metadata.pop("tags", None) is not None) == ["a"]
    assert [one.metadata for one in memory.documents] == [{"tags": ["x"]}, {}]


def test_metadata_that_contain_themselves_are_one_error(make_engine, tmp_path):
    """A circle in metadata is answered over, and refused where it would have to be written or compared."""
    engine, circle = make_engine(), {}
    circle["self"] = circle
    memory = engine.remember([Document("a", "the cat sat", circle)])
    assert engine.answer("who?", memory, max_tokens=2).tokens
    with pytest.raises(ConfigError, match="contain themselves"):
        fingerprint(memory.documents)
    with pytest.raises(ConfigError, match="cannot be saved"):
        memory.save(tmp_path)
    for folder in (None, tmp_path / "kept"):
        with pytest.raises(ConfigError, match="contain themselves"):
            LongMemory(folder, engine=engine).put([Document("a", "the cat sat", circle)])


def test_an_engine_is_not_pickled(make_engine):
    """Alone or inside something: one error that says what to do, not torch's or the tokenizer's."""
    engine = make_engine()
    for carry in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ConfigError, match=r"FocusEngine\.from_pretrained"):
            carry({"engine": engine} if carry is not copy.copy else engine)


def test_a_budget_is_no_part_of_what_an_answer_is_known_by(make_engine, tmp_path):
    """Where chunk KV lies changes no answer: fingerprints are equal, and so are the collections it is saved to."""
    engine = make_engine()
    small, documents = engine.with_config(memory_budget=0), [Document("a", "the cat sat")]
    assert engine.remember(documents).fingerprint == small.remember(documents).fingerprint
    assert engine_fingerprint(engine) == engine_fingerprint(small)
    digests = set()
    for name, one in (("one", engine), ("two", small)):
        one.remember(documents).save(tmp_path / name)
        digests.add(Store(tmp_path / name).collection("default").digest)
    assert len(digests) == 1
    assert shared_memory(small, tmp_path / "one").encoder.budget.limit == 0
    assert shared_memory(engine, tmp_path / "one").encoder.budget.limit is None


def test_a_memory_of_no_kind_is_refused(make_engine):
    """Not a memory, a name or a folder: the error says what it may be."""
    with pytest.raises(ConfigError, match="name or folder of a saved one; got int"):
        MemoryHolder().hold(make_engine(), memory=3)
