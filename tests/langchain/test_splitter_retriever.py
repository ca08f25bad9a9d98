"""Check splitter and retriever: exact offsets, one chunk a piece, scores that are the answer's own."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from langchain_core.documents import Document as Page
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests

from focus_core import Document
from focus_core.errors import ConfigError
from focus_integrations.langchain import (
    ChatFocusLLM,
    FocusLLM,
    FocusRetriever,
    FocusTextSplitter,
    create_documents_chain,
)
from tests.langchain.conftest import tiny_engine

ENGINE = tiny_engine()
TEXTS = {
    "repeated": "The cat sat. " * 300,
    "unbroken": "x" * 900,
    "scripts": "漢字かな交じり文。한국어 텍스트 👩‍👩‍👧 emoji 🇩🇪 naïve e\u0301\r\n\n" * 40,
    "paragraphs": "one two three.\n\nfour five six.\n\n" * 60,
}
PAGES = [
    Page(page_content=f"the {word} sat on the mat. " * 9, metadata={"source": word}) for word in ("cat", "dog", "hat")
]


class TestStandard(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return FocusRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"engine": ENGINE, "documents": PAGES}

    @property
    def retriever_query_example(self) -> str:
        return "who sat on the mat?"


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_exact_and_become_one_chunk_each(name):
    """text[start:end] is the piece, the pieces tile the text, and each is one memory chunk."""
    text = TEXTS[name]
    pages = FocusTextSplitter(engine=ENGINE).split_documents([Page(page_content=text, metadata={"source": name})])
    assert "".join(page.page_content for page in pages) == text
    for page in pages:
        facts = page.metadata
        assert text[facts["start_index"] : facts["end_index"]] == page.page_content
        assert facts["source"] == name
        assert facts["n_tokens"] <= ENGINE.config.chunk_size
    assert len(pages) > 3
    if name != "unbroken":  # a piece whose tokens merge across nothing is cut again nowhere
        memory = ENGINE.remember([Document(str(index), page.page_content) for index, page in enumerate(pages[:6])])
        assert len(memory) == min(6, len(pages))


def test_splitter_settings(tokenizer):
    """Size and tokenizer can be given; blank texts have no pieces; pickling keeps the cuts; bad sizes are named."""
    splitter = FocusTextSplitter(16, tokenizer=tokenizer)
    pieces = splitter.split_text(TEXTS["repeated"])
    assert all(len(tokenizer(piece, add_special_tokens=False).input_ids) <= 16 for piece in pieces)
    assert pickle.loads(pickle.dumps(splitter)).split_text(TEXTS["repeated"]) == pieces
    assert splitter.split_text("  \n") == []
    assert splitter.create_documents(["a", "b"])[1].page_content == "b"
    with pytest.raises(ConfigError, match="between 1 and"):
        FocusTextSplitter(9000, engine=ENGINE)
    with pytest.raises(ConfigError, match="at least 1"):
        FocusTextSplitter(0)


def test_ranking_is_the_answers_own():
    """Passages, order and scores equal an answer's of the engine; spans are exact; async does not differ."""
    retriever = FocusRetriever(engine=ENGINE, documents=PAGES, k=5)
    found = retriever.invoke("who sat?")
    expected = ENGINE.answer("who sat?", ENGINE.remember(retriever.holder.documents(PAGES)), max_tokens=1).passages[:5]
    assert [page.id for page in found] == [f"{item.document_id}:{item.start}-{item.end}" for item in expected]
    assert [page.metadata["score"] for page in found] == pytest.approx([item.score for item in expected])
    for page in found:
        whole = next(other.page_content for other in PAGES if other.metadata["source"] == page.metadata["source"])
        assert whole[page.metadata["start_index"] : page.metadata["end_index"]] == page.page_content


async def test_ranking_async_filters_and_errors():
    """ainvoke equals invoke; a filter narrows; nothing to read and unknown options are named."""
    retriever = FocusRetriever(engine=ENGINE, documents=PAGES, k=2)
    assert await retriever.ainvoke("who sat?") == retriever.invoke("who sat?")
    only = retriever.invoke("who sat?", memory_filter={"source": "dog"})
    assert {page.metadata["source"] for page in only} == {"dog"}
    with pytest.raises(ConfigError, match="something to read"):
        FocusRetriever(engine=ENGINE).invoke("x")
    with pytest.raises(ConfigError, match="unknown option 'kk'"):
        retriever.invoke("x", kk=3)


