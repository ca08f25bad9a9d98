"""Gather what is known about an answer when it has ended: sources, token counts, seconds.

A streamed response holds the list and the dictionary from its beginning; they are filled in place. Nothing is generated
here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any

from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index_instrumentation import get_dispatcher

from focus_core.session.arguments import taken
from focus_core.session.citations import about
from focus_integrations.llama_index._nodes import scored_nodes, text_start
from focus_integrations.llama_index.events import FocusAttributionEvent
from focus_integrations.llama_index.llm import FocusLLM

dispatcher = get_dispatcher(__name__)


class Found:
    """What is found out about one answer.

    Args:
        query: what was asked.
        node_of: finds a node by its id; ``None`` where it is unknown.
        mode: metadata that stood in front of the nodes' texts when they were read.
        limit: most nodes to name; ``None`` names all.
        others: sources that stand behind those of the answer.
    """

    def __init__(
        self,
        query: str,
        node_of: Callable[[str], BaseNode | None],
        mode: MetadataMode,
        limit: int | None = None,
        others: Sequence[NodeWithScore] = (),
    ) -> None:
        self.query, self._node_of, self._mode, self._limit, self._others = query, node_of, mode, limit, others
        self.nodes: list[NodeWithScore] = []
        self.metadata: dict[str, Any] = {}
        self._started = time.perf_counter()
        self._first: float | None = None

    def begin(self) -> None:
        """Note the time of the first piece."""
        self._first = self._first or time.perf_counter()

    def respond(self, reader: FocusLLM, call: dict[str, Any], streaming: bool) -> RESPONSE_TYPE:
        """Return a reader's response to a call, or one that streams."""
        if streaming:
            return StreamingResponse(self.pieces(reader.stream_complete(**call)), self.nodes, self.metadata)
        completion = reader.complete(**call)
        self.finish(completion.raw)
        return Response(completion.text, self.nodes, self.metadata)

    async def arespond(self, reader: FocusLLM, call: dict[str, Any], streaming: bool) -> RESPONSE_TYPE:
        """Like :meth:`respond`, without blocking the event loop; a stream is begun at its first piece."""
        if streaming:
            pieces = self.apieces(lambda: reader.astream_complete(**call))
            return AsyncStreamingResponse(pieces, self.nodes, self.metadata)
        completion = await reader.acomplete(**call)
        self.finish(completion.raw)
        return Response(completion.text, self.nodes, self.metadata)

    def pieces(self, parts: Iterable[CompletionResponse]) -> Generator[str, None, None]:
        """Yield the new text of a stream and note what it ends with."""
        for part in parts:
            self.begin()
            if part.delta:
                yield part.delta
        self.finish(part.raw)

    async def apieces(
        self, begin: Callable[[], Awaitable[AsyncIterable[CompletionResponse]]]
    ) -> AsyncGenerator[str, None]:
        """Like :meth:`pieces`, for a stream that is begun when the first piece is asked for."""
        async for part in await begin():
            self.begin()
            if part.delta:
                yield part.delta
        self.finish(part.raw)

    def finish(self, raw: Any) -> None:
        """Fill in what an answer's ``raw`` has, and send :class:`FocusAttributionEvent`."""
        ended = time.perf_counter()
        focus: dict[str, Any] = raw["focus"]
        named = ("document_id", "score", "start", "end")
        sources = [self._placed(taken(item, named), "start", "end") for item in focus["sources"]]
        citations = [self._placed(item, "source_start", "source_end") for item in focus["citations"]]
        self.nodes.extend([*scored_nodes(sources, self._node_of, self._limit), *self._others])
        timings = {"total": ended - self._started}
        if self._first is not None:
            timings["first_token"] = self._first - self._started
        self.metadata.update(
            usage=raw["usage"],
            finish_reason=raw["finish_reason"],
            chunks=focus["chunks"],
            supported=focus["supported"],
            timings=timings,
            citations=citations,
        )
        dispatcher.event(FocusAttributionEvent(query=self.query, sources=sources))

    def _placed(self, found: dict[str, Any], start: str, end: str) -> dict[str, Any]:
        """Return a source or citation of the node's own text, without the header of its metadata."""
        node = self._node_of(str(found["document_id"]))
        if node is None:
            return found
        text, before = node.get_content(MetadataMode.NONE), text_start(node, self._mode)
        found = {**found, **{name: min(max(found[name] - before, 0), len(text)) for name in (start, end)}}
        if "cited_text" in found:
            of = about(node.metadata, node.ref_doc_id or node.node_id, found[start])
            found |= {**of, "cited_text": text[found[start] : found[end]]}
        return found


def empty(text: str, streaming: bool) -> RESPONSE_TYPE:
    """Return a response without sources."""
    return StreamingResponse(piece for piece in [text]) if streaming else Response(text)


def aempty(text: str, streaming: bool) -> RESPONSE_TYPE:
    """Like :func:`empty`, for callers that do not block."""

    async def pieces() -> AsyncGenerator[str, None]:
        yield text

    return AsyncStreamingResponse(pieces()) if streaming else Response(text)
