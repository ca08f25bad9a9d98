"""Check what frameworks expect of a chat model: every message class and block, callbacks, copies, contexts."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document as Page
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    ChatMessageChunk,
    FunctionMessage,
    FunctionMessageChunk,
    HumanMessage,
    HumanMessageChunk,
    SystemMessageChunk,
    ToolMessageChunk,
)
from langchain_core.retrievers import BaseRetriever

from focus_core import Document
from focus_core.errors import ConfigError, StoreError
from focus_core.method.room import run_together
from focus_core.model.tool_calls import ToolCall, write_tool_call
from focus_core.session.long_memory import LongMemory
from focus_integrations.langchain import ChatFocusLLM, FocusLLM, FocusRetriever, FocusTextSplitter, memory_tools
from focus_integrations.langchain._messages import to_messages
from tests.langchain.test_trust import BOTH, ENGINE, SAYING, _pages


class _Store(BaseRetriever):
    """A retriever over a list that may change, and what it was told."""

    pages: list[Page]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Page]:
        return self.pages


def test_every_message_class_goes_back_into_the_history():
    """A streamed answer and every chunk class are said as the whole message is; unknown roles are named."""
    chat = ChatFocusLLM(engine=ENGINE, max_tokens=6)
    streamed = None
    for chunk in chat.stream("hello"):
        streamed = chunk if streamed is None else streamed + chunk
    assert isinstance(streamed, AIMessageChunk)
    history = [HumanMessage("hello"), AIMessage(streamed.content), HumanMessage("again")]
    assert chat.invoke([history[0], streamed, history[2]]).content == chat.invoke(history).content
    assert chat.get_num_tokens_from_messages([streamed]) == chat.get_num_tokens_from_messages([history[1]])
    said, _ = to_messages(
        [
            SystemMessageChunk("s"),
            HumanMessageChunk("h"),
            AIMessageChunk(
                "",
                tool_call_chunks=[{"name": "f", "args": '{"a": 1}', "id": "1", "index": 0, "type": "tool_call_chunk"}],
            ),
            ToolMessageChunk("t", tool_call_id="1"),
            FunctionMessage("r", name="f"),
            FunctionMessageChunk("r", name="f"),
            ChatMessage("c", role="Assistant"),
            ChatMessageChunk("c", role="developer"),
        ]
    )
    assert [one.role for one in said] == ["system", "user", "assistant", "tool", "tool", "tool", "assistant", "system"]
    assert said[2].tool_calls == (ToolCall("1", "f", {"a": 1}),)
    assert (said[3].tool_call_id, said[4].name) == ("1", "f")
    with pytest.raises(ConfigError, match="unknown role 'critic'"):
        to_messages([ChatMessage("c", role="critic")])


def test_every_standard_block_goes_back_into_the_history():
    """What a provider's server did is said where it has words and left out where it has none; media are refused."""
    blocks = [
        {"type": "reasoning", "reasoning": "hm", "content": "hidden"},
        {"type": "server_tool_call", "id": "1", "name": "search", "args": {"q": "x"}},
        {"type": "server_tool_call_chunk", "id": "1", "name": "search", "args": "{", "index": 0},
        {"type": "server_tool_result", "tool_call_id": "1", "status": "success", "output": {"n": 3}},
        {"type": "server_tool_result", "tool_call_id": "1", "status": "success"},
        {"type": "text", "text": "hi", "annotations": [{"type": "citation", "cited_text": "y"}]},
        {"type": "refusal", "refusal": "no"},
        {"type": "tool_call", "id": "2", "name": "f", "args": {}},
        {"type": "tool_call_chunk", "id": "2", "name": "f", "args": "{}", "index": 1},
        {"type": "invalid_tool_call", "id": "3", "name": "f", "args": "{", "error": "cut"},
        {"type": "web_search_call", "id": "ws", "status": "completed"},
        {"type": "tool_result", "content": [{"type": "text", "text": "found"}]},
        {"type": "non_standard", "value": {"x": 1}},
        {"type": "citation", "cited_text": "y"},
        "plain",
    ]
    (said,), _ = to_messages([AIMessage(blocks)])
    assert said.content.split("\n") == ['{"n": 3}', "hi", "no", "found", "plain"]
    for kind in ("image", "audio", "video", "unheard_of"):
        with pytest.raises(ConfigError, match=f"type '{kind}'"):
            to_messages([HumanMessage([{"type": kind, "url": "http://x"}])])
    chat = ChatFocusLLM(engine=ENGINE, max_tokens=2)
    blank = {"type": "text-plain", "text": " ", "mime_type": "text/plain", "title": "blank"}
    assert chat.invoke([HumanMessage(["who?", blank]), AIMessage(blocks[:7]), HumanMessage("and?")]) is not None


@pytest.mark.slow
def test_broken_calls_are_no_traceback():
    """What a model writes instead of a call is text or an invalid call, in invoke and in a stream alike."""

    def f(a: str) -> str:
        """Say it."""
        return a

    chat = ChatFocusLLM(engine=SAYING, max_tokens=900).bind_tools([f])

    for said, texts, broken in (
        ('<tool_call>{"name": "\\q", "arguments": {}}</tool_call>', True, 0),
        ('<tool_call>{"a": ' + "[" * 200 + "</tool_call>", True, 0),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\q"}}</tool_call>', False, 1),
        ('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', False, 1),
        (write_tool_call(ToolCall("", "f", {"a": "b"})), False, 0),
    ):
        SAYING.said = said
        message = chat.invoke("x")
        assert (message.content == said) == texts
        assert len(message.invalid_tool_calls) == broken
        whole = None
        for chunk in chat.stream("x"):
            whole = chunk if whole is None else whole + chunk
        assert whole.content.strip() == message.content


