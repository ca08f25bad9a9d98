"""Check constrained decoding: whatever a random model samples must parse, validate, and end in time."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from jsonschema import Draft202012Validator

from focus_core.errors import ConfigError
from focus_core.model.chat import Message, Tool
from focus_core.model.constraints import json_schema, regex, tool_calls
from focus_core.text.corpus import Document
from tests.conftest import EngineFactory, parse_tool_calls, tiny_model

SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
    },
    "nested": {
        "$defs": {"item": {"type": "object", "properties": {"tag": {"enum": ["a", "b"]}}, "required": ["tag"]}},
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 2},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "size": {"type": "number"},
            "more": {"type": "boolean"},
        },
        "required": ["items"],
    },
    "choice": {"oneOf": [{"type": "string", "minLength": 3}, {"type": "integer"}]},
    "open": {"type": "object"},
    "anything": True,
    "list": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
    "date": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]},
    "unsupported": {"type": "array", "items": {"type": "integer"}, "uniqueItems": False, "minItems": 1},
}
ADD = Tool(
    "add",
    "Add numbers.",
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}, "required": ["a", "b"]},
)
SAY = Tool("say", "", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]})
NOW = Tool("now")
TOOLS = {tool.name: tool for tool in (ADD, SAY, NOW)}


def _ask(engine, **arguments):
    return engine.chat([Message("user", "the cat?")], **arguments).answer


@pytest.fixture
def engine(make_engine: EngineFactory):
    return make_engine(model=tiny_model("llama", window=4096), window=4096)


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [60, 200])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_sample_validates_and_ends(engine, name, max_tokens):
    """A random model at high temperature, cut short or not: every answer is a whole value of the schema."""
    schema = SCHEMAS[name]
    for seed in range(3):
        answer = _ask(engine, schema=schema, temperature=1.5, seed=seed, max_tokens=max_tokens)
        Draft202012Validator(schema).validate(json.loads(answer.text))
        assert answer.usage.generated <= max_tokens


@pytest.mark.slow
def test_greedy_and_long_memories_too(engine):
    """Greedy answers over a memory validate; attention is recorded for every token."""
    memory = engine.remember([Document("a", "the cat sat on the mat. " * 20)])
    answer = _ask(engine, memory=memory, schema=SCHEMAS["person"], max_tokens=80)
    Draft202012Validator(SCHEMAS["person"]).validate(json.loads(answer.text))
    assert answer.attention.shape[0] == answer.usage.generated
    assert answer.evidence[0].document_id == "a"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", "add", "now"])
def test_forced_calls_parse_and_validate(engine, choice, parallel):
    """required and a name give calls of the right tools with valid arguments and no text."""
    counts = []
    for seed in range(3):
        answer = _ask(
            engine,
            tools=list(TOOLS.values()),
            tool_choice=choice,
            parallel=parallel,
            temperature=1.5,
            seed=seed,
            max_tokens=250,
        )
        text, calls = parse_tool_calls(answer.text)
        assert text == ""
        assert calls
        for call in calls:
            assert choice in ("required", call.name)
            Draft202012Validator(TOOLS[call.name].parameters).validate(call.arguments)
        counts.append(len(calls))
    assert parallel or set(counts) == {1}


def test_auto_leaves_text_free_and_holds_calls(engine):
    """auto samples what the base samples until a call begins; once opened, a call is whole."""
    free = _ask(engine, temperature=1.0, seed=3, max_tokens=30)
    auto = engine.chat([Message("user", "the cat?")], tools=[NOW], temperature=1.0, seed=3, max_tokens=30).answer
    assert "<tool_call>" not in auto.text
    grammar = tool_calls([NOW], "auto")
    state = grammar.begin(engine.tokenizer, engine.end_tokens, 100)
    size = engine.base.config.vocab_size
    for token in engine.tokenizer.encode("Well, <b>: <tool_call>"):
        assert state.allowed(size)[token]
        assert state.accept(token, 99)
    written = []
    while not state.finished and not state.allowed(size)[1]:
        token = int(state.allowed(size).nonzero()[-1])
        assert state.accept(token, 99)
        written.append(token)
    assert parse_tool_calls("<tool_call>" + engine.tokenizer.decode(written))[1][0].name == "now"
    assert free.text != ""


@pytest.mark.slow
def test_a_schema_beside_tools_is_an_answer_or_a_call(engine):
    """With tools and a schema an answer is either valid JSON or valid calls, and both happen."""
    kinds = set()
    for seed in range(12):
        answer = _ask(
            engine, tools=[NOW], schema={"type": "integer", "maximum": 9}, temperature=3.0, seed=seed, max_tokens=80
        )
        text, calls = parse_tool_calls(answer.text)
        kinds.add(bool(calls))
        assert calls or isinstance(json.loads(text), int)
    assert kinds == {True, False}


def test_unconstrained_sampling_is_unchanged_by_a_grammar_of_everything(engine):
    """With a grammar that allows all text, ids and log-probabilities equal those without one."""
    local = engine.local_ids("who?")
    free = engine.stream_ids(local, temperature=1.0, seed=1, max_tokens=24, logprobs=3).answer
    held = engine.stream_ids(
        local, temperature=1.0, seed=1, max_tokens=24, logprobs=3, constraint=regex("(.|\n)*")
    ).answer
    same = 0
    for one, two in zip(free.tokens, held.tokens, strict=False):
        if one.id != two.id:
            break  # a byte that is not UTF-8, or a special token, is refused
        assert one.logprob == pytest.approx(two.logprob)
        assert [item[0] for item in one.top] == [item[0] for item in two.top]
        same += 1
    assert same >= 1


def test_regex_stop_strings_and_penalties(engine):
    """A pattern holds; stop strings and penalties still work."""
    local = engine.local_ids("who?")
    for seed in range(3):
        answer = engine.stream_ids(
            local,
            temperature=1.0,
            seed=seed,
            max_tokens=12,
            repetition_penalty=1.3,
            constraint=regex("[ab]{3}-[0-9]{2}"),
        ).answer
        assert re.fullmatch("[ab]{3}-[0-9]{2}", answer.text)
        assert answer.finish_reason == "stop"
    cut = engine.stream_ids(local, max_tokens=12, stop=("-",), constraint=regex("[ab]{3}-[0-9]{2}")).answer
    assert re.fullmatch("[ab]{3}", cut.text)


def test_reported_logprobs_are_the_models_own(engine):
    """logprob is the base's before the grammar: equal to log-softmax of the logits of the same ids."""
    local = engine.local_ids("who?")
    answer = engine.stream_ids(local, max_tokens=6, constraint=regex("[ab]{3}")).answer
    from focus_core.method.state import MemoryState

    reading = engine.reading(MemoryState({}, (), ()), max_tokens=8)
    logits = reading.begin(local)
    for token in answer.tokens:
        assert token.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[token.id]), abs=1e-5)
        logits = reading.step(token.id)


