"""Check that agents of several threads and tenants see what is theirs, through every door of a shared memory."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest
from langchain_core.documents import Document as Page
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver

from focus_core import Document
from focus_integrations.langchain import ChatFocusLLM, LongMemory, memory_tools
from focus_integrations.langchain.middleware import FocusMemoryMiddleware, _document
from tests.langchain.conftest import tiny_engine

ENGINE = tiny_engine()
SECRET = [HumanMessage("alice's pin is 4711 " * 5, id="1"), AIMessage("ok", id="2"), HumanMessage("hi", id="3")]


class _Calling(GenericFakeChatModel):
    """Says what was written for it, tool calls too."""

    def bind_tools(self, *_: Any, **__: Any) -> Any:
        return self


def _thread(name: str | None) -> Any:
    return {"configurable": {} if name is None else {"thread_id": name}}


def _asked(middleware: FocusMemoryMiddleware, model: Any, messages: list[Any], thread: str | None, **more: Any) -> Any:
    """Return the request that the middleware hands on in a thread."""
    request = ModelRequest(model=model, messages=messages, **more)
    return RunnableLambda(lambda _: middleware._moved(request)).invoke(None, _thread(thread))


def _read(request: Any) -> set[str]:
    message = request.model.bind(**request.model_settings).invoke(request.messages)
    return {source["text"] for source in message.response_metadata["sources"]}


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["recall", "forget"])
@pytest.mark.parametrize("own_tools", [False, True])
def test_tools_see_their_thread_alone(tool, own_tools):
    """An agent's recall and forget know nothing of another thread's turns, and everything of their own."""
    memory = LongMemory(engine=ENGINE)
    memory.remember("a shared note", "note")
    middleware = FocusMemoryMiddleware(memory, keep_tokens=20, tools=not own_tools)
    script: Any = iter([])
    extra = memory_tools(memory) if own_tools else []
    model = _Calling(messages=iter(lambda: next(script), None))
    agent = create_agent(model, extra, middleware=[middleware], checkpointer=InMemorySaver())
    script = iter([AIMessage("ok")])
    agent.invoke({"messages": SECRET}, _thread("alice"))
    turn = next(document.id for document in memory.documents if "4711" in document.text)

    def result(thread: str) -> str:
        nonlocal script
        arguments = {"query": "pin"} if tool == "recall" else {"id": turn}
        call = {"name": tool, "args": arguments, "id": "call"}
        script = iter([AIMessage("", tool_calls=[call]), AIMessage("done")])
        found = agent.invoke({"messages": [HumanMessage("what is the pin?")]}, _thread(thread))["messages"]
        return next(message.text for message in reversed(found) if isinstance(message, ToolMessage))

    bob, alice = result("bob"), result("alice")
    if tool == "recall":
        assert "4711" not in bob
        assert "a shared note" in bob
        assert "4711" in alice
    else:
        assert bob.startswith("there is no note")
        assert alice == f"forgot {turn}"


def test_runs_without_a_thread_share_nothing():
    """What leaves a run without thread_id is read by that run and found by no other, with a thread or without."""
    memory = LongMemory(engine=ENGINE)
    middleware = FocusMemoryMiddleware(memory, keep_tokens=20)
    own = _asked(middleware, ChatFocusLLM(engine=ENGINE, max_tokens=2), SECRET, None)
    assert any("4711" in text for text in _read(own))
    assert memory.documents == []
    memory.put([Document("old", "human: 4711", {"thread": ""})])
    for thread in (None, "bob", ""):
        other = _asked(middleware, ChatFocusLLM(engine=ENGINE, max_tokens=2), [HumanMessage("pin?", id="9")], thread)
        assert _read(other) == set()
    fake = FakeListChatModel(responses=["x"])
    assert "4711" in _asked(middleware, fake, SECRET, None).system_message.text
    assert _asked(middleware, fake, [HumanMessage("pin?")], None).system_message is None


def test_ids_of_threads_and_messages_do_not_collide():
    """However threads and messages are called, their documents have names of their own."""
    pairs = [("1", "2-x"), ("1-2", "x"), ("1/2", "x"), ("1", "2/x"), ("1%2F2", "x"), ("", "1/2/x"), ("a b", "x")]
    names = {_document("turn", HumanMessage("a", id=own), "a", thread).id for thread, own in pairs}
    assert len(names) == len(pairs)


def test_the_models_own_corpus_and_filter_stay_in_force():
    """Behind the middleware a model reads its corpus under its filter, the call's documents, and notes."""
    kept = ENGINE.remember([Document("kb", "ours", {"t": "a"}), Document("kb2", "theirs", {"t": "b"})])
    pages = [Page(page_content="our page", metadata={"t": "a"}), Page(page_content="their page", metadata={"t": "b"})]
    model = ChatFocusLLM(engine=ENGINE, memory=kept, memory_filter={"t": "a"}, documents=pages, max_tokens=2)
    memory = LongMemory(engine=ENGINE)
    memory.remember("a note")
    middleware = FocusMemoryMiddleware(memory)
    for settings, more in (({}, set()), ({"documents": ["the call's"]}, {"the call's"})):
        asked = _asked(middleware, model, [HumanMessage("q")], "t", model_settings=settings)
        assert _read(asked) == {"ours", "our page", "a note"} | more
    bound: Any = model.bind(documents=["bound"])
    settings = _asked(middleware, bound, [HumanMessage("q")], "t").model_settings
    assert {source["text"] for source in bound.bind(**settings).invoke("q").response_metadata["sources"]} == {
        "ours",
        "our page",
        "a note",
        "bound",
    }


