"""Check what users rely on: no stale or foreign answer, whole messages, callbacks, time limits, copies."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import threading
import time
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
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
from pydantic import ValidationError

from focus_core.errors import ConfigError
from focus_core.method.passes import run_together
from focus_core.model.tool_calls import ToolCall, write_tool_call
from focus_core.session import engines
from focus_core.session.long_memory import LongMemory
from focus_core.store import memory as core_memory
from focus_core.text.corpus import Document
from focus_integrations.langchain import ChatFocusLLM, FocusLLM, FocusRetriever, FocusTextSplitter, memory_tools
from focus_integrations.langchain._messages import to_messages
from tests.langchain.conftest import EndlessEngine, ScriptedEngine, tiny_engine

ENGINE, ENDLESS = tiny_engine(), tiny_engine(EndlessEngine)
BOTH = pytest.mark.parametrize("kind", [FocusLLM, ChatFocusLLM])


class _Saying(ScriptedEngine):
    """Writes what a test says."""

    said = ""

    def chat(self, messages: Any, memory: Any = None, **arguments: Any) -> Any:
        stream = super().chat(messages, memory, **arguments)
        left, generation = self.tokenizer.encode(self.said), stream._generation
        generation._draw = lambda *_: (left.pop(0) if left else min(generation.end_tokens), 0.0, ())
        return stream


SAYING = tiny_engine(_Saying)


def _pages(**years: int) -> list[Page]:
    return [Page(page_content=f"the {name} sat", metadata={"year": year}, id=name) for name, year in years.items()]


def _info(model: Any, prompt: str = "who?", **kwargs: Any) -> dict[str, Any]:
    if isinstance(model, FocusLLM):
        return model.generate([prompt], **kwargs).generations[0][0].generation_info
    return model.invoke(prompt, **kwargs).response_metadata


def _sources(model: Any, prompt: str = "who?", **kwargs: Any) -> list[str]:
    return sorted(source["text"] for source in _info(model, prompt, **kwargs)["sources"])


class _Store(BaseRetriever):
    """A retriever over a list that may change, and what it was told."""

    pages: list[Page]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Page]:
        return self.pages


# -- metadata ---------------------------------------------------------------------------------------------------


@BOTH
def test_metadata_of_this_call_decide(kind):
    """Filters and citations use the metadata given now, changed in place, in a new list or in another call."""
    pages = _pages(cat=1, dog=2)
    model = kind(engine=ENGINE, documents=pages, max_tokens=2)
    assert _sources(model, memory_filter={"year": 1}) == ["the cat sat"]
    pages[0].metadata["year"], pages[1].metadata["year"] = 2, 1
    assert _sources(model, memory_filter={"year": 1}) == ["the dog sat"]
    other = kind(engine=ENGINE, documents=_pages(cat=1, dog=2), max_tokens=2, holder=model.holder)
    assert _sources(other, memory_filter={"year": 1}) == ["the cat sat"]
    for title in ("One", "Two"):
        page = Page(page_content="the hat", metadata={"title": title, "url": f"http://{title}"}, id="hat")
        cited = _info(other, documents=[page], memory_filter={"year": 0}, citations=9)["citations"]
        assert [(one["title"], one["url"]) for one in cited] == [(title, f"http://{title}")]


@BOTH
def test_a_filter_reads_no_copy_of_what_it_excludes(kind):
    """Two tenants have the same text under the same id; each sees its own metadata and nothing of the other."""
    pages = [Page(page_content="shared text", metadata={"tenant": name, "title": name}, id="x") for name in "ab"]
    model = kind(engine=ENGINE, documents=pages, max_tokens=2, citations=9)
    for name in "abab":
        cited = _info(model, memory_filter={"tenant": name})["citations"]
        assert [one["title"] for one in cited] == [name]


# -- caches -----------------------------------------------------------------------------------------------------


@BOTH
def test_a_cache_tells_filters_apart(kind):
    """Functions as filters, and metadata swapped under an equal filter, have their own keys; equal calls share one."""
    cache = InMemoryCache()
    model = kind(engine=ENGINE, documents=_pages(cat=1, dog=2), cache=cache, max_tokens=2)
    for year, text in ((1, "the cat sat"), (2, "the dog sat"), (1, "the cat sat")):
        assert _sources(model, memory_filter=lambda document, year=year: document.metadata["year"] == year) == [text]
    assert len(cache._cache) == 2
    swapped = kind(engine=ENGINE, documents=_pages(cat=2, dog=1), cache=cache, max_tokens=2)
    assert _sources(model, memory_filter={"year": 1}) == ["the cat sat"]
    assert _sources(swapped, memory_filter={"year": 1}) == ["the dog sat"]
    assert _sources(kind(engine=ENGINE, cache=cache, max_tokens=2), memory=ENGINE.remember(["a"])) == ["a"]
    assert _sources(kind(engine=ENGINE, cache=cache, max_tokens=2), memory=ENGINE.remember(["b"])) == ["b"]


@BOTH
async def test_a_cache_serves_no_old_contents(kind, tmp_path):
    """Changed contents of a retriever, a file, a folder and a saved memory are read, cached or not, sync or not."""
    store = _Store(pages=_pages(cat=1))
    cache = InMemoryCache()
    model = kind(engine=ENGINE, retriever=store, cache=cache, max_tokens=2)
    assert _sources(model) == ["the cat sat"]
    store.pages = _pages(dog=1)
    assert _sources(model) == ["the dog sat"]
    await model.ainvoke("who?")
    assert cache._cache == {}
    file, folder = tmp_path / "n.txt", str(tmp_path)
    for given in (str(file), folder):
        own = kind(engine=ENGINE, documents=given, cache=cache, max_tokens=2) if file.exists() else None
        for text in ("the cat sat", "the dog sat", "the dog ate"):
            file.write_text(text)
            asked = kind(engine=ENGINE, cache=cache, max_tokens=2)
            assert _sources(asked, documents=given) == [text]
            own = own or kind(engine=ENGINE, documents=given, cache=cache, max_tokens=2)
            assert _sources(own) == [text]
    memory = LongMemory(tmp_path / "saved", engine=ENGINE)
    saved = kind(engine=ENGINE, memory_path=str(tmp_path / "saved"), cache=cache, max_tokens=2)
    for text in ("one", "two"):
        memory.remember(text, "note")
        assert _sources(saved) == [text]


class _Changing(InMemoryCache):
    """A cache in which something changes between a key and its answer."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def lookup(self, prompt: str, llm_string: str) -> Any:
        found = super().lookup(prompt, llm_string)
        self.change()
        return found


