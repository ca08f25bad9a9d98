"""Check chunk KV: what is written is read, however it came to lie where it does, in every format."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_core.method import kv as module
from focus_core.method.attention import Part, attend, attend_chunks, merge
from focus_core.method.kv import ChunkKV, best_block, blocked
from focus_core.method.sources import FIRST, KVShape
from focus_core.store import memory as memory_module
from focus_core.text.corpus import Document

FORMATS = ["base", "int8", "int4"]
STEPS = {"base": 0.0, "int8": 1 / 100, "int4": 1 / 6}  # of the largest number, what rounding may cost


def shape_of(written="base", dtype=torch.float32, head_dim=8):
    return KVShape(2, 2, head_dim, dtype, torch.device("cpu"), written)


def filled(lengths, written="base", seed=0, dtype=torch.float32, head_dim=8):
    """Chunk KV of random numbers, and what was written: per chunk (layers, 2, kv_heads, length, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    shape, longest = shape_of(written, dtype, head_dim), max(lengths)
    data = torch.randn(2, 2, len(lengths), 2, longest, head_dim, generator=generator).to(dtype)
    kv = ChunkKV.allocate(shape, lengths)
    for layer in range(2):
        kv.write(layer, data[layer, 0], data[layer, 1])
    return kv, [data[:, :, row, :, :length] for row, length in enumerate(lengths)]


def assert_near(found, expected, written):
    bound = STEPS[written] * float(expected.abs().max())
    assert (found.float() - expected.float()).abs().max() <= bound
    assert torch.equal(found[..., :FIRST, :], expected[..., :FIRST, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written", FORMATS)
def test_what_is_written_is_read(written, dtype):
    """Chunks of many lengths, one shorter than the first tokens: read == written, but for the format's rounding."""
    lengths = [700, 300, 300, 130, 64, 33, 5, 4, 2]
    kv, expected = filled(lengths, written, dtype=dtype)
    for row, item in enumerate(expected):
        assert_near(kv.dense(row), item, written)
    other = ChunkKV.allocate(kv.shape, lengths[::-1])
    for row in range(len(lengths)):
        other.put(len(lengths) - 1 - row, kv.get(row))
        assert torch.equal(other.dense(len(lengths) - 1 - row), kv.dense(row))


@pytest.mark.parametrize("written", FORMATS)
def test_formats_are_as_small_as_they_say(written):
    """Bytes of 64 channels: 8 bits about half of bfloat16, 4 bits about a third."""
    base = ChunkKV.allocate(shape_of("base", torch.bfloat16, 64), [512] * 4).nbytes
    share = ChunkKV.allocate(shape_of(written, torch.bfloat16, 64), [512] * 4).nbytes / base
    assert {"base": 1.0, "int8": 0.54, "int4": 0.32}[written] == pytest.approx(share, abs=0.02)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 150), min_size=1, max_size=5), min_size=1, max_size=10),
    st.integers(0, 2**16),
    st.sampled_from(FORMATS),
)
def test_any_history_keeps_every_chunk(history, seed, written):
    """Adding and removing in any order: every chunk left has the KV that it was given, and little lies unused."""
    rng, kv, present = random.Random(seed), None, []
    for number, lengths in enumerate(history):
        new, expected = filled(lengths, written, number)
        grown = kv.extended(lengths) if kv is not None else ChunkKV.allocate(new.shape, lengths)
        for row in range(len(lengths)):
            grown.put(grown.size - len(lengths) + row, new.get(row))
        kv, present = grown, present + expected
        kept = [row for row in range(len(present)) if rng.random() < 0.7]
        kv, present = kv.choose(kept), [present[row] for row in kept]
        assert kv.size == len(present)
        for row, item in enumerate(present):
            assert_near(kv.dense(row), item, written)
        assert kv._live() >= module._LIVE


def test_chunks_that_come_one_by_one_are_copied_few_times(monkeypatch):
    """300 additions: a chunk is copied about log(300) / log(1.25) times in all, not once an addition."""
    copied, original = [0], ChunkKV.copied
    monkeypatch.setattr(ChunkKV, "copied", lambda self, more=(): (copied.append(self.size), original(self, more))[1])
    kv, _ = filled([20])
    for _ in range(300):
        kv = kv.extended([20])
    assert sum(copied) < 300 * 8
    assert kv.size == 301


def test_an_older_view_is_left_alone():
    """Two views of one source grow: each has its own rows, and what both share stays as it was."""
    kv, expected = filled([40, 30])
    kv = kv.copied([8])
    kv = kv.rows(0, 2)
    more = [filled([25], seed=seed) for seed in (5, 6)]
    grown = [kv.extended([25]) for _ in more]
    for one, (new, _) in zip(grown, more, strict=True):
        one.put(2, new.get(0))
    for one, (_, own) in zip(grown, more, strict=True):
        torch.testing.assert_close(one.dense(2), own[0])
        torch.testing.assert_close(one.dense(0), expected[0])


@pytest.mark.parametrize("lengths", [[512] * 30, [64] * 100, [30] * 100, [512, 400, 90, 30] * 10, [3, 2]])
def test_blocks_fit_what_they_hold(lengths):
    """Like chunks fill their blocks; a mixture leaves at most a quarter empty."""
    block = best_block([length + 1 for length in lengths])
    held = sum(blocked(length + 1, block) for length in lengths)
    assert held <= 1.34 * sum(lengths) + block


