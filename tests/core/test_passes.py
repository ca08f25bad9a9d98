"""Check that requests which wait for the model pass it together, and that what happens to one is its own affair."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch

from focus_core.errors import CancelledError, ContextTooLongError, OutOfMemoryError
from focus_core.method import passes
from focus_core.method.suffix import Suffix
from focus_core.text.corpus import Document

DOCUMENTS = [Document("one", "the cat sat on the mat"), Document("two", "a dog ran in the park all day")]
QUESTIONS = [[20 + number, 30, 31 + number, 40] for number in range(4)]


class Gate:
    """A sweep whose first call waits until ``others`` more requests have come; it counts the requests of each call.

    ``fail`` is raised by the first call, ``broken`` is a local context whose sweeps fail.
    """

    def __init__(self, engine, others, fail=None, broken=None):
        self.engine, self.others, self.fail, self.broken = engine, others, fail, broken
        self.original, self.sizes = passes.sweep, []

    def __call__(self, base, adapter, calls, locals_, positions, check):
        self.sizes.append(len(locals_))
        if len(self.sizes) == 1:
            end = time.monotonic() + 20
            while len(self.engine.passes._waiting) < self.others and time.monotonic() < end:
                time.sleep(0.001)
            if self.fail is not None:
                raise self.fail
        if any(list(local.asked[0].ids[1:]) == self.broken for local in locals_):
            raise ValueError("my own fault")
        return self.original(base, adapter, calls, locals_, positions, check)


def _readings(engine, memory):
    return [engine.reading(memory.state, max_tokens=4) for _ in QUESTIONS]


def _run(readings):
    """Begin all readings in threads, the first one first; return logits or error of each."""
    results = [None] * len(readings)

    def begin(number):
        try:
            results[number] = readings[number].begin(QUESTIONS[number])
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(len(readings))]
    threads[0].start()
    while not readings[0].passes._busy:
        time.sleep(0.001)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.fixture
def asked(make_engine):
    """An engine, a memory, and the logits that each question gives alone."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    alone = [reading.begin(ids) for reading, ids in zip(_readings(engine, memory), QUESTIONS, strict=True)]
    return engine, memory, alone


def test_those_who_wait_pass_together(asked, monkeypatch):
    """While one sweep runs three more requests come: the next sweep serves all three; logits == each alone."""
    engine, memory, alone = asked
    gate = Gate(engine, others=3)
    monkeypatch.setattr(passes, "sweep", gate)
    readings = _readings(engine, memory)
    found = _run(readings)
    assert gate.sizes == [1, 3]
    torch.testing.assert_close(torch.stack(found), torch.stack(alone), atol=1e-5, rtol=1e-4)
    steps = [reading.step(50) for reading in readings]
    single = _readings(engine, memory)
    for reading, ids in zip(single, QUESTIONS, strict=True):
        reading.begin(ids)
    torch.testing.assert_close(
        torch.stack(steps), torch.stack([reading.step(50) for reading in single]), atol=1e-5, rtol=1e-4
    )


def test_steps_of_several_readings_share_one_call(asked, monkeypatch):
    """Four readings stepping in threads give the logits of four readings stepping alone, in fewer sweeps."""
    engine, memory, _ = asked
    readings, single = _readings(engine, memory), _readings(engine, memory)
    for reading, other, ids in zip(readings, single, QUESTIONS, strict=True):
        reading.begin(ids)
        other.begin(ids)
    gate = Gate(engine, others=3)
    monkeypatch.setattr(passes, "sweep", gate)
    monkeypatch.setattr(type(readings[0]), "begin", lambda self, ids: self.step(ids[0]))
    found = _run(readings)
    assert gate.sizes == [1, 3]
    expected = torch.stack([other.step(ids[0]) for other, ids in zip(single, QUESTIONS, strict=True)])
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=1e-4)


def test_a_cancelled_request_leaves_the_others_running(asked, monkeypatch):
    """One of three that pass together is cancelled: it raises CancelledError, the others' logits == alone."""
    engine, memory, alone = asked
    readings = _readings(engine, memory)

    def cancelled():
        raise CancelledError("the request was cancelled")

    readings[2].check = cancelled
    monkeypatch.setattr(passes, "sweep", Gate(engine, others=3))
    found = _run(readings)
    assert isinstance(found[2], CancelledError)
    for number in (0, 1, 3):
        torch.testing.assert_close(found[number], alone[number], atol=1e-5, rtol=1e-4)


def test_a_failure_belongs_to_the_request_that_failed(asked, monkeypatch):
    """One of three fails inside the common sweep: each runs again alone, and only that one raises."""
    engine, memory, alone = asked
    gate = Gate(engine, others=3, broken=QUESTIONS[1])
    monkeypatch.setattr(passes, "sweep", gate)
    found = _run(_readings(engine, memory))
    assert gate.sizes == [1, 3, 1, 1, 1]
    assert str(found[1]) == "my own fault"
    for number in (0, 2, 3):
        torch.testing.assert_close(found[number], alone[number], atol=1e-5, rtol=1e-4)