@BOTH
@pytest.mark.parametrize("what", ["memory", "memory_of_call", "filter", "file"])
def test_what_changes_between_key_and_answer_is_not_cached_under_the_key(kind, what, tmp_path):
    """A memory, a filter or a file that changes there: the answer is that of the moment the key was made."""
    page, before, after = tmp_path / "a.txt", Document("a", "the cat sat"), Document("a", "the dog ran away")
    page.write_text(before.text)
    memory = ENGINE.remember([before, Document("b", "the hat")])
    shown, done = {"a"}, []

    def change() -> None:
        if not done:
            done.append(1)
            memory.add([after])
            page.write_text(after.text)
            shown.clear()

    options: dict[str, Any] = {} if what == "memory_of_call" else {"memory": memory}
    call = {"memory": memory} if what == "memory_of_call" else {}
    if what == "filter":
        options["memory_filter"] = lambda document: document.id in shown
    if what == "file":
        options = {"documents": page}
    model = kind(engine=ENGINE, max_tokens=2, cache=_Changing(change), **options)
    sources = _sources(model, **call)
    assert "the cat sat" in sources
    assert "the dog ran away" not in sources
    memory.add([before])
    page.write_text(before.text)
    shown.add("a")
    assert _sources(model, **call) == sources


@BOTH
def test_a_cache_tells_apart_how_documents_lie_in_memory(kind):
    """Documents that share a chunk give another answer than the same ones apart."""
    pages, cache = [Document(name, f"the {name} sat") for name in ("cat", "dog")], InMemoryCache()
    for packed in (True, False):
        memory = ENGINE.remember(pages, packed=packed)
        infos = [_info(kind(engine=ENGINE, memory=memory, max_tokens=2, cache=held)) for held in (cache, False)]
        assert infos[0]["focus"]["chunks"] == infos[1]["focus"]["chunks"] == (1 if packed else 2)


