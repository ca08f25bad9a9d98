"""Share one engine per process and weights, and the memories that framework models read.

Models are built and copied freely by both frameworks, so weights are loaded at first use and shared by all that ask for
the same ones; so is a saved memory. What a call reads besides is kept for the next call, so a conversation that grows
computes only what is new. No framework is imported here.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.files import file_facts
from focus_core.method.kv import ChunkKV
from focus_core.method.state import MemoryState
from focus_core.session.concurrency import Turns
from focus_core.session.documents import (
    MemoryFilter,
    fingerprint,
    kept_ids,
    to_documents,
    written,
)
from focus_core.store.encoder import ChunkEncoder
from focus_core.store.memory import Memory, Progress
from focus_core.store.places import Place, find_place
from focus_core.store.segments import Tensors
from focus_core.text.corpus import Document, canonical, distinct, load_documents

_engines: dict[tuple[Any, ...], FocusEngine] = {}
_memories: weakref.WeakValueDictionary[tuple[Any, ...], Memory] = weakref.WeakValueDictionary()
_fingerprints: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # of these tables; never held while something is loaded
_turns = Turns()

_KEPT = 8  # memories of each kind that a holder keeps


def _patient() -> None:
    """Go on waiting."""


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
        device: ``cpu``, ``cuda`` or ``mps``; chosen if not given.
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
    with _turns.of(("engine", *key), _patient):
        if key not in _engines:
            _engines[key] = FocusEngine.from_pretrained(base, adapter, device=device, dtype=kind)
    with _lock:
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
    info = {**engine.info.to_dict(), "trained": None, "focus": engine.config.of_answers()}
    return f"{known}-{engine.base.dtype}-{canonical(info)}"


def shared_memory(engine: FocusEngine, place: str | Path | Place, check: Callable[[], None] = _patient) -> Memory:
    """Return a saved memory; it is read once while anybody uses it, and again when it was saved anew.

    Args:
        engine: it is of this engine's model.
        place: folder, or name of a collection.
        check: called while another caller reads it; raises to give up.

    Raises:
        StoreError: there is none, it is damaged, or it was made by other weights or settings.
    """
    found = find_place(place)
    digest = found.open().collection(found.name).digest
    own = (id(engine.base), engine_fingerprint(engine), engine.config.memory_budget)
    key = (*own, found.folder.resolve(), found.name, found.tenant, digest)
    with _turns.of(("memory", *key), check):
        memory = _memories.get(key)
        if memory is None:
            memory = _memories[key] = engine.load_memory(found)
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


def beside(
    engine: FocusEngine,
    memory: Memory | None,
    documents: Sequence[Document],
    *,
    progress: Progress = lambda done, total: None,
    check: Callable[[], None] = _patient,
) -> Held:
    """Return a memory with documents of one caller read beside it; the memory stays as it is.

    Args:
        engine: reads them.
        memory: what is there, if anything.
        documents: one whose id is known stands for that one.
        progress: called with tokens done and to do.
        check: called often; raises to cancel.
    """
    if not documents:
        return Held(memory)
    held = memory.subset(one.id for one in memory.documents) if memory is not None else engine.remember([])
    before = held.tokens
    held.add(documents, progress=progress, check=check)
    return Held(held, held.tokens - before)


def holding(
    engine: FocusEngine, memory: Memory | None, check: Callable[[], None] = _patient
) -> Callable[[str, Sequence[Document]], Held]:
    """Return what holds, for a request, a memory and beside it what the request brings under ids of its own."""

    def hold(question: str, more: Sequence[Document]) -> Held:
        return beside(engine, memory, distinct(more, memory.documents if memory is not None else ()), check=check)

    return hold


@dataclass(frozen=True)
class Moment:
    """What a call reads, as it is at one moment: nothing in it changes, whatever happens to what it was made from.

    Args:
        memory: of the model, ``None`` where there is none.
        documents: of the model, ``None`` where there are none.
        ids: what a filter keeps of both, ``None`` without a filter.
        fingerprint: hash of everything about them that an answer depends on.
    """

    memory: Memory | None
    documents: Any
    ids: list[str] | None
    fingerprint: str


class MemoryHolder:
    """Reads documents and saved memories once, and afterwards only what changed in them.

    Copies of a model share it. It keeps the memories of a model's own documents apart from those of single calls, so
    that calls do not push them out; memories that overlap share their chunk KV. Callers wait for each other only where
    they read the same.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[str, str], tuple[Any, list[Document]]] = OrderedDict()
        self._used_up: OrderedDict[int, tuple[Any, list[Document]]] = OrderedDict()
        self._saved: OrderedDict[str, Memory] = OrderedDict()
        self._own: OrderedDict[str, Memory] = OrderedDict()
        self._recent: OrderedDict[str, Memory] = OrderedDict()
        self._part: tuple[MemoryState, list[str], Memory] | None = None
        self._lock = threading.Lock()  # of these tables; never held while something is read
        self._turns = Turns()

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryHolder, ()  # what was read is read again where it is needed

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryHolder:
        return self

    def documents(self, documents: Any) -> list[Document]:
        """Return core documents; files are read again when they have changed, an iterator's items are kept.

        Raises:
            ConfigError: an item is no document.
            CorpusError: a file cannot be read, or nothing holds text.
        """
        if not isinstance(documents, Iterator):
            return to_documents(documents, self._file)
        with self._turns.of(id(documents), _patient):
            if id(documents) not in self._used_up:  # the object is kept so that its id stays its own
                found = to_documents(list(documents), self._file)
                with self._lock:
                    self._used_up[id(documents)] = (documents, found)
                    _forget(self._used_up, 8 * _KEPT)
                return found
            return self._used_up[id(documents)][1]

    def moment(
        self,
        engine: FocusEngine,
        documents: Any = None,
        memory: Memory | str | Path | Place | None = None,
        wanted: MemoryFilter | None = None,
    ) -> Moment:
        """Return what a call of a model would read now; no chunk KV is computed.

        Raises:
            ConfigError: a document is none, or the filter is bad.
            CorpusError: a document, or the saved memory, cannot be read.
        """
        base, kept = self._base(engine, memory, _patient), None
        found = base.documents if base is not None else []
        if documents is not None:
            several = documents if isinstance(documents, (list, tuple)) else [documents]
            if any(isinstance(item, Memory) for item in several):
                documents = [item.snapshot() if isinstance(item, Memory) else item for item in several]
            else:
                documents = self.documents(documents)
            found = [*found, *distinct(self.documents(documents), found)]
        if wanted is not None and (base is not None or documents is not None):
            kept = kept_ids(found, wanted)
            found = [document for document in found if document.id in set(kept)]
        return Moment(base, documents, kept, f"{fingerprint(found)}-{_layout(base, found)}")

    def hold(
        self,
        engine: FocusEngine,
        documents: Any = None,
        memory: Memory | str | Path | Place | None = None,
        extra: Sequence[Any] = (),
        wanted: MemoryFilter | None = None,
        check: Callable[[], None] = _patient,
    ) -> Held:
        """Return what a call reads.

        Args:
            engine: reads it.
            documents: of the model; files are read again when they change.
            memory: a memory, or the folder or name of a saved one; it stays as it is.
            extra: documents of this call, and memories that are read besides; what calls before it read is not computed
                again.
            wanted: filter on documents and memory; ``extra`` is not filtered.
            check: called often; raises to cancel.

        Raises:
            ConfigError: a document is none, or the filter is bad.
            StoreError: the saved memory cannot be read.
        """
        base, created = self._base(engine, memory, check), 0
        if documents is not None:
            several = documents if isinstance(documents, (list, tuple)) else [documents]
            read_before = [item.snapshot() for item in several if isinstance(item, Memory)]
            base, created = self._with(engine, base, self.documents(documents), self._own, check, read_before)
        if base is not None and wanted is not None:
            base = self._subset(base, kept_ids(base.documents, wanted))
        others = [item.snapshot() for item in extra if isinstance(item, Memory)]
        more = [item for item in extra if not isinstance(item, Memory)]
        texts = [*(document for other in others for document in other.documents), *to_documents(written(more))]
        if texts:
            base, read = self._with(engine, base, distinct(texts, ()), self._recent, check, others)
            created += read
        return Held(base, created)

    def _base(
        self, engine: FocusEngine, memory: Memory | str | Path | Place | None, check: Callable[[], None]
    ) -> Memory | None:
        if memory is None or isinstance(memory, Memory):
            return memory.snapshot() if memory is not None else None
        if not isinstance(memory, (str, Path, Place)):
            raise ConfigError(
                "memory must be made by FocusEngine.remember, or be the name or folder of a saved one; got "
                f"{type(memory).__name__}"
            )
        saved = shared_memory(engine, memory, check)
        with self._lock:
            self._saved[str(memory)] = saved  # read again only when it changed
            _forget(self._saved, _KEPT)
        return saved.snapshot()

    def _file(self, path: str | Path) -> list[Document]:
        """Return the documents of a file or folder, read again if it has changed."""
        key, facts = (str(path), str(Path(path).resolve())), file_facts(path)
        known = self._files.get(key)
        if known is None or known[0] != facts:
            known = facts, load_documents([path])
            with self._lock:
                self._files[key] = known
                _forget(self._files, 8 * _KEPT)
        return known[1]

    def _with(
        self,
        engine: FocusEngine,
        base: Memory | None,
        more: list[Document],
        kept: OrderedDict[str, Memory],
        check: Callable[[], None],
        others: Sequence[Memory] = (),
    ) -> tuple[Memory, int]:
        """Return a memory of ``base`` and ``more``, and the tokens that were computed for it."""
        present = [] if base is None else base.documents
        together = [*present, *distinct(more, present)]
        key = f"{engine_fingerprint(engine)}-{fingerprint(together)}"
        with self._turns.of((id(kept), key), check):
            with self._lock:
                if key in kept:
                    kept.move_to_end(key)
                    return kept[key], 0
                known = [*([base] if base is not None else []), *others, *self._own.values(), *self._recent.values()]
            held, created = _gathered(engine, together, known, check)
            with self._lock:
                kept[key] = held
                _forget(kept, _KEPT)
            return held, created

    def _subset(self, memory: Memory, ids: list[str]) -> Memory:
        part = self._part
        if part is None or part[0] is not memory.state or part[1] != ids:
            part = self._part = (memory.state, ids, memory.subset(ids))
        return part[2]


