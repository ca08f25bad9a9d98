"""Check LangChain's LLM cache: its key holds everything that an answer depends on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache

from focus_core.session import engines
from focus_core.session.long_memory import LongMemory
from focus_core.text.corpus import Document
from focus_integrations.langchain import ChatFocusLLM, FocusLLM
from tests.langchain.test_contracts import _Store
from tests.langchain.test_trust import BOTH, ENDLESS, ENGINE, _info, _pages, _sources


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


@pytest.mark.slow
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
