"""Check FocusLLM as a LlamaIndex LLM: the conformance suite, and what only this model promises."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import re
import threading

import pytest
from llama_index.core import Document as Page
from llama_index.core import SummaryIndex
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.llms import ChatMessage

from focus_core import Document
from focus_core.errors import ConfigError, NotTextError
from focus_core.method.reading import Reading
from focus_core.model.constraints import regex
from focus_integrations.llama_index import FocusLLM
from tests.conftest import tiny_model

from .conformance import ADD, HELLO, LLMConformance, collect

LONG = "the cat sat on the mat.\n\n" * 200 + "who ate the hat?"
SCRIPTS = "漢字かな交じり文。🙂🙂 naïve. " * 12
REPETITIVE = "the cat sat on the mat. " * 30


@pytest.fixture
def engine(make_engine):
    return make_engine(model=tiny_model("llama", window=1024), window=1024, chunk_size=64)


@pytest.fixture
def llm(engine):
    return FocusLLM(engine=engine, max_tokens=12)


class TestTinyModel(LLMConformance):
    """Every promise on random weights."""


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get("FOCUSLLM_REAL_SUITE"), reason="slow; set FOCUSLLM_REAL_SUITE=1 to run it")
class TestDefaultModel(LLMConformance):
    """Promises on the default base, without the ones that only take longer there."""

    @pytest.fixture
    def llm(self, real_engine):
        return FocusLLM(engine=real_engine, max_tokens=6)

    test_concurrent_calls_equal_sequential_ones = None
    test_callbacks_and_token_counts = None
    test_instrumentation = None
    test_cancelling_frees_the_engine = None
    test_deepcopy_answers_alike = None
    test_predict_and_stream_of_templates = None
    test_formatted_skips_the_prompt_wrapper = None
    test_options_of_a_call = None
    test_tool_results_are_read = None


async def test_the_event_loop_stays_free(engine, working_threads):
    """Documents are read and layers run in other threads than the loop's, for plain and streamed answers."""
    llm = FocusLLM(engine=engine, documents=[REPETITIVE], max_tokens=3)
    await llm.achat(HELLO)
    await collect(await llm.astream_complete("the cat sat?"))
    assert working_threads
    assert threading.get_ident() not in working_threads


# -- memory -----------------------------------------------------------------------------------------------------


