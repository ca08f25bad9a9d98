"""Share one engine per process and weights, and the memories that framework models read.

Models are built and copied freely by both frameworks, so weights are loaded at first use and shared by all that ask for
the same ones; so is a saved memory. What a call reads besides is kept for the next call, so a conversation that grows
computes only what is new. No framework is imported here.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.method.state import MemoryState
from focus_core.session.documents import MemoryFilter, distinct, fingerprint, kept_ids, source_dicts, to_documents
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document

__all__ = [
    "Held",
    "MemoryHolder",
    "asked",
    "engine_fingerprint",
    "shared_engine",
    "shared_memory",
    "source_dicts",
    "to_documents",
]

_engines: dict[tuple[Any, ...], FocusEngine] = {}
_memories: weakref.WeakValueDictionary[tuple[Any, ...], Memory] = weakref.WeakValueDictionary()
_fingerprints: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_lock = threading.RLock()

_KEPT = 8  # memories of each kind that a holder keeps


def shared_engine(
    base: str | None = None,
    adapter: str | None = None,
    chunk_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> FocusEngine:
    """Return the process's engine for these settings; weights are loaded the first time, once.

    Args:
        base: a named base, hub name, folder or GGUF file; the installed default if not given.
        adapter: folder or hub name; the shipped one if not given.
        chunk_size: most tokens of a chunk; engines that differ in it alone share weights.
        device: ``cpu`` or ``cuda``; chosen if not given.
        dtype: ``float32``, ``bfloat16`` or ``float16``; chosen if not given.

    Raises:
        ConfigError: the dtype is none.
        BaseModelError: the base cannot be loaded.
        AdapterError: there is no adapter, or it is another base's.
    """
    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise ConfigError(f"dtype must be float32, bfloat16 or float16; got {dtype!r}")
    key = (base, adapter, device, dtype)
    with _lock:
        if key not in _engines:
            _engines[key] = FocusEngine.from_pretrained(base, adapter, device=device, dtype=kind)
        engine = _engines[key]
        if chunk_size is None or chunk_size == engine.config.chunk_size:
            return engine
        if (*key, chunk_size) not in _engines:
            _engines[*key, chunk_size] = engine.with_config(chunk_size=chunk_size)
        return _engines[*key, chunk_size]


def asked(engine: FocusEngine, question: str) -> str:
    """Return the part of a question that a memory is asked: all of it, or the tail that the window has room for."""
    return engine.split_prompt(question)[1]


def engine_fingerprint(engine: FocusEngine) -> str:
    """Return a hash of everything but prompt, memory and sampling that an answer depends on."""
    with _lock:
        known = _fingerprints.get(engine.adapter)
        if known is None:
            known = _fingerprints[engine.adapter] = f"{engine.loaded.fingerprint}-{engine.adapter_fingerprint}"
    return f"{known}-{engine.base.dtype}-{sorted(engine.config.to_dict().items())}"


def shared_memory(engine: FocusEngine, folder: str | Path) -> Memory:
    """Return a saved memory; it is read once while anybody uses it, and again when it was saved anew.

    Raises:
        StoreError: there is none, it is damaged, or it was made by other weights or settings.
    """
    manifest = Path(folder).resolve() / "memory.json"
    changed = manifest.stat().st_mtime_ns if manifest.exists() else 0
    key = (id(engine.base), engine_fingerprint(engine), str(manifest), changed)
    with _lock:
        memory = _memories.get(key)
        if memory is None:
            memory = _memories[key] = engine.load_memory(folder)
        return memory


@dataclass(frozen=True)
class Held:
    """What one call reads.

    Args:
        memory: ``None`` where there is nothing.
        created: tokens whose chunk KV was computed for this call.
    """

    memory: Memory | None
    created: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the memory."""
        return self.memory.tokens if self.memory is not None else 0


