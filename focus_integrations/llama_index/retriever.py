"""Rank the nodes of a :class:`FocusMemoryIndex` by the attention that a question gives them.

All nodes are read to find the best, so this is no cheap first stage; of a question longer than the window, the tail is
asked. It shows what the model would use, and lets
engines that want nodes stand on a memory. It answers nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from focus_core.session.arguments import refuse_unknown
from focus_core.session.engines import asked
from focus_integrations.llama_index._nodes import scored_nodes
from focus_integrations.llama_index._request import CALL_OPTIONS
from focus_integrations.llama_index._selection import ReadNodes, Selection
from focus_integrations.llama_index.llm import FocusLLM


class FocusRetriever(BaseRetriever):
    """Returns nodes with the share of attention that they received, best first.

    Args:
        index: whose memory is read.
        llm: model that reads; the index's if not given.
        similarity_top_k: most nodes to return; ``None`` returns all.
        filters: metadata filters that choose the nodes to read.
        doc_ids: documents to read.
        probe_tokens: tokens of an answer over which attention is added up; more are slower and steadier.
        callback_manager: of the retriever.
        verbose: print when an object of an ``IndexNode`` is asked.
        **options: more options of the model's call.

    Raises:
        ConfigError: an option is unknown.
    """

    def __init__(
        self,
        index: ReadNodes,
        llm: FocusLLM | None = None,
        *,
        similarity_top_k: int | None = 10,
        filters: MetadataFilters | None = None,
        doc_ids: Sequence[str] | None = None,
        probe_tokens: int = 1,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        refuse_unknown(options, CALL_OPTIONS)
        super().__init__(callback_manager or index._callback_manager, index._object_map, verbose=verbose)
        self.index, self.llm, self.similarity_top_k = index, llm or index.llm, similarity_top_k
        self.selection = Selection(index, filters, doc_ids)
        self.options = {"template": "question", **options, "max_tokens": probe_tokens}

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        reader = self.selection.reader(self.llm, self.similarity_top_k)
        return self._nodes(reader.complete(self._asked(query_bundle), **self.options)) if reader else []

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        reader = await asyncio.to_thread(self.selection.reader, self.llm, self.similarity_top_k)
        return self._nodes(await reader.acomplete(self._asked(query_bundle), **self.options)) if reader else []

    def _asked(self, query_bundle: QueryBundle) -> str:
        return asked(self.llm.engine, query_bundle.query_str)

    def _nodes(self, completion: Any) -> list[NodeWithScore]:
        return scored_nodes(completion.raw["focus"]["sources"], self.index.node, self.similarity_top_k)
