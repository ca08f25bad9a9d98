"""Check what the standard suites leave out: the event loop, cancelling, concurrency, cache keys, citations, bad input.

What is checked of one class is checked of both, so ``FocusLLM``, which has no standard suite, is at par.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
import time
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document as Page
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField
from pydantic import BaseModel, ValidationError

from focus_core import Document
from focus_core.errors import ConfigError, EmptyCorpusError, NotTextError, OutOfMemoryError
from focus_core.method import passes
from focus_core.method.kv import ChunkKV
from focus_core.model.chat import Message
from focus_core.model.families import BaseDecoder
from focus_core.session import engines
from focus_integrations.langchain import ChatFocusLLM, FocusLLM
from tests.langchain.conftest import EndlessEngine, ScriptedEngine, tiny_engine

ENGINE, SCRIPTED, ENDLESS = tiny_engine(), tiny_engine(ScriptedEngine), tiny_engine(EndlessEngine)
PAGES = [Page(page_content=f"the {word} sat on the mat. " * 9, metadata={"source": word}) for word in ("cat", "dog")]
BOTH = pytest.mark.parametrize("kind", [FocusLLM, ChatFocusLLM])
LONG = "the cat sat on the mat.\n\n" * 900 + "who ate the hat?"


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.content)


def _said(chunks: Any) -> str:
    return "".join(map(_text, chunks))


# -- the same answer on every way -------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
async def test_every_way_gives_the_engines_answer(kind):
    """invoke, stream, batch and their async twins, and both classes, give what the engine itself gives."""
    model = kind(engine=ENGINE, documents=PAGES, max_tokens=8)
    memory = ENGINE.remember([Document("cat", PAGES[0].page_content), Document("dog", PAGES[1].page_content)])
    expected = ENGINE.answer("who sat?", memory, template="chat", max_tokens=8).text
    assert expected
    assert _text(model.invoke("who sat?")) == expected
    assert _said(model.stream("who sat?")) == expected
    assert [_text(one) for one in model.batch(["who sat?"] * 3)] == [expected] * 3
    assert _text(await model.ainvoke("who sat?")) == expected
    assert _said([chunk async for chunk in model.astream("who sat?")]) == expected
    assert [_text(one) for one in await model.abatch(["who sat?"] * 2)] == [expected] * 2


@pytest.mark.slow
@BOTH
def test_a_batch_passes_the_model_together(kind, monkeypatch):
    """Eight prompts of a batch take fewer sweeps than the same prompts one after the other, and say the same."""
    model = kind(engine=ENGINE, documents=PAGES, max_tokens=8)
    prompts = [f"who sat, {number}?" for number in range(8)]
    sizes, original = [], passes.sweep

    def counted(base, adapter, calls, locals_, positions, check):
        sizes.append(len(locals_))
        return original(base, adapter, calls, locals_, positions, check)

    monkeypatch.setattr(passes, "sweep", counted)
    expected = [_text(model.invoke(prompt)) for prompt in prompts]
    alone = len(sizes)
    assert set(sizes) == {1}
    sizes.clear()
    assert [_text(one) for one in model.batch(prompts)] == expected
    assert len(sizes) < alone / 2
    assert sum(sizes) == alone


@pytest.mark.slow
@BOTH
def test_concurrent_calls_equal_sequential_ones(kind):
    """Twelve threads with sampling, memories and seeds of their own get what they get alone."""
    model = kind(engine=ENGINE, max_tokens=8, temperature=1.0)

    def ask(number: int) -> str:
        return _text(model.invoke(f"question {number}", seed=number, documents=[f"the cat {number} sat. " * 12]))

    alone = [ask(number) for number in range(12)]
    together: list[str] = [""] * 12
    threads = [
        threading.Thread(target=lambda number=number: together.__setitem__(number, ask(number))) for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone)) > 6


def test_one_load_per_process(monkeypatch):
    """Models of both classes, copies, chunk sizes and threads share one load; another base is another."""
    loads: list[Any] = []

    def load(base: Any, adapter: Any, **settings: Any) -> Any:
        loads.append(base)
        time.sleep(0.05)
        return ENGINE

    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setattr(engines.FocusEngine, "from_pretrained", load)
    models = [FocusLLM(max_tokens=2), ChatFocusLLM(max_tokens=2), ChatFocusLLM(chunk_size=32, max_tokens=2)]
    models += [models[1].model_copy(), pickle.loads(pickle.dumps(models[1]))]
    threads = [threading.Thread(target=model.invoke, args=("x",)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [None]
    assert models[2]._get_engine().config.chunk_size == 32
    FocusLLM(model="other", max_tokens=2).invoke("x")
    assert loads == [None, "other"]


# -- the event loop and cancelling ------------------------------------------------------------------------------


@BOTH
async def test_the_event_loop_stays_free(kind, working_threads):
    """Documents are read and layers run in other threads than the loop's, for plain and streamed answers."""
    model = kind(engine=ENGINE, documents=["the mat. " * 20], max_tokens=3)
    await model.ainvoke("who?")
    async for _ in model.astream("who sat?"):
        pass
    assert working_threads
    assert threading.get_ident() not in working_threads


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("way", ["task", "astream", "stream"])
async def test_cancelling_frees_the_engine_within_a_step(kind, way, monkeypatch):
    """After cancelling or closing, at most one further pass through the layers begins."""
    passes = 0
    own_logits = BaseDecoder.logits

    def counted(self: BaseDecoder, hidden: Any) -> Any:
        nonlocal passes
        passes += 1
        return own_logits(self, hidden)

    monkeypatch.setattr(BaseDecoder, "logits", counted)
    model = kind(engine=ENDLESS, max_tokens=4000, documents=PAGES)
    if way == "task":
        task = asyncio.create_task(model.ainvoke("who?"))
        while passes < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "astream":
        stream = model.astream("who?")
        await anext(stream)
        await stream.aclose()
    else:
        chunks = model.stream("who?")
        next(chunks)
        chunks.close()
    before = passes
    await asyncio.sleep(0.3)
    assert passes <= before + 1
    assert _text(model.invoke("who?", max_tokens=3)) == _text(
        kind(engine=ENDLESS, documents=PAGES).invoke("who?", max_tokens=3)
    )


