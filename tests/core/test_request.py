"""Check what every interface stands on: options, time limits, requests of any length, tool calls, citations."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from focus_core.answers import Answer, Usage
from focus_core.config import DecodeConfig
from focus_core.errors import CancelledError, ConfigError
from focus_core.generation import Token
from focus_core.method.attribution import Evidence
from focus_core.model.chat import Message, Tool
from focus_core.session.arguments import refuse_unknown
from focus_core.session.citations import about, cite
from focus_core.session.engines import Held
from focus_core.session.openai import to_choice, to_tools
from focus_core.session.request import SAMPLING, Request, begin, decode_of, seconds_of
from focus_core.text.corpus import Document
from tests.conftest import tiny_model

ADD = Tool("add", "Add numbers.", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})


@pytest.fixture
def engine(make_engine):
    return make_engine(model=tiny_model("llama", window=1024), window=1024, chunk_size=64)


def started(engine, request, held=None, asked=None):
    def hold(question, documents):
        if asked is not None:
            asked.append((question, [document.id for document in documents]))
        return held or Held(engine.remember(documents) if documents else None)

    return begin(engine, request, hold, threading.Event())


def test_a_call_s_options_stand_over_the_settings():
    """None means not given, a string is one stop, and every option but stop is a sampling option."""
    settings = SimpleNamespace(**{name: getattr(DecodeConfig(), name) for name in SAMPLING}, stop=["x"])
    assert decode_of({}, settings) == DecodeConfig(stop=("x",))
    given = {"max_tokens": 3, "stop": "end", "temperature": None}
    assert decode_of(given, settings) == DecodeConfig(max_tokens=3, stop=("end",))
    with pytest.raises(ConfigError, match="temperature"):
        decode_of({"temperature": -1.0}, settings)


def test_time_limits_and_unknown_names():
    assert (seconds_of({}, 2.0), seconds_of({"timeout": None}, 2.0), seconds_of({"timeout": 1}, None)) == (2.0, None, 1)
    with pytest.raises(ConfigError, match="timeout must be a number of seconds above 0"):
        seconds_of({"timeout": 0}, None)
    with pytest.raises(ConfigError, match="unknown option 'tmp'; it may be one of seed, top_p"):
        refuse_unknown(["seed", "tmp"], ["top_p", "seed"], "option")


def test_tools_and_choices_are_read_alike():
    tools = to_tools([{"type": "function", "function": {"name": "add"}}])
    assert tools[0].parameters == {"type": "object", "properties": {}}
    named = {"type": "function", "function": {"name": "add"}}
    choices = (None, "auto", False, "none", True, "any", "required", "add", named)
    assert [to_choice(choice, tools) for choice in choices] == [
        *("auto", "auto", "none", "none", "required", "required", "required", "add", "add"),
    ]
    with pytest.raises(ConfigError, match="tool_choice 'other' is none of"):
        to_choice("other", tools)


def test_texts_and_conversations_are_what_the_engine_says_to_them(engine):
    """begin adds nothing: the same tokens as the engine's own stream and chat."""
    decode = DecodeConfig(max_tokens=4)
    page = Document("cat", "the large cat sat. " * 10)
    text = started(engine, Request(decode, text="who sat?", template="question", documents=[page]))
    said = started(engine, Request(decode, [Message("user", "who sat?")], template="question", documents=[page]))
    put = engine.info.question_template.replace("{question}", "who sat?")
    memory = engine.remember([page])
    alone = engine.stream("who sat?", memory, template="question", decode=decode).answer
    chat = engine.chat([Message("user", put)], memory, decode=decode).answer
    for call, expected in ((text, alone), (said, chat)):
        pieces = list(call.pieces())
        assert [token.id for piece in pieces for token in piece.tokens] == [token.id for token in expected.tokens]
        assert "".join(piece.delta.text for piece in pieces) == expected.text == call.stream.answer.text
        assert (call.calls, call.reason) == ((), expected.finish_reason)