class _Known:
    """Chunk KV that memories hold, as a place to take it from, and the keys of what was computed besides."""

    def __init__(self, encoder: ChunkEncoder, memories: Sequence[Memory], texts: set[str]) -> None:
        self.computed: set[str] = set()
        self._kept: dict[str, tuple[ChunkKV, int]] = {}
        for memory in memories:
            ids = {document.id for document in memory.documents if document.text in texts}
            for slab in memory.state.slabs if ids else ():
                for chunk, row in slab.between(0, slab.kv.size):
                    if any(span.document_id in ids for span in chunk.spans):
                        self._kept.setdefault(encoder.key(chunk), (slab.kv, row))

    def holds(self, keys: Iterable[str]) -> set[str]:
        return self._kept.keys() & set(keys)

    def get(self, key: str) -> dict[str, Tensor]:
        kv, row = self._kept[key]
        return kv.get(row)

    def put_all(self, items: Mapping[str, Tensors]) -> None:
        self.computed.update(items)


def _gathered(
    engine: FocusEngine, together: list[Document], memories: Sequence[Memory], check: Callable[[], None]
) -> tuple[Memory, int]:
    """Return a memory of these documents, and the tokens computed: the memory that holds most of them is taken over,
    and of the others each chunk that is there.
    """
    known = [memory for memory in memories if _is_of(memory, engine)]
    shared = [_shared(memory, together, engine) for memory in known]
    best = max(range(len(known)), key=lambda index: len(shared[index]), default=None)
    part = known[best].subset(shared[best]) if best is not None and shared[best] else engine.remember([])
    missing = {document.text for document in together if document.id not in part}
    places = _Known(engine.encoder, known, missing)
    held = Memory(engine.encoder, places, part.state)
    held.add(together, check=check)
    held.store = None
    before = set(map(id, part.chunks))
    new = [chunk for chunk in held.chunks if id(chunk) not in before] if places.computed else []
    return held, sum(len(chunk.ids) for chunk in new if engine.encoder.key(chunk) in places.computed)


