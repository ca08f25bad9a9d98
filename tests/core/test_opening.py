"""Check that what all questions begin with runs behind the chunks once, and that nobody can tell from the answers."""

from __future__ import annotations

import pytest
import torch

from focus_core.method import passes, reading
from focus_core.model.chat import Message, Tool
from focus_core.text.corpus import Document

DOCUMENTS = [Document(str(number), f"the cat number {number} sat on the mat. " * 20) for number in range(9)]


@pytest.fixture
def asked(make_engine, monkeypatch):
    """An engine, its memory, and a list that notes how many ordinary tokens every sweep puts behind a chunk."""
    engine = make_engine(window=512, chunk_size=200, prompt_length=256)
    rows = []

    def noting(original):
        def sweep(base, adapter, calls, *rest):
            groups = [group for call in calls for group in call]
            rows.append(max((len(it.ordinary) for group in groups for it in group.asked), default=0))
            return original(base, adapter, calls, *rest)

        return sweep

    monkeypatch.setattr(passes, "sweep", noting(passes.sweep))
    monkeypatch.setattr(reading, "sweep", noting(reading.sweep))
    return engine, engine.remember(DOCUMENTS), rows


@pytest.mark.parametrize("size", [None, 2])
def test_a_kept_opening_gives_the_same_logits(asked, size):
    """With an opening that is kept, one that is new, and none at all: the same logits, bit for bit where it is kept."""
    engine, memory, rows = asked
    local = engine.local_ids("who sat?")

    def begin(opening):
        return engine.reading(memory.state, max_tokens=4, chunks_per_batch=size).begin(local, opening)

    whole, new, kept = begin(0), begin(5), begin(5)
    assert rows == [len(local) - 1, 5, len(local) - 6, len(local) - 6]
    assert torch.equal(new, kept)
    torch.testing.assert_close(new, whole, atol=1e-5, rtol=1e-4)


def test_the_second_question_begins_behind_the_opening(asked):
    """The system turn of the template runs behind the chunks for the first question only; a change starts anew."""
    engine, memory, rows = asked
    engine.info = type(engine.info)(**{**vars(engine.info), "system": "use the documents"})
    first = engine.answer("who sat?", memory, max_tokens=1).tokens[0]
    opening, rest = rows[:2]
    assert opening >= 3
    rows.clear()
    engine.answer("where was it?", memory, max_tokens=1)
    assert len(rows) == 1
    assert rows[0] < rest + 8
    memory.add([Document("more", "a dog barked in the yard.")])
    memory.remove(["more"])
    rows.clear()
    again = engine.answer("who sat?", memory, max_tokens=1).tokens[0]
    assert rows == [opening, rest]
    assert (again.id, again.logprob) == (first.id, first.logprob)


def test_a_conversation_keeps_its_system_turn_and_tools(asked):
    """Two conversations with the same system turn and tools: the second one's opening is there."""
    engine, memory, rows = asked
    tools = [Tool("find", "find a thing", {"type": "object", "properties": {}})]
    for question, sweeps in (("who sat?", 2), ("what now?", 1)):
        rows.clear()
        messages = [Message("system", "be brief"), Message("user", question)]
        engine.chat(messages, memory, tools=tools, tool_choice="none", max_tokens=1).answer  # noqa: B018
        assert len(rows) == sweeps


def test_few_chunks_and_long_openings_run_as_one(asked):
    """Where a pass of its own does not pay, or what is kept would be large beside the chunks, nothing is kept."""
    engine, memory, rows = asked
    local = engine.local_ids("who sat on the mat all day? " * 5)
    few = memory.subset(["0", "1"])
    engine.reading(few.state, max_tokens=4).begin(local, 5)
    engine.reading(memory.state, max_tokens=4).begin(local, len(local) - 2)
    assert rows == [len(local) - 1] * 2