def test_bad_grammars_are_named(engine, monkeypatch):
    """Each mistake says what was wrong and what to do."""
    with pytest.raises(ConfigError, match="nonsense"):
        json_schema({"type": "nonsense"})
    with pytest.raises(ConfigError, match="pattern"):
        regex("(unclosed")
    with pytest.raises(ConfigError, match="tool_choice 'other'"):
        tool_calls([ADD], "other")
    with pytest.raises(ConfigError, match="same name"):
        tool_calls([ADD, ADD])
    with pytest.raises(ConfigError, match="nonsense"):
        tool_calls([Tool("f", "", {"type": "object", "properties": {"x": {"type": "nonsense"}}})])
    with pytest.raises(ConfigError, match="raise max_tokens"):
        _ask(engine, schema=SCHEMAS["person"], max_tokens=4)
    assert tool_calls([ADD], "none") is None
    assert tool_calls([], "auto") is None
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install llguidance"):
        json_schema({})


def test_long_conversations_are_read_as_memory(make_engine):
    """A conversation of several windows is answered; the memory handed over stays as it was."""
    engine = make_engine(window=256)
    memory = engine.remember([Document("a", "the mat")])
    talk = [Message("user", f"the cat number {number} sat on the mat") for number in range(30)]
    answer = engine.chat([*talk, Message("user", "who?")], memory, max_tokens=8).answer
    assert answer.usage.chunks > 5
    assert {item.document_id for item in answer.evidence} >= {"a", "turn-1"}
    assert len(memory) == 1