class _Listening(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: dict[Any, list[str]] = {}
        self.parents: list[Any] = []
        self.runs: list[Any] = []

    def on_llm_start(self, *_: Any, run_id: Any, **__: Any) -> None:
        self.runs.append(run_id)

    def on_chat_model_start(self, *_: Any, run_id: Any, **__: Any) -> None:
        self.runs.append(run_id)

    def on_llm_new_token(self, token: Any, *, run_id: Any, **_: Any) -> None:
        self.tokens.setdefault(run_id, []).append(token)

    def on_retriever_start(self, *_: Any, parent_run_id: Any = None, **__: Any) -> None:
        self.parents.append(parent_run_id)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_streaming_inside_invoke(kind, asynchronous):
    """With streaming=True callbacks hear every token of an invoke, and each prompt's of a batch."""
    model, listening = kind(engine=ENGINE, documents=["the mat"], max_tokens=6, streaming=True), _Listening()
    config: Any = {"callbacks": [listening]}
    answer = await model.ainvoke("hi", config) if asynchronous else model.invoke("hi", config)
    expected = kind(engine=ENGINE, documents=["the mat"], max_tokens=6).invoke("hi")
    assert getattr(answer, "content", answer) == getattr(expected, "content", expected)
    (heard,) = listening.tokens.values()
    assert len(heard) > 2
    assert "".join(heard) == getattr(expected, "content", expected)
    if kind is FocusLLM:
        listening = _Listening()
        prompts = ["hi", "ho", "ha"]
        config = {"callbacks": [listening]}
        said = await model.abatch(prompts, config) if asynchronous else model.batch(prompts, config)
        assert sorted("".join(heard) for heard in listening.tokens.values()) == sorted(said)
        assert "sources" in model.generate(["hi"]).generations[0][0].generation_info


@BOTH
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "streaming", "ranked"])
async def test_a_retriever_is_traced_below_its_caller(kind, way):
    """Callbacks of a call hear its retriever, as a child of the call's run."""
    store, listening = _Store(pages=_pages(cat=1)), _Listening()
    config: Any = {"callbacks": [listening]}
    model = kind(engine=ENGINE, retriever=store, max_tokens=2, streaming=way == "streaming")
    if way == "ranked":
        FocusRetriever(engine=ENGINE, retriever=store).invoke("x", config)
        assert listening.parents[0] is None
        assert listening.parents[1] is not None
        return
    if way == "ainvoke":
        await model.ainvoke("x", config)
    else:
        model.invoke("x", config)
    assert listening.parents == listening.runs


def test_context_reaches_every_item_of_a_batch():
    """Items that run together see the caller's context variables, and change them for themselves alone."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    variable.set("outer")

    def look(item: int) -> str:
        seen = variable.get()
        variable.set(f"inner {item}")
        return seen

    assert run_together(look, [1, 2, 3], threading.Event()) == ["outer"] * 3
    assert variable.get() == "outer"


def test_copies_share_what_cannot_be_copied():
    """Deep copies share engine, memory and what was read; pickles find the engine, or say what to give."""
    memory = ENGINE.remember(["a note"])
    for kind in (FocusLLM, ChatFocusLLM, FocusRetriever):
        model = kind(engine=ENGINE, memory=memory, documents=["own"])
        for other in (copy.deepcopy(model), model.model_copy(deep=True), copy.copy(model)):
            assert (other.engine, other.memory, other.holder) == (ENGINE, memory, model.holder)
        with pytest.raises(ConfigError, match="engine= lives in one process"):
            pickle.dumps(model)
        with pytest.raises(ConfigError, match="memory_path="):
            pickle.dumps(kind(memory=memory))
        assert pickle.loads(pickle.dumps(kind(documents=["own"]))).documents == ["own"]
    chain = ChatFocusLLM(engine=ENGINE, retriever=FocusRetriever(engine=ENGINE, documents=["x"]), max_tokens=2)
    assert copy.deepcopy(chain).invoke("who?").content == chain.invoke("who?").content
    splitter = FocusTextSplitter(16, engine=ENGINE)
    text = "the cat sat on the mat. " * 9
    assert pickle.loads(pickle.dumps(splitter)).split_text(text) == splitter.split_text(text)
    assert copy.deepcopy(memory_tools(LongMemory(engine=ENGINE))[0]).invoke({"text": "x"}).startswith("remembered")


def test_no_messages_have_no_tokens():
    """An empty conversation counts 0, as trimming asks."""
    assert ChatFocusLLM(engine=ENGINE).get_num_tokens_from_messages([]) == 0


def test_memory_takes_the_name_of_a_collection(tmp_path, monkeypatch):
    """``memory="contracts"`` reads what the command line indexed; a call may name another; it is pickled."""
    monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path))
    for name, text in (("contracts", "the lease was signed by Ada"), ("boats", "the boat is called Tom")):
        ENGINE.remember([Document(name, text)]).save(tmp_path, name=name)
    for kind in (FocusLLM, ChatFocusLLM, FocusRetriever):
        model = kind(engine=ENGINE, memory="contracts")
        held = model._hold(ENGINE, [], {}, lambda: None).memory
        assert [one.id for one in held.documents] == ["contracts"]
        held = model._hold(ENGINE, [], {"memory": "boats"}, lambda: None).memory
        assert [one.id for one in held.documents] == ["boats"]
        assert pickle.loads(pickle.dumps(kind(memory="contracts"))).memory == "contracts"
    with pytest.raises(StoreError, match="no saved memory 'nothing'"):
        FocusLLM(engine=ENGINE, memory="nothing").invoke("who?")
