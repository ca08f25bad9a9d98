"""Check perplexity: against transformers' own loss without chunks and incremental decoding with them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from focus_core.errors import ConfigError, ContextTooLongError, EmptyCorpusError
from focus_core.evaluation.tasks.perplexity import measure_window, memory_logits, run_perplexity, window_logits
from focus_core.evaluation.tasks.text_windows import read_windows
from focus_core.method.encoding import encode_chunks
from focus_core.text.corpus import Document
from focus_core.training.objectives import Query, Task, dense_logits

CHUNKS = [list(range(20, 50)), list(range(60, 75)), list(range(5, 38)), [7, 7, 8]]
LOCAL = [31, 32, 90, 33, 61, 62, 63, 200, 9]
SPLIT = 5


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_without_chunks_it_is_transformers_loss(make_engine, family):
    """Both local passes give the loss that transformers computes itself for the same labels."""
    engine = make_engine(family)
    row = torch.tensor([[engine.sink, *LOCAL]])
    labels = row.clone()
    labels[0, : 1 + SPLIT] = -100
    expected = float(engine.loaded.model(row, labels=labels).loss)
    for logits in (memory_logits(engine, [], LOCAL, SPLIT), window_logits(engine, LOCAL, len(LOCAL) - SPLIT)):
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LOCAL[SPLIT:]))
        assert float(loss) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("rows", [1, 9, 1000])
@pytest.mark.parametrize("settings", [{}, {"candidate_bias": "log_k", "top_candidates": 2}, {"prompt_length": 2}])
def test_with_chunks_it_is_incremental_decoding(make_engine, family, rows, settings):
    """Logits of every target equal those of decoding token by token, whatever is run together."""
    engine = make_engine(family, chunk_size=64, **settings)
    texts = [engine.tokenizer.decode(chunk) for chunk in CHUNKS]
    memory = engine.remember([Document(str(index), text) for index, text in enumerate(texts)])
    reading = engine.reading(memory.state, max_tokens=len(LOCAL))
    steps = [reading.begin(LOCAL[:SPLIT])]
    steps += [reading.step(token) for token in LOCAL[SPLIT:-1]]
    found = memory_logits(engine, [chunk.ids for chunk in memory.chunks], LOCAL, SPLIT, rows_at_once=rows)
    assert len(memory) == len(CHUNKS)
    torch.testing.assert_close(found, torch.stack(steps), atol=2e-5, rtol=1e-4)


def test_other_ways_of_decoding_are_refused(make_engine):
    """One pass is incremental decoding within the window; anything else is named."""
    with pytest.raises(ConfigError, match="local_mode is 'exact'"):
        memory_logits(make_engine(local_mode="exact"), CHUNKS, LOCAL, SPLIT)
    with pytest.raises(ContextTooLongError, match="a local context of 10 tokens does not fit the window of 8"):
        memory_logits(make_engine(window=8, prompt_length=2, chunk_size=4), CHUNKS, LOCAL, SPLIT)


def test_it_is_the_dense_pass_of_training(make_engine):
    """The same numbers as training's dense logits on the same chunks."""
    engine = make_engine()
    batch = encode_chunks(engine.base, [[engine.sink, *chunk] for chunk in CHUNKS])
    task = Task(batch, Query(tuple(LOCAL), SPLIT))
    expected = dense_logits(engine.base, engine.adapter, [task], engine.sink, engine.config.positions)[0]
    torch.testing.assert_close(memory_logits(engine, CHUNKS, LOCAL, SPLIT, 8), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture
def book(tmp_path):
    words = ["cat", "dog", "mat", "hat", "sat", "ate"]
    rng = random.Random(0)
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"The {rng.choice(words)} {rng.choice(words)} on {number}." for number in range(300)))
    (tmp_path / "short.txt").write_text("too short")
    return tmp_path


def test_windows_of_all_lengths_end_alike(make_engine, book):
    """Windows are runs of the text's own ids, seeded, within the text; shorter ones are ends of longer ones."""
    engine = make_engine()
    ids = engine.tokenizer.encode((book / "book.txt").read_text())
    windows = list(read_windows([book], engine.tokenizer, 600, 3, seed=4))
    for window in windows:
        stop = int(window.name.split("@")[1])
        assert window.encoded.ids.tolist() == ids[stop - 600 : stop]
        assert engine.tokenizer.decode(window.encoded.ids.tolist()) == window.text
        short = window.end(100)
        assert short.encoded.ids.tolist() == ids[stop - 100 : stop]
        assert short.encoded.starts[0] == 0
        assert window.text.endswith(short.text)
    again = list(read_windows([book], engine.tokenizer, 600, 3, seed=4))
    assert [window.fingerprint for window in again] == [window.fingerprint for window in windows]
    assert len({window.fingerprint for window in windows}) == 3
    with pytest.raises(EmptyCorpusError, match="no text of 100000 tokens"):
        next(read_windows([book], engine.tokenizer, 100_000, 1))


def test_a_measurement_is_its_parts(make_engine, book, monkeypatch):
    """Chunks tile the memory part; each loss is that of its logits; the base sees its whole window."""
    from focus_core.evaluation.tasks import perplexity

    engine = make_engine(chunk_size=48)
    window = next(read_windows([book], engine.tokenizer, 700, 1))
    ids = window.encoded.ids
    seen = []

    def watched(engine, chunks, local, split):
        seen.append(([token for chunk in chunks for token in chunk], max(map(len, chunks)), local, split))
        return memory_logits(engine, chunks, local, split)

    monkeypatch.setattr(perplexity, "memory_logits", watched)
    record = measure_window(engine, window, 300, given=10, targets=6)
    local, scored = ids[-16:].tolist(), torch.tensor(ids[-6:])
    tiled, longest_chunk, asked, split = seen[0]
    assert tiled == ids[-300:-16].tolist()
    assert longest_chunk <= 48
    assert (asked, split) == (local, 10)
    loss = torch.nn.functional.cross_entropy(window_logits(engine, local, 6), scored)
    assert record["local"] == pytest.approx(float(loss), abs=1e-6)
    longest = ids[-(engine.base.window - 1) :].tolist()
    loss = torch.nn.functional.cross_entropy(window_logits(engine, longest, 6), scored)
    assert record["window"] == pytest.approx(float(loss), abs=1e-6)
    assert record["memory"] != record["local"]
    with pytest.raises(ConfigError, match="leaves no memory"):
        measure_window(engine, window, 16, given=10, targets=6)
    with pytest.raises(ConfigError, match="at least 1 local token before the scored ones; got 0"):
        measure_window(engine, window, 300, given=0, targets=6)


def test_a_run_resumes_and_puts_the_ratio_first(make_engine, book, tmp_path, monkeypatch):
    """Ratio == memory / local perplexity over all texts; a second run computes nothing."""
    from focus_core.evaluation.tasks import perplexity

    engine = make_engine(chunk_size=48)
    windows = list(read_windows([book], engine.tokenizer, 400, 2))
    records = []
    row = run_perplexity(engine, "p", windows, 400, 10, tmp_path / "out", records.append, targets=6)
    assert row.memory == pytest.approx(math.exp(sum(record["memory"] for record in records) / 2))
    assert row.ratio == pytest.approx(row.memory / row.local)
    assert set(row.by_text) == {window.name for window in windows}
    monkeypatch.setattr(perplexity, "measure_window", None)
    assert run_perplexity(engine, "p", windows, 400, 10, tmp_path / "out", targets=6) == row
