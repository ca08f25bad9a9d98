"""Say what engines need of an index, and choose the part of its memory that a question reads.

Engines and retrievers know an index as a :class:`ReadNodes` alone, so that imports go one way. A selection shares chunk
KV with the whole memory where it can, and is made once as long as the same nodes pass. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import MetadataFilters

from focus_core.method.state import MemoryState
from focus_core.store.memory import Memory
from focus_integrations.llama_index._nodes import matching
from focus_integrations.llama_index.llm import FocusLLM


class ReadNodes(Protocol):
    """Nodes that a model has read: what a retriever or an engine needs of a ``FocusMemoryIndex``."""

    llm: FocusLLM
    memory: Memory
    metadata_mode: MetadataMode
    _callback_manager: CallbackManager
    _object_map: dict[str, Any]

    @property
    def nodes(self) -> list[BaseNode]:
        """Nodes in memory, in order of addition."""

    def node(self, node_id: str) -> BaseNode | None:
        """Return a node, or ``None`` where the id is unknown."""


class Selection:
    """The part of an index's memory that filters choose.

    Args:
        index: whose nodes are filtered.
        filters: LlamaIndex metadata filters; ``None`` lets all nodes pass.
        doc_ids: documents whose nodes may pass; ``None`` means all.
    """

    def __init__(
        self, index: ReadNodes, filters: MetadataFilters | None = None, doc_ids: Sequence[str] | None = None
    ) -> None:
        self.index, self.filters, self.doc_ids = index, filters, doc_ids
        self._made: tuple[MemoryState, list[str], Memory] | None = None

    def memory(self) -> Memory:
        """Return the memory to read, of one moment; it may be empty."""
        whole = self.index.memory
        if self.filters is None and self.doc_ids is None:
            return whole
        passing = matching(self.index.nodes, self.filters, self.doc_ids)
        state, made = whole.state, self._made
        ids = [node.node_id for node in passing if _is_held(node, state)]
        if made is None or made[0] is not state or made[1] != ids:
            snapshot = Memory(whole.encoder, whole.store, state)  # the index may change meanwhile
            made = self._made = (state, ids, snapshot.subset(ids))
        return made[2]

    def reader(self, llm: FocusLLM, max_sources: int | None) -> FocusLLM | None:
        """Return a model that reads the memory and names so many sources; ``None`` where there is nothing to read."""
        memory = self.memory()
        return llm.with_memory(memory, max_sources=max_sources) if len(memory) else None


def _is_held(node: BaseNode, state: MemoryState) -> bool:
    """Whether a memory holds a node's present text; while it is replaced, the old one has passed no filter."""
    document = state.documents.get(node.node_id)
    return document is not None and node.get_content(MetadataMode.NONE).strip() in document.text
