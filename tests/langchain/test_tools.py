"""Check tools and structured output of the chat model: always well formed, streamed, and put back into the history."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from focus_core.errors import ConfigError, ContextTooLongError
from focus_integrations.langchain import ChatFocusLLM
from tests.langchain.test_models import ENGINE, SCRIPTED, Person


@pytest.mark.slow
def test_tools_stream_and_round_trip():
    """Streamed call chunks add up to the call; no two calls have the same id, of equal requests neither."""

    def add(a: int, b: int) -> int:
        """Add numbers."""
        return a + b

    bound = ChatFocusLLM(engine=SCRIPTED, max_tokens=160).bind_tools([add])
    message = bound.invoke("add 3 and 4")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("add", {"a": 3, "b": 4})]
    assert message.response_metadata["finish_reason"] == "tool_calls"
    chunks = list(bound.stream("add 3 and 4"))
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 2
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert [{**call, "id": None} for call in whole.tool_calls] == [{**call, "id": None} for call in message.tool_calls]
    again = bound.invoke("add 3 and 4")
    assert len({call["id"] for one in (message, whole, again) for call in one.tool_calls}) == 3
    talk = [HumanMessage("add 3 and 4"), message, ToolMessage("7", tool_call_id=message.tool_calls[0]["id"])]
    assert "7" in bound.invoke(talk).content
    later = bound.invoke([*talk, AIMessage("seven"), HumanMessage("add 5 and 6")])
    assert later.tool_calls[0]["args"] == {"a": 5, "b": 6}
    assert later.tool_calls[0]["id"] != message.tool_calls[0]["id"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_of_any_sample(method):
    """Whatever is sampled is a value of the schema; include_raw gives the message too; streams end in the value."""
    chat = ChatFocusLLM(engine=ENGINE, max_tokens=140, temperature=1.5)
    for seed in range(2):
        assert isinstance(chat.bind(seed=seed).with_structured_output(Person, method=method).invoke("x"), Person)
    whole = chat.with_structured_output(Person.model_json_schema(), method=method, include_raw=True).invoke("x")
    assert Person(**whole["parsed"])
    assert whole["parsing_error"] is None
    assert isinstance(whole["raw"], AIMessage)
    last = list(chat.with_structured_output(Person.model_json_schema(), method=method).stream("x"))[-1]
    assert Person(**last)


def test_bad_tools_schemas_and_messages_are_named():
    """Tools, choices, schemas and conversations that cannot be used say why."""
    chat = ChatFocusLLM(engine=ENGINE, max_tokens=100)
    bad = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": 3}}}},
    }
    with pytest.raises(ConfigError, match="cannot be used"):
        chat.bind_tools([bad], tool_choice="any").invoke("x")
    with pytest.raises(ConfigError, match="tool_choice 'other'"):
        chat.bind_tools([Person], tool_choice="other")
    with pytest.raises(ConfigError, match="method must be"):
        chat.with_structured_output(Person, method="magic")
    with pytest.raises(ConfigError, match="raise max_tokens"):
        chat.with_structured_output(Person).invoke("x", max_tokens=3)
    with pytest.raises(ConfigError, match="template 'raw'"):
        ChatFocusLLM(engine=ENGINE, template="raw").invoke("x")
    with pytest.raises(ContextTooLongError, match="window"):
        chat.invoke("x", max_tokens=9000)
    with pytest.raises(ConfigError, match="OpenAI's form"):
        chat.invoke("x", tools=[{"name": "f"}])
    assert chat.profile["tool_calling"]


def test_the_profile_tells_what_memory_holds(monkeypatch):
    """What is free as chunk KV where there is an engine, a setting before that, and nothing where none is loaded."""
    monkeypatch.setattr("focus_core.engine.free_bytes", lambda device: 10**9)
    assert ChatFocusLLM(engine=ENGINE).profile["max_input_tokens"] == ENGINE.capacity > ENGINE.config.window
    assert ChatFocusLLM(engine=ENGINE, context_window=77).profile["max_input_tokens"] == 77
    assert "max_input_tokens" not in ChatFocusLLM().profile