def test_what_does_not_fit_is_held(engine):
    """The head of a text and old turns come to hold beside the request's documents, with the question."""
    decode, long = DecodeConfig(max_tokens=2), "the dog sat on the mat. " * 200
    asked = []
    page = Document("cat", "the cat sat.")
    started(engine, Request(decode, text=long, template="raw", documents=[page]), asked=asked).stream.close()
    turns = [Message("user", long), Message("assistant", "yes"), Message("user", "and the cat?")]
    started(engine, Request(decode, turns, documents=[page]), asked=asked).stream.close()
    (tail, read), (question, moved) = asked
    assert read == ["cat", "prompt"]
    assert 0 < len(tail) < len(long)
    assert long.endswith(tail)
    assert question == "and the cat?"
    assert moved[0] == "cat"
    assert len(moved) > 1


def test_what_cannot_be_begun(engine):
    decode = DecodeConfig(max_tokens=2)
    with pytest.raises(ConfigError, match="there is no message"):
        started(engine, Request(decode))
    with pytest.raises(ConfigError, match="template 'raw' has no turns"):
        started(engine, Request(decode, [Message("user", "x")], template="raw"))
    gone = threading.Event()
    gone.set()
    with pytest.raises(CancelledError):
        begin(engine, Request(decode, text="x"), lambda question, documents: Held(None), gone)


def test_calls_are_taken_out_of_the_text(engine):
    pytest.importorskip("llguidance", reason="tool calls are held to their schemas by llguidance")
    decode = DecodeConfig(max_tokens=120)
    call = started(engine, Request(decode, [Message("user", "add")], tools=[ADD], choice="required", parallel=False))
    deltas = [piece.delta for piece in call.pieces()]
    assert "".join(delta.text for delta in deltas).strip() == ""
    (made,) = call.calls
    assert (made.name, call.reason, call.citations(3)) == ("add", "tool_calls", [])
    assert json.loads("".join(delta.arguments for delta in deltas)) == made.arguments
    unasked = started(engine, Request(decode, [Message("user", "add")], tools=[ADD], choice="none"))
    assert unasked.parser is None
    unasked.stream.close()


def test_two_sources_get_two_spans():
    """Each word is credited to the passage that was attended to while it was made."""
    tokens = [Token(1, "red", -0.1), Token(2, " roof,", -0.1), Token(3, " nine", -0.1), Token(4, " trees", -0.1)]
    attention = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.1, 0.9], [0.2, 0.7]])
    passages = [Evidence("roof", 0.55, 0, 8, "the roof", 0), Evidence("garden", 0.45, 4, 10, "garden", 1)]
    answer = Answer("red roof, nine trees", "stop", passages, passages, Usage(1, 2, 4, 2), tokens, attention, attention)
    documents = {
        "roof": Document("roof", "the roof is red", {"title": "The roof", "page_label": "7"}),
        "garden": Document("garden", "the garden has trees", {"file_name": "g.pdf", "page_starts": [0, 3]}),
    }
    one, two = (citation.to_dict() for citation in cite(answer, documents, 5))
    assert (answer.text[one["start"] : one["end"]], answer.text[two["start"] : two["end"]]) == (
        "red roof,",
        "nine trees",
    )
    assert (one["title"], one["page"], two["title"], two["page"]) == ("The roof", 7, "g.pdf", 2)
    assert (two["document_id"], two["source_start"], two["source_end"], two["cited_text"]) == (
        "garden",
        4,
        10,
        "garden",
    )
    assert json.loads(json.dumps(one)) == one
    assert [citation.document_id for citation in cite(answer, {"garden": documents["garden"]}, 5)] == ["garden"]
    assert cite(answer, documents, 0) == []
    assert about({"page_label": "iv"}, "x", 0) == {"title": "x", "url": None, "page": None}
