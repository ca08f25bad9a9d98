"""Check FocusMemoryIndex and what reads it: build, change, persist, ask; on tiny models."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.base import BaseIndex
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import ImageDocument, MetadataMode, NodeWithScore, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters

from focus_core.errors import ConfigError, StoreError
from focus_core.store.memory import Memory
from focus_integrations.llama_index import (
    FocusChatEngine,
    FocusLLM,
    FocusMemoryIndex,
    FocusQueryEngine,
    FocusRetriever,
    FocusSynthesizer,
)

NAMES = ("cat", "dog", "hat", "mat")


def pages(*names, **metadata):
    """Documents that repeat a sentence, so that equal text stands at many places."""
    return [
        Document(text=f"the {name} sat on the mat. " * 12, doc_id=name, metadata={"about": name, **metadata})
        for name in names or NAMES
    ]


@pytest.fixture
def index(llm):
    return FocusMemoryIndex.from_documents(pages(), llm=llm)


def logits(index: FocusMemoryIndex) -> torch.Tensor:
    """First logits of a question over an index's memory."""
    engine = index.llm.engine
    return engine.reading(index.memory.state, max_tokens=4).begin(engine.local_ids("who sat?"))


def encoded_chunks(monkeypatch) -> list[int]:
    """Count chunks whose KV is computed from now on."""
    from focus_core.store import memory

    counts: list[int] = []
    plain = memory.encode_chunks
    monkeypatch.setattr(
        memory, "encode_chunks", lambda base, rows, *more: counts.append(len(rows)) or plain(base, rows, *more)
    )
    return counts


# -- building and changing --------------------------------------------------------------------------------------


def test_they_are_what_they_are_taken_for():
    """MRO, as LlamaIndex's own packages test it."""
    kinds = {
        FocusMemoryIndex: BaseIndex,
        FocusRetriever: BaseRetriever,
        FocusSynthesizer: BaseSynthesizer,
        FocusChatEngine: BaseChatEngine,
    }
    for ours, base in kinds.items():
        assert base.__name__ in [item.__name__ for item in ours.__mro__]


def test_one_node_is_one_chunk(index):
    """Every node is one memory chunk with its metadata in front, and an exact place in its document."""
    assert len(index.nodes) == len(index.memory) >= 2 * len(NAMES)
    texts = {document.id_: document.text for document in pages()}
    for node, document in zip(index.nodes, index.memory.documents, strict=True):
        assert document.id == node.node_id
        assert document.text == node.get_content(MetadataMode.LLM)
        assert texts[node.ref_doc_id][node.start_char_idx : node.end_char_idx] == node.text
    assert set(index.ref_doc_info) == set(NAMES)


def test_progress_is_told(llm, capfd):
    """Tokens done rise to the total; the bar is drawn if asked for; events are sent."""
    told, events = [], []

    class Handler(BaseEventHandler):
        def handle(self, event, **kwargs):
            events.append(type(event).__name__)

    get_dispatcher().add_event_handler(handler := Handler())
    try:
        index = FocusMemoryIndex.from_documents(
            pages(), llm=llm, progress=lambda *step: told.append(step), show_progress=True
        )
    finally:
        get_dispatcher().event_handlers.remove(handler)
    assert told[-1] == (index.memory.tokens, index.memory.tokens)
    assert "FocusPrefillEvent" in events
    assert "Reading" in capfd.readouterr().err


def test_unknown_documents_are_logged(index, caplog):
    """Deleting what is not there changes nothing."""
    before = index.memory.fingerprint
    index.delete_ref_doc("zebra")
    index.delete_nodes(["no such node"])
    assert "zebra not found" in caplog.text
    assert index.memory.fingerprint == before


