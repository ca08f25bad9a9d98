"""Answer over nodes that some other part of LlamaIndex has chosen: they become memory chunks, not prompt text.

So RetrieverQueryEngine, RouterQueryEngine and SubQuestionQueryEngine keep working, with any number of nodes, one call,
and sources scored by attention. Chunk KV of nodes that earlier calls read is used again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index_instrumentation import get_dispatcher

from focus_core.session.arguments import refuse_unknown
from focus_core.text.corpus import Document
from focus_integrations.llama_index._found import Found, aempty, empty
from focus_integrations.llama_index._nodes import to_documents
from focus_integrations.llama_index._request import CALL_OPTIONS
from focus_integrations.llama_index.llm import FocusLLM

dispatcher = get_dispatcher(__name__)


class FocusSynthesizer(BaseSynthesizer):
    """Reads nodes as memory; give it to an engine as ``response_synthesizer``.

    Example:
        >>> synthesizer = FocusSynthesizer(FocusLLM())  # doctest: +SKIP
        >>> RetrieverQueryEngine.from_args(retriever, response_synthesizer=synthesizer)  # doctest: +SKIP

    Args:
        llm: model that reads; the default one if not given. ``Settings.llm`` is never asked.
        streaming: return a ``StreamingResponse``; its sources fill up when the stream has ended.
        metadata_mode: which metadata stands in front of a node's text.
        template: ``question`` puts the question as the adapter was trained; ``chat`` as a plain user turn.
        source_top_k: most nodes to name as sources, best first; ``None`` names every node read.
        callback_manager: of the synthesizer and the model.
        empty_response: said where there are no nodes.
        **options: sampling options of :class:`~focus_core.config.DecodeConfig`, such as ``max_tokens``.

    Raises:
        ConfigError: an option is unknown.
    """

    def __init__(
        self,
        llm: FocusLLM | None = None,
        *,
        streaming: bool = False,
        metadata_mode: MetadataMode = MetadataMode.LLM,
        template: str = "question",
        source_top_k: int | None = None,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
        **options: Any,
    ) -> None:
        refuse_unknown(options, CALL_OPTIONS)
        self.reader = llm or FocusLLM()
        super().__init__(self.reader, callback_manager, streaming=streaming, empty_response=empty_response)
        self.metadata_mode, self.source_top_k = metadata_mode, source_top_k
        self.options = {**options, "template": template, "max_sources": None}

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts_dict: PromptDictType) -> None:
        """There are no prompts: nodes are not pasted into one."""

    # -- nodes --------------------------------------------------------------------------------------------------

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer over nodes; they come back as sources, best first, scored by attention."""
        work = _Work(self, query, nodes, additional_source_nodes)
        with work.event() as end:
            if work.documents:
                response = work.found.respond(self.reader, work.call, self._streaming)
            else:
                response = empty(self._empty_response, self._streaming)
            end(response)
        return response

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Like :meth:`synthesize`, without blocking the event loop."""
        work = _Work(self, query, nodes, additional_source_nodes)
        with work.event() as end:
            if work.documents:
                response = await work.found.arespond(self.reader, work.call, self._streaming)
            else:
                response = aempty(self._empty_response, self._streaming)
            end(response)
        return response

    # -- texts --------------------------------------------------------------------------------------------------

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer over texts, for callers that have no nodes."""
        documents = _of_texts(text_chunks)
        if not self._streaming:
            return str(self.reader.complete(query_str, documents=documents, **self.options).text)

        def pieces() -> Generator[str, None, None]:
            for part in self.reader.stream_complete(query_str, documents=documents, **self.options):
                yield part.delta or ""

        return pieces()

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Like :meth:`get_response`, without blocking the event loop."""
        documents = _of_texts(text_chunks)
        if not self._streaming:
            return str((await self.reader.acomplete(query_str, documents=documents, **self.options)).text)

        async def pieces() -> AsyncGenerator[str, None]:
            async for part in await self.reader.astream_complete(query_str, documents=documents, **self.options):
                yield part.delta or ""

        return pieces()


class _Work:
    """One question over some nodes."""

    def __init__(
        self,
        owner: FocusSynthesizer,
        query: QueryType,
        nodes: Sequence[NodeWithScore],
        additional: Sequence[NodeWithScore] | None,
    ) -> None:
        self.owner = owner
        self.query = QueryBundle(query) if isinstance(query, str) else query
        self.nodes = {item.node.node_id: item.node for item in nodes}
        self.documents = to_documents(self.nodes.values(), owner.metadata_mode)
        self.found = Found(
            self.query.query_str, self.nodes.get, owner.metadata_mode, owner.source_top_k, additional or ()
        )
        self.call = {"prompt": self.query.query_str, "documents": self.documents, **owner.options}

    @contextmanager
    def event(self) -> Iterator[Callable[[RESPONSE_TYPE], None]]:
        """Tell callbacks and dispatchers of the work; gives what is to be called with the response."""
        dispatcher.event(SynthesizeStartEvent(query=self.query))
        payload: dict[str, Any] = {EventPayload.QUERY_STR: self.query.query_str}
        made: list[RESPONSE_TYPE] = []
        with self.owner._callback_manager.event(CBEventType.SYNTHESIZE, payload=payload) as event:
            yield made.append
            event.on_end(payload={EventPayload.RESPONSE: made[0]})
        dispatcher.event(SynthesizeEndEvent(query=self.query, response=made[0]))


def _of_texts(texts: Sequence[str]) -> list[Document]:
    return [Document(f"text-{number}", text) for number, text in enumerate(texts) if text.strip()]
