"""Prove invariant 10: where chunk KV lies, and how much of it a budget lets stay, changes no answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_core.config import FocusConfig
from focus_core.errors import ConfigError, StoreError
from focus_core.session.corpus import memory_costs
from focus_core.store.database import Store
from focus_core.store.segments import Segments
from focus_core.store.tiers import Budget, Staged
from focus_core.text.corpus import Document
from tests.conftest import tiny_model

TEXT = "the cat sat on the mat and the dog ate the hat. "
DOCUMENTS = [Document(str(number), f"room {number} " + TEXT * (1 + number % 3)) for number in range(9)]


def logits(engine, memory):
    return engine.reading(memory.state, max_tokens=4).begin(engine.local_ids("who ate the hat?"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["base", "int8", "int4"])
def test_any_budget_gives_the_answer_of_no_budget(make_engine, saved, form):
    """Logits with every layer in memory == with some == with none, bit for bit, in each format."""
    engine = make_engine(kv_format=form)
    memory = engine.remember(DOCUMENTS)
    memory.save(saved, name=form)
    expected = logits(engine, memory)
    whole = memory.state.slabs[0].kv.nbytes

    @settings(deadline=None, max_examples=12)
    @given(st.integers(0, 2 * whole))
    def check(budget):
        poor = engine.with_config(memory_budget=budget)
        loaded = poor.load_memory(saved, name=form)
        assert torch.equal(logits(poor, loaded), expected)
        assert poor.encoder.budget.used <= budget
        assert torch.equal(logits(poor, loaded.subset([one.id for one in DOCUMENTS])), expected)

    check()


def test_a_collections_format_is_its_own(make_engine, tmp_path):
    """An engine of another format opens it as it was written."""
    coarse = make_engine(kv_format="int4")
    memory = coarse.remember(DOCUMENTS)
    memory.save(tmp_path)
    loaded = make_engine().load_memory(tmp_path)
    assert loaded.state.slabs[0].kv.shape.format == "int4"
    assert torch.equal(logits(make_engine(), loaded), logits(coarse, memory))


def test_opening_reads_no_chunk_kv(make_engine, tmp_path, monkeypatch):
    """Neither opening nor listing nor the estimate of costs touches a segment; a question does."""
    engine = make_engine()
    engine.remember(DOCUMENTS).save(tmp_path)
    read = []
    monkeypatch.setattr(Segments, "read", lambda *arguments: read.append(arguments))
    original = Segments.read_layer
    monkeypatch.setattr(
        Segments, "read_layer", lambda self, *arguments: read.append(arguments) or original(self, *arguments)
    )
    memory = engine.load_memory(tmp_path)
    assert len(memory) > 9
    costs = memory_costs(memory)
    assert costs["chunk KV bytes in memory"] >= costs["chunk KV bytes"]
    assert costs["chunk KV bytes from disk a token"] == 0
    none = memory_costs(engine.with_config(memory_budget=0).load_memory(tmp_path))
    assert none["chunk KV bytes in memory"] == 0
    assert none["chunk KV bytes from disk a token"] >= none["chunk KV bytes"]
    assert read == []
    engine.answer("who?", memory, max_tokens=3)
    assert len(read) == engine.encoder.shape.layers * memory.state.slabs[0].kv.size  # and once a layer, not a step


@pytest.mark.slow
def test_damage_is_found_at_first_touch(make_engine, tmp_path):
    """A flipped byte in one layer, a cut or lost file: the question is refused with what to do, the engine goes on."""
    engine = make_engine(memory_budget=0)
    engine.remember(DOCUMENTS).save(tmp_path)
    expected = engine.answer("who?", engine.load_memory(tmp_path), max_tokens=3).text
    path = next((tmp_path / "kv").rglob("*.safetensors"))
    data = path.read_bytes()
    for broken in (data[:-1] + bytes([data[-1] ^ 1]), data[:-5], b"", data[:2000] + b"\xff" + data[2001:], None):
        path.unlink() if broken is None else path.write_bytes(broken)
        with pytest.raises(StoreError, match="verify --repair"):
            engine.answer("who?", engine.load_memory(tmp_path), max_tokens=3)
        path.write_bytes(data)
        assert engine.answer("who?", engine.load_memory(tmp_path), max_tokens=3).text == expected


def test_memories_share_a_budget(make_engine, tmp_path):
    """Two memories of which one fits: each takes the other's room when it is asked, and both answer as alone."""
    engine = make_engine()
    memories = [engine.remember([Document(name, TEXT * 6 + name)]) for name in ("a", "b")]
    for number, memory in enumerate(memories):
        memory.save(tmp_path, name=f"m{number}")
    expected = [logits(engine, memory) for memory in memories]
    suffixes = memory_costs(engine.load_memory(tmp_path, name="m0"), 20, 4)["bytes behind the chunks a question"]
    poor = engine.with_config(memory_budget=int(memories[0].nbytes * 1.5) + suffixes)
    loaded = [poor.load_memory(tmp_path, name=f"m{number}") for number in range(2)]
    for _ in range(3):
        for memory, wanted in zip(loaded, expected, strict=True):
            assert torch.equal(logits(poor, memory), wanted)
            assert memory.state.slabs[0].kv.source.resident == poor.encoder.shape.layers
            assert poor.encoder.budget.used <= poor.config.memory_budget
    del loaded, memory
    assert poor.encoder.budget.used == 0


