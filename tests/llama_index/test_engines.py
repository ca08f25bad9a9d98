"""Check that engines over a FocusMemoryIndex take what those of every LlamaIndex index take; on tiny models."""

from __future__ import annotations

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine, TransformQueryEngine
from llama_index.core.schema import IndexNode, MetadataMode, NodeRelationship, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from focus_core.errors import ConfigError
from focus_integrations.llama_index import FocusLLM, FocusMemoryIndex, FocusQueryEngine
from tests.conftest import tiny_model

NAMES = ("cat", "dog", "hat", "mat")
MODES = (ChatMode.BEST, ChatMode.CONTEXT, ChatMode.CONDENSE_QUESTION, ChatMode.CONDENSE_PLUS_CONTEXT)
CATS = MetadataFilters(filters=[MetadataFilter(key="about", value="cat")])


def pages(*names):
    return [Document(text=f"the {name} sat on the mat. " * 4, doc_id=name, metadata={"about": name}) for name in names]


@pytest.fixture
def index(llm):
    return FocusMemoryIndex.from_documents(pages(*NAMES), llm=llm)


def other():
    """A model that repeats its prompt, so that a test sees what it was given."""
    return MockLLM(max_tokens=None)


def kept():
    return ChatMemoryBuffer.from_defaults(token_limit=3000)


def read_by(response) -> set[str]:
    return {item.node.ref_doc_id for item in response.source_nodes}


async def four_ways(make, message: str = "who sat?") -> list[tuple[str, set[str]]]:
    """Text and sources of a chat engine's answer: whole, streamed, asynchronous, both."""
    whole = make().chat(message)
    streamed = make().stream_chat(message)
    text = "".join(streamed.response_gen)
    later = await make().achat(message)
    parts = await make().astream_chat(message)
    again = "".join([piece async for piece in parts.async_response_gen()])
    return [
        (str(whole).strip(), read_by(whole)),
        (text.strip(), read_by(streamed)),
        (str(later).strip(), read_by(later)),
        (again.strip(), read_by(parts)),
    ]


# -- filters ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("another", [False, True], ids=["focus", "another"])
@pytest.mark.parametrize("mode", MODES)
async def test_every_chat_mode_reads_what_passes_its_filters(index, mode, another):
    """Sync, streamed, async; on the index's model and on another one: no text of an excluded document."""
    talker = other() if another else None

    def make(**options):
        return index.as_chat_engine(chat_mode=mode, llm=talker, memory=kept(), **options)

    for options in ({"filters": CATS}, {"doc_ids": ["cat"]}):
        ways = await four_ways(lambda options=options: make(**options))
        assert [sources for _, sources in ways] == [{"cat"}] * 4
        assert len({text for text, _ in ways}) == 1
        if another:
            assert "the cat sat" in ways[0][0]
            assert not any(f"the {name} sat" in ways[0][0] for name in ("dog", "hat"))
    unfiltered = await four_ways(make)
    assert [sources for _, sources in unfiltered] == [set(NAMES)] * 4


async def test_filters_see_a_node_as_it_is_now(llm):
    """Equal id and text under other metadata: the new metadata decide, also in an engine that has asked before."""
    node = TextNode(text="the cat sat on the mat. " * 4, id_="n", metadata={"owner": "anna"})
    node.excluded_llm_metadata_keys = ["owner"]
    other = TextNode(text="the dog ate the hat. " * 4, id_="m", metadata={"owner": "anna"})
    index = FocusMemoryIndex([node, other], llm=llm)
    mine = MetadataFilters(filters=[MetadataFilter(key="owner", value="anna")])
    engine = index.as_query_engine(filters=mine)
    assert {item.node_id for item in engine.query("who?").source_nodes} == {"n", "m"}
    moved = TextNode(text=node.text, id_="n", metadata={"owner": "ben"}, excluded_llm_metadata_keys=["owner"])
    index.insert_nodes([moved])
    assert {item.node_id for item in engine.query("who?").source_nodes} == {"m"}


def test_filters_while_a_node_is_replaced(llm, monkeypatch):
    """Between the new node's arrival and its reading, nobody is shown the old text under the new metadata."""
    old = TextNode(text="the secret of anna. " * 4, id_="n", metadata={"owner": "anna"})
    new = TextNode(text="the hat of ben. " * 4, id_="n", metadata={"owner": "ben"})
    index = FocusMemoryIndex([old], llm=llm)
    plain, seen = index.memory.add, []

    def ask(*arguments, **options):
        for owner in ("anna", "ben"):
            only = MetadataFilters(filters=[MetadataFilter(key="owner", value=owner)])
            seen.append(str(index.as_query_engine(filters=only).query("who?")))
        return plain(*arguments, **options)

    monkeypatch.setattr(index.memory, "add", ask)
    index.insert_nodes([new])
    assert seen == ["Empty Response"] * 2


