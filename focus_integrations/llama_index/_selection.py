"""Choose the part of an index's memory that a question reads: LlamaIndex metadata filters and document ids.

A selection shares chunk KV with the whole memory where it can, and is made once per version of the memory. Nothing is
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_index.core.vector_stores.types import MetadataFilters

from focus_core.method.state import MemoryState
from focus_core.store.memory import Memory
from focus_integrations.llama_index._nodes import matching

if TYPE_CHECKING:
    from focus_integrations.llama_index.index import FocusMemoryIndex


class Selection:
    """The part of an index's memory that filters choose; made once per version of the memory.

    Args:
        index: whose nodes are filtered.
        filters: LlamaIndex metadata filters; ``None`` lets all nodes pass.
        doc_ids: documents whose nodes may pass; ``None`` means all.
    """

    def __init__(
        self, index: FocusMemoryIndex, filters: MetadataFilters | None = None, doc_ids: Sequence[str] | None = None
    ) -> None:
        self.index, self.filters, self.doc_ids = index, filters, doc_ids
        self._made: tuple[MemoryState, Memory] | None = None

    def memory(self) -> Memory:
        """Return the memory to read; it may be empty."""
        whole = self.index.memory
        if self.filters is None and self.doc_ids is None:
            return whole
        state, made = whole.state, self._made
        if made is None or made[0] is not state:
            passing = matching(self.index.nodes, self.filters, self.doc_ids)
            made = self._made = (state, whole.subset([node_id for node_id in passing if node_id in whole]))
        return made[1]
