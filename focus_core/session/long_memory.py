"""Keep what agents should remember beyond the process: texts in a folder, recalled by attention.

Everything is kept word for word; what to recall is decided when a question is asked, by the same scores that citations
have. Every change is saved before it returns, merged with what other processes have saved meanwhile; a change that
fails leaves what was there. No framework is imported here.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.session.documents import MemoryFilter, fingerprint, kept_ids, own_name, to_documents
from focus_core.session.engines import asked, shared_engine
from focus_core.store.collections import row_sum
from focus_core.store.database import Store
from focus_core.store.memory import Memory
from focus_core.store.migration import DEFAULT_NAME
from focus_core.text.corpus import Document


@dataclass(frozen=True)
class Recalled:
    """A text that came back.

    Args:
        document: as it was remembered.
        passage: its part with most attention.
        score: its share of the attention.
    """

    document: Document
    passage: str
    score: float


class LongMemory:
    """Texts that can be remembered, recalled and forgotten. The model is loaded at first use.

    Args:
        folder: where it is saved; ``None`` keeps it in this process only.
        engine: a loaded engine; the process's for these settings if not given.
        model: base model.
        adapter: of the base.
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: of the weights.

    Raises:
        StoreError: at first use, if the folder was written by another model or is damaged.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        engine: FocusEngine | None = None,
        model: str | None = None,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._load: Callable[[], FocusEngine] = lambda: engine or shared_engine(model, adapter, None, device, dtype)
        self._memory: Memory | None = None
        self._lock = threading.RLock()

    @property
    def engine(self) -> FocusEngine:
        """The engine that reads."""
        return self._load()

    @property
    def memory(self) -> Memory:
        """The core memory, with what others have saved until now; a model may read it while it changes."""
        with self._lock:
            if self._memory is None:
                self._memory = self._open()
            self._memory.refresh()
            return self._memory

    @property
    def documents(self) -> list[Document]:
        """Everything remembered, oldest first."""
        return self.memory.documents

    def remember(self, text: str, id: str | None = None, metadata: dict[str, Any] | None = None) -> str:
        """Keep a text and return its id; the same id again replaces it.

        Raises:
            ConfigError: there is no text.
        """
        if not text.strip():
            raise ConfigError("there is nothing to remember; give some text")
        name = id or _name(text)
        self.put([Document(name, text, metadata or {})])
        return name

    def put(self, documents: Iterable[Any]) -> None:
        """Keep documents under their ids, all or none; texts that are known already cost nothing.

        Args:
            documents: core or framework documents; one without id and source is named by its text.

        Raises:
            ConfigError: an item is no document, or its metadata hold what JSON cannot and there is a folder to save to.
            EmptyCorpusError: one holds no text.
        """
        with self._lock:
            known = {document.id: fingerprint([document]) for document in self.memory.documents}
            given = {one.id: one for item in documents for one in _documents(item)}
            fresh = [document for key, document in given.items() if known.get(key) != fingerprint([document])]
            if self.folder is not None:
                for document in fresh:
                    row_sum(document)
            self._change(fresh)

    def forget(self, ids: Iterable[str]) -> list[str]:
        """Remove texts; returns the ids that were there."""
        with self._lock:
            gone = [key for key in dict.fromkeys(ids) if key in self.memory]
            self._change((), gone)
            return gone

    def recall(self, query: str, k: int = 4, wanted: MemoryFilter | None = None) -> list[Recalled]:
        """Return the texts with most attention for a question, best first.

        Args:
            query: the question.
            k: most texts.
            wanted: which to look at: ids, metadata that must be equal, or a function of a document.
        """
        memory = self.memory.snapshot()
        if wanted is not None:
            memory = memory.subset(kept_ids(memory.documents, wanted))
        return recall(self.engine, memory, query, k)

    def __deepcopy__(self, memo: dict[int, Any]) -> LongMemory:
        """Share what is remembered: a copy of an agent has the same memory."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled, alone or inside a tool: what is remembered is shared by folder."""
        raise ConfigError("a LongMemory lives in one process and cannot be pickled; make another over the same folder")

    def _open(self) -> Memory:
        if self.folder is None:
            return self.engine.remember([])
        store = Store(self.folder)
        if store.has(DEFAULT_NAME):
            return self.engine.load_memory(self.folder, name=DEFAULT_NAME)
        memory = self.engine.remember([])
        memory.save(store)
        return memory

    def _change(self, documents: Sequence[Document], gone: Sequence[str] = ()) -> None:
        """Change and save; what cannot be saved is not kept in the process either."""
        memory = self.memory
        before = memory.state
        memory.update(documents, gone)
        if self.folder is not None and memory.state is not before:
            try:
                memory.save(self.folder)
            except BaseException:
                memory.restore(before)
                raise


def recall(engine: FocusEngine, memory: Memory, query: str, k: int) -> list[Recalled]:
    """Return the ``k`` texts of a memory with most attention for a question, best first."""
    if not memory.chunks:
        return []
    stream = engine.stream(asked(engine, query), memory, max_tokens=1)
    best = stream.answer.evidence[:k]
    return [Recalled(stream.documents[item.document_id], item.text, item.score) for item in best]


def _documents(item: Any) -> list[Document]:
    if isinstance(item, Document):
        return [item]
    found = to_documents([item])
    nameless = own_name(item) is None and [one.id for one in found] == ["document-0"]
    return [replace(found[0], id=_name(found[0].text))] if nameless else found


def _name(text: str) -> str:
    return f"note-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
