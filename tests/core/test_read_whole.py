"""Check chunks that are read whole: against the oracle, and when the choice moves."""

from __future__ import annotations

import pytest
import torch

from focus_core.model.candidate import CandidateLinear
from tests.core.test_invariants import (
    CHUNKS,
    LOCAL,
    _memory_of,
    build,
    candidate_weights,
    positions_of,
)
from tests.oracle import Oracle


def reader_weights(model) -> dict[str, torch.Tensor]:
    """The base's matrices with the reader's differences added, as the oracle takes them; empty without a reader."""
    return {
        name.removesuffix(".base_layer"): module.base_layer.weight.data
        + module.reader.up.data @ module.reader.down.data
        for name, module in model.named_modules()
        if isinstance(module, CandidateLinear) and module.reader is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("opening", [0, 2])
@pytest.mark.parametrize("mode", ["incremental", "exact"])
@pytest.mark.parametrize(("family", "rank"), [("llama", 0), ("llama", 3), ("phi3", 3), ("gpt_neox", 0), ("opt", 2)])
def test_3_reading_whole_equals_the_oracle(family, rank, mode, opening, make_engine):
    """Chunks read whole == the oracle over all candidates with those tokens behind the local row's opening alone.

    With a reader its matrices stand in the place of the base's in that row, and no candidate is in front of it.
    """
    positions = positions_of(family)[0]
    model, _, adapter = build(family, reader_rank=rank)
    weights, reader = candidate_weights(model), reader_weights(model)
    adapter.detach()
    chunks, given, separator = [*CHUNKS, [70, 71], CHUNKS[1]], 4, [9]
    oracle, choices, logits = Oracle(model, weights, positions, 0, reader), ([2, 0], range(5), [1, 4]), []
    for whole in choices:
        front = [token for index in sorted(whole) for token in (*chunks[index], *separator)]
        logits.append(oracle.logits(chunks, LOCAL, given, mode, front, opening))
    options = {"positions": positions, "local_mode": mode, "reader_rank": rank}
    engine = make_engine(family, model=model, dtype=torch.float64, **options)
    state = _memory_of(engine, chunks).state
    for size in (None, 2):
        reading = engine.reading(state, max_tokens=len(LOCAL), chunks_per_batch=size)
        reading.begin(LOCAL[:given], opening)
        for whole, expected in zip(choices, logits, strict=True):  # the second choice takes the place of the first
            first = reading.read_whole(whole, separator)
            torch.testing.assert_close(first.double(), expected[0], atol=2e-6, rtol=1e-5)
        found = [reading.step(token) for token in LOCAL[given:]]
        torch.testing.assert_close(torch.stack(found).double(), expected[1:], atol=2e-6, rtol=1e-5)
        assert (reading.whole, reading.reread_tokens) == ([1, 4], len(front))
        assert reading.candidates == (0 if rank else len(chunks))


@pytest.mark.parametrize("moved", [False, True])
def test_3_mass_on_whole_chunks_is_that_on_their_tokens(moved, make_engine):
    """All a last row attends to adds up to one: candidates, whole chunks, and what stands between."""
    engine = make_engine("llama", dtype=torch.float64)
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=len(LOCAL))
    reading.begin(LOCAL[:4])
    reading.read_whole([2, 0], moved=moved)
    for mass in reading.mass:
        assert mass.shape == (4, len(CHUNKS))
        assert bool((mass > 0).all())
        assert bool((mass.sum(1) < 1).all())


def test_3_reading_whole_leaves_out_what_the_window_has_no_room_for(make_engine):
    """The best chunk that fits is read, a worse one behind a full window is not; no room at all changes nothing."""
    engine = make_engine("llama", window=40, chunk_size=20, prompt_length=8)
    state = _memory_of(engine, [[10] * 18, [11] * 18, [12] * 3]).state
    reading = engine.reading(state, max_tokens=4)
    reading.begin(LOCAL)
    assert reading.read_whole([0, 1, 2]) is not None
    assert reading.reread_tokens == 18
    full = engine.reading(state, max_tokens=15)
    full.begin(LOCAL)
    assert full.read_whole([0]) is None
    assert full.local == LOCAL
