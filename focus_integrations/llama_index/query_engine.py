"""Answer questions over a whole :class:`FocusMemoryIndex`, with sources scored by the attention they received.

There is no retrieval step: every node that passes the filters is read. Metadata filters choose a subset of the memory;
nothing is computed again for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from focus_integrations.llama_index._found import Found
from focus_integrations.llama_index._selection import Selection
from focus_integrations.llama_index.llm import FocusLLM
from focus_integrations.llama_index.retriever import FocusRetriever

if TYPE_CHECKING:
    from focus_integrations.llama_index.index import FocusMemoryIndex

EMPTY = "Empty Response"
"""What LlamaIndex answers where there is nothing to read."""


class FocusQueryEngine(BaseQueryEngine):
    """Reads all of an index's memory for every question.

    Args:
        index: what to read.
        llm: model to answer with; the index's if not given. It must be of the engine that read the index.
        streaming: return a ``StreamingResponse``; its sources and metadata fill up when the stream has ended.
        filters: metadata filters that choose the nodes to read.
        doc_ids: documents to read.
        source_top_k: most nodes to name as sources, best first; ``None`` names every node read.
        template: ``question`` puts the question as the adapter was trained; ``chat`` as a plain user turn.
        callback_manager: of the engine.
        **options: sampling options of :class:`~focus_core.config.DecodeConfig`, such as ``max_tokens``.
    """

    def __init__(
        self,
        index: FocusMemoryIndex,
        llm: FocusLLM | None = None,
        *,
        streaming: bool = False,
        filters: MetadataFilters | None = None,
        doc_ids: Sequence[str] | None = None,
        source_top_k: int | None = 10,
        template: str = "question",
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        super().__init__(callback_manager or index._callback_manager)
        self.index, self.llm, self.streaming = index, llm or index.llm, streaming
        self.selection = Selection(index, filters, doc_ids)
        self.options = {**options, "template": template}
        self.source_top_k = source_top_k

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            reader = self._reader()
            if reader is None:
                response: RESPONSE_TYPE = self._empty()
            elif self.streaming:
                found = self._found(query_bundle)
                response = StreamingResponse(
                    found.pieces(reader.stream_complete(found.query, **self.options)), found.nodes, found.metadata
                )
            else:
                found = self._found(query_bundle)
                completion = reader.complete(query_bundle.query_str, **self.options)
                found.finish(completion.raw)
                response = Response(completion.text, found.nodes, found.metadata)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            reader = await asyncio.to_thread(self._reader)
            if reader is None:
                response: RESPONSE_TYPE = self._aempty()
            elif self.streaming:
                found = self._found(query_bundle)
                response = AsyncStreamingResponse(
                    found.apieces(reader.astream_complete(found.query, **self.options)), found.nodes, found.metadata
                )
            else:
                found = self._found(query_bundle)
                completion = await reader.acomplete(query_bundle.query_str, **self.options)
                found.finish(completion.raw)
                response = Response(completion.text, found.nodes, found.metadata)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Return the nodes that a first look at the question attends to most."""
        selection = self.selection
        retriever = FocusRetriever(
            self.index,
            self.llm,
            similarity_top_k=self.source_top_k,
            filters=selection.filters,
            doc_ids=selection.doc_ids,
        )
        return retriever.retrieve(query_bundle)

    # -- inside -------------------------------------------------------------------------------------------------

    def _reader(self) -> FocusLLM | None:
        memory = self.selection.memory()
        return self.llm.with_memory(memory, max_sources=self.source_top_k) if len(memory) else None

    def _found(self, query_bundle: QueryBundle) -> Found:
        return Found(query_bundle.query_str, self.index.node, self.source_top_k)

    def _empty(self) -> RESPONSE_TYPE:
        return StreamingResponse(text for text in [EMPTY]) if self.streaming else Response(EMPTY)

    def _aempty(self) -> RESPONSE_TYPE:
        async def text() -> AsyncGenerator[str, None]:
            yield EMPTY

        return AsyncStreamingResponse(text()) if self.streaming else Response(EMPTY)