@BOTH
def test_timeouts_stop_and_say_so(kind):
    """A call over its time is stopped and raises; one within it does not."""
    model = kind(engine=ENDLESS, max_tokens=4000, timeout=0.3)
    with pytest.raises(TimeoutError, match=r"0\.3 seconds"):
        model.invoke("who?")
    assert model.invoke("who?", max_tokens=1, timeout=60) is not None


# -- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
def test_cache_keys_hold_the_corpus(kind, tmp_path):
    """One prompt over other documents, a changed list, a changed memory, or call documents is not served from cache."""
    set_llm_cache(InMemoryCache())
    try:
        pages = [PAGES[0]]
        memory = ENGINE.remember([Document("cat", PAGES[0].page_content)])
        listed, live = (
            kind(engine=ENGINE, documents=pages, max_tokens=12),
            kind(engine=ENGINE, memory=memory, max_tokens=12),
        )
        first = _text(listed.invoke("who?"))
        assert _text(live.invoke("who?")) == first
        pages.append(Page(page_content="hat hat hat " * 40))
        memory.add([Document("document-1", "hat hat hat " * 40)])
        changed = _text(kind(engine=ENGINE, cache=False, documents=list(pages), max_tokens=12).invoke("who?"))
        assert changed != first
        assert _text(listed.invoke("who?")) == changed
        assert _text(live.invoke("who?")) == changed
        other = kind(engine=ENGINE, documents=[PAGES[0]], max_tokens=12)
        assert _text(other.invoke("who?")) == first
        assert _text(other.invoke("who?", documents=["hat hat hat " * 40])) != first
        sampled = [_text(other.invoke("who?", temperature=1.0, seed=seed)) for seed in (1, 2, 1)]
        assert sampled[0] == sampled[2] != sampled[1]
    finally:
        set_llm_cache(None)


