"""Check an index among LlamaIndex's own pieces: pipelines, routers, sub-questions, events."""

from __future__ import annotations

import json

import pytest
import torch
from llama_index.core import Document
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool

from focus_core.store.database import Store
from focus_integrations.llama_index import (
    FocusMemoryIndex,
    FocusPrefill,
    FocusSynthesizer,
)
from tests.llama_index.test_index import (
    encoded_chunks,
    index,  # noqa: F401
    logits,
    pages,
)


def test_prefill_in_a_pipeline_is_incremental(llm, tmp_path, monkeypatch):
    """Ingested nodes cost an index nothing; with a document store only what is new or changed is computed."""
    from focus_integrations.llama_index import FocusNodeParser

    counts = encoded_chunks(monkeypatch)
    pipeline = IngestionPipeline(
        transformations=[
            FocusNodeParser.from_defaults(llm=llm),
            FocusPrefill(llm=llm, store=str(tmp_path), batch_tokens=99),
        ],
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.DUPLICATES_ONLY,
    )
    nodes = pipeline.run(documents=pages())
    first = sum(counts)
    assert first == len(Store(tmp_path)) == len(nodes)
    index = FocusMemoryIndex(nodes, llm=llm, store=tmp_path)
    assert sum(counts) == first
    assert len(index.memory) == first
    pipeline.run(documents=[*pages("cat", "hat"), Document(text="the dog ran.", doc_id="dog")])
    assert sum(counts) == first + 1
    assert torch.equal(logits(index), logits(FocusMemoryIndex.from_documents(pages(), llm=llm)))


def test_attribution_is_sent_as_an_event(index):
    """Handlers get the sources without their text."""
    seen = []

    class Handler(BaseEventHandler):
        def handle(self, event, **kwargs):
            if event.class_name() == "FocusAttributionEvent":
                seen.append(event)

    get_dispatcher().add_event_handler(handler := Handler())
    try:
        found = index.as_query_engine().query("who sat?")
    finally:
        get_dispatcher().event_handlers.remove(handler)
    assert seen[0].query == "who sat?"
    assert seen[0].sources[0]["document_id"] == found.source_nodes[0].node_id
    json.dumps(seen[0].sources)


class Splitter(BaseQuestionGenerator):
    """Asks each tool the whole question."""

    def _get_prompts(self):
        return {}

    def _update_prompts(self, prompts):
        pass

    def generate(self, tools, query):
        return [SubQuestion(sub_question=query.query_str, tool_name=tool.name) for tool in tools]

    async def agenerate(self, tools, query):
        return self.generate(tools, query)


@pytest.mark.slow
@pytest.mark.usefixtures("own_loop")
def test_router_and_sub_questions(index, llm, engine, monkeypatch):
    """Engines of LlamaIndex that route and split stand on ours; the router's choice is scripted by a grammar."""
    from focus_core.model.constraints import regex

    tools = [
        QueryEngineTool.from_defaults(index.as_query_engine(doc_ids=[name]), name=name, description=name)
        for name in ("cat", "dog")
    ]
    split = SubQuestionQueryEngine.from_defaults(
        tools,
        question_gen=Splitter(),
        response_synthesizer=FocusSynthesizer(llm),
        llm=llm,
        use_async=False,
        verbose=False,
    )
    found = split.query("who sat?")
    assert str(found)
    assert {item.node.ref_doc_id for item in found.source_nodes} >= {"cat", "dog"}
    plain = engine.stream_ids
    choice = iter([regex('\\[\\{"choice": 2, "reason": "x"\\}\\]')])
    monkeypatch.setattr(
        engine, "stream_ids", lambda *a, **k: plain(*a, **{**k, "constraint": next(choice, None), "max_tokens": 60})
    )
    router = RouterQueryEngine(
        LLMSingleSelector.from_defaults(llm=llm), tools, llm=llm, summarizer=FocusSynthesizer(llm)
    )
    assert {item.node.ref_doc_id for item in router.query("who sat?").source_nodes} == {"dog"}