def _layout(memory: Memory | None, documents: Sequence[Document]) -> str:
    """Return a hash of how documents lie in a memory: which share a chunk, and the formats of chunk KV."""
    kept, digest = {document.id for document in documents}, hashlib.sha256()
    for slab in memory.state.slabs if memory is not None else ():
        for chunk, _ in slab.between(0, slab.kv.size):
            spans = [span for span in chunk.spans if span.document_id in kept]
            if spans:
                digest.update(f"{slab.kv.shape.format}{spans}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _is_of(memory: Memory, engine: FocusEngine) -> bool:
    same_model = memory.encoder.base is engine.base and memory.encoder.config == engine.config
    return same_model and memory.encoder.sink == engine.sink


def _shared(memory: Memory, together: list[Document], engine: FocusEngine) -> list[str]:
    """Return the documents of a memory that can be taken over; where order counts, only in the same order."""
    if engine.config.positions == "ordered":
        pairs = zip(memory.documents, together, strict=False)
        alike = itertools.takewhile(lambda pair: (pair[0].id, pair[0].text) == (pair[1].id, pair[1].text), pairs)
        return [one.id for one, _ in alike]
    texts = {document.id: document.text for document in together}
    return [one.id for one in memory.documents if texts.get(one.id) == one.text]


def _forget(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)
