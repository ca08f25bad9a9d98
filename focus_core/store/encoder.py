"""Turn documents into chunks and chunks into the keys of their KV, for one base and one configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from focus_core.config import FocusConfig
from focus_core.errors import UnsupportedModelError
from focus_core.hardware import dtype_name
from focus_core.method.encoding import Check, kv_shape
from focus_core.method.sources import KVShape
from focus_core.model.families import BaseDecoder
from focus_core.store.segments import chunk_key
from focus_core.store.tiers import Budget
from focus_core.text.chunking import Chunk, Span, cut
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer


def check_sliding_window(base: BaseDecoder, config: FocusConfig) -> None:
    """Raise :class:`UnsupportedModelError` if some layer of the base would not see the whole of a chunk row."""
    longest = config.chunk_size + config.prompt_length + int(config.sink) + 1
    sliding = base.sliding_window
    if sliding is not None and sliding < longest:
        raise UnsupportedModelError(
            f"this base attends to {sliding} tokens only (sliding window), but a chunk row has {longest}; choose "
            f"chunk_size + prompt_length of at most {sliding - 1 - int(config.sink)}"
        )


@dataclass(frozen=True)
class ChunkEncoder:
    """Turns documents into chunks and chunks into KV, for one base and one configuration.

    Raises:
        UnsupportedModelError: the base's sliding window is shorter than a chunk row.
    """

    base: BaseDecoder
    tokenizer: TextTokenizer
    config: FocusConfig
    sink: int | None
    fingerprint: str
    check: Check = field(default=lambda: None)

    def __post_init__(self) -> None:
        check_sliding_window(self.base, self.config)

    def facts(self) -> dict[str, Any]:
        """Return everything but the tokens that chunk KV depends on."""
        rope = getattr(self.base.config, "rope_parameters", None)
        written = {} if self.config.kv_format == "base" else {"kv": self.config.kv_format}
        return {
            "base": self.fingerprint,
            "dtype": dtype_name(self.base.dtype),
            "sink": self.sink,
            "rope": rope if isinstance(rope, dict) else None,
            **written,
        }

    @cached_property
    def shape(self) -> KVShape:
        """What chunk KV looks like."""
        return kv_shape(self.base, self.config.kv_format)

    @cached_property
    def budget(self) -> Budget:
        """Memory that chunk KV on disk may take while it is read."""
        return Budget(self.config.memory_budget, self.base.device)

    def cut(self, document: Document) -> list[Chunk]:
        """Cut a document to the configured chunk size."""
        encoded = self.tokenizer.encode_with_offsets(document.text)
        return cut(document.id, document.text, encoded, self.config.chunk_size)

    def ids_of(self, document: Document, span: Span) -> list[int]:
        """Return the ids of a part of a document that begins and ends where one of its chunks did."""
        encoded = self.tokenizer.encode_with_offsets(document.text)
        first, stop = np.searchsorted(encoded.starts, [span.start, span.end])
        ids = encoded.ids[first if span.start else 0 : stop if span.end < encoded.length else None]
        return [int(token) for token in ids]

    @cached_property
    def separator(self) -> tuple[int, ...]:
        """What stands between documents that share a chunk."""
        return tuple(self.tokenizer.encode("\n\n"))

    def row(self, chunk: Chunk) -> list[int]:
        """Return the ids that run through the base: sink, then chunk."""
        return ([] if self.sink is None else [self.sink]) + list(chunk.ids)

    def key(self, chunk: Chunk) -> str:
        """Return the store address of a chunk."""
        return chunk_key(self.facts(), self.row(chunk))
