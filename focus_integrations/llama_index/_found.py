"""Gather what is known about an answer when it has ended: sources, token counts, seconds.

A streamed response holds the list and the dictionary from its beginning; they are filled in place. Nothing is generated
here.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any

from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index_instrumentation import get_dispatcher

from focus_integrations.llama_index._nodes import scored_nodes
from focus_integrations.llama_index.events import FocusAttributionEvent

dispatcher = get_dispatcher(__name__)


class Found:
    """What is found out about one answer.

    Args:
        query: what was asked.
        node_of: finds a node by its id; ``None`` where it is unknown.
        limit: most nodes to name; ``None`` names all.
        others: sources that stand behind those of the answer.
    """

    def __init__(
        self,
        query: str,
        node_of: Callable[[str], BaseNode | None],
        limit: int | None = None,
        others: Sequence[NodeWithScore] = (),
    ) -> None:
        self.query, self._node_of, self._limit, self._others = query, node_of, limit, others
        self.nodes: list[NodeWithScore] = []
        self.metadata: dict[str, Any] = {}
        self._started = time.perf_counter()
        self._first: float | None = None

    def begin(self) -> None:
        """Note the time of the first piece."""
        self._first = self._first or time.perf_counter()

    def pieces(self, parts: Iterable[CompletionResponse]) -> Generator[str, None, None]:
        """Yield the new text of a stream and note what it ends with."""
        for part in parts:
            self.begin()
            if part.delta:
                yield part.delta
        self.finish(part.raw)

    async def apieces(self, parts: Awaitable[AsyncIterable[CompletionResponse]]) -> AsyncGenerator[str, None]:
        """Like :meth:`pieces`, for a stream that is yet to be awaited."""
        async for part in await parts:
            self.begin()
            if part.delta:
                yield part.delta
        self.finish(part.raw)

    def finish(self, raw: Any) -> None:
        """Fill in what an answer's ``raw`` has, and send :class:`FocusAttributionEvent`."""
        ended = time.perf_counter()
        focus: dict[str, Any] = raw["focus"]
        sources = [{name: item[name] for name in ("document_id", "score", "start", "end")} for item in focus["sources"]]
        self.nodes.extend([*scored_nodes(sources, self._node_of, self._limit), *self._others])
        timings = {"total": ended - self._started}
        if self._first is not None:
            timings["first_token"] = self._first - self._started
        self.metadata.update(
            usage=raw["usage"], finish_reason=raw["finish_reason"], chunks=focus["chunks"], timings=timings
        )
        dispatcher.event(FocusAttributionEvent(query=self.query, sources=sources))
