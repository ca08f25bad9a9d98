"""Check what users rely on: no stale or foreign answer, whole messages, callbacks, time limits, copies."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document as Page
from pydantic import ValidationError

from focus_core.errors import ConfigError
from focus_core.session.long_memory import LongMemory
from focus_core.store import memory as core_memory
from focus_integrations.langchain import ChatFocusLLM, FocusLLM, memory_tools
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


def test_metadata_that_are_not_there_equal_nothing():
    """A filter for ``None``, as an unset tenant gives, keeps no document that lacks the key."""
    model = ChatFocusLLM(engine=ENGINE, documents=_pages(cat=1), max_tokens=1, memory_filter={"tenant": None})
    assert _sources(model) == []


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


@pytest.mark.slow
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


# -- callbacks --------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
