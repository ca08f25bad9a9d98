"""Answer questions over a whole :class:`FocusMemoryIndex`, with sources scored by the attention they received.

There is no retrieval step: every node that passes the filters is read. Metadata filters choose a subset of the memory;
nothing is computed again for it. What every LlamaIndex query engine takes besides (another model, postprocessors,
response modes, templates) stands on nodes, and so on a :class:`FocusRetriever`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.utils import LLMType, resolve_llm
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from focus_core.session.arguments import keywords, left, refuse_unknown, taken
from focus_integrations.llama_index._found import Found, aempty, empty
from focus_integrations.llama_index._request import CALL_OPTIONS
from focus_integrations.llama_index._selection import ReadNodes, Selection
from focus_integrations.llama_index.llm import FocusLLM
from focus_integrations.llama_index.retriever import FocusRetriever
from focus_integrations.llama_index.synthesizer import FocusSynthesizer

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

    Raises:
        ConfigError: an option is unknown.
    """

    def __init__(
        self,
        index: ReadNodes,
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
        refuse_unknown(options, CALL_OPTIONS)
        super().__init__(callback_manager or index._callback_manager)
        self.index, self.llm, self.streaming = index, llm or index.llm, streaming
        self.selection = Selection(index, filters, doc_ids)
        self.options = {**options, "template": template}
        self.source_top_k = source_top_k

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        with self.callback_manager.event(CBEventType.QUERY, payload=payload) as event:
            reader = self.selection.reader(self.llm, self.source_top_k)
            if reader is None:
                response = empty(EMPTY, self.streaming)
            else:
                response = self._found(query_bundle).respond(reader, self._call(query_bundle), self.streaming)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        with self.callback_manager.event(CBEventType.QUERY, payload=payload) as event:
            reader = await asyncio.to_thread(self.selection.reader, self.llm, self.source_top_k)
            if reader is None:
                response = aempty(EMPTY, self.streaming)
            else:
                response = await self._found(query_bundle).arespond(reader, self._call(query_bundle), self.streaming)
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

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Answer over nodes that somebody else has chosen."""
        return self._synthesizer().synthesize(query_bundle, nodes, additional_source_nodes)

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Like :meth:`synthesize`, without blocking the event loop."""
        return await self._synthesizer().asynthesize(query_bundle, nodes, additional_source_nodes)

    # -- inside -------------------------------------------------------------------------------------------------

    def _synthesizer(self) -> FocusSynthesizer:
        return FocusSynthesizer(
            self.llm,
            streaming=self.streaming,
            metadata_mode=self.index.metadata_mode,
            source_top_k=self.source_top_k,
            callback_manager=self.callback_manager,
            **self.options,
        )

    def _found(self, query_bundle: QueryBundle) -> Found:
        return Found(query_bundle.query_str, self.index.node, self.index.metadata_mode, self.source_top_k)

    def _call(self, query_bundle: QueryBundle) -> dict[str, Any]:
        return {"prompt": query_bundle.query_str, **self.options}


_ENGINE = keywords(RetrieverQueryEngine.from_args, "retriever", "llm")
_RETRIEVER = keywords(FocusRetriever.__init__, "index", "llm")
_WHOLE = keywords(FocusQueryEngine.__init__, "index", "llm") | CALL_OPTIONS
_IDLE = frozenset({"use_async", "verbose"})  # there is one call, and nothing to tell
_PROMPTED = _ENGINE - _IDLE - {"streaming", "node_postprocessors", "callback_manager"}


def query_engine(index: ReadNodes, llm: LLMType | None, values: dict[str, Any]) -> BaseQueryEngine:
    """Return the query engine that these arguments ask for.

    Args:
        index: what to read.
        llm: the index's if not given; one that is no ``FocusLLM`` reads nodes in its prompt.
        values: arguments of :class:`FocusQueryEngine`, of :class:`FocusRetriever` and of LlamaIndex's
            ``RetrieverQueryEngine.from_args``. With any but the first, nodes are retrieved (all of them, if
            ``similarity_top_k`` is not given) before they are read.

    Raises:
        ConfigError: an argument is unknown.
    """
    focus = llm is None or isinstance(llm, FocusLLM)
    refuse_unknown(values, _ENGINE | _RETRIEVER | (_WHOLE if focus else frozenset()))
    if not focus:
        talker = resolve_llm(llm, callback_manager=index._callback_manager)
        return _prompting(FocusRetriever(index, **taken(values, _RETRIEVER)), talker, taken(values, _ENGINE))
    reader = llm if isinstance(llm, FocusLLM) else index.llm
    if values.keys() <= _WHOLE | _IDLE and not has_objects(index):
        return FocusQueryEngine(index, reader, **left(values, _IDLE))
    retriever = FocusRetriever(index, **{"similarity_top_k": None, **taken(values, _RETRIEVER)})
    engine = taken(values, _ENGINE)
    if any(value is not None for value in taken(values, _PROMPTED).values()):
        talker = reader.with_fields(**taken(values, _WHOLE & set(FocusLLM.model_fields)))
        return _prompting(retriever, talker, engine)
    synthesizer = FocusSynthesizer(
        reader, metadata_mode=index.metadata_mode, **taken(values, _WHOLE - {"filters", "doc_ids"})
    )
    return RetrieverQueryEngine.from_args(retriever, reader, synthesizer, **left(engine, {"response_synthesizer"}))


def _prompting(retriever: FocusRetriever, llm: LLM, values: dict[str, Any]) -> RetrieverQueryEngine:
    """Return LlamaIndex's engine, whose synthesizer puts nodes into prompts."""
    if values.get("response_mode") == ResponseMode.NO_TEXT and values.get("response_synthesizer") is None:
        values = {**values, "response_synthesizer": NoText(llm)}  # LlamaIndex's would ask Settings for a model
    return RetrieverQueryEngine.from_args(retriever, llm, **values)


def has_objects(index: ReadNodes) -> bool:
    """Whether some nodes stand for objects that are to answer in their place."""
    return any(item is not None for item in index._object_map.values())