@BOTH
async def test_a_cached_call_loads_nothing_on_the_event_loop(kind, tmp_path, monkeypatch):
    """The key needs the saved memory, which is loaded beside the loop, within the time limit."""
    ENGINE.remember([Document("a", "the cat sat")]).save(tmp_path / "kept")
    threads, load = [], engines.find_place
    monkeypatch.setattr(
        engines, "find_place", lambda *given: (threads.append(threading.current_thread()), load(*given))[1]
    )
    model = kind(engine=ENGINE, memory_path=str(tmp_path / "kept"), max_tokens=2, cache=InMemoryCache())
    await model.ainvoke("who?")
    assert threads
    assert threading.main_thread() not in threads


def test_metadata_that_are_not_there_equal_nothing():
    """A filter for ``None``, as an unset tenant gives, keeps no document that lacks the key."""
    model = ChatFocusLLM(engine=ENGINE, documents=_pages(cat=1), max_tokens=1, memory_filter={"tenant": None})
    assert _sources(model) == []


def test_a_cache_keeps_stop_strings_and_forms():
    """Stop strings of a FocusLLM count with a cache; so do schemas, tools and the form of the content."""
    cache = InMemoryCache()
    text = FocusLLM(engine=ENDLESS, cache=cache, max_tokens=24).invoke("the cat")
    stop = [text[len(text) // 2]]
    cut = FocusLLM(engine=ENDLESS, cache=cache, max_tokens=24, stop=stop).invoke("the cat")
    assert cut == FocusLLM(engine=ENDLESS, max_tokens=24, stop=stop).invoke("the cat") != text
    assert FocusLLM(engine=ENDLESS, cache=cache, max_tokens=24).invoke("the cat") == text
    chat = ChatFocusLLM(engine=ENDLESS, cache=cache, max_tokens=24)
    assert isinstance(chat.invoke("x").content, str)
    assert isinstance(
        ChatFocusLLM(engine=ENDLESS, cache=cache, max_tokens=24, output_version="v1").invoke("x").content, list
    )
    forms = [chat._get_llm_string(response_format=_schema(kind)) for kind in (int, str)]
    assert forms[0] != forms[1]
    assert engines.engine_fingerprint(ENGINE) != engines.engine_fingerprint(_other_system(ENGINE))


def _schema(kind: type) -> Any:
    from pydantic import create_model

    return create_model("Answer", value=(kind, ...))


def _other_system(engine: Any) -> Any:
    from dataclasses import replace

    from focus_core.engine import FocusEngine

    info = replace(engine.info, system="Answer in one word.")
    return FocusEngine(engine.loaded, info, engine.adapter, base=engine.base, tokenizer=engine.tokenizer)


@BOTH
def test_an_iterator_of_documents_is_read_whole(kind):
    """A generator as documents is read by the call, by every prompt of it, and by every call of a model that has it."""
    pages = _pages(cat=1, dog=2)
    for cache in (None, InMemoryCache()):
        assert len(_sources(kind(engine=ENGINE, cache=cache, max_tokens=2), documents=iter(pages))) == 2
    result = FocusLLM(engine=ENGINE, max_tokens=2).generate(["a", "b"], documents=(page for page in pages))
    assert [len(one[0].generation_info["sources"]) for one in result.generations] == [2, 2]
    own = kind(engine=ENGINE, documents=(page for page in pages), max_tokens=2)
    assert [len(_sources(own)), len(_sources(own))] == [2, 2]


def test_a_list_of_paths_may_change(tmp_path):
    """Paths that replace others in the same list are read, whatever their identity."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    paths = ["".join([str(tmp_path), "/a", ".txt"])]
    model = ChatFocusLLM(engine=ENGINE, documents=paths, max_tokens=2)
    assert _sources(model) == ["text of a"]
    paths[:] = ["".join([str(tmp_path), "/b", ".txt"])]
    assert _sources(model) == ["text of b"]


@BOTH
def test_a_saved_memory_is_loaded_once(kind, tmp_path, monkeypatch):
    """memory_path is loaded at the first call and again when it was saved anew, alone and with documents besides."""
    memory, loads = LongMemory(tmp_path, engine=ENGINE), []
    memory.remember("first", "x")
    original = core_memory.Memory.load.__func__

    def load(cls: Any, *arguments: Any, **named: Any) -> Any:
        loads.append(1)
        return original(cls, *arguments, **named)

    monkeypatch.setattr(core_memory.Memory, "load", classmethod(load))
    for documents in (None, ["abc"]):
        model = kind(engine=ENGINE, memory_path=str(tmp_path), documents=documents, max_tokens=2)
        loads.clear()
        for _ in range(3):
            _info(model)
        assert len(loads) == 1
        memory.remember(f"more {documents}", "y")
        assert f"more {documents}" in _sources(model)
        assert len(loads) == 2
        del model


@BOTH
def test_a_saved_memory_is_not_written_to(kind, tmp_path):
    """What a call reads besides a saved memory is kept in this process, not in the memory's folder."""
    LongMemory(tmp_path, engine=ENGINE).remember("first", "x")

    def facts() -> dict[Any, int]:  # a reader's own files (SQLite's log and index) come and go
        return {
            file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if not file.name.endswith(("-wal", "-shm"))
        }

    before = facts()
    model = kind(engine=ENGINE, memory_path=str(tmp_path), documents=["own"], max_tokens=2)
    assert _sources(model, documents=["call"]) == ["call", "first", "own"]
    assert facts() == before
    assert [document.text for document in LongMemory(tmp_path, engine=ENGINE).documents] == ["first"]


# -- messages ---------------------------------------------------------------------------------------------------


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


# -- callbacks --------------------------------------------------------------------------------------------------


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


# -- time limits ------------------------------------------------------------------------------------------------


def _slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> threading.Event:
    """Let reading of documents take its time; the event is set when it has begun."""
    began, original = threading.Event(), core_memory.encode_chunks

    def encode(*arguments: Any, **named: Any) -> Any:
        began.set()
        time.sleep(seconds)
        return original(*arguments, **named)

    monkeypatch.setattr(core_memory, "encode_chunks", encode)
    return began


@BOTH
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_a_time_limit_covers_reading(kind, way, monkeypatch):
    """A call whose documents take longer than its limit raises when the limit is over, however it is made."""
    model = kind(engine=ENGINE, documents=[f"slow {kind.__name__} {way}"], timeout=0.3, max_tokens=2)
    _slow(monkeypatch, 1.5)
    start = time.monotonic()

    async def ask() -> None:
        if way == "invoke":
            model.invoke("who?")
        elif way == "ainvoke":
            await model.ainvoke("who?")
        elif way == "stream":
            list(model.stream("who?"))
        else:
            assert [chunk async for chunk in model.astream("who?")]

    with pytest.raises(TimeoutError, match=r"more than 0\.3 seconds"):
        await ask()
    assert time.monotonic() - start < 1.2


def test_a_time_limit_covers_waiting_for_others(monkeypatch):
    """Behind another's reading of the same, a limit holds; a call that needs nothing of it does not wait."""
    model = ChatFocusLLM(engine=ENGINE, max_tokens=2)
    began = _slow(monkeypatch, 1.5)
    pages = [Page(page_content="read by two")]
    reader = threading.Thread(target=lambda: model.invoke("q", documents=pages))
    reader.start()
    began.wait()
    start = time.monotonic()
    assert model.invoke("q") is not None
    assert time.monotonic() - start < 1.0
    with pytest.raises(TimeoutError):
        model.invoke("q", documents=pages, timeout=0.2)
    assert time.monotonic() - start < 1.4
    reader.join()
    assert _sources(model, documents=pages, timeout=60) == ["read by two"]


def test_time_limits_have_bounds():
    """A limit must be above 0, of a model and of a call."""
    with pytest.raises(ValidationError, match="greater than 0"):
        ChatFocusLLM(timeout=-1)
    for bad in (0, -1, "1"):
        with pytest.raises(ConfigError, match="above 0"):
            ChatFocusLLM(engine=ENGINE).invoke("x", timeout=bad)


# -- copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1, 0, float("nan"), "soon"])
def test_time_limits_are_positive_numbers(seconds):
    """Of a model and of a call: one clear error."""
    for kind in (FocusLLM, ChatFocusLLM):
        with pytest.raises(ValidationError, match="timeout"):
            kind(engine=ENGINE, timeout=seconds)
        with pytest.raises(ConfigError, match="timeout must be a number of seconds above 0, or None; got"):
            kind(engine=ENGINE).invoke("who?", timeout=seconds)


@BOTH
async def test_a_time_limit_may_be_without_end(kind):
    """``inf`` and centuries are taken, streamed and not."""
    for seconds in (float("inf"), 1e12):
        model = kind(engine=ENGINE, max_tokens=2, timeout=seconds)
        assert model.invoke("who?") is not None
        assert await model.ainvoke("who?") is not None
        assert list(model.stream("who?"))
        assert [piece async for piece in model.astream("who?")]


def test_what_holds_memory_says_how_to_take_it_elsewhere():
    """Memories, alone or inside a tool, are not pickled: one error says what to do; a tool's copy shares its memory."""
    long_memory = LongMemory(engine=ENGINE)
    for held in (long_memory, memory_tools(long_memory)[0]):
        with pytest.raises(ConfigError, match="cannot be pickled; make another over the same folder"):
            pickle.dumps(held)
    assert copy.deepcopy(memory_tools(long_memory)[0]).memory is long_memory
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ConfigError, match="save it, and load it where it is needed"):
            copied(ENGINE.remember(["the cat"]))


def test_a_question_of_half_an_emoji_is_answered():
    """It is read as U+FFFD, with a warning, as it is by the engine; so is half of one in a page."""
    page = Page(page_content="the cat\ud83d sat", metadata={"of": "\ud83d"})
    for kind in (FocusLLM, ChatFocusLLM):
        with pytest.warns(UserWarning, match="holds half a surrogate pair"):
            info = _info(kind(engine=ENGINE, documents=[page], max_tokens=2, cache=InMemoryCache()), "who \ud83d sat?")
        assert [(source["start"], source["text"]) for source in info["sources"]] == [(0, "the cat\ufffd sat")]
    with pytest.warns(UserWarning, match="holds half a surrogate pair"):
        said = ChatFocusLLM(engine=ENGINE, max_tokens=4).invoke("who \ud83d?").content
    assert said == ChatFocusLLM(engine=ENGINE, max_tokens=4).invoke("who \ufffd?").content


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


async def test_many_calls_at_once_wait_for_nothing_of_each_other(tmp_path):
    """Calls with documents of their own, and one saved memory, run beside each other and read what is theirs."""
    LongMemory(tmp_path, engine=ENGINE).remember("shared", "x")
    model = ChatFocusLLM(engine=ENGINE, memory_path=str(tmp_path), max_tokens=2)

    async def ask(number: int) -> list[str]:
        message = await model.ainvoke("who?", documents=[f"own {number}"])
        return sorted(source["text"] for source in message.response_metadata["sources"])

    found = await asyncio.gather(*(ask(number % 5) for number in range(12)))
    assert found == [[f"own {number % 5}", "shared"] for number in range(12)]


# -- trials (docs/trials.md) ------------------------------------------------------------------------------------


@BOTH
def test_none_means_the_default(kind):
    """Options left None are the default, those of a call the model's; a filter stays in force."""
    model = kind(engine=ENDLESS, max_tokens=None, temperature=None, top_p=None, stop=None, template=None)
    assert (model.max_tokens, model.temperature, model.template) == (128, 0.0, "chat")
    own = kind(engine=ENGINE, documents=_pages(cat=1, dog=2), memory_filter={"year": 1}, max_tokens=3)
    nothing: Any = dict.fromkeys(
        ("max_tokens", "temperature", "seed", "template", "citations", "memory_filter", "memory")
    )
    assert _sources(own, **nothing) == ["the cat sat"]


@BOTH
def test_one_stop_string(kind):
    """A stop string need not be in a list, of a model, bound or in a call, whole or streamed."""
    model = kind(engine=ENDLESS, max_tokens=12)
    text = getattr(model.invoke("x"), "content", model.invoke("x"))
    stop = text[3:5]
    for stopped in (kind(engine=ENDLESS, max_tokens=12, stop=stop), model.bind(stop=stop), model.bind(stop=[stop])):
        answers = [stopped.invoke("x"), *stopped.batch(["x"])]
        streamed = "".join(getattr(chunk, "content", chunk) for chunk in stopped.stream("x"))
        assert [getattr(one, "content", one) for one in answers] == [streamed, streamed]
        assert stop not in streamed


def test_no_messages_have_no_tokens():
    """An empty conversation counts 0, as trimming asks."""
    assert ChatFocusLLM(engine=ENGINE).get_num_tokens_from_messages([]) == 0
