"""Check a memory whose chunks are shared among gloo processes against the same memory in one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from focus_core.errors import CancelledError, ConfigError, RankError
from focus_core.text.corpus import Document
from tests.processes import together

pytestmark = pytest.mark.slow

DOCUMENTS = [Document(str(number), f"the cat {number} sat on mat {number % 4}. " * (number + 1)) for number in range(5)]
QUESTION, ANSWER = [20, 21, 22, 23], [60, 61, 62]


def logits_of(ranks, engine, memory, act=None):
    """Logits, attention and bytes sent of a question and three steps."""
    reading = engine.with_ranks(ranks).reading(memory.state, max_tokens=8)
    found = [reading.begin(QUESTION)]
    if act is not None:
        found.append(act(reading))
    before = ranks.sent
    found += [reading.step(token) for token in ANSWER]
    tokens = sum(sum(slab.kv.lengths) for slab in reading.state.slabs)
    return torch.stack(found), torch.stack(reading.mass), ranks.sent - before, tokens


def alone(engine, memory, act=None):
    reading = engine.reading(memory.state, max_tokens=8)
    found = [reading.begin(QUESTION)]
    if act is not None:
        found.append(act(reading))
    found += [reading.step(token) for token in ANSWER]
    return torch.stack(found), torch.stack(reading.mass)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("settings", [{"top_candidates": 2}, {"positions": "ordered", "candidate_bias": "log_k"}])
def test_shared_chunks_give_the_logits_of_one_process(make_engine, tmp_path, count, settings):
    """Two and four processes, ragged and equal chunks, the best two of all: logits and attention == one process's."""
    engine = make_engine(**settings)
    ties = "top_candidates" in settings  # of equal candidates any may be among the best, as all of layer 0 are
    documents = DOCUMENTS if ties else [*DOCUMENTS, Document("again", DOCUMENTS[1].text)]
    memory = engine.remember(documents)
    logits, mass = alone(engine, memory)
    found = together(tmp_path, count, logits_of, documents, **settings)
    whole = sum(sum(slab.kv.lengths) for slab in memory.state.slabs)
    assert sum(result[3] for result in found) == whole
    assert max(result[3] for result in found) < whole
    for result in found:
        torch.testing.assert_close(result[0], logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result[1][int(ties) :], mass[int(ties) :], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("act", [lambda it: it.narrow([0, 3]), lambda it: it.read_whole([1, 2], (3,))])
def test_fewer_chunks_and_whole_ones_are_shared_too(make_engine, tmp_path, act):
    """Going on with two chunks, of which one process has none, and reading two whole: logits == one process's."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    logits, mass = alone(engine, memory, act)
    for result in together(tmp_path, 3, partial(logits_of, act=act), DOCUMENTS):
        torch.testing.assert_close(result[0], logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result[1], mass, atol=1e-5, rtol=1e-4)


def test_only_candidates_travel(make_engine, tmp_path):
    """A step sends 2 x candidates x kv_heads x head_dim numbers a layer, and as many for chunks three times as long."""
    engine = make_engine(chunk_size=100)
    sent = []
    for times in (1, 3):
        documents = [Document(str(number), f"cat {number} sat. " * 6 * times) for number in range(4)]
        assert len(engine.remember(documents)) == 4
        folder = tmp_path / str(times)
        folder.mkdir()
        sent += [result[2] for result in together(folder, 2, logits_of, documents, chunk_size=100)]
    base = engine.base
    each = base.num_layers * 2 * 2 * base.num_kv_heads * base.head_dim * base.dtype.itemsize  # two chunks a process
    assert sent == [len(ANSWER) * each] * 4


def test_answers_are_those_of_one_process(make_engine, tmp_path):
    """Answers with sources from two processes, one question and several, == those of one."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    questions = ["who sat?", "where is cat 3?"]

    def ask(ranks, engine, memory):
        own = engine.with_ranks(ranks)
        one = own.answer(questions[0], memory, max_tokens=6, temperature=1.0, seed=3)
        return one.text, [item.document_id for item in one.evidence], [
            answer.text for answer in own.answer_many(questions, memory, max_tokens=6)
        ]  # fmt: skip

    one = engine.answer(questions[0], memory, max_tokens=6, temperature=1.0, seed=3)
    several = [answer.text for answer in engine.answer_many(questions, memory, max_tokens=6)]
    expected = one.text, [item.document_id for item in one.evidence], several
    assert together(tmp_path, 2, ask, DOCUMENTS) == [expected] * 2


def test_a_cancelled_process_stops_all(make_engine, tmp_path):
    """One of two is cancelled: both end with CancelledError, and answer the next question."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)

    def ask(ranks, engine, memory):
        def check():
            if ranks.rank == 1:
                raise CancelledError("the request was cancelled")

        reading = engine.with_ranks(ranks).reading(memory.state, max_tokens=8)
        reading.begin(QUESTION)
        reading.check = check
        with pytest.raises(CancelledError):
            reading.step(60)
        return engine.with_ranks(ranks).answer("who sat?", memory, max_tokens=3).text

    assert together(tmp_path, 2, ask, DOCUMENTS) == [engine.answer("who sat?", memory, max_tokens=3).text] * 2


@pytest.mark.parametrize("way", ["dies", "fails"])
def test_a_lost_process_is_one_clear_error(tmp_path, way):
    """One of two dies or fails in the middle of a layer: the other raises RankError well before its patience ends."""

    def ask(ranks, engine, memory):
        reading = engine.with_ranks(ranks).reading(memory.state, max_tokens=8)
        reading.begin(QUESTION)
        run_layer = engine.base.run_layer

        def lost(layer, *rest):
            if layer == 1:
                if way == "dies":
                    os._exit(1)
                raise ValueError("my own fault")
            return run_layer(layer, *rest)

        if ranks.rank == 1:
            engine.base.run_layer = lost
        reading.step(60)

    started = time.monotonic()
    first, second = together(tmp_path, 2, ask, DOCUMENTS)
    assert time.monotonic() - started < 45
    assert first[0] is RankError
    assert "process 0 of 2 lost another one" in first[1]
    assert second is None if way == "dies" else second[:2] == (ValueError, "my own fault")


def test_chunk_kv_is_not_moved_between_processes(tmp_path):
    """reread_way='moved' names the other way."""

    def ask(ranks, engine, memory):
        reading = engine.with_ranks(ranks).reading(memory.state, max_tokens=8)
        reading.begin(QUESTION)
        reading.read_whole([0], moved=True)

    for result in together(tmp_path, 2, ask, DOCUMENTS):
        assert result[0] is ConfigError
        assert "reread_way='run'" in result[1]


def test_ask_in_two_processes_says_what_one_says(run, base_folder, tmp_path):
    """``torchrun -m focus_core.cli ask``: one answer, that of one process."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat. a dog ran in the park. " * 8, encoding="utf-8")
    arguments = ["ask", "who sat?", tmp_path / "a.txt", "--max-tokens", 4, "--chunk-size", 16]
    _, said, _ = run(*arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "focus_core.cli", *map(str, arguments), "--base", str(base_folder), "--adapter", "untrained"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == said
