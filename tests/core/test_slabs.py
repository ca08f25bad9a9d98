"""Check how chunk KV is laid out: few slabs, none too large, little padding, and the KV of every chunk its own."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_core.method.kv import ChunkBatch
from focus_core.method.slabs import Layout, Slab
from focus_core.text.chunking import Chunk, Span
from focus_core.text.corpus import Document

LONGEST = 64


def chunk(ids):
    return Chunk(tuple(ids), (Span("document", 0, 1),))


def slab_of(groups):
    """Return a slab whose KV tells which ids it belongs to."""
    return Slab.of(groups, ChunkBatch.gather([kv_of(alike[0].ids) for alike in groups]))


def kv_of(ids):
    return torch.tensor(ids, dtype=torch.float32).view(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 2)


def check(slabs, expected, layout):
    """Every chunk is held once, with its own KV, in a slab of one length class and within the limit."""
    held = [(id(item), item) for slab in slabs for item in slab.chunks]
    assert sorted(key for key, _ in held) == sorted(map(id, expected))
    for slab in slabs:
        for item, tensor in slab.tensors():
            torch.testing.assert_close(tensor, kv_of(item.ids))
        lengths = [len(item.ids) for item in slab.chunks]
        assert max(lengths) + 8 <= 1.4 * (min(lengths) + 8) + 1e-9
        assert slab.batch.size == 1 or slab.batch.size * max(lengths) * layout.token_bytes <= layout.slab_bytes


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, LONGEST), min_size=1, max_size=5), max_size=12),
    st.integers(0, 2**16),
    st.sampled_from([600, 5_000, 10**9]),
)
def test_any_history_keeps_every_chunk(history, seed, limit):
    """Adding and removing in any order: chunks, KV, classes and limit hold after every change."""
    layout, rng, slabs, present = Layout(LONGEST, 16, limit), random.Random(seed), (), []
    for lengths in history:
        new = [chunk([rng.randint(0, 3)] * length) for length in lengths]
        slabs = layout.joined([*slabs, *map(slab_of, layout.groups(new))])
        present += new
        check(slabs, present, layout)
        gone = [item for item in present if rng.random() < 0.3]
        kept = [slab.without(set(map(id, gone))) for slab in slabs]
        slabs = layout.joined([slab for slab in kept if slab is not None])
        present = [item for item in present if not any(item is other for other in gone)]
        check(slabs, present, layout)


@pytest.mark.parametrize("limit", [10**9, 40 * LONGEST * 16])
def test_chunks_that_come_one_by_one_lie_in_few_slabs(limit):
    """300 additions leave at most log2 as many slabs, or twice what the limit makes of them; copies are few."""
    layout, slabs, copied = Layout(LONGEST, 16, limit), (), 0
    for number in range(300):
        new = slab_of(layout.groups([chunk([number] * LONGEST)])[0])
        before = {slab.batch.data.data_ptr() for slab in (*slabs, new)}
        slabs = layout.joined([*slabs, new])
        copied += sum(slab.batch.size for slab in slabs if slab.batch.data.data_ptr() not in before)
    full = math.ceil(300 * LONGEST * 16 / limit)
    assert len(slabs) <= 2 * full + math.log2(300)
    assert copied <= 300 * (math.log2(300) + 1)
    assert sum(slab.batch.size for slab in slabs) == 300


def test_equal_chunks_share_a_row_also_when_slabs_are_joined():
    """Three equal chunks of three additions are one row."""
    layout, slabs = Layout(LONGEST, 16, 10**9), ()
    for _ in range(3):
        slabs = layout.joined([*slabs, slab_of(layout.groups([chunk([7] * 20)])[0])])
    assert [(len(slab.chunks), slab.batch.size) for slab in slabs] == [(3, 1)]


def test_a_change_copies_one_slab_only(make_engine, monkeypatch):
    """Replacing one document leaves the other slabs' tensors where they are, and answers like a memory made anew."""
    from focus_core.store import encoder as module

    engine = make_engine(chunk_size=32)
    row = 32 * engine.encoder.layout.token_bytes
    monkeypatch.setitem(module._SLAB_BYTES, "cpu", 4 * row)
    engine = make_engine(chunk_size=32)
    texts = [f"the cat number {number} sat on the mat of the dog" for number in range(40)]
    memory = engine.remember([Document(str(index), text) for index, text in enumerate(texts)])
    assert len(memory.state.slabs) > 5
    before = {slab.batch.data.data_ptr() for slab in memory.state.slabs}
    texts[17] = "a hat"
    memory.add([Document("17", texts[17])])
    after = {slab.batch.data.data_ptr() for slab in memory.state.slabs}
    assert len(before - after) == 1
    fresh = engine.remember([Document(str(index), text) for index, text in enumerate(texts)])
    one, two = (engine.answer("who sat", item, max_tokens=4, logprobs=1) for item in (memory, fresh))
    assert one.text == two.text
    for item, other in zip(one.tokens, two.tokens, strict=True):
        assert item.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_memory_that_grew_by_document_has_few_slabs(make_engine):
    """As an agent's memory grows: forty additions, a few slabs, the same answer as when read at once."""
    engine = make_engine(chunk_size=32)
    documents = [Document(str(number), f"message {number} of the dog") for number in range(40)]
    whole, grown = engine.remember(documents), engine.remember(documents[:1])
    for document in documents[1:]:
        grown.add([document])
    assert len(grown.state.slabs) <= len(whole.state.slabs) + 6
    expected, found = (engine.answer("who", memory, max_tokens=4) for memory in (whole, grown))
    assert found.text == expected.text
    assert [item.document_id for item in found.evidence[:3]] == [item.document_id for item in expected.evidence[:3]]


def test_a_memory_without_room_to_join_stays_as_it_is(make_engine, monkeypatch):
    """Joining is an improvement, not a need: where it runs out of memory, documents are added all the same."""
    engine = make_engine(chunk_size=32)
    memory = engine.remember([Document("a", "the cat sat")])

    def full(self, slabs):
        raise MemoryError

    monkeypatch.setattr(Layout, "_join", full)
    memory.add([Document("b", "the dog sat")])
    assert (len(memory), len(memory.state.slabs)) == (2, 2)