@pytest.mark.slow
def test_what_lies_on_disk_can_be_changed_and_carried(make_engine, tmp_path):
    """Added to, removed from, saved elsewhere: as a memory of the same documents that never was on disk."""
    engine = make_engine(memory_budget=0)
    engine.remember(DOCUMENTS).save(tmp_path / "one")
    loaded = engine.load_memory(tmp_path / "one")
    loaded.update([Document("new", "the dog " * 9)], ["3"])
    fresh = engine.remember([*(one for one in DOCUMENTS if one.id != "3"), Document("new", "the dog " * 9)])
    torch.testing.assert_close(logits(engine, loaded), logits(engine, fresh), atol=1e-5, rtol=1e-5)
    loaded.save(tmp_path / "two")
    loaded.save(tmp_path / "one")
    assert Store(tmp_path / "two").verify() == []
    for place in ("one", "two"):
        again = engine.load_memory(tmp_path / place)
        torch.testing.assert_close(logits(engine, again), logits(engine, fresh), atol=1e-5, rtol=1e-5)


def test_a_budget_gives_and_takes():
    """The owner that asked longest ago loses its room first; one that asks for too much gets nothing."""
    budget, lost = Budget(10, torch.device("cpu")), []
    assert budget.take(1, 4, lambda: lost.append(1))
    assert budget.take(2, 4, lambda: lost.append(2))
    assert budget.take(1, 2, lambda: lost.append(1))
    assert budget.take(3, 4, lambda: lost.append(3))
    assert lost == [2]
    assert not budget.take(3, 20, lambda: None)
    assert not budget.take(3, 1, lambda: None, beside=6)
    budget.pin(4)
    assert budget.take(4, 5, lambda: lost.append(4))
    assert not budget.take(5, 6, lambda: lost.append(5))
    assert 4 not in lost
    with pytest.raises(ConfigError, match="memory_budget"):
        FocusConfig(memory_budget=-1)


def test_what_must_lie_somewhere_is_counted():
    """Owners make room for it; it is given back when its holder dies, and cannot be refused."""

    class Holder:
        pass

    budget, lost, holder = Budget(10, torch.device("cpu")), [], Holder()
    assert budget.take(1, 8, lambda: lost.append(1))
    budget.count(holder, 4)
    assert (lost, budget.used) == ([1], 4)
    assert not budget.take(2, 8, lambda: None)
    del holder
    assert budget.take(2, 8, lambda: None)
    budget.count(budget, 99)
    assert budget.used >= 99


@pytest.mark.parametrize("share", [2, 4, 6])
def test_suffixes_and_layers_that_pass_are_within_the_budget(make_engine, tmp_path, share):
    """What lies in memory at any moment, the suffixes and the two layers that pass included, is within a budget that
    holds as much; the layers that stay are those that were told before.
    """
    engine = make_engine(model=tiny_model("llama", layers=7))
    engine.remember(DOCUMENTS).save(tmp_path)
    costs = memory_costs(engine.load_memory(tmp_path), len(engine.local_ids("who ate the hat?")) - 1, 4)
    layer = costs["chunk KV bytes in memory"] // 6
    poor = engine.with_config(memory_budget=costs["bytes behind the chunks a question"] + share * layer)
    memory, used = poor.load_memory(tmp_path), []
    read = Staged._read

    def watched(self, index):
        used.append(poor.encoder.budget.used)
        return read(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staged, "_read", watched)
        assert torch.equal(logits(poor, memory), logits(engine, engine.load_memory(tmp_path)))
    told = memory_costs(memory, len(engine.local_ids("who ate the hat?")) - 1, 4)
    assert (
        memory.state.slabs[0].kv.source.resident
        == told["chunk KV bytes in memory"] // layer
        == {2: 0, 4: 2, 6: 6}[share]
    )
    passing = told["chunk KV bytes passing through memory"]
    assert passing == (0 if share == 6 else 2 * layer)
    assert costs["bytes behind the chunks a question"] <= max(used) <= poor.config.memory_budget - passing
    assert told["chunk KV bytes from disk a token"] == {2: 6, 4: 4, 6: 0}[share] * layer


