"""Check memories of chunks that a store has and of others, and collections that became others under the same name."""

from __future__ import annotations

import random

import pytest
import torch

from focus_core.store.database import Store
from focus_core.text.corpus import Document


@pytest.mark.parametrize("form", ["base", "int8", "int4"])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_that_a_store_has_and_those_that_it_lacks_are_told_apart(form, seed, make_engine, tmp_path):
    """Any mixture, of equal and other lengths: each chunk's KV == that of its text read alone, here and saved."""
    engine = make_engine(chunk_size=64, kv_format=form)
    texts = [f"cat {number} " + "sat on the mat. " * (1 + number % 3) for number in range(14)]
    rng = random.Random(seed)

    def held(memory):
        return {
            chunk.ids: slab.kv.dense(row)
            for slab in memory.state.slabs
            for row, alike in enumerate(slab.groups())
            for chunk in alike
        }

    alone = {}
    for text in texts:
        alone |= held(engine.remember([Document("one", text)]))
    for _ in range(4):
        documents = [Document(f"d{place}", text) for place, text in enumerate(rng.sample(texts, 6))]
        mixed = engine.remember(documents, store=Store(tmp_path))
        mixed.save(tmp_path, name="mixed", replace=True)
        for memory in (mixed, engine.load_memory(tmp_path, name="mixed")):
            for ids, kv in held(memory).items():
                torch.testing.assert_close(kv, alone[ids], atol=2e-5, rtol=1e-4)


def test_a_collection_that_was_dropped_and_made_again_is_read_anew(make_engine, tmp_path):
    """Its version is the one that was read, its contents are others: a reader sees these."""
    engine, store = make_engine(), Store(tmp_path)
    engine.remember([Document("old", "the cat sat")]).save(store, name="notes")
    reader = engine.load_memory(tmp_path, name="notes")
    assert not reader.refresh()
    store.drop("notes")
    engine.remember([Document("new", "the dog ate")]).save(store, name="notes")
    assert reader.refresh()
    assert [document.id for document in reader.documents] == ["new"]
    assert not reader.refresh()