def test_empty_and_non_text_documents(llm, caplog):
    """Documents without text are left out and logged; an index of nothing answers as LlamaIndex's do."""
    nothing = [Document(text=""), Document(text=" \n"), ImageDocument(image=b"x")]
    index = FocusMemoryIndex.from_documents([*nothing, *pages("cat")], llm=llm)
    assert {node.ref_doc_id for node in index.nodes} == {"cat"}
    with caplog.at_level(logging.WARNING):
        FocusMemoryIndex([TextNode(text=" ", id_="blank")], llm=llm)
    assert "1 nodes hold no text and are left out of memory, the first one is blank" in caplog.text
    empty = FocusMemoryIndex.from_documents(nothing, llm=llm)
    assert str(empty.as_query_engine().query("who?")) == "Empty Response"
    assert "".join(empty.as_query_engine(streaming=True).query("who?").response_gen) == "Empty Response"
    assert empty.as_retriever().retrieve("who?") == []
    whole = FocusMemoryIndex(pages(), llm=llm)
    assert len(whole.nodes) == len(NAMES) < len(whole.memory)  # a node may be longer than a chunk


# -- persistence ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_round_trips_answer_alike(index, llm, tmp_path, monkeypatch):
    """persist and load compute nothing; logits are bit-equal, answers and sources the same; then it still changes."""
    expected = index.as_query_engine().query("who sat?")
    index.persist(tmp_path)
    counts = encoded_chunks(monkeypatch)
    loaded = FocusMemoryIndex.load(tmp_path, llm)
    assert torch.equal(logits(loaded), logits(index))
    found = loaded.as_query_engine().query("who sat?")
    assert found.response == expected.response
    assert [(item.node_id, item.score) for item in found.source_nodes] == [
        (item.node_id, item.score) for item in expected.source_nodes
    ]
    assert counts == []
    assert loaded.refresh_ref_docs(pages()) == [False] * len(NAMES)
    loaded.insert(pages("zebra")[0])
    loaded.delete_ref_doc("cat")
    loaded.persist(tmp_path)
    again = FocusMemoryIndex.load(tmp_path, llm)
    assert {node.ref_doc_id for node in again.nodes} == {"dog", "hat", "mat", "zebra"}
    torch.testing.assert_close(logits(again), logits(loaded))
    assert str(again.as_query_engine().query("who sat?")) == str(loaded.as_query_engine().query("who sat?"))