@pytest.mark.slow
@BOTH
def test_memory_in_every_way(kind, tmp_path):
    """Documents, paths, a saved memory, a live memory, per-call documents, filters and long prompts are all read."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("the cat sat. " * 30)
    memory = ENGINE.remember([Document("kept", "the dog ate. " * 30)])
    memory.save(tmp_path / "memory")

    def read(model: Any, prompt: str = "who?", **kwargs: Any) -> set[str]:
        if kind is FocusLLM:
            info = model.generate([prompt], **kwargs).generations[0][0].generation_info
        else:
            info = model.invoke(prompt, **kwargs).response_metadata
        return {source["document_id"] for source in info["sources"]}

    folder = kind(engine=ENGINE, documents=str(tmp_path / "notes"), memory_path=str(tmp_path / "memory"), max_tokens=2)
    note = str(tmp_path / "notes" / "a.txt")
    assert read(folder) == {note, "kept"}
    assert read(folder, documents=["call"]) == {note, "kept", "document-0"}
    assert read(folder) == {note, "kept"}
    assert read(folder, memory_filter=["kept"]) == {"kept"}
    assert read(folder, memory_filter=lambda document: document.id == note) == {note}
    other = ENGINE.remember([Document("other", "the hat. " * 30)])
    assert read(folder, memory=other) == {note, "other"}
    assert read(kind(engine=ENGINE, max_tokens=2), LONG) == {"prompt"}
    assert read(kind(engine=ENGINE, max_tokens=2)) == set()
    bound = folder.configurable_fields(documents=ConfigurableField(id="documents"))
    assert bound.with_config(configurable={"documents": ["x"]}).invoke("who?") is not None


def test_documents_of_one_source_are_all_kept():
    """Pieces of one file share a source; each is read, and a text without an id does not push another out."""
    pages = [Page(page_content=f"piece {number}", metadata={"source": "file"}) for number in range(3)]
    ids = [document.id for document in engines.to_documents(pages)]
    assert ids == ["file", "file#2", "file#3"]
    message = ChatFocusLLM(engine=ENGINE, documents=["one"], max_tokens=2).invoke("x", documents=["two"])
    cited = {one["cited_text"] for one in message.response_metadata["citations"]}
    assert cited == {"one", "two"}


def test_usage_counts_what_was_computed_and_what_was_kept():
    """The first call creates, the next reads; a grown conversation creates only what is new; totals add up."""
    chat = ChatFocusLLM(engine=ENGINE, documents=PAGES, max_tokens=3)
    details = [chat.invoke("who?").usage_metadata for _ in range(2)]
    tokens = sum(ENGINE.count_tokens(page.page_content) for page in PAGES)
    assert details[0]["input_token_details"] == {"cache_creation": tokens, "cache_read": 0}
    assert details[1]["input_token_details"] == {"cache_creation": 0, "cache_read": tokens}
    local = chat.get_num_tokens_from_messages([HumanMessage("who?")])
    assert details[1]["input_tokens"] == local + tokens
    assert details[1]["total_tokens"] == details[1]["input_tokens"] + details[1]["output_tokens"]
    new = chat.invoke("who?", documents=["a new page"]).usage_metadata["input_token_details"]
    assert new == {"cache_creation": ENGINE.count_tokens("a new page"), "cache_read": tokens}


def test_conversations_of_any_length():
    """Turns that do not fit are read from memory, word for word, and the next turn computes only what is new."""
    chat = ChatFocusLLM(engine=ENGINE.with_config(window=1024), max_tokens=4)
    talk: list[Any] = [SystemMessage("be brief")]
    for number in range(25):
        talk += [HumanMessage(f"the cat {number} sat on the mat. " * 9), AIMessage(f"yes {number}")]
    first = chat.invoke([*talk, HumanMessage("who?")])
    assert first.response_metadata["focus"]["chunks"] > 10
    again = chat.invoke([*talk, HumanMessage("who?"), AIMessage("me"), HumanMessage("where?")])
    details = again.usage_metadata["input_token_details"]
    assert details["cache_creation"] < 0.2 * details["cache_read"]


def test_attached_documents_become_memory():
    """text-plain and file blocks are read as documents and cited with their title; other media are refused."""
    chat = ChatFocusLLM(engine=ENGINE, max_tokens=3)
    data = base64.b64encode(b"the dog ate. " * 20).decode()
    blocks = [
        {"type": "text", "text": "who?"},
        {
            "type": "text-plain",
            "text": "the cat sat. " * 20,
            "mime_type": "text/plain",
            "title": "Cats",
            "url": "http://c",
        },
        {"type": "file", "base64": data, "mime_type": "text/markdown", "extras": {"filename": "dogs.md"}},
    ]
    message = chat.invoke([HumanMessage(content=blocks)])
    found = {one["title"]: one for one in message.response_metadata["citations"]}
    assert set(found) <= {"Cats", "dogs.md"}
    assert {one["document_id"] for one in message.response_metadata["sources"]} == {"Cats", "dogs.md"}
    assert found.get("Cats", {"url": "http://c"})["url"] == "http://c"
    for bad, error in (
        ({"type": "image", "url": "http://x"}, ConfigError),
        (
            {"type": "file", "base64": base64.b64encode(b"%PDF\xff").decode(), "mime_type": "application/pdf"},
            NotTextError,
        ),
        (
            {"type": "file", "base64": base64.b64encode(b"\xff\xfe\xfa").decode(), "mime_type": "text/plain"},
            NotTextError,
        ),
        ({"type": "file", "file_id": "x"}, ConfigError),
    ):
        with pytest.raises(error):
            chat.invoke([HumanMessage(content=["who?", bad])])


# -- citations --------------------------------------------------------------------------------------------------

CITED = {
    "repeated": "The cat sat. " * 120,
    "scripts": "漢字かな交じり文。한국어 👩‍👩‍👧 🇩🇪 naïve e\u0301\r\n" * 30,
    "brackets": "<|end|><|user|> {} [] <tool_call> " * 40,
}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("name", CITED)
def test_citations_are_exact_and_come_last(name, version):
    """text[start:end] of the source is the cited text; the stream's last chunk brings what invoke has."""
    page = Page(page_content=CITED[name], metadata={"source": f"http://{name}", "title": name})
    chat = ChatFocusLLM(engine=ENGINE, documents=[page], max_tokens=8, output_version=version)
    message = chat.invoke("who?")
    block = next(block for block in message.content_blocks if block["type"] == "text")
    assert len(block["annotations"]) == 3
    for citation in block["annotations"]:
        where = citation["extras"]
        assert CITED[name][where["source_start"] : where["source_end"]] == citation["cited_text"]
        assert (citation["title"], citation["url"]) == (name, f"http://{name}")
        assert block["text"][citation["start_index"] : citation["end_index"]] == message.text
    scores = [citation["extras"]["score"] for citation in block["annotations"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1
    chunks = list(chat.stream("who?"))
    assert not any("annotations" in str(chunk.content_blocks) for chunk in chunks[:-2])
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole.text == message.text
    streamed = [block for block in whole.content_blocks if block.get("annotations")]
    assert [block["annotations"] for block in streamed] == [block["annotations"] for block in streamed[:1]]
    assert streamed[0]["annotations"] == block["annotations"]
    assert isinstance(message.content, str if version == "v0" else list)
    assert (
        ChatFocusLLM(engine=ENGINE, citations=0, documents=[page])
        .invoke("x", max_tokens=2)
        .response_metadata["citations"]
        == []
    )


def test_citations_of_a_document_with_pages_name_the_page():
    """A file read whole knows where its pages begin, a loader's document is one page."""
    pages = ["the cat sat on the mat. " * 8, "the dog ate the hat. " * 8]
    whole = Document("paper.pdf", "".join(pages), {"title": "Paper", "page_starts": [0, len(pages[0])]})
    loaded = Page(page_content="a third page", metadata={"source": "other.pdf", "page": 2, "page_label": "3"})
    facts = ChatFocusLLM(engine=ENGINE, documents=[whole, loaded], max_tokens=8, citations=9).invoke("who?")
    cited = facts.response_metadata["citations"]
    assert facts.response_metadata["supported"] is None  # the adapter was not fitted for it
    found = {(one["title"], one["extras"]["page"]) for one in cited}
    assert {("Paper", 2), ("other.pdf", 3)} <= found <= {("Paper", 1), ("Paper", 2), ("other.pdf", 3)}
    for one in cited:
        where = one["extras"]
        assert set(where) == {"document_id", "page", "source_start", "source_end", "score", "spans"}
        assert all(0 <= start < end <= len(facts.text) for start, end in where["spans"])
        if one["title"] == "Paper":
            assert whole.text[where["source_start"] : where["source_end"]] == one["cited_text"]
            assert where["page"] == (2 if where["source_start"] >= len(pages[0]) else 1)


def test_the_text_models_citations_are_the_same():
    """FocusLLM reports the same citations in generation_info, streamed last."""
    chat = ChatFocusLLM(engine=ENGINE, documents=PAGES, max_tokens=8)
    llm = FocusLLM(engine=ENGINE, documents=PAGES, max_tokens=8)
    expected = chat.invoke("who?").response_metadata
    info = llm.generate(["who?"]).generations[0][0].generation_info
    assert info["citations"] == expected["citations"]
    assert info["finish_reason"] == expected["finish_reason"]
    assert info["model_name"] == expected["model_name"]


def test_logprobs_and_stop():
    """Log-probabilities come once with alternatives; stop strings end the text in invoke and stream."""
    chat = ChatFocusLLM(engine=ENDLESS, max_tokens=24, logprobs=2)
    message = chat.invoke("who?")
    content = message.response_metadata["logprobs"]["content"]
    assert len(content) == message.usage_metadata["output_tokens"]
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in content)
    stop = message.content[4:6]
    assert stop not in chat.invoke("who?", stop=[stop]).content
    assert stop not in _said(chat.stream("who?", stop=[stop]))
    assert chat.invoke("who?", stop=[stop]).response_metadata["finish_reason"] == "stop"


# -- tools and structured output --------------------------------------------------------------------------------


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", ["any", "required", True, "Person", {"type": "function", "function": {"name": "Person"}}]
)
def test_forced_choices_call(choice):
    """Every form that asks for a call gets one, valid, of a random model."""
    message = ChatFocusLLM(engine=ENGINE, max_tokens=160).bind_tools([Person], tool_choice=choice).invoke("who?")
    assert isinstance(Person(**message.tool_calls[0]["args"]), Person)


