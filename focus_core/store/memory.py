"""Hold what a model has read: documents, their chunks, and where the chunks' KV lies.

A :class:`Memory` is a list of documents one can add to and remove from like rows in a table; nothing else is computed
again. Its state is replaced as a whole, so a question that is being answered keeps the memory it began with, and a
cancelled or failed change leaves no trace. Saving merges what changed into a collection, so that several writers keep
each other's documents; reading writes nothing. Memory generates nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from focus_core.errors import ConfigError, EmptyCorpusError, OutOfMemoryError, StoreError
from focus_core.hardware import free_bytes, is_out_of_memory
from focus_core.method.encoding import Check, encode_chunks
from focus_core.method.kv import ChunkKV
from focus_core.method.slabs import Alike, Slab, equal_chunks
from focus_core.method.state import MemoryState
from focus_core.store.collections import Change, Contents, MissingChunksError, row_sum
from focus_core.store.database import ChunkStore, Store
from focus_core.store.encoder import ChunkEncoder
from focus_core.store.migration import DEFAULT_NAME
from focus_core.store.segments import Tensors
from focus_core.store.tiers import Staged, staged_kv
from focus_core.text.chunking import Chunk, joined, pack
from focus_core.text.corpus import Document

Progress = Callable[[int, int], None]
"""``progress(done, total)`` in tokens."""

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_UNKNOWN = (-1, "")  # stamp of no collection
_PUT_BYTES = 256 << 20


class Memory:
    """Documents that an engine can focus on. Made by :meth:`FocusEngine.remember`; safe to use from several threads.

    Args:
        encoder: of the engine that made it.
        store: where chunk KV is kept (on disk, or in a cache) while it is computed; ``None`` keeps it in memory only.
    """

    def __init__(
        self, encoder: ChunkEncoder, store: ChunkStore | None = None, state: MemoryState | None = None
    ) -> None:
        self.encoder, self.store = encoder, store
        self._source: Store | None = None  # looked into for chunk KV where nothing may be written
        self._state = state or MemoryState({}, (), ())
        self._origin: _Origin | None = None  # where it was last loaded from or saved to
        self._origins: dict[tuple[Path, str, str], _Origin] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or copied, alone or inside something else."""
        raise ConfigError(
            "a memory lives in one process and cannot be pickled or copied; save it, and load it where it is needed"
        )

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> MemoryState:
        """The present version; it never changes."""
        return self._state

    @property
    def documents(self) -> list[Document]:
        """Documents in order of addition."""
        return list(self._state.documents.values())

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks in memory order."""
        return self._state.chunks

    @property
    def tokens(self) -> int:
        """Tokens of all chunks, sinks not counted."""
        return sum(len(chunk.ids) for chunk in self._state.chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of chunk KV held."""
        return sum(slab.kv.nbytes for slab in self._state.slabs)

    def pin(self) -> None:
        """Keep what is in memory of its chunk KV there when other memories of the engine need room.

        Holds for what was loaded from disk, in this memory and in what is made of it. To pin some documents alone, load
        them as a memory of their own (``FocusEngine.load_memory(where=...)``).
        """
        for slab in self._state.slabs:
            if isinstance(slab.kv.source, Staged):
                slab.kv.source.pin()

    @property
    def fingerprint(self) -> str:
        """Hash of base, settings of answers and documents: equal memories answer equally."""
        digest = hashlib.sha256(json.dumps([self.encoder.facts(), self.encoder.config.of_answers()]).encode())
        for document in self.documents:
            digest.update(f"{document.id}\0{document.text}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._state.chunks)

    def __contains__(self, document_id: str) -> bool:
        return document_id in self._state.documents

    # -- changing -----------------------------------------------------------------------------------------------

    def add(
        self,
        documents: Iterable[Document],
        *,
        packed: bool = False,
        progress: Progress = lambda done, total: None,
        check: Check = lambda: None,
    ) -> None:
        """Read documents: their chunk KV is computed (or fetched from the store) and nothing else changes.

        Args:
            documents: a known id with other text is replaced; with the same text it takes the new metadata.
            packed: let short documents share chunks.
            progress: called with tokens done and to do.
            check: called often; raises to cancel, and then the memory is as before.

        Raises:
            EmptyCorpusError: a document holds no text.
            OutOfMemoryError: not even one chunk could be computed.
        """
        self.update(documents, packed=packed, progress=progress, check=check)

    def remove(self, document_ids: Iterable[str]) -> None:
        """Forget documents; the others' KV stays where it is.

        Raises:
            ConfigError: an id is not in memory; nothing is removed then.
        """
        self.update((), document_ids)

    def update(
        self,
        documents: Iterable[Document],
        remove: Iterable[str] = (),
        *,
        packed: bool = False,
        progress: Progress = lambda done, total: None,
        check: Check = lambda: None,
    ) -> None:
        """Remove and add documents as one change: all of it happens or none, and no reader sees a part of it.

        Takes what :meth:`add` and :meth:`remove` take, and raises what they raise.
        """
        with self._lock:
            state, gone = self._state, dict.fromkeys(remove)
            _require(state, list(gone))
            given = {document.id: document for document in documents}
            for document in given.values():
                if not document.text.strip():
                    raise EmptyCorpusError(f"document {document.id!r} is empty; leave it out")
            held = {key: document for key, document in state.documents.items() if key not in gone}
            fresh = {key: one for key, one in given.items() if key not in held or held[key].text != one.text}
            kept = {key: given.get(key, one) for key, one in held.items() if key not in fresh}
            if not fresh and not gone:
                if any(state.documents[key] is not document for key, document in kept.items()):
                    self._state = replace(state, documents=kept)
            else:
                chunks = self._cut_without(state, {*gone, *fresh}) + self._cut(fresh.values(), packed)
                self._state = self._become(state, {**kept, **fresh}, chunks, progress, check)

    def restore(self, state: MemoryState) -> None:
        """Go back to a version that :attr:`state` gave: what a caller could not finish has not happened."""
        with self._lock:
            self._state = state

    def subset(self, document_ids: Iterable[str]) -> Memory:
        """Return a memory of some documents only (a filter), for reading: what is added to it is kept nowhere.

        Chunk KV is gathered once; only chunks that packed documents shared with others are computed.
        """
        kept, state = set(document_ids), self._state
        _require(state, sorted(kept))
        documents = {key: document for key, document in state.documents.items() if key in kept}
        chunks = self._cut_without(state, state.documents.keys() - kept)
        part = self.snapshot()
        part._state = part._become(state, documents, chunks)
        return part

    def snapshot(self) -> Memory:
        """Return this memory as it is now, for reading; later changes of either are not seen by the other."""
        copy = Memory(self.encoder, None, self._state)
        copy._source = self._source
        return copy

    # -- persistence --------------------------------------------------------------------------------------------

    def save(
        self,
        folder: str | Path | Store,
        progress: Progress = lambda done, total: None,
        *,
        name: str = DEFAULT_NAME,
        replace: bool = False,
    ) -> None:
        """Merge what changed since it was loaded or saved there into a collection; only what is new is written.

        Documents that others have put there stay, and those of the same id are replaced; it is done whole or not at
        all.

        Args:
            folder: of the store, made if absent.
            progress: called with tokens done and to do.
            name: of the collection.
            replace: drop the documents of the collection that this memory does not hold.

        Raises:
            StoreError: it cannot be written, or was made by another model; nothing is changed then.
            ConfigError: metadata hold what JSON cannot.
        """
        store = folder if isinstance(folder, Store) else Store(folder)
        with self._lock:
            state, origin = self._state, _Origin(store, name, _UNKNOWN, {})
            known = self._origins.get(origin.place, origin)
            sums = {key: row_sum(document) for key, document in state.documents.items()}
            changed = {key for key, checksum in sums.items() if known.sums.get(key) != checksum}
            removed = known.sums.keys() - sums.keys()
            keys = {id(chunk): self.encoder.key(chunk) for chunk in state.chunks}
            self._put(store, keys, progress)
            chunks = [(store.address(keys[id(chunk)]), chunk) for chunk in state.chunks]
            change = Change(state.documents, chunks, changed, removed, replace)
            try:
                info = store.commit(name, self.encoder.facts(), self.encoder.config.of_answers(), change)
            except MissingChunksError:  # pruned since they were looked for
                self._put(store, keys, progress)
                info = store.commit(name, self.encoder.facts(), self.encoder.config.of_answers(), change)
            seen = info.version == known.stamp[0] + 1  # else others' changes are to be read
            self._be_at(_Origin(store, name, info.stamp if seen else _UNKNOWN, sums))

    def refresh(self) -> bool:
        """Read what other writers have changed in the collection since this was loaded or saved; tell whether any.

        Changes of this memory that were not saved are dropped.
        """
        with self._lock:
            origin = self._origin
            if origin is None or origin.is_present():
                return False
            contents = checked_contents(origin.store, origin.name, self.encoder)
            known = {(chunk.ids, chunk.spans): chunk for chunk in self._state.chunks}
            chunks = [known.get((chunk.ids, chunk.spans), chunk) for _, chunk in contents.chunks]
            self._state = self._become(self._state, contents.documents, chunks)
            self._be_at(_Origin.of(origin.store, contents))
            return True

    @classmethod
    def load(
        cls,
        folder: str | Path | Store,
        encoder: ChunkEncoder,
        progress: Progress = lambda done, total: None,
        *,
        name: str = DEFAULT_NAME,
        ids: Collection[str] | None = None,
    ) -> Memory:
        """Open a collection; nothing is computed or written, and chunk KV is read when a question needs it.

        ``FocusConfig.memory_budget`` says how much of it stays in memory; the rest is read again at every step.

        Raises:
            StoreError: there is none, its rows are damaged, or it was made by other weights or settings. Chunk KV that
                is damaged is refused by the question that reads it.
        """
        store = folder if isinstance(folder, Store) else Store(folder, read_only=True)
        contents = checked_contents(store, name, encoder, ids)
        chunks = [chunk for _, chunk in contents.chunks]
        groups, total = equal_chunks(chunks), sum(len(chunk.ids) for chunk in chunks)
        keys, lengths = [encoder.key(alike[0]) for alike in groups], [len(encoder.row(alike[0])) for alike in groups]
        kv = staged_kv(encoder.shape, store.stored(keys), lengths, encoder.budget)
        if kv is None:  # written by an earlier version
            kv, loaded = ChunkKV.allocate(encoder.shape, lengths), 0
            for row, alike in enumerate(groups):
                _read(kv, row, store.get(keys[row]))
                loaded += sum(len(chunk.ids) for chunk in alike)
                progress(loaded, total)
        progress(total, total)
        slabs = (Slab.of(groups, kv),) if groups else ()
        memory = cls(encoder, None, MemoryState(contents.documents, tuple(chunks), slabs))
        memory._source = store
        memory._be_at(_Origin.of(store, contents))
        if ids is not None:
            memory._origin = None  # a part does not follow what others do to the whole
            return memory if len(contents.documents) == len(set(ids)) else memory.subset(ids)
        return memory

    def _be_at(self, origin: _Origin) -> None:
        self._origin = self._origins[origin.place] = origin

    # -- inside -------------------------------------------------------------------------------------------------

    def _cut(self, documents: Iterable[Document], packed: bool) -> list[Chunk]:
        chunks = [chunk for document in documents for chunk in self.encoder.cut(document)]
        if not packed:
            return chunks
        return pack(chunks, self.encoder.config.chunk_size, self.encoder.separator)

    def _cut_without(self, state: MemoryState, gone: set[str]) -> list[Chunk]:
        """Return the chunks without these documents: of one that others share, what is theirs is left."""
        chunks: list[Chunk] = []
        for chunk in state.chunks:
            spans = tuple(span for span in chunk.spans if span.document_id not in gone)
            if len(spans) == len(chunk.spans):
                chunks.append(chunk)
            elif spans:
                parts = [self.encoder.ids_of(state.documents[span.document_id], span) for span in spans]
                chunks.append(Chunk(tuple(joined(parts, self.encoder.separator)), spans))
        return chunks

    def _become(
        self,
        state: MemoryState,
        documents: dict[str, Document],
        chunks: Sequence[Chunk],
        progress: Progress = lambda done, total: None,
        check: Check = lambda: None,
    ) -> MemoryState:
        """Return a state of these chunks: the KV of those that ``state`` has stays, the others' is computed."""
        present, wanted = {id(chunk) for chunk in state.chunks}, {id(chunk) for chunk in chunks}
        slabs = [kept for slab in state.slabs if (kept := slab.without(present - wanted)) is not None]
        fresh = [chunk for chunk in chunks if id(chunk) not in present]
        return MemoryState(documents, tuple(chunks), self._grown(slabs, fresh, progress, check))

    def _grown(
        self, slabs: Sequence[Slab], chunks: Sequence[Chunk], progress: Progress, check: Check
    ) -> tuple[Slab, ...]:
        """Lay new chunks behind those that are there: beside an equal one, else in rows of their own."""
        total, held = sum(len(chunk.ids) for chunk in chunks), [slab.groups() for slab in slabs]
        known = {alike[0].ids: (number, row) for number, slab in enumerate(held) for row, alike in enumerate(slab)}
        fresh = []
        for alike in equal_chunks(chunks):
            if alike[0].ids in known:
                number, row = known[alike[0].ids]
                held[number][row] += alike
            else:
                fresh.append(alike)
        found = [Slab.of(group, slab.kv) for group, slab in zip(held, slabs, strict=True)]
        done = total - sum(len(chunk.ids) for alike in fresh for chunk in alike)
        if not fresh:
            return tuple(found)
        last, kv = self._room(found, [len(self.encoder.row(alike[0])) for alike in fresh])
        new = kv.rows(kv.size - len(fresh), kv.size)
        self._encode(new, fresh, lambda tokens: progress(done + tokens, total), check)
        both = Slab.of([*(last.groups() if last is not None else ()), *fresh], kv)
        return (*(slab for slab in found if slab is not last), both)

    def _room(self, slabs: Sequence[Slab], lengths: Sequence[int]) -> tuple[Slab | None, ChunkKV]:
        """Make room for new rows: behind the last slab, which is returned too, or in a slab of their own."""
        shape = self.encoder.shape
        try:
            if slabs and slabs[-1].kv.extension_bytes(lengths) < free_bytes(shape.device) // 2:
                return slabs[-1], slabs[-1].kv.extended(lengths)
            return None, ChunkKV.allocate(shape, lengths)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _too_large(len(lengths), error) from error

    def _encode(self, kv: ChunkKV, groups: Sequence[Alike], progress: Callable[[int], None], check: Check) -> None:
        """Compute or fetch the KV of each group of equal chunks; groups are sorted by falling length."""
        encoder = self.encoder
        keys = [encoder.key(alike[0]) for alike in groups]
        tokens = [sum(len(chunk.ids) for chunk in alike) for alike in groups]
        missing = self._fetch(keys, kv)
        done = sum(tokens) - sum(tokens[row] for row in missing)
        most = _BATCH_TOKENS.get(encoder.base.device.type, 4096)
        progress(done)
        while missing:
            check()
            count = max(1, min(len(missing), most // kv.lengths[missing[0]]))
            some = missing[:count]
            try:
                encode_chunks(encoder.base, [encoder.row(groups[row][0]) for row in some], check, kv.select(some))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    raise _too_large(1, error) from error
                most //= 2
                continue
            done += sum(tokens[row] for row in some)
            if self.store is not None:
                self.store.put_all({keys[row]: kv.get(row) for row in some})
            missing = missing[count:]
            progress(done)

    def _fetch(self, keys: Sequence[str], kv: ChunkKV) -> list[int]:
        """Copy what the store has and return the rows that it has not, or that are damaged there."""
        missing, source = [], self.store if self.store is not None else self._source
        held = source.holds(keys) if source is not None else set()
        for row, key in enumerate(keys):
            try:
                if source is None or key not in held:
                    raise StoreError("it is to be computed")
                _read(kv, row, source.get(key))
            except StoreError:
                missing.append(row)
        return missing

    def _put(self, store: Store, keys: Mapping[int, str], progress: Progress) -> None:
        """Write the chunk KV that a store has not, some at a time."""
        present, total, done = store.holds(set(keys.values())), self.tokens, 0
        waiting: dict[str, Tensors] = {}
        for slab in self._state.slabs:
            for row, alike in enumerate(slab.groups()):
                key = keys[id(alike[0])]
                if key not in present:
                    present.add(key)
                    waiting[key] = slab.kv.get(row)
                if sum(array.nbytes for item in waiting.values() for array in item.values()) >= _PUT_BYTES:
                    store.put_all(waiting)
                    waiting = {}
                done += sum(len(chunk.ids) for chunk in alike)
                progress(done, total)
        if waiting:
            store.put_all(waiting)


@dataclass(frozen=True)
class _Origin:
    """The collection that a memory was loaded from or saved to, as it was then."""

    store: Store
    name: str
    stamp: tuple[int, str]
    sums: Mapping[str, bytes]

    @classmethod
    def of(cls, store: Store, contents: Contents) -> _Origin:
        sums = {key: row_sum(document) for key, document in contents.documents.items()}
        return cls(store, contents.info.name, contents.info.stamp, sums)

    def is_present(self) -> bool:
        """Whether nobody has changed the collection since."""
        return self.store.collection(self.name).stamp == self.stamp

    @property
    def place(self) -> tuple[Path, str, str]:
        return self.store.folder.resolve(), self.store.tenant, self.name


def checked_contents(store: Store, name: str, encoder: ChunkEncoder, ids: Collection[str] | None = None) -> Contents:
    """Read a collection's rows; refuse those of another model, and chunks that are not what their key says."""
    contents = store.read(name, ids)
    found, own = contents.info.facts, encoder.facts()
    if found != own:
        differ = ", ".join(
            f"{key}: {found.get(key)!r} there, {own.get(key)!r} here"
            for key in sorted({*own, *found})
            if found.get(key) != own.get(key)
        )
        raise StoreError(
            f"{store.folder} was made by another model or settings ({differ}); use that model, or index the documents "
            "again with this one into another collection"
        )
    for key, chunk in contents.chunks:
        if store.address(encoder.key(chunk)) != key:
            raise StoreError(
                f"a chunk of {chunk.document_id!r} in {store.folder} is damaged (its key is another's); index the "
                "documents again"
            )
    return contents


def _require(state: MemoryState, document_ids: Sequence[str]) -> None:
    unknown = [key for key in document_ids if key not in state.documents]
    if unknown:
        raise ConfigError(f"no document {unknown[0]!r} in memory; it holds {len(state.documents)} documents")


def _read(kv: ChunkKV, row: int, arrays: Tensors) -> None:
    """Write what a store has into a row; it may be of the first form, one tensor of all keys and values."""
    if set(arrays) == {"kv"} and kv.shape.format == "base":
        kv.put_dense(row, arrays["kv"])
    elif set(arrays) == set(kv.shape.arrays):
        kv.put(row, arrays)
    else:
        raise StoreError(f"chunk KV of an unknown form ({', '.join(sorted(arrays))}); index the documents again")


def _too_large(chunks: int, error: BaseException) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{chunks} chunks do not fit in memory ({error}); read fewer documents, or use a smaller chunk size or model"
    )
