"""Check questions that pass the model together: they join and leave at any step, share reads, and count bytes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from focus_core.errors import CancelledError
from focus_core.method import passes, room
from focus_core.method.kv import ChunkKV
from focus_core.method.room import Room, run_together
from focus_core.method.suffix import suffix_bytes
from focus_core.text.corpus import Document

DOCUMENTS = [Document(str(number), f"the cat {number} sat on the mat {'all day ' * number}") for number in range(4)]
QUESTIONS = [[20, 21, 22, 23], [30, 31], [40, 41, 42, 43, 44, 45, 46], [50]]
ANSWER = [60, 61, 62, 63, 64, 65]


@pytest.fixture
def asked(make_engine):
    """An engine, two memories, and each question's logits asked alone: of question q over memory q % 3 // 2."""
    engine = make_engine(top_candidates=2)
    memories = [engine.remember(DOCUMENTS), engine.remember(DOCUMENTS[:2])]
    alone = []
    for number in range(len(QUESTIONS)):
        reading = reading_of(engine, memories, number)
        alone.append([reading.begin(QUESTIONS[number]), *(reading.step(token) for token in ANSWER)])
    return engine, memories, alone


def reading_of(engine, memories, number):
    return engine.reading(memories[number % 3 // 2].state, max_tokens=16)


def together(engine, acts):
    """Run acts in threads, all of them in one sweep; return what each gave."""
    found = [None] * len(acts)

    def act(place):
        try:
            found[place] = acts[place]()
        except CancelledError as error:
            found[place] = error

    engine.passes._together = len(acts)
    threads = [threading.Thread(target=act, args=(place,)) for place in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(range(4)), min_size=1, unique=True), min_size=2, max_size=8), st.data())
def test_questions_join_and_leave_at_any_step(asked, schedule, data):
    """Rounds in which any questions begin, step, are cancelled or stay away: all in one sweep, logits == alone."""
    engine, memories, alone = asked
    running, steps, sizes, original = {}, {}, [], passes.sweep

    def counted(base, adapter, calls, locals_, positions, check):
        sizes.append(len(locals_))
        return original(base, adapter, calls, locals_, positions, check)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "sweep", counted)
        for present in schedule:
            engine.passes._patience = 20
            numbers = [number for number in present if steps.get(number, -1) < len(ANSWER)]
            cancelled = data.draw(st.sampled_from([None, *numbers])) if len(numbers) > 1 else None
            acts = []
            for number in numbers:
                if number not in running:
                    running[number], steps[number] = reading_of(engine, memories, number), 0
                    acts.append(lambda number=number: running[number].begin(QUESTIONS[number]))
                else:
                    steps[number] += 1
                    acts.append(lambda number=number: running[number].step(ANSWER[steps[number] - 1]))
                running[number].check = cancel if number == cancelled else lambda: None
            sizes.clear()
            found = together(engine, acts)
            assert sizes == ([len(numbers)] if numbers else [])
            for number, logits in zip(numbers, found, strict=True):
                if number == cancelled:
                    assert isinstance(logits, CancelledError)
                    del running[number], steps[number]  # it may be asked again
                    continue
                expected = alone[number][steps[number]]
                assert int(logits.argmax()) == int(expected.argmax())
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def cancel():
    raise CancelledError("the request was cancelled")


def test_questions_over_one_memory_read_it_once(asked, monkeypatch):
    """A step of three questions asks for each layer's chunk KV as often as a step of one."""
    engine, memories, _ = asked
    layers, original = [], ChunkKV.layer
    monkeypatch.setattr(ChunkKV, "layer", lambda self, index: layers.append(index) or original(self, index))
    counts = []
    for many in (1, 3):
        readings = [engine.reading(memories[0].state, max_tokens=8) for _ in range(many)]
        for reading, ids in zip(readings, QUESTIONS, strict=False):
            reading.begin(ids)
        layers.clear()
        engine.passes._patience = 20
        together(engine, [lambda reading=reading: reading.step(60) for reading in readings])
        counts.append(list(layers))
    assert counts[0] == counts[1] == list(range(engine.base.num_layers - 1))


def test_suffixes_grow_in_blocks_and_are_counted(asked):
    """What a question holds is what its blocks take, however long its answer may become; it grows a block at a time."""
    engine, memories, _ = asked
    kv = memories[0].state.slabs[0].kv
    reading = engine.reading(memories[0].state, max_tokens=200)
    reading.begin(QUESTIONS[0])
    local = reading._cache.nbytes
    assert reading.nbytes - local == suffix_bytes(kv.shape, kv.size, 28)  # one block of 32, the first tokens in it
    for token in range(60, 60 + 30):
        reading.step(token)
    assert reading.nbytes - local == suffix_bytes(kv.shape, kv.size, 3 + 30) == 2 * suffix_bytes(kv.shape, kv.size, 28)
    assert reading._suffix_bytes() == suffix_bytes(kv.shape, kv.size, 203)


@pytest.mark.slow
@pytest.mark.parametrize(("free", "most"), [(3, 3), (1, 1), (0, 1)])
def test_memory_decides_how_many_run_at_once(asked, monkeypatch, free, most):
    """With room for ``free`` suffixes so many questions run together, one alone always; all answers == alone."""
    engine, memories, _ = asked
    questions = [f"who is {number}?" for number in range(6)]
    single = [engine.answer(question, memories[0], max_tokens=4).text for question in questions]
    size = engine.reading(memories[0].state, max_tokens=4)
    size.begin(engine.local_ids(questions[0]))
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * free * size._suffix_bytes())
    seen, original = [], Room.take

    def noted(self, nbytes, device):
        original(self, nbytes, device)
        seen.append(len(self._held))

    monkeypatch.setattr(Room, "take", noted)
    answers = engine.answer_many(questions, memories[0], max_tokens=4)
    assert [answer.text for answer in answers] == single
    assert len(seen) == len(questions)
    assert max(seen) <= most


def test_more_than_sixteen_questions_share_a_sweep(asked, monkeypatch):
    """Twenty questions that wait pass in one sweep."""
    engine, memories, _ = asked
    readings = [engine.reading(memories[0].state, max_tokens=8) for _ in range(20)]
    for reading in readings:
        reading.begin([20, 21])
    sizes, original = [], passes.sweep

    def counted(base, adapter, calls, locals_, positions, check):
        sizes.append(len(locals_))
        return original(base, adapter, calls, locals_, positions, check)

    monkeypatch.setattr(passes, "sweep", counted)
    engine.passes._patience = 20
    found = together(engine, [lambda reading=reading: reading.step(60) for reading in readings])
    assert sizes == [20]
    torch.testing.assert_close(torch.stack(found), found[0].expand(20, -1), atol=1e-5, rtol=1e-4)


def test_a_question_that_waits_for_room_can_be_cancelled():
    """While one holds all the room the next waits, and ends when the batch is cancelled."""
    cancelled, begun = threading.Event(), []

    def work(item):
        room.take_room(1 << 62, torch.device("cpu"))
        begun.append(item)
        cancelled.set()
        end = threading.Event()
        end.wait(0.2)
        return item

    with pytest.raises(CancelledError):
        run_together(work, [1, 2, 3], cancelled)
    assert begun == [1]