def test_an_interrupted_leader_leaves_the_others_running(asked, monkeypatch):
    """The thread that leads is interrupted: its own request ends, those that wait are led by one of them."""
    engine, memory, alone = asked
    gate = Gate(engine, others=3, fail=KeyboardInterrupt())
    monkeypatch.setattr(passes, "sweep", gate)
    found = _run(_readings(engine, memory))
    assert isinstance(found[0], KeyboardInterrupt)
    torch.testing.assert_close(torch.stack(found[1:]), torch.stack(alone[1:]), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_a_common_pass_that_fails_half_way_leaves_no_trace(asked, monkeypatch, fault):
    """Memory runs out, or Ctrl-C comes, in the last layer of three that pass together: attention kept == alone."""
    engine, memory, alone = asked
    single = _readings(engine, memory)
    for reading, ids in zip(single, QUESTIONS, strict=True):
        reading.begin(ids)
    gate, run_layer, failed = Gate(engine, others=3), engine.base.run_layer, []

    def fails_once(layer, hidden, rope, attend):
        done = run_layer(layer, hidden, rope, attend)
        if layer == engine.base.num_layers - 1 and gate.sizes[-1] > 1 and not failed:
            failed.append(fault)
            raise fault
        return done

    monkeypatch.setattr(passes, "sweep", gate)
    monkeypatch.setattr(engine.base, "run_layer", fails_once)
    readings = _readings(engine, memory)
    found = _run(readings)
    assert failed
    whole = [number for number, result in enumerate(found) if not isinstance(result, KeyboardInterrupt)]
    assert len(whole) == (3 if isinstance(fault, KeyboardInterrupt) else 4)
    for number in whole:
        torch.testing.assert_close(found[number], alone[number], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(readings[number].mass, single[number].mass, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(readings[number].step(50), single[number].step(50), atol=1e-5, rtol=1e-4)


def test_an_interrupt_while_rows_are_kept_is_not_the_others(asked, monkeypatch):
    """Ctrl-C reaches the leader when the sweep is over: the next step of those it led == alone."""
    engine, memory, _ = asked
    single = _readings(engine, memory)
    for reading, ids in zip(single, QUESTIONS, strict=True):
        reading.begin(ids)
    readings, commit, failed = _readings(engine, memory), Suffix.commit, []
    gate = Gate(engine, others=3)

    def interrupted(self, rows):
        commit(self, rows)
        failed.extend([True] if gate.sizes[-1] > 1 else [])
        if len(failed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(passes, "sweep", gate)
    monkeypatch.setattr(Suffix, "commit", interrupted)
    found = _run(readings)
    whole = [number for number, result in enumerate(found) if not isinstance(result, KeyboardInterrupt)]
    assert len(failed) >= 2
    assert len(whole) == 3
    for number in whole:
        torch.testing.assert_close(readings[number].step(50), single[number].step(50), atol=1e-5, rtol=1e-4)


def test_a_failed_common_pass_is_let_go_before_each_runs_alone(asked, monkeypatch):
    """What a pass that ran out of memory held is free when its requests run again."""
    engine, memory, _ = asked
    gate, states, alive = Gate(engine, others=3), [], []

    class Large:
        pass

    def sweep(base, adapter, calls, locals_, positions, check):
        if len(locals_) > 1:
            large = Large()
            states.append(weakref.ref(large))
            raise RuntimeError("CUDA out of memory")
        if states:
            alive.append(states[0]() is not None)
        return original(base, adapter, calls, locals_, positions, check)

    original, gate.original = gate.original, sweep
    monkeypatch.setattr(passes, "sweep", gate)
    _run(_readings(engine, memory))
    assert alive == [False] * 3


def test_memory_that_runs_out_in_a_step_is_one_clear_error(asked, monkeypatch):
    """A step, a narrowing and a rereading out of memory raise OutOfMemoryError, not the library's RuntimeError."""
    engine, memory, _ = asked

    def full(*arguments):
        raise RuntimeError("CUDA out of memory")

    for act in (lambda it: it.step(50), lambda it: it.narrow([0]), lambda it: it.read_whole([0])):
        reading = engine.reading(memory.state, max_tokens=4)
        reading.begin(QUESTIONS[0])
        with monkeypatch.context() as patch:
            patch.setattr(passes, "sweep", full)
            with pytest.raises(OutOfMemoryError, match="memory ran out"):
                act(reading)


@pytest.mark.slow
def test_many_answers_are_those_of_each_question(make_engine):
    """answer_many of five questions == answer of each; a bad question raises its own error."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    questions = [f"who is {number}?" for number in range(5)]
    single = [engine.answer(question, memory, max_tokens=6).text for question in questions]
    assert [answer.text for answer in engine.answer_many(questions, memory, max_tokens=6)] == single
    with pytest.raises(ContextTooLongError, match="the question has"):
        engine.answer_many([*questions, "x " * 5000], memory, max_tokens=6)
    assert engine.answer_many([], memory) == []