@pytest.mark.slow
def test_choices_that_do_not_call():
    """'none' and 'auto' may answer in words; parallel_tool_calls=False gives one call."""
    chat = ChatFocusLLM(engine=ENGINE, max_tokens=160, temperature=2.0, seed=1)
    assert chat.bind_tools([Person], tool_choice="none").invoke("who?").tool_calls == []
    assert chat.bind_tools([Person]).invoke("who?", max_tokens=4).content != ""
    one = chat.bind_tools([Person], tool_choice="any", parallel_tool_calls=False).invoke("who?")
    assert len(one.tool_calls) == 1


# -- bad input --------------------------------------------------------------------------------------------------


@BOTH
def test_bad_input_is_named(kind, tmp_path):
    """Each mistake raises one clear error."""
    model = kind(engine=ENGINE, max_tokens=4)
    with pytest.raises(ValidationError, match="temprature"):
        kind(temprature=0.5)
    with pytest.raises(ConfigError, match="unknown option 'temprature'"):
        model.invoke("x", temprature=0.5)
    with pytest.raises(ConfigError, match="temperature must be"):
        model.invoke("x", temperature=-1)
    with pytest.raises(EmptyCorpusError, match="empty"):
        model.invoke("x", documents=[Page(page_content="  ")])
    with pytest.raises(ConfigError, match="got int"):
        model.invoke("x", documents=[3])
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    with pytest.raises(NotTextError, match="binary"):
        model.invoke("x", documents=[tmp_path / "b.bin"])
    with pytest.raises(ConfigError, match="memory_filter"):
        model.invoke("x", documents=None, memory=ENGINE.remember(["a"]), memory_filter=["nothing"])
    with pytest.raises(ConfigError, match=r"FocusEngine\.remember"):
        kind(engine=ENGINE, memory=3).invoke("x")
    with pytest.raises(ConfigError, match="dtype"):
        kind(dtype="int99").invoke("x")


@BOTH
def test_a_corpus_larger_than_memory_says_so(kind, monkeypatch):
    """Where chunk KV cannot be allocated the error names the number of chunks, and the model works on afterwards."""
    model = kind(engine=ENGINE, max_tokens=2)

    def allocate(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with monkeypatch.context() as patched:
        patched.setattr(ChunkKV, "allocate", allocate)
        with pytest.raises(OutOfMemoryError, match=r"\d chunks do not fit in memory"):
            model.invoke("x", documents=["the large cat. " * 20])
    assert model.invoke("x", documents=["the large cat. " * 20]) is not None


def test_chat_messages_take_both_templates():
    """template='question' asks as the adapter was trained, as the engine itself does."""
    chat = ChatFocusLLM(engine=ENGINE, template="question", max_tokens=6, documents=PAGES)
    memory = ENGINE.remember([Document("cat", PAGES[0].page_content), Document("dog", PAGES[1].page_content)])
    assert chat.invoke("who?").content == ENGINE.answer("who?", memory, max_tokens=6).text
    plain = ENGINE.chat([Message("user", "who?")], memory, max_tokens=6).answer.text
    assert chat.invoke("who?", template="chat").content == plain
