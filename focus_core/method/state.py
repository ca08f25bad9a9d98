"""Hold one version of what is read: documents, chunks, where their KV lies. A state is replaced, never changed.

Only what questions begin with (:class:`KeptOpening`) is filled in while a state is read; it is a cache that changes no
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from focus_core.method.slabs import Slab
from focus_core.text.chunking import Chunk
from focus_core.text.corpus import Document


class KeptOpening:
    """The KV that one run of tokens has behind every chunk of a memory: questions begin alike.

    It holds one run, the last, and only where that is small beside the chunks themselves.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[int, ...], list[Tensor]] | None = None

    def get(self, ids: Sequence[int]) -> list[Tensor] | None:
        """Return (layers, 2, chunks, kv_heads, len(ids), head_dim) of each slab, if it is kept for ``ids``."""
        kept = self._kept
        return kept[1] if kept is not None and kept[0] == tuple(ids) else None

    def put(self, ids: Sequence[int], tensors: list[Tensor]) -> None:
        """Keep tensors instead of those that are kept."""
        self._kept = (tuple(ids), tensors)


@dataclass(frozen=True)
class MemoryState:
    """One immutable version of a memory.

    Args:
        documents: by id, in order of addition.
        chunks: of all documents, in memory order.
        slabs: where KV lies.
        opening: what the last question began with and its KV behind every chunk, for the next one that begins so.
    """

    documents: dict[str, Document]
    chunks: tuple[Chunk, ...]
    slabs: tuple[Slab, ...]
    opening: KeptOpening = field(default_factory=KeptOpening, compare=False, repr=False)