class MemoryHolder:
    """Reads documents and saved memories once, and afterwards only what changed in them.

    Copies of a model share it. It keeps the memories of a model's own documents apart from those of single calls, so
    that calls do not push them out; memories that overlap share their chunk KV.
    """

    def __init__(self) -> None:
        self._read: OrderedDict[tuple[Any, ...], tuple[Any, list[Document]]] = OrderedDict()
        self._own: OrderedDict[str, Memory] = OrderedDict()
        self._recent: OrderedDict[str, Memory] = OrderedDict()
        self._part: tuple[MemoryState, list[str], Memory] | None = None
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryHolder, ()  # what was read is read again where it is needed

    def documents(self, documents: Any) -> list[Document]:
        """Return core documents; files are read once, a list that has changed is read again."""
        key = _identity(documents)
        with self._lock:
            if key not in self._read:
                self._read[key] = (documents, to_documents(documents))  # kept so that the key's ids stay their own
                _forget(self._read, _KEPT)
            return self._read[key][1]

    def fingerprint(self, documents: Any = None, memory: Memory | str | Path | None = None) -> str | None:
        """Return a hash of the texts that would be read, without computing anything; ``None`` for nothing."""
        if documents is None and memory is None:
            return None
        saved = _saved_text(memory) if isinstance(memory, (str, Path)) else ""
        there = memory.documents if isinstance(memory, Memory) else [Document("", saved)]
        return fingerprint([*there, *(self.documents(documents) if documents is not None else [])])

    def get(self, engine: FocusEngine, documents: Any, memory_path: str | None) -> Memory | None:
        """Return the memory of these settings, or ``None`` where there are none."""
        return self.hold(engine, documents, memory_path).memory

    def hold(
        self,
        engine: FocusEngine,
        documents: Any = None,
        memory: Memory | str | Path | None = None,
        extra: Any = None,
        wanted: MemoryFilter | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Held:
        """Return what a call reads.

        Args:
            engine: reads it.
            documents: of the model; read until they change.
            memory: a memory, or the folder of a saved one; it stays as it is.
            extra: documents of this call; what calls before it read is not computed again.
            wanted: filter on documents and memory; ``extra`` is not filtered.
            check: called often; raises to cancel.

        Raises:
            ConfigError: a document is none, or the filter is bad.
            StoreError: the saved memory cannot be read.
        """
        with self._lock:
            given = shared_memory(engine, memory) if isinstance(memory, (str, Path)) else memory
            base, created = given.snapshot() if given is not None else None, 0
            if documents is not None:
                base, created = self._with(engine, base, self.documents(documents), self._own, check)
            if base is not None and wanted is not None:
                base = self._subset(base, kept_ids(base.documents, wanted))
            if extra:
                base, read = self._with(engine, base, to_documents(extra), self._recent, check)
                created += read
            return Held(base, created)

    def _with(
        self,
        engine: FocusEngine,
        base: Memory | None,
        more: list[Document],
        kept: OrderedDict[str, Memory],
        check: Callable[[], None],
    ) -> tuple[Memory, int]:
        """Return a memory of ``base`` and ``more``, from the kept one that holds most, and tokens computed."""
        present = [] if base is None else base.documents
        together = [*present, *distinct(more, present)]
        key = f"{engine_fingerprint(engine)}-{fingerprint(together)}"
        if key in kept:
            kept.move_to_end(key)
            return kept[key], 0
        candidates = [*([base] if base is not None else []), *self._own.values(), *self._recent.values()]
        shared = [_shared(memory, together, engine) for memory in candidates]
        best = max(range(len(candidates)), key=lambda index: len(shared[index]), default=None)
        held = candidates[best].subset(shared[best]) if best is not None and shared[best] else engine.remember([])
        before = held.tokens
        held.add(together, check=check)
        kept[key] = held
        _forget(kept, _KEPT)
        return held, held.tokens - before

    def _subset(self, memory: Memory, ids: list[str]) -> Memory:
        if self._part is None or self._part[0] is not memory.state or self._part[1] != ids:
            self._part = (memory.state, ids, memory.subset(ids))
        return self._part[2]


def _shared(memory: Memory, together: list[Document], engine: FocusEngine) -> list[str]:
    """Return the documents of a memory that can be taken over; where order counts, only in the same order."""
    same_model = memory.encoder.base is engine.base and memory.encoder.config == engine.config
    if not same_model or memory.encoder.sink != engine.sink:
        return []
    if engine.config.positions == "ordered":
        pairs = zip(memory.documents, together, strict=False)
        return [one.id for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    texts = {document.id: document.text for document in together}
    return [one.id for one in memory.documents if texts.get(one.id) == one.text]


def _forget(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


def _saved_text(folder: str | Path) -> str:
    path = Path(folder) / "documents.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _identity(documents: Any) -> tuple[Any, ...]:
    """Return what tells whether documents are still the same: their objects and texts."""
    several = documents if isinstance(documents, (list, tuple)) else [documents]
    return tuple((id(item), hash(getattr(item, "page_content", None) or getattr(item, "text", ""))) for item in several)
