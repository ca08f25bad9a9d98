"""Define the instrumentation events that LlamaIndex has no word for.

They reach every handler that listens to LlamaIndex's dispatchers; nothing here sends them.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.instrumentation.events import BaseEvent


class FocusPrefillEvent(BaseEvent):
    """Chunk KV is being computed.

    Args:
        done: tokens computed or fetched so far.
        total: tokens to do.
    """

    done: int
    total: int

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "FocusPrefillEvent"


class FocusAttributionEvent(BaseEvent):
    """An answer's sources are known.

    Args:
        query: what was asked.
        sources: ``document_id`` (node id), ``score``, ``start``, ``end``, best first.
    """

    query: str
    sources: list[dict[str, Any]]

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "FocusAttributionEvent"
