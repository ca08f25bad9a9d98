"""Single flipped bits of a catalogue, each at the place that was found by `scripts/faults/store.py damages`.

What is tried is written on and repaired as after any damage: the store is whole again, or there is one clear error.
"""

import re
import sqlite3
from contextlib import closing

import pytest

from focus_core import Document
from focus_core.errors import StoreError
from focus_core.store.database import Store
from focus_core.store.indexing import index_documents, repair_collection

TEXT = "the cat sat on the mat and the dog ate the hat. " * 4


@pytest.fixture
def whole(make_engine, tmp_path):
    """An engine, a store of one document, and its answer."""
    engine = make_engine()
    memory = engine.remember([Document("a", TEXT)])
    memory.save(tmp_path)
    return engine, tmp_path, engine.answer("who?", memory, max_tokens=3).text


def pages(folder, name):
    """The bytes of the catalogue that a table or an index lies in."""
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as index:
        root = index.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0]
        size = index.execute("PRAGMA page_size").fetchone()[0]
    return slice((root - 1) * size, root * size)


def flip(folder, name, pattern, bit, skip):
    """Flip a bit of the first byte that a pattern finds, `skip` bytes on, in the pages of a table or an index."""
    path = folder / "catalogue.sqlite"
    data = bytearray(path.read_bytes())
    part = pages(folder, name)
    data[part.start + re.search(pattern, bytes(data[part])).start() + skip] ^= bit
    path.write_bytes(data)


def read(engine, folder, expected):
    """Answer and read every byte; what `verify` returns is raised as the command line does."""
    assert engine.answer("who?", engine.load_memory(folder), max_tokens=3).text == expected
    if bad := Store(folder).verify():
        raise StoreError(f"{bad} are damaged; run focusllm verify --repair")


def mended(engine, folder, expected):
    """Index on, repair, and check everything."""
    store = Store(folder)
    index_documents(store, "default", engine.encoder, [Document("a", TEXT)])
    repair_collection(store, "default", engine.encoder)
    assert store.verify() == []
    return engine.answer("who?", engine.load_memory(folder), max_tokens=3).text == expected


@pytest.mark.parametrize(
    ("where", "pattern", "bit", "skip"),
    [
        ("sqlite_autoindex_segments_1", rb"[0-9a-f]{64}", 1, 30),  # another key in the index than in the row
        ("segments", rb"[0-9a-f]{64}\{|[0-9a-f]{64}", 1, 30),  # another key in the row than in the index
        ("segments", rb"[0-9a-f]{64}", 0x40, 30),  # no key at all in the row
        ("segments", rb'"sums"', 1, 1),  # facts of another name
        ("segments", rb'"sums"', 0x80, 1),  # facts that are no text
    ],
)
def test_what_a_flipped_bit_hides_is_mended(whole, where, pattern, bit, skip):
    """A key that index and row tell differently, and facts that cannot be read: named, and whole after a repair."""
    engine, folder, expected = whole
    flip(folder, where, pattern, bit, skip)
    with pytest.raises(StoreError, match="verify --repair"):
        read(engine, folder, expected)
    assert mended(engine, folder, expected)


def test_a_size_that_is_not_the_files_is_noticed_and_mended(whole):
    """The number of bytes of a file is checked by every way of reading it, so a repair finds it too."""
    engine, folder, expected = whole
    with Store(folder).catalogue.writing() as index:
        index.execute("UPDATE segments SET size = size + 1")
    store = Store(folder)
    assert len(store.verify()) == len(store.keys())
    with pytest.raises(StoreError, match="lost or cut"):
        engine.answer("who?", engine.load_memory(folder), max_tokens=1)
    assert mended(engine, folder, expected)


def test_a_change_is_not_signed_over_damage(whole):
    """A writer does not put its own hash over rows that somebody else's damage has changed, nor raise a KeyError."""
    engine, folder, _ = whole
    with Store(folder).catalogue.writing() as index:
        index.execute("UPDATE documents SET checksum = x'00'")
    with pytest.raises(StoreError, match="hash over its rows"):
        index_documents(Store(folder), "default", engine.encoder, [Document("b", TEXT)])
    with pytest.raises(StoreError, match="damaged"):
        engine.load_memory(folder)


def test_damaged_chunk_kv_that_nothing_refers_to_is_forgotten(whole):
    """What `verify` names, a repair mends or drops: it is not named for ever."""
    engine, folder, expected = whole
    store = Store(folder)
    store.put("0" * 64, store.get(store.keys()[0]))
    store.segments.path("0" * 64).unlink()
    assert store.verify() == ["0" * 64]
    assert mended(engine, folder, expected)
    assert "0" * 64 not in store