# -- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_condensed_questions_stream_with_history(index):
    """Second turns, whose question is condensed by the model: four equal answers, kept in the history."""

    def make():
        history = [ChatMessage(role="user", content="the cat?"), ChatMessage(role="assistant", content="the mat")]
        return index.as_chat_engine(chat_mode="condense_question", chat_history=history, max_tokens=4)

    ways = await four_ways(make)
    assert len({text for text, _ in ways}) == 1
    engine = make()
    text = "".join(engine.stream_chat("who?").response_gen)
    assert [message.content for message in engine.chat_history] == ["the cat?", "the mat", "who?", text.strip()]
    engine.reset()
    assert engine.chat_history == []


@pytest.mark.slow
async def test_conversations_with_more_text_than_the_window(make_engine):
    """A long system prompt, and modes that put every node into it: read as memory, not refused."""
    small = make_engine(model=tiny_model("llama", window=512), window=512, chunk_size=64)
    index = FocusMemoryIndex.from_documents(pages(*NAMES), llm=FocusLLM(engine=small, max_tokens=4))
    for mode in (*MODES, ChatMode.SIMPLE):
        long = (
            {} if mode == ChatMode.CONDENSE_QUESTION else {"system_prompt": "be as brief as the cat on the mat. " * 90}
        )
        ways = await four_ways(lambda mode=mode, long=long: index.as_chat_engine(chat_mode=mode, memory=kept(), **long))
        assert len({text for text, _ in ways}) == 1
        assert ways[0][0]


@pytest.mark.slow
async def test_a_turn_whose_stream_is_left_is_kept(index):
    """As LlamaIndex's own engines do since 0.14.16: the question at once, the answer when it is whole."""
    for mode in (*MODES, ChatMode.SIMPLE):
        chat = index.as_chat_engine(chat_mode=mode)
        pieces = chat.stream_chat("who sat?").response_gen
        next(pieces)
        pieces.close()
        assert [message.role.value for message in chat.chat_history] == ["user", "assistant"]
        expected = index.as_chat_engine(chat_mode=mode).chat("who sat?")
        assert chat.chat_history[-1].content == str(expected)


@pytest.mark.slow
def test_braces_are_text(llm):
    """JSON and template fields in documents, metadata, questions, histories and system prompts."""
    odd = '{"name": "cat", "x": {context_str}} {0} {} '
    index = FocusMemoryIndex.from_documents([Document(text=odd * 3, doc_id="j", metadata={"m": "{a}"})], llm=llm)
    history = [ChatMessage(role="user", content="say {json} {}"), ChatMessage(role="assistant", content="{query_str}")]
    for mode in (*MODES, ChatMode.SIMPLE):
        system = {} if mode == ChatMode.CONDENSE_QUESTION else {"system_prompt": "answer as {json: 1}"}
        chat = index.as_chat_engine(chat_mode=mode, chat_history=history, **system)
        chat.chat("what is {name} {} {0}?")
        list(chat.stream_chat("{x").response_gen)
        said = [message.content for message in chat.chat_history]
        assert len(said) == 6
        assert (said[2], said[4]) == ("what is {name} {} {0}?", "{x")


@pytest.mark.slow
def test_arguments_that_tutorials_pass_to_chat_engines(index):
    """``streaming``, ``verbose`` and ``similarity_top_k`` in every mode."""
    for mode in (*MODES, ChatMode.SIMPLE):
        chat = index.as_chat_engine(chat_mode=mode, streaming=True, verbose=False, similarity_top_k=1)
        list(chat.stream_chat("who?").response_gen)
        assert [message.role.value for message in chat.chat_history] == ["user", "assistant"]


@pytest.mark.slow
def test_conversations_share_no_turns(index):
    """Engines, and calls, that are given one list of turns: nobody appends to it."""
    history = [ChatMessage(role="user", content="the cat?"), ChatMessage(role="assistant", content="the mat")]
    for mode in (*MODES, ChatMode.SIMPLE):
        one, two = (index.as_chat_engine(chat_mode=mode, chat_history=history) for _ in range(2))
        one.chat("who sat?")
        assert (len(history), len(one.chat_history), len(two.chat_history)) == (2, 4, 2)
    given = index.as_chat_engine()
    given.chat("who?", history)
    list(given.stream_chat("who?", history).response_gen)
    assert (len(history), len(given.chat_history)) == (2, 4)