@pytest.mark.parametrize("saved", [False, True])
def test_a_model_over_the_agents_own_memory_sees_its_thread_alone(saved, tmp_path):
    """Where the model's memory is the agents' memory, other threads' turns are left out of it."""
    memory = LongMemory(tmp_path if saved else None, engine=ENGINE)
    memory.remember("a note", "note", {"t": "a"})
    memory.remember("another note", "other", {"t": "b"})
    middleware = FocusMemoryMiddleware(memory, keep_tokens=20)
    given: Any = {"memory_path": str(tmp_path)} if saved else {"memory": memory.memory}
    model = ChatFocusLLM(engine=ENGINE, max_tokens=2, **given)
    assert any("4711" in text for text in _read(_asked(middleware, model, SECRET, "alice")))
    bob = _asked(middleware, model, [HumanMessage("pin?", id="9")], "bob")
    assert _read(bob) == {"a note", "another note"}


def test_system_messages_stay_in_the_prompt():
    """A system message among the messages stays; what is recalled is added to one that is text or blocks."""
    memory = LongMemory(engine=ENGINE)
    middleware = FocusMemoryMiddleware(memory, keep_tokens=20)
    rule = SystemMessage("Never reveal prices. " * 9, id="s")
    asked = _asked(middleware, ChatFocusLLM(engine=ENGINE), [rule, *SECRET], "t")
    assert [message.type for message in asked.messages] == ["system", "ai", "human"]
    assert not any("prices" in document.text for document in memory.documents)
    blocks = SystemMessage([{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}])
    system = _asked(middleware, FakeListChatModel(responses=["x"]), SECRET, "t", system_message=blocks).system_message
    assert system.content[0] == blocks.content[0]
    assert "4711" in system.content[1]["text"]


def test_a_long_or_blank_last_message_is_no_error():
    """With another model a last message above the window asks with its tail, a blank one asks for nothing."""
    memory = LongMemory(engine=ENGINE)
    memory.remember("a note")
    middleware = FocusMemoryMiddleware(memory)
    fake = FakeListChatModel(responses=["x"])
    assert "a note" in _asked(middleware, fake, [HumanMessage("word " * 9000)], "t").system_message.text
    assert _asked(middleware, fake, [HumanMessage(" ")], "t").system_message is None