def test_an_opening_is_kept_where_the_budget_has_room_for_it(make_engine, tmp_path):
    """It is counted while it is kept; where it is more than a share of the budget it is computed anew, with no other
    logits.
    """
    engine = make_engine(window=512, chunk_size=200, prompt_length=256)
    engine.remember([Document(str(number), TEXT * 9) for number in range(9)]).save(tmp_path)
    local = engine.local_ids("who ate the hat?")
    expected = engine.reading(engine.load_memory(tmp_path).state, max_tokens=4).begin(local, 5)
    for budget, kept in ((1 << 30, True), (1 << 10, False)):
        poor = engine.with_config(memory_budget=budget)
        memory = poor.load_memory(tmp_path)
        for _ in range(2):
            assert torch.equal(poor.reading(memory.state, max_tokens=4).begin(local, 5), expected)
        opening = memory.state.openings.get(local[:5])
        assert (opening is not None) is kept
        assert poor.encoder.budget.used >= sum(tensor.nbytes for tensor in opening or ())


def test_a_pinned_memory_keeps_its_room(make_engine, tmp_path):
    """Another memory that is read meanwhile goes by disk, and answers alike."""
    engine = make_engine()
    for name in ("a", "b"):
        engine.remember([Document(name, TEXT * 6 + name)]).save(tmp_path, name=name)
    costs = memory_costs(engine.load_memory(tmp_path, name="a"), 20, 4)
    poor = engine.with_config(memory_budget=costs["chunk KV bytes"] * 2 + costs["bytes behind the chunks a question"])
    pinned, other = poor.load_memory(tmp_path, name="a"), poor.load_memory(tmp_path, name="b")
    pinned.pin()
    expected = logits(poor, pinned)
    held = pinned.state.slabs[0].kv.source.resident
    logits(poor, other)
    assert pinned.state.slabs[0].kv.source.resident == held == poor.encoder.shape.layers
    assert torch.equal(logits(poor, pinned), expected)
    with pytest.raises(ConfigError, match="memory_budget"):
        FocusConfig(memory_budget=-1)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("remove"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0)),
        st.tuples(st.just("index"), st.integers(0, 3), st.integers(0, 3)),
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.slow
def test_any_history_equals_building_from_scratch(make_engine, tmp_path_factory):
    """Add, remove, update, reopen, index beside it, in any order: catalogue exactly, chunk KV and logits to 1e-5; a
    subset is a memory of that subset.
    """
    from focus_core.store.indexing import index_documents

    engine = make_engine()
    texts = ["the cat sat on the mat", TEXT * 2, "a dog and a hat " * 5, TEXT * 4]

    @settings(deadline=None, max_examples=15)
    @given(OPERATIONS)
    def check(history):
        place, other = tmp_path_factory.mktemp("grown"), tmp_path_factory.mktemp("fresh")
        memory = engine.remember([Document("first", "the hat")])
        memory.save(place)
        for operation, name, text in history:
            one = Document(f"d{name}", texts[text], {"version": text})
            if operation == "put":
                memory.add([one])
            elif operation == "remove" and one.id in memory:
                memory.remove([one.id])
            elif operation == "index":
                index_documents(Store(place), "default", engine.encoder, [one])
            memory.save(place)
            memory = engine.load_memory(place) if operation == "reopen" else memory
            memory.refresh()
        fresh = engine.remember(memory.documents)
        fresh.save(other)
        assert Store(place).collection("default").digest == Store(other).collection("default").digest
        loaded = engine.load_memory(place)
        assert [(item.ids, item.spans) for item in loaded.chunks] == [(item.ids, item.spans) for item in fresh.chunks]
        torch.testing.assert_close(logits(engine, loaded), logits(engine, fresh), atol=1e-5, rtol=1e-5)
        some = [document.id for document in memory.documents][::2]
        part, alone = memory.subset(some), engine.remember([one for one in memory.documents if one.id in some])
        assert part.documents == alone.documents
        torch.testing.assert_close(logits(engine, part), logits(engine, alone), atol=1e-5, rtol=1e-5)

    check()