def test_hybrid_reads_what_a_retriever_finds():
    """A model with a retriever reads what it finds for the question; a FocusRetriever ranks what another finds."""

    class Fixed(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Page]:
            return [page for page in PAGES if page.metadata["source"] in query]

    answer = ChatFocusLLM(engine=ENGINE, retriever=Fixed(), max_tokens=4).invoke("where is the dog?")
    assert {source["document_id"] for source in answer.response_metadata["sources"]} == {"dog"}
    ranked = FocusRetriever(engine=ENGINE, retriever=Fixed(), k=1).invoke("where is the hat?")
    assert ranked[0].metadata["source"] == "hat"


@pytest.mark.parametrize("kind", [FocusLLM, ChatFocusLLM])
def test_the_documents_chain_reads_everything(kind):
    """The one-line replacement of a stuffing chain answers as the model with these documents does."""
    prompt: Any = ChatPromptTemplate.from_template("Use {context}. {input}")
    if kind is FocusLLM:
        prompt = PromptTemplate.from_template("Use {context}. {input}")
    chain = create_documents_chain(kind(engine=ENGINE, max_tokens=6), prompt)
    direct = kind(engine=ENGINE, max_tokens=6, documents=PAGES)
    asked = prompt.format(context="(the documents are in memory)", input="who?")
    expected = direct.invoke(asked.removeprefix("Human: "))
    assert chain.invoke({"input": "who?", "context": PAGES}) == getattr(expected, "content", expected)
    with pytest.raises(ConfigError, match="'context'"):
        chain.invoke({"input": "who?"})


class _Fixed(BaseRetriever):
    pages: list[Page]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Page]:
        return self.pages


async def test_what_reads_nothing_finds_nothing():
    """An inner retriever without results, a filter that keeps nothing and an empty memory give []; blanks go."""
    nothing = FocusRetriever(engine=ENGINE, retriever=_Fixed(pages=[]))
    assert nothing.invoke("x") == await nothing.ainvoke("x") == []
    assert FocusRetriever(engine=ENGINE, retriever=_Fixed(pages=[Page(page_content=" ")])).invoke("x") == []
    assert FocusRetriever(engine=ENGINE, documents=PAGES).invoke("x", memory_filter={"source": "none"}) == []
    assert FocusRetriever(engine=ENGINE, memory=ENGINE.remember([])).invoke("x") == []
    blank = Page(page_content="\n ", metadata={"source": "blank"})
    found = FocusRetriever(engine=ENGINE, documents=[*PAGES, blank], k=9).invoke("x")
    assert {page.metadata["source"] for page in found} == {"cat", "dog", "hat"}
    for kind in (FocusLLM, ChatFocusLLM):
        kind(engine=ENGINE, retriever=_Fixed(pages=[blank]), max_tokens=2).invoke("x")
        kind(engine=ENGINE, max_tokens=2).invoke("x", documents=[PAGES[0], blank])


def test_a_question_above_the_window_asks_with_its_tail():
    """A retriever, and models that have one, take a question that is longer than the window."""
    long = "word " * 9000
    retriever = FocusRetriever(engine=ENGINE, documents=PAGES)
    assert len(retriever.invoke(long)) == 3
    for kind in (FocusLLM, ChatFocusLLM):
        assert kind(engine=ENGINE, retriever=retriever, max_tokens=2).invoke(long) is not None


def test_offsets_of_pieces_are_the_whole_texts():
    """Passages of split documents have offsets in the text that was split, so that text[start:end] is the passage."""
    text = "".join(f"The cat {number} sat on the mat.\n\n" for number in range(60))
    pieces = FocusTextSplitter(chunk_size=48, engine=ENGINE).create_documents([text], [{"source": "f"}])
    found = FocusRetriever(engine=ENGINE, documents=pieces, k=8).invoke("cat")
    assert len({page.metadata["start_index"] for page in found}) == 8
    for page in found:
        assert text[page.metadata["start_index"] : page.metadata["end_index"]] == page.page_content
