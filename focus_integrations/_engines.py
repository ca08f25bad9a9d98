"""Share one engine per process and settings, and turn framework documents into memories.

Models are built and copied freely by both frameworks, so weights are loaded at first use and shared by all that ask for
the same ones. No framework is imported here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from focus_core.corpus import Document, load_documents
from focus_core.engine import Answer, AnswerStream, FocusEngine, Template
from focus_core.errors import ConfigError
from focus_core.memory import Memory

_engines: dict[tuple[str | None, str | None, int | None, str | None], FocusEngine] = {}
_lock = threading.Lock()


def shared_engine(
    base: str | None = None, adapter: str | None = None, chunk_size: int | None = None, device: str | None = None
) -> FocusEngine:
    """Return the process's engine for these settings; it is loaded the first time."""
    key = (base, adapter, chunk_size, device)
    with _lock:
        if key not in _engines:
            _engines[key] = FocusEngine.from_pretrained(base, adapter, chunk_size=chunk_size, device=device)
        return _engines[key]


def to_documents(documents: Any) -> list[Document]:
    """Turn what users hand over into core documents.

    Args:
        documents: a path (str or Path), a text in a :class:`~focus_core.corpus.Document`, framework documents or nodes
            (anything with ``page_content`` or ``text``), or a sequence of them. A plain string is a path if it names
            one, else a text.

    Raises:
        ConfigError: an item is none of these.
    """
    several: Sequence[Any] = documents if isinstance(documents, (list, tuple)) else [documents]
    found: list[Document] = []
    for item in several:
        if isinstance(item, Document):
            found.append(item)
        elif isinstance(item, Path) or (isinstance(item, str) and _is_path(item)):
            found.extend(load_documents([item]))
        elif isinstance(item, str):
            found.append(Document(f"document-{len(found)}", item))
        else:
            found.append(_from_framework(item, len(found)))
    return found


class MemoryHolder:
    """Reads a model's documents and saved memory once, and again when they are replaced."""

    def __init__(self) -> None:
        self._memory: Memory | None = None
        self._of: tuple[int, str | None] | None = None
        self._lock = threading.Lock()

    def get(self, engine: FocusEngine, documents: Any, memory_path: str | None) -> Memory | None:
        """Return the memory of these settings, or ``None`` where there are none."""
        if documents is None and memory_path is None:
            return None
        with self._lock:
            key = (id(documents), memory_path)
            if self._memory is None or self._of != key:
                memory = engine.load_memory(memory_path) if memory_path else engine.remember([])
                if documents is not None:
                    memory.add(to_documents(documents))
                self._memory, self._of = memory, key
            return self._memory


def source_dicts(answer: Answer) -> list[dict[str, Any]]:
    """Return an answer's documents as plain dictionaries, best first, with exact spans."""
    return [asdict(item) for item in answer.evidence]


def start(
    engine: FocusEngine, prompt: str, memory: Memory | None, documents: list[Document], **options: Any
) -> AnswerStream:
    """Begin an answer to a prompt of any length: what does not fit the window becomes memory.

    Args:
        engine: from :func:`shared_engine`.
        prompt: of any length; the head of a long one is read as memory, its tail stays local.
        memory: what to read besides.
        documents: read for this call only.
        **options: for :meth:`FocusEngine.stream`.

    Returns:
        The running answer.
    """
    head, tail = engine.split_prompt(prompt)
    extra = [*documents, *([Document("prompt", head)] if head.strip() else [])]
    if extra:
        held = memory.subset([document.id for document in memory.documents]) if memory else engine.remember([])
        held.add(extra)
        memory = held
    template: Template = options.pop("template", "chat")
    return engine.stream(tail, memory, template=template, **options)


def _is_path(text: str) -> bool:
    try:
        return len(text) < 1024 and "\n" not in text and Path(text).exists()
    except OSError:
        return False


def _from_framework(item: Any, number: int) -> Document:
    text = getattr(item, "page_content", None)
    if text is None and callable(getattr(item, "get_content", None)):
        text = item.get_content()
    if text is None:
        text = getattr(item, "text", None)
    if not isinstance(text, str):
        raise ConfigError(f"a document must be a path, a text or a framework document; got {type(item).__name__}")
    metadata = dict(getattr(item, "metadata", None) or {})
    own = getattr(item, "id", None) or getattr(item, "node_id", None) or metadata.get("source")
    return Document(str(own) if own else f"document-{number}", text, metadata)