# -- attention over it ------------------------------------------------------------------------------------------


def reference(query, chunks, layer, scale, softcap, others):
    """Attend chunk by chunk to its keys as one tensor."""
    parts = []
    for row, chunk in enumerate(chunks):
        keys, values = (part[None].to(query.dtype) for part in chunk[layer])
        own = Part(torch.zeros_like(query[row : row + 1]), torch.full(query[row : row + 1].shape[:3], -1e9))
        if keys.shape[2] > FIRST:
            own = attend(query[row : row + 1], keys[:, :, FIRST:], values[:, :, FIRST:], scale, softcap=softcap)
        parts.append(merge([own, *(Part(*(item[row : row + 1] for item in part)) for part in others)]))
    return Part(*(torch.cat(items) for items in zip(*parts, strict=True)))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("written", FORMATS)
def test_attention_equals_that_over_each_chunk(written, rows, softcap):
    """Few rows (over blocks) and many (over whole chunks), scattered and left-out chunks: == one chunk at a time."""
    lengths = [300, 4, 150, 150, 33, 2, 90, 600]
    kv, _ = filled(lengths, written)
    kv = kv.extended([70]).rows(0, 8).select([7, 0, 1, 3, 5, 2])
    chunks = [kv.dense(row) for row in range(kv.size)]
    query = torch.randn(kv.size, 4, rows, 8)
    others = [Part(torch.randn(kv.size, 4, rows, 8), torch.randn(kv.size, 4, rows)) for _ in range(2)]
    found = attend_chunks(query, kv.layer(1), 0.4, softcap=softcap, others=others)
    expected = reference(query, chunks, 1, 0.4, softcap, others)
    torch.testing.assert_close(found, expected.out, atol=1e-4, rtol=1e-4)


# -- memories ---------------------------------------------------------------------------------------------------


def answers_alike(engine, one, two):
    first, second = (engine.answer("who sat", item, max_tokens=4, logprobs=1) for item in (one, two))
    assert first.text == second.text
    for item, other in zip(first.tokens, second.tokens, strict=True):
        assert item.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_memory_that_grew_by_document_is_one_slab(make_engine):
    """Forty additions and a replacement: one slab, and the answer of a memory that was read at once."""
    engine = make_engine(chunk_size=32)
    texts = [f"the cat number {number} sat on the mat of the dog" for number in range(40)]
    grown = engine.remember([])
    for number, text in enumerate(texts):
        grown.add([Document(str(number), text)])
    texts[17] = "a hat"
    grown.add([Document("17", texts[17])])
    assert len(grown.state.slabs) == 1
    answers_alike(engine, grown, engine.remember([Document(str(index), text) for index, text in enumerate(texts)]))


def test_equal_chunks_share_a_row_also_when_they_come_later(make_engine):
    """Three equal documents of three additions are one row, computed once; removing one leaves the others."""
    engine = make_engine(chunk_size=32)
    memory = engine.remember([])
    for name in "abc":
        memory.add([Document(name, "the cat sat")])
    assert [(len(slab.chunks), slab.kv.size) for slab in memory.state.slabs] == [(3, 1)]
    memory.remove(["b"])
    assert [(len(slab.chunks), slab.kv.size) for slab in memory.state.slabs] == [(2, 1)]


def test_a_memory_without_room_to_copy_goes_on_in_a_second_slab(make_engine, monkeypatch):
    """Where a copy would not fit, documents are added all the same, and the answer is that of one slab."""
    engine = make_engine(chunk_size=32)
    documents = [Document(name, f"the {name} sat on the mat") for name in ("cat", "dog", "hat")]
    memory = engine.remember(documents[:1])
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 1000)
    memory.add(documents[1:])
    assert (len(memory), len(memory.state.slabs)) == (3, 2)
    monkeypatch.undo()
    answers_alike(engine, memory, engine.remember(documents))
    memory.remove(["cat"])
    assert len(memory.state.slabs) == 1


@pytest.mark.parametrize("written", ["int8", "int4"])
def test_a_memory_in_few_bits_answers_much_like_one_in_full(make_engine, written, tmp_path):
    """Its logits are near, it is smaller; saved and loaded it answers the same, by an engine of another format too."""
    engine = make_engine(chunk_size=64, kv_format=written)
    full = make_engine(chunk_size=64)
    text = "the cat sat on the mat. a dog ate the hat! " * 20
    memory, other = engine.remember(text), full.remember(text)
    assert memory.nbytes < other.nbytes
    one, two = (
        item.reading(read.state, max_tokens=2).begin([20, 21, 22]) for item, read in ((engine, memory), (full, other))
    )
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, atol={"int8": 0.05, "int4": 0.4}[written], rtol=0)
    memory.save(tmp_path)
    again = engine.load_memory(tmp_path)
    assert torch.equal(engine.reading(again.state, max_tokens=2).begin([20, 21, 22]), one)
    kept = full.load_memory(tmp_path)  # the format is the collection's affair, whichever the engine writes
    assert kept.nbytes < other.nbytes
    assert torch.equal(full.reading(kept.state, max_tokens=2).begin([20, 21, 22]), one)