def test_documents_are_read_and_named(engine):
    """Sources come with scores, exact places and token counts; a call's own documents do not stay."""
    llm = FocusLLM(engine=engine, max_tokens=6, documents=[Document("a", REPETITIVE), Document("b", SCRIPTS)])
    raw = llm.complete("who?").raw
    assert {source["document_id"] for source in raw["focus"]["sources"]} == {"a", "b"}
    assert sum(source["score"] for source in raw["focus"]["sources"]) == pytest.approx(1.0, abs=1e-5)
    assert raw["usage"]["prompt_tokens"] == raw["focus"]["memory_tokens"] + raw["focus"]["local_tokens"]
    for source in raw["focus"]["sources"]:
        text = {"a": REPETITIVE, "b": SCRIPTS}[source["document_id"]]
        assert text[source["start"] : source["end"]] == source["text"]
    extra = llm.complete("who?", documents=[Page(text="the hat " * 20, doc_id="c")]).raw
    assert "c" in {source["document_id"] for source in extra["focus"]["sources"]}
    assert extra["focus"]["read_now"] == extra["focus"]["memory_tokens"] - raw["focus"]["memory_tokens"] > 0
    again = llm.complete("who?").raw
    assert again["focus"]["sources"] == raw["focus"]["sources"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == raw["focus"]["memory_tokens"]
    assert len(llm.complete("who?", max_sources=1).raw["focus"]["sources"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chat", "question", "raw"])
def test_prompts_of_any_length(engine, template):
    """What does not fit the window becomes memory, in completions and in conversations."""
    llm = FocusLLM(engine=engine, max_tokens=4, template=template)
    assert llm.get_num_tokens(LONG) > 1024
    raw = llm.complete(LONG).raw
    assert raw["focus"]["sources"][0]["document_id"] == "prompt"
    assert raw["focus"]["chunks"] > 10
    history = [ChatMessage(role=role, content=REPETITIVE * 2) for role in ("user", "assistant") * 3]
    sources = llm.chat([*history, *HELLO]).raw["focus"]["sources"]
    assert {source["document_id"] for source in sources} >= {"turn-1", "turn-2"}


def test_a_summary_index_hands_over_every_node(engine):
    """LlamaIndex's own query engine puts all nodes into one call, streamed or not, sync or not."""
    llm = FocusLLM(engine=engine, max_tokens=6)
    index = SummaryIndex.from_documents([Page(text=f"the cat {number} sat on the mat. " * 20) for number in range(5)])
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # LlamaIndex's asyncio_run would leave one open
    try:
        response = index.as_query_engine(llm=llm).query("who sat?")
        assert str(response)
        assert len(response.source_nodes) == 5
        streamed = index.as_query_engine(llm=llm, streaming=True).query("who sat?")
        assert "".join(streamed.response_gen) == str(response)
        assert str(loop.run_until_complete(index.as_query_engine(llm=llm).aquery("who sat?"))) == str(response)
    finally:
        loop.close()
        asyncio.set_event_loop(None)


def test_capacity_is_what_memory_holds(engine, monkeypatch):
    """The window reported is half of free memory as chunk KV and the local window; a setting overrides it."""
    base, size = engine.base, engine.config.chunk_size
    token = 2 * (base.num_layers - 1) * base.num_kv_heads * base.head_dim * base.dtype.itemsize
    free, window = 10_000 * token * 2 * (size + 4), engine.config.window
    monkeypatch.setattr("focus_core.engine.free_bytes", lambda device: free)
    assert FocusLLM(engine=engine).metadata.context_window == 10_000 * size + window
    assert FocusLLM(engine=engine, context_window=5000).metadata.context_window == 5000


def test_with_memory_reads_the_memory_of_the_moment(engine):
    """A function is asked at every call; the model it was made of reads nothing."""
    held = {"memory": engine.remember([Document("a", REPETITIVE)])}
    base = FocusLLM(engine=engine, max_tokens=4)
    llm = base.with_memory(lambda: held["memory"], max_tokens=5)
    assert llm.complete("who?").raw["usage"]["completion_tokens"] == 5
    held["memory"] = engine.remember([Document("b", REPETITIVE)])
    assert [source["document_id"] for source in llm.complete("who?").raw["focus"]["sources"]] == ["b"]
    assert base.complete("who?").raw["focus"]["chunks"] == 0
    small = base.with_memory(lambda: None, context_window=77)
    assert base.metadata.context_window != small.metadata.context_window == 77


# -- content blocks ---------------------------------------------------------------------------------------------


def blocks(*content):
    return [ChatMessage(role="user", blocks=[*content, TextBlock(text="who sat?")])]


def test_citable_content_is_cited_with_exact_places(llm):
    """Citable and document blocks become memory; citations point at text[start:end], repetitive and CJK too."""
    texts = {"one": REPETITIVE, "two": SCRIPTS, "notes.txt": "the dog ate the hat. " * 20}
    found = llm.chat(
        blocks(
            CitableBlock(title="One", source="one", content=REPETITIVE),
            CitableBlock(title="Two", source="two", content=[TextBlock(text=SCRIPTS)]),
            DocumentBlock(data=texts["notes.txt"].encode(), title="notes.txt"),
            CachePoint(cache_control=CacheControl(type="ephemeral")),
            ThinkingBlock(content="nothing of this is read " * 100),
        )
    )
    cited = [block for block in found.message.blocks if isinstance(block, CitationBlock)]
    assert len(cited) == 5
    assert {block.source for block in cited} <= set(texts)
    for block in cited:
        place = block.additional_location_info
        assert texts[block.source][place["source_start"] : place["source_end"]] == block.cited_content.text
    assert found.message.content == found.message.blocks[0].text
    again = llm.chat([*HELLO, found.message, *HELLO])
    assert again.raw["focus"]["chunks"] == 0  # citations are output, not text to read again


def test_document_blocks_from_files(llm, tmp_path):
    """Text files are read; others are refused by name."""
    (tmp_path / "a.txt").write_text(REPETITIVE)
    (tmp_path / "b.bin").write_bytes(b"\x7fELF\0\0")
    raw = llm.chat(blocks(DocumentBlock(path=tmp_path / "a.txt"))).raw
    assert raw["focus"]["sources"][0]["document_id"].endswith("a.txt")
    with pytest.raises(NotTextError, match=r"b\.bin holds binary data; convert"):
        llm.chat(blocks(DocumentBlock(path=tmp_path / "b.bin")))
    with pytest.raises(ConfigError, match="FocusLLM reads text; a message of role 'user' holds a ImageBlock"):
        llm.chat(blocks(ImageBlock(image=b"x")))


def test_logprobs(llm):
    """Alternatives per token where they are asked for."""
    assert llm.complete("the cat").logprobs is None
    found = llm.complete("the cat", logprobs=3).logprobs
    assert len(found) == 12
    assert all(tokens[0].logprob <= 0 and len(tokens) in (3, 4) for tokens in found)


# -- copies and errors ------------------------------------------------------------------------------------------


def test_a_pickle_finds_its_engine_again(engine, monkeypatch):
    """Weights stay behind, silently; the copy asks the process's registry for its settings."""
    from focus_integrations.llama_index import llm as module

    asked = []
    monkeypatch.setattr(module, "shared_engine", lambda *settings: asked.append(settings) or engine)
    llm = FocusLLM(model="x", adapter="y", chunk_size=9, max_tokens=5)
    text = llm.complete("the cat").text
    copied = pickle.loads(pickle.dumps(llm))
    assert copied.complete("the cat").text == text
    assert set(asked) == {("x", "y", 9, None, None)}


@pytest.mark.slow
def test_tool_call_text_is_text_without_tools(llm, engine, monkeypatch):
    """The same output is a call where tools were offered, and plain text where none were."""
    written = '<tool_call>\n{"name": "add", "arguments": {"a": true, "b": true}}\n</tool_call>'
    plain = engine.stream_ids
    only = regex(re.escape(written))
    monkeypatch.setattr(engine, "stream_ids", lambda *a, **k: plain(*a, **{**k, "constraint": only}))
    (block,) = llm.chat(HELLO, max_tokens=200).message.blocks
    assert block.text == written
    (block,) = llm.chat_with_tools([ADD], "x", max_tokens=200).message.blocks
    assert (block.tool_name, block.tool_kwargs) == ("add", {"a": True, "b": True})


async def test_a_cancelled_request_stops_within_a_step(llm, monkeypatch):
    """After cancelling a task or closing a stream at most the step that runs is finished."""
    steps = []
    plain = Reading.step
    monkeypatch.setattr(Reading, "step", lambda self, token: steps.append(token) or plain(self, token))
    task = asyncio.create_task(llm.achat(HELLO, max_tokens=800))
    while len(steps) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = len(steps)
    await asyncio.sleep(0.2)
    assert len(steps) <= before + 1
    stream = await llm.astream_complete("the cat", max_tokens=800)
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0.01)
    before = len(steps)
    await asyncio.sleep(0.2)
    assert len(steps) <= before + 1


@pytest.mark.slow
async def test_a_time_limit_covers_reading(engine, monkeypatch):
    """All eight methods give up while documents are being read, by their own call or by another; then all is well."""
    from focus_core.store import memory

    plain, released = memory.encode_chunks, threading.Event()
    monkeypatch.setattr(memory, "encode_chunks", lambda *arguments: (released.wait(60), plain(*arguments))[1])
    llm = FocusLLM(engine=engine, max_tokens=4, documents=[Document("a", REPETITIVE)], timeout=0.2)
    for ask in (llm.complete, lambda text: list(llm.stream_complete(text))):
        with pytest.raises(TimeoutError, match=r"more than 0\.2 seconds; raise timeout"):
            ask("who?")
    for ask in (llm.chat, lambda turns: list(llm.stream_chat(turns))):
        with pytest.raises(TimeoutError):
            ask(HELLO)
    for later in (llm.acomplete("who?"), llm.achat(HELLO)):
        with pytest.raises(TimeoutError):
            await later
    for stream in (await llm.astream_complete("who?"), await llm.astream_chat(HELLO)):
        with pytest.raises(TimeoutError):
            await anext(stream)
    released.set()
    assert llm.complete("who?", timeout=60).raw["focus"]["chunks"] > 0
    for bad in (0, -1, "soon"):
        with pytest.raises(ConfigError, match="timeout must be a number of seconds above 0"):
            llm.complete("who?", timeout=bad)


def test_bad_options_have_a_message(llm):
    """Each bound names itself; a required schema that cannot end in time says so."""
    with pytest.raises(ConfigError, match=r"top_p must be above 0\.0 and at most 1\.0; got 2"):
        llm.complete("the cat", top_p=2)
    with pytest.raises(ConfigError, match="raise max_tokens"):
        llm.chat(HELLO, schema={"type": "object", "properties": {"a": {"const": "x" * 50}}, "required": ["a"]})
    with pytest.raises(ConfigError, match="a document must be a path, a text or a framework document; got int"):
        llm.complete("the cat", documents=[3])


def test_pickling_warns_of_nothing(llm, caplog):
    """LlamaIndex's own pickling tries weights and logs; this one does not."""
    with caplog.at_level(logging.WARNING):
        pickle.dumps(llm)
    assert not caplog.records


def test_memory_takes_a_name_a_folder_or_a_memory(engine, tmp_path, monkeypatch):
    """``memory="contracts"`` reads what the command line indexed, besides documents; `with_memory` takes it too."""
    monkeypatch.setenv("FOCUSLLM_STORE", str(tmp_path))
    memory = engine.remember([Document("lease", "the lease was signed by Ada")])
    memory.save(tmp_path, name="contracts")

    def read(llm):
        return {one["document_id"] for one in llm.complete("who?", max_tokens=2).raw["focus"]["sources"]}

    for given in ("contracts", tmp_path, memory):
        assert read(FocusLLM(engine=engine, memory=given, documents=[Document("boat", "the boat is red")])) == {
            "lease",
            "boat",
        }
    assert read(FocusLLM(engine=engine).with_memory("contracts")) == {"lease"}
    assert pickle.loads(pickle.dumps(FocusLLM(memory="contracts"))).memory == "contracts"