def test_what_is_not_an_index_is_refused(index, llm, make_engine, tmp_path):
    """Another model, nothing, half-written, damaged, of another format: each has a message that says what to do."""
    with pytest.raises(StoreError, match="does not exist"):
        FocusMemoryIndex.load(tmp_path / "nowhere", llm)
    folder = tmp_path / "whole"
    index.persist(folder)
    other = FocusLLM(engine=make_engine("qwen2", window=256, chunk_size=64))
    with pytest.raises(StoreError, match=r"made by another model or settings .* index the documents again"):
        FocusMemoryIndex.load(folder, other)

    def copied(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    half = copied("half")
    (half / "focus_index.json").unlink()
    with pytest.raises(StoreError, match="was not written to its end"):
        FocusMemoryIndex.load(half, llm)
    mixed = copied("mixed")
    index.insert(pages("zebra")[0])
    index.storage_context.persist(mixed)  # a crash after the nodes, before memory and manifest
    with pytest.raises(StoreError, match=r"docstore\.json is missing or not the one that was persisted"):
        FocusMemoryIndex.load(mixed, llm)
    without = copied("without")
    shutil.rmtree(without / "focus_memory")
    with pytest.raises(StoreError, match="no saved memory in"):
        FocusMemoryIndex.load(without, llm)
    damaged = copied("damaged")
    chunk = next((damaged / "focus_memory" / "kv").rglob("*.safetensors"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="checksum differs"):
        FocusMemoryIndex.load(damaged, llm).as_query_engine().query("who?")
    for content, message in (
        (b"{", "is damaged"),
        (b'{"format": 9, "files": {}, "index_id": "", "metadata_mode": ""}', "has format 9"),
    ):
        broken = copied(f"broken{len(content)}")
        (broken / "focus_index.json").write_bytes(content)
        with pytest.raises(StoreError, match=message):
            FocusMemoryIndex.load(broken, llm)


def test_foreign_files_stay(index, llm, tmp_path):
    """A file that is not the index's, anywhere in its folder, is neither read nor removed."""
    tmp_path.joinpath("notes.txt").write_text("mine")
    index.persist(tmp_path)
    strangers = [tmp_path / "notes.txt", tmp_path / "focus_memory" / "x.bin", tmp_path / "focus_memory" / "kv" / "y"]
    for path in strangers:
        path.write_text("mine")
    loaded = FocusMemoryIndex.load(tmp_path, llm)
    loaded.insert(pages("zebra")[0])
    loaded.persist(tmp_path)
    assert [path.read_text() for path in strangers] == ["mine"] * 3
    assert len(FocusMemoryIndex.load(tmp_path, llm).nodes) == len(loaded.nodes)


def test_a_store_kept_elsewhere(index, llm, tmp_path):
    """Nodes in a database of the user's: load takes its storage context."""
    context = StorageContext.from_defaults()
    made = FocusMemoryIndex.from_documents(pages(), llm=llm, storage_context=context)
    made.persist(tmp_path)
    loaded = FocusMemoryIndex.load(tmp_path, llm, storage_context=context)
    assert [node.node_id for node in loaded.nodes] == [node.node_id for node in made.nodes]
    index_store = json.loads((tmp_path / "index_store.json").read_text())
    assert len(index_store["index_store/data"]) == 1


# -- asking -----------------------------------------------------------------------------------------------------


async def test_answers_agree_and_sources_add_up(index):
    """sync == streamed == async == async streamed; all nodes named, scores fall and add up to 1."""
    ask = index.as_query_engine(source_top_k=None)
    whole = ask.query("who sat?")
    assert whole.response
    assert {item.node_id for item in whole.source_nodes} == {node.node_id for node in index.nodes}
    scores = [item.score for item in whole.source_nodes]
    assert sum(scores) == pytest.approx(1.0, abs=1e-5)
    assert scores == sorted(scores, reverse=True)
    assert whole.metadata["chunks"] == len(index.memory)
    assert whole.metadata["usage"]["prompt_tokens"] > index.memory.tokens
    assert whole.metadata["timings"]["total"] > 0
    stream = index.as_query_engine(source_top_k=None, streaming=True)
    streamed = stream.query("who sat?")
    assert isinstance(streamed, StreamingResponse)
    assert streamed.source_nodes == [] == list(streamed.metadata)
    assert "".join(streamed.response_gen) == whole.response
    again = await stream.aquery("who sat?")
    assert isinstance(again, AsyncStreamingResponse)
    assert "".join([piece async for piece in again.async_response_gen()]) == whole.response
    found = await ask.aquery("who sat?")
    assert found.response == whole.response
    for other in (streamed, again, found):
        assert [item.score for item in other.source_nodes] == scores
        assert other.metadata["usage"] == whole.metadata["usage"]
    assert streamed.metadata["timings"]["first_token"] <= streamed.metadata["timings"]["total"]
    assert len(index.as_query_engine(source_top_k=2).query("who sat?").source_nodes) == 2
    assert index.as_query_engine(max_tokens=2).query("who?").metadata["usage"]["completion_tokens"] <= 2


def test_filters_choose_what_is_read(index, monkeypatch):
    """Metadata filters and doc_ids give a subset; it answers as an index of those documents alone would."""
    counts = encoded_chunks(monkeypatch)
    only = MetadataFilters(filters=[MetadataFilter(key="about", value=["cat", "dog"], operator=FilterOperator.IN)])
    found = index.as_query_engine(filters=only, source_top_k=None).query("who sat?")
    assert {item.node.ref_doc_id for item in found.source_nodes} == {"cat", "dog"}
    named = index.as_query_engine(doc_ids=["cat", "dog"], source_top_k=None).query("who sat?")
    assert counts == []
    alone = FocusMemoryIndex.from_documents(pages("cat", "dog"), llm=index.llm).as_query_engine().query("who sat?")
    assert found.response == named.response == alone.response
    nobody = MetadataFilters(filters=[MetadataFilter(key="about", value="zebra")])
    assert str(index.as_query_engine(filters=nobody).query("who?")) == "Empty Response"
    engine = index.as_query_engine(doc_ids=["cat", "zebra"], source_top_k=None)
    before = len(engine.query("who?").source_nodes)
    index.insert(pages("zebra")[0])
    assert len(engine.query("who?").source_nodes) > before


async def test_retrievers_rank_by_attention(index):
    """Nodes come best first, all or the best k, and the first is what an answer's first token attends to most."""
    every = index.as_retriever(similarity_top_k=None).retrieve("who sat?")
    assert len(every) == len(index.nodes)
    two = await index.as_retriever(similarity_top_k=2).aretrieve("who sat?")
    assert [item.node_id for item in two] == [item.node_id for item in every[:2]]
    answer = index.llm.engine.answer("who sat?", index.memory, max_tokens=1)
    assert [item.node_id for item in every] == [item.document_id for item in answer.evidence]
    assert index.as_query_engine().retrieve("who sat?")[0].node_id == every[0].node_id
    filtered = index.as_retriever(doc_ids=["cat"]).retrieve("who sat?")
    assert {item.node.ref_doc_id for item in filtered} == {"cat"}


@pytest.mark.usefixtures("own_loop")
def test_another_model_may_read_the_best_nodes(index):
    """An llm that is no FocusLLM gets the nodes that attention ranks first."""
    found = index.as_query_engine(llm=MockLLM(max_tokens=5), similarity_top_k=2).query("who sat?")
    assert [item.node_id for item in found.source_nodes] == [
        item.node_id for item in index.as_retriever(similarity_top_k=2).retrieve("who sat?")
    ]


# -- synthesizer ------------------------------------------------------------------------------------------------


async def test_chosen_nodes_become_memory(index, llm, monkeypatch):
    """RetrieverQueryEngine over any retriever: one call, attention scores, KV of known nodes used again."""
    vectors = VectorStoreIndex(index.nodes, embed_model=MockEmbedding(8)).as_retriever(similarity_top_k=6)
    engine = RetrieverQueryEngine.from_args(vectors, llm, response_synthesizer=FocusSynthesizer(llm))
    whole = engine.query("who sat?")
    scores = [item.score for item in whole.source_nodes]
    assert len(scores) == 6
    assert sum(scores) == pytest.approx(1.0, abs=1e-5)
    assert whole.metadata["chunks"] == 6
    counts = encoded_chunks(monkeypatch)
    assert (await engine.aquery("who sat?")).response == whole.response
    assert sum(counts) == 0
    stream = FocusSynthesizer(llm, streaming=True)
    streamed = RetrieverQueryEngine.from_args(vectors, llm, response_synthesizer=stream, streaming=True).query(
        "who sat?"
    )
    assert "".join(streamed.response_gen) == whole.response
    assert [item.score for item in streamed.source_nodes] == scores
    again = await stream.asynthesize("who sat?", vectors.retrieve("x"), [NodeWithScore(node=TextNode(text="more"))])
    assert "".join([piece async for piece in again.async_response_gen()]) == whole.response
    assert again.source_nodes[-1].node.text == "more"


async def test_synthesizers_take_texts_and_nothing(llm):
    """Strings as LlamaIndex's other callers pass them; no nodes give the empty response."""
    texts = ["the cat sat. " * 9, "the dog ate. " * 9, " "]
    plain, stream = FocusSynthesizer(llm), FocusSynthesizer(llm, streaming=True)
    whole = plain.get_response("who sat?", texts)
    assert whole
    assert await plain.aget_response("who sat?", texts) == whole
    assert "".join(stream.get_response("who sat?", texts)) == whole
    assert "".join([piece async for piece in await stream.aget_response("who sat?", texts)]) == whole
    assert str(plain.synthesize("who?", [])) == str(await plain.asynthesize("who?", [])) == "Empty Response"
    assert "".join(stream.synthesize("who?", []).response_gen) == "Empty Response"
    assert plain.get_prompts() == {}


# -- conversations ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conversations_read_the_whole_memory(index, own_loop):
    """Four ways to talk give the same turns with sources; history matters; reset forgets it, the memory stays."""

    def fresh(**options):
        return index.as_chat_engine(source_top_k=None, **options)

    one = fresh()
    first = one.chat("who sat?")
    assert {item.node_id for item in first.source_nodes} == {node.node_id for node in index.nodes}
    assert first.metadata["chunks"] == len(index.memory)
    second = one.chat("who?")
    assert [message.role.value for message in one.chat_history] == ["user", "assistant"] * 2
    assert second.response != fresh().chat("who?").response
    streamed = fresh().stream_chat("who sat?")
    assert "".join(streamed.response_gen).strip() == first.response
    assert [item.score for item in streamed.source_nodes] == [item.score for item in first.source_nodes]

    async def talk():
        whole = await fresh().achat("who sat?")
        parts = await fresh().astream_chat("who sat?")
        text = "".join([piece async for piece in parts.async_response_gen()])
        return whole, text.strip(), parts.source_nodes

    whole, text, sources = own_loop.run_until_complete(talk())
    assert whole.response == text == first.response
    assert len(sources) == len(whole.source_nodes) == len(index.nodes)
    one.reset()
    assert one.chat_history == []
    assert one.chat("who sat?").response == first.response
    only = fresh(doc_ids=["cat"], system_prompt="the hat", max_tokens=3).chat("who?")
    assert {item.node.ref_doc_id for item in only.source_nodes} == {"cat"}


def test_other_chat_modes_are_llamaindexs(index, own_loop):
    """condense_question goes through the query engine."""
    from llama_index.core.chat_engine import CondenseQuestionChatEngine
    from llama_index.core.chat_engine.types import ChatMode

    kept = ChatMemoryBuffer.from_defaults(token_limit=1000)
    engine = index.as_chat_engine(ChatMode.CONDENSE_QUESTION, memory=kept)
    assert isinstance(engine, CondenseQuestionChatEngine)
    assert str(engine.chat("who sat?")) == str(index.as_query_engine().query("who sat?"))
    plus = index.as_chat_engine(ChatMode.CONDENSE_PLUS_CONTEXT, memory=kept)
    assert plus.chat("who sat?").source_nodes
    assert str(index.as_chat_engine(ChatMode.SIMPLE, memory=kept).chat("who sat?"))
    with pytest.raises(ConfigError, match="use an agent with index_tool"):
        index.as_chat_engine(ChatMode.REACT)


# -- another process --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*half a surrogate pair:UserWarning")
async def test_half_an_emoji_in_a_document_or_a_question(llm):
    """It is read as U+FFFD with a warning, wherever documents and questions come in; the caller's stay as they are."""
    halves = [Document(text=f"the {name} \ud83d sat", id_=name) for name in ("cat", "dog", "hat", "mat", "rat")]
    with pytest.warns(UserWarning, match="the text of 'cat' holds half a surrogate pair"):
        index = FocusMemoryIndex.from_documents(halves[:1], llm=llm)
    with pytest.warns(UserWarning, match="the text of 'dog' holds half a surrogate pair"):
        index.insert(halves[1])
    assert index.refresh_ref_docs(halves[:3]) == [False, False, True]
    await index.ainsert(halves[3])
    assert await index.arefresh_ref_docs(halves[2:]) == [False, False, True]
    index.update_ref_doc(halves[0])
    assert halves[0].text == "the cat \ud83d sat"
    assert sorted(node.text for node in index.nodes) == [f"the {one.id_} \ufffd sat" for one in halves]
    assert all(node.start_char_idx == 0 and node.end_char_idx == 13 for node in index.nodes)
    assert index.as_query_engine().query("who \ud83d?").source_nodes
    assert index.as_chat_engine().chat("who \ud83d?").response
    with pytest.warns(UserWarning, match="a text holds half a surrogate pair"):
        said = llm.complete("who \ud83d?").text
    assert said == llm.complete("who \ufffd?").text


def test_a_memory_of_another_engine_is_refused(index, make_engine):
    """A query engine with a model that did not read the index."""
    other = FocusLLM(engine=make_engine("qwen2"), max_tokens=4)
    with pytest.raises(ConfigError, match="another engine"):
        FocusQueryEngine(index, other).query("who?")
    assert isinstance(index.memory, Memory)
