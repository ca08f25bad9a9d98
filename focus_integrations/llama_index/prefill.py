"""Compute chunk KV while documents are ingested, so that an index built later finds it on disk.

Nodes pass unchanged. With an ingestion pipeline's document store and its UPSERTS strategy, only new and changed
documents reach this step, so prefill is incremental. Nothing is kept in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index_instrumentation import get_dispatcher

from focus_core.store.database import Store
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document
from focus_integrations.llama_index._nodes import to_documents
from focus_integrations.llama_index.events import FocusPrefillEvent
from focus_integrations.llama_index.llm import FocusLLM

dispatcher = get_dispatcher(__name__)


class FocusPrefill(TransformComponent):
    """Write the chunk KV of nodes into a store; put it after the node parser.

    Example:
        >>> FocusPrefill(llm=FocusLLM(), store="storage/kv")(nodes)  # doctest: +SKIP
        >>> FocusMemoryIndex(nodes, llm=FocusLLM(), store="storage/kv")  # computes nothing  # doctest: +SKIP
    """

    llm: SerializeAsAny[FocusLLM] = Field(description="Model that reads the nodes.")
    store: str = Field(description="Folder of the store.")
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.LLM, description="Metadata in front of the text; the index must use the same."
    )
    batch_tokens: int = Field(default=16_384, gt=0, description="About as many tokens are held in memory at a time.")

    @classmethod
    def class_name(cls) -> str:
        """Name used in serialised settings."""
        return "FocusPrefill"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compute what the store lacks; return the nodes as they are."""
        engine, store = self.llm.engine, Store(self.store)
        documents = to_documents(nodes, self.metadata_mode)
        lengths = [engine.count_tokens(document.text) for document in documents]
        done, total = 0, sum(lengths)
        batch: list[Document] = []
        held = 0
        for document, length in zip(documents, lengths, strict=True):
            batch.append(document)
            held += length
            if held >= self.batch_tokens or document is documents[-1]:
                Memory(engine.encoder, store).add(batch)
                done, held, batch = done + held, 0, []
                dispatcher.event(FocusPrefillEvent(done=done, total=total))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Like a call, without blocking the event loop."""
        return await asyncio.to_thread(self, nodes, **kwargs)