# -- query engines ----------------------------------------------------------------------------------------------


class Backwards(BaseNodePostprocessor):
    """Keeps the last node."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        return nodes[-1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"streaming": True},
        {"response_mode": "tree_summarize"},
        {"response_mode": "no_text"},
        {"node_postprocessors": [SimilarityPostprocessor(similarity_cutoff=0.0)]},
        {"similarity_top_k": 2, "use_async": False, "verbose": False},
        {"text_qa_template": PromptTemplate("{context_str} {query_str}")},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("another", [False, True], ids=["focus", "another"])
async def test_query_engines_take_what_every_index_takes(index, options, another):
    """Streams, response modes, postprocessors, templates: on the index's model and on another."""
    engine = index.as_query_engine(llm=other() if another else None, **options)
    found = engine.query("who sat?")
    text = "".join(found.response_gen) if options.get("streaming") else str(found)
    if options.get("response_mode") != "no_text":
        assert text
    if another and options.get("response_mode") != "no_text":
        assert f"the {found.source_nodes[0].metadata['about']} sat" in text
    assert len(found.source_nodes) == options.get("similarity_top_k", len(NAMES))
    later = await engine.aquery("who sat?")
    assert ([item.node_id for item in later.source_nodes] or None) in (
        [item.node_id for item in found.source_nodes],
        None if options.get("streaming") else [],
    )


def test_postprocessors_choose_what_is_read(index):
    """Nodes that a postprocessor drops are not read; all are offered to it."""
    whole = index.as_query_engine()
    assert isinstance(whole, FocusQueryEngine)
    last = index.as_retriever(similarity_top_k=None).retrieve("who sat?")[-1]
    engine = index.as_query_engine(node_postprocessors=[Backwards()], max_tokens=4)
    assert isinstance(engine, RetrieverQueryEngine)
    found = engine.query("who sat?")
    assert [item.node_id for item in found.source_nodes] == [last.node_id]
    assert found.source_nodes[0].score == pytest.approx(1.0)
    assert found.metadata["usage"]["completion_tokens"] <= 4
    streamed = index.as_query_engine(node_postprocessors=[Backwards()], streaming=True, max_tokens=4).query("who sat?")
    assert "".join(streamed.response_gen) == str(found)
    chat = index.as_chat_engine(node_postprocessors=[Backwards()], memory=kept()).chat("who sat?")
    assert [item.node_id for item in chat.source_nodes] == [last.node_id]


@pytest.mark.slow
async def test_engines_that_stand_on_query_engines(index):
    """Engines of LlamaIndex that choose nodes themselves and hand them over; no model of Settings is asked."""
    ask, bundle = index.as_query_engine(max_tokens=4), QueryBundle("who sat?")
    nodes = index.as_retriever(similarity_top_k=2).retrieve(bundle)
    found = ask.synthesize(bundle, nodes)
    assert {item.node_id for item in found.source_nodes} == {item.node_id for item in nodes}
    assert str(await ask.asynthesize(bundle, nodes)) == str(found)
    hyde = TransformQueryEngine(ask, HyDEQueryTransform(llm=index.llm)).query("who sat?")
    assert len(hyde.source_nodes) == len(NAMES)
    cited = CitationQueryEngine.from_args(index, llm=index.llm, similarity_top_k=2).query("who sat?")
    assert len(cited.source_nodes) >= 2


def test_misspelt_arguments_are_refused(index):
    """When the engine is made, and not ignored or found at the first question."""
    for make in (index.as_query_engine, index.as_chat_engine, index.as_retriever):
        with pytest.raises(ConfigError, match=r"unknown argument 'max_tokns'.* max_tokens"):
            make(max_tokns=3)
    for make in (index.as_query_engine, index.as_chat_engine):
        with pytest.raises(ConfigError, match="unknown argument 'similarity_topk'"):
            make(llm=other(), similarity_topk=3)
    with pytest.raises(ConfigError, match="FocusLLM has no field 'temperatur'"):
        index.llm.with_memory(index.memory, temperatur=1)


# -- objects and given memories -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_objects_stand_behind_their_summaries(llm):
    """An IndexNode's object answers for it, as in a SummaryIndex; without its text in the answer's sources."""

    def make():
        inner = TextNode(text="the dog ate the hat. " * 4, id_="inner")
        return [IndexNode(text="a summary about the dog", index_id="dog", obj=inner)]

    index = FocusMemoryIndex(pages("cat"), objects=make(), llm=llm)
    expected = SummaryIndex(pages("cat"), objects=make()).as_retriever().retrieve("who?")
    assert {item.node_id for item in index.as_retriever().retrieve("who?")} == {item.node_id for item in expected}
    found = index.as_query_engine().query("who?")
    assert {item.node_id for item in found.source_nodes} == {"inner", "cat"}
    assert {item.node_id for item in index.as_chat_engine(memory=kept()).chat("who?").source_nodes} == {"inner", "cat"}
    alone = FocusMemoryIndex(objects=make(), llm=llm)
    assert [item.node_id for item in alone.as_query_engine().query("who?").source_nodes] == ["inner"]
    asked = FocusMemoryIndex(
        pages("mat"), objects=[IndexNode(text="cats", index_id="c", obj=index.as_query_engine())], llm=llm
    )
    assert len(asked.as_query_engine().query("who?").source_nodes) == 2


def test_an_empty_memory_that_is_given_is_used(llm, engine):
    """The caller's own memory, not another one."""
    mine = engine.remember([])
    index = FocusMemoryIndex([TextNode(text="the cat sat")], llm=llm, memory=mine)
    assert index.memory is mine
    assert len(mine) == 1


# -- places -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "template", ["{metadata_str}\n\n{content}", "[{content}]\n{metadata_str}", "{metadata_str}|{content}"]
)
def test_places_are_those_of_the_text_that_the_user_holds(llm, template):
    """The attribution event's offsets lie in node.text, whatever header its metadata put in front."""
    seen = []

    class Handler(BaseEventHandler):
        def handle(self, event, **kwargs):
            if event.class_name() == "FocusAttributionEvent":
                seen.append(event)

    texts = {"n": "the cat the cat", "m": "  the hat sat on the mat.\n" * 20}
    nodes = [
        TextNode(text=text, id_=name, metadata={"about": "the cat"}, text_template=template)
        for name, text in texts.items()
    ]
    for node in nodes:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="d")
    index = FocusMemoryIndex(nodes, llm=llm)
    get_dispatcher().add_event_handler(handler := Handler())
    try:
        raw = index.llm.with_memory(index.memory).complete("who?", template="question").raw["focus"]["sources"]
        cited = index.as_query_engine().query("who?").metadata["citations"]
        index.as_query_engine(similarity_top_k=2).query("who?")
    finally:
        get_dispatcher().event_handlers.remove(handler)
    read = {item["document_id"]: item["text"] for item in raw}
    for event in seen:
        for source in event.sources:
            text = texts[source["document_id"]]
            assert 0 <= source["start"] < source["end"] <= len(text)
            part = text[source["start"] : source["end"]]
            assert part.strip() in read[source["document_id"]]
            if source["document_id"] == "n":
                assert part == text
    assert len(seen) == 2
    assert cited
    for item in cited:
        assert texts[item["document_id"]][item["source_start"] : item["source_end"]] == item["cited_text"]
        assert (item["title"], item["page"]) == ("d", None)
        assert item["spans"]
        assert 0 <= item["start"] < item["end"]
    assert index.node("n").get_content(MetadataMode.LLM) != texts["n"]


def test_citations_of_a_document_with_pages_name_the_page(llm):
    """Nodes as LlamaIndex's readers make them, one a page; ``supported`` stands beside the citations."""
    pages = {"1": "the cat sat on the mat. " * 8, "2": "the dog ate the hat. " * 8}
    nodes = [
        TextNode(text=text, id_=f"page {label}", metadata={"page_label": label, "file_name": "paper.pdf"})
        for label, text in pages.items()
    ]
    answer = FocusMemoryIndex(nodes, llm=llm).as_query_engine().query("who?")
    cited = answer.metadata["citations"]
    assert cited
    assert answer.metadata["supported"] is None  # the adapter was not fitted for it
    held = {node.node.node_id: node.node for node in answer.source_nodes}
    for one in cited:
        node = held[one["document_id"]]
        assert (one["title"], str(one["page"])) == ("paper.pdf", node.metadata["page_label"])
        assert node.text[one["source_start"] : one["source_end"]] == one["cited_text"]
        assert all(0 <= start < end <= len(str(answer)) for start, end in one["spans"])
        assert {"start", "end", "score", "url"} <= set(one)
