"""Hold what a model has read: documents, their chunks, and where the chunks' KV lies.

A :class:`Memory` is a list of documents one can add to and remove from like rows in a table; nothing else is computed
again. Its state is replaced as a whole, so a question that is being answered keeps the memory it began with, and a
cancelled or failed change leaves no trace. Memory generates nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from focus_core.config import FocusConfig
from focus_core.errors import ConfigError, EmptyCorpusError, OutOfMemoryError, StoreError, UnsupportedModelError
from focus_core.files import write_atomically
from focus_core.hardware import dtype_name, is_out_of_memory
from focus_core.method.kv import ChunkBatch
from focus_core.method.parallel import Check, encode_chunks
from focus_core.method.slabs import Layout, Slab
from focus_core.method.state import MemoryState
from focus_core.model.families import BaseDecoder
from focus_core.store.segments import FORMAT, ChunkStore, Store, chunk_key
from focus_core.text.chunking import Chunk, Span, cut, pack
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer

Progress = Callable[[int, int], None]
"""``progress(done, total)`` in tokens."""

_SLAB_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


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
        return {
            "base": self.fingerprint,
            "dtype": dtype_name(self.base.dtype),
            "sink": self.sink,
            "rope": rope if isinstance(rope, dict) else None,
        }

    @cached_property
    def layout(self) -> Layout:
        """Which chunks lie together."""
        base = self.base
        token_bytes = (base.num_layers - 1) * 2 * base.num_kv_heads * base.head_dim * base.dtype.itemsize
        return Layout(self.config.chunk_size, token_bytes, _SLAB_BYTES.get(base.device.type, 1 << 30))

    def cut(self, document: Document) -> list[Chunk]:
        """Cut a document to the configured chunk size."""
        encoded = self.tokenizer.encode_with_offsets(document.text)
        return cut(document.id, document.text, encoded, self.config.chunk_size)

    def row(self, chunk: Chunk) -> list[int]:
        """Return the ids that run through the base: sink, then chunk."""
        return ([] if self.sink is None else [self.sink]) + list(chunk.ids)

    def key(self, chunk: Chunk) -> str:
        """Return the store address of a chunk."""
        return chunk_key(self.facts(), self.row(chunk))

    def allocate(self, rows: Sequence[Sequence[int]]) -> ChunkBatch:
        """Allocate KV for these rows."""
        base = self.base
        lengths = tuple(len(row) for row in rows)
        return ChunkBatch.empty(base.num_layers - 1, base.num_kv_heads, base.head_dim, lengths, base.dtype, base.device)


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
        self._state = state or MemoryState({}, (), ())
        self._lock = threading.Lock()

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
        return sum(slab.batch.nbytes for slab in self._state.slabs)

    @property
    def fingerprint(self) -> str:
        """Hash of base, settings and documents: equal memories answer equally."""
        digest = hashlib.sha256(json.dumps([self.encoder.facts(), self.encoder.config.to_dict()]).encode())
        for document in self.documents:
            digest.update(f"{document.id}\0{document.text}\0".encode())
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
            documents: a known id with other text is replaced; with the same text only its metadata are.
            packed: let short documents share chunks.
            progress: called with tokens done and to do.
            check: called often; raises to cancel, and then the memory is as before.

        Raises:
            EmptyCorpusError: a document holds no text.
            OutOfMemoryError: not even one chunk could be computed.
        """
        with self._lock:
            state = self._state
            fresh = {document.id: document for document in documents}
            for document in fresh.values():
                if not document.text.strip():
                    raise EmptyCorpusError(f"document {document.id!r} is empty; leave it out")
            same = {
                key: document
                for key, document in fresh.items()
                if key in state.documents and state.documents[key].text == document.text
            }
            if any(state.documents[key] is not document for key, document in same.items()):
                state = replace(state, documents={**state.documents, **same})
            fresh = {key: document for key, document in fresh.items() if key not in same}
            if not fresh:
                self._state = state
                return
            state, again = _without(state, [key for key in fresh if key in state.documents])
            fresh = {**{document.id: document for document in again}, **fresh}
            self._state = self._with(state, list(fresh.values()), packed, progress, check)

    def remove(self, document_ids: Iterable[str]) -> None:
        """Forget documents; the others' KV stays where it is.

        Raises:
            ConfigError: an id is not in memory; nothing is removed then.
        """
        with self._lock:
            wanted = list(document_ids)
            _require(self._state, wanted)
            state, again = _without(self._state, wanted)
            self._state = self._with(state, again, True, lambda done, total: None, lambda: None)

    def subset(self, document_ids: Iterable[str]) -> Memory:
        """Return a memory of some documents only (a filter); chunk KV is gathered once, nothing is computed."""
        kept, state = set(document_ids), self._state
        _require(state, sorted(kept))
        state, _ = _without(state, [key for key in state.documents if key not in kept])
        state = replace(state, slabs=self._joined(state.slabs))
        return Memory(self.encoder, self.store, state)

    def snapshot(self) -> Memory:
        """Return this memory as it is now; later changes of either are not seen by the other."""
        return Memory(self.encoder, self.store, self._state)

    # -- persistence --------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, progress: Progress = lambda done, total: None) -> None:
        """Write documents, chunks and KV to ``folder``; saving again writes only what is new."""
        folder = Path(folder)
        store = Store(folder / "kv")
        state, total, done = self._state, self.tokens, 0
        for slab in state.slabs:
            for chunk, tensor in slab.tensors():
                store.put(self.encoder.key(chunk), tensor)
                done += len(chunk.ids)
                progress(done, total)
        rows = [json.dumps(asdict(document), ensure_ascii=False) for document in state.documents.values()]
        write_atomically(folder / "documents.jsonl", ("\n".join(rows) + "\n").encode())
        entries = [
            {"key": self.encoder.key(chunk), "ids": chunk.ids, "spans": [asdict(span) for span in chunk.spans]}
            for chunk in state.chunks
        ]
        facts, config = self.encoder.facts(), self.encoder.config.to_dict()
        manifest = {"format": FORMAT, "facts": facts, "config": config, "chunks": entries}
        write_atomically(folder / "memory.json", json.dumps(manifest).encode())
        store.prune({str(entry["key"]) for entry in entries})

    @classmethod
    def load(cls, folder: str | Path, encoder: ChunkEncoder, progress: Progress = lambda done, total: None) -> Memory:
        """Read a saved memory; nothing is computed.

        Raises:
            StoreError: there is none, it is damaged, or it was made by other weights or settings.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest["facts"] != encoder.facts():
            found, own = manifest["facts"], encoder.facts()
            differ = ", ".join(
                f"{key}: {found.get(key)!r} there, {own[key]!r} here" for key in own if found.get(key) != own[key]
            )
            raise StoreError(f"{folder} was made by another model or settings ({differ}); index the documents again")
        try:
            lines = (folder / "documents.jsonl").read_text(encoding="utf-8").split("\n")
            documents = [Document(**json.loads(line)) for line in lines if line]
            chunks = tuple(
                Chunk(tuple(item["ids"]), tuple(Span(**span) for span in item["spans"])) for item in manifest["chunks"]
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{folder} is damaged ({error}); index the documents again") from error
        store, loaded, total = Store(folder / "kv"), 0, sum(len(chunk.ids) for chunk in chunks)
        slabs = []
        for group in encoder.layout.groups(chunks):
            tensors = []
            for alike in group:
                tensors.append(store.get(encoder.key(alike[0])).to(encoder.base.device))
                loaded += sum(len(chunk.ids) for chunk in alike)
                progress(loaded, total)
            slabs.append(Slab.of(group, ChunkBatch.gather(tensors)))
        return cls(encoder, store, MemoryState({item.id: item for item in documents}, chunks, tuple(slabs)))

    # -- inside -------------------------------------------------------------------------------------------------

    def _with(
        self, state: MemoryState, documents: list[Document], packed: bool, progress: Progress, check: Check
    ) -> MemoryState:
        chunks = [chunk for document in documents for chunk in self.encoder.cut(document)]
        if packed:
            separator = tuple(self.encoder.tokenizer.encode("\n\n"))
            chunks = pack(chunks, self.encoder.config.chunk_size, separator)
        total, done = sum(len(chunk.ids) for chunk in chunks), 0
        slabs = []
        for group in self.encoder.layout.groups(chunks):
            batch = self._encode(group, lambda tokens, before=done: progress(before + tokens, total), check)  # type: ignore[misc]
            slabs.append(Slab.of(group, batch))
            done += sum(len(chunk.ids) for alike in group for chunk in alike)
        return MemoryState(
            {**state.documents, **{document.id: document for document in documents}},
            (*state.chunks, *chunks),
            self._joined([*state.slabs, *slabs]),
        )

    def _joined(self, slabs: Sequence[Slab]) -> tuple[Slab, ...]:
        """Join small slabs, which makes steps faster, unless there is no room to do it."""
        try:
            return self.encoder.layout.joined(slabs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return tuple(slabs)

    def _encode(self, groups: Sequence[Sequence[Chunk]], progress: Callable[[int], None], check: Check) -> ChunkBatch:
        """Compute or fetch one KV for each group of equal chunks; groups are sorted by falling length."""
        encoder = self.encoder
        rows = [encoder.row(alike[0]) for alike in groups]
        try:
            batch = encoder.allocate(rows)
        except (RuntimeError, MemoryError) as error:
            raise _too_large(len(rows), error) from error
        keys = [encoder.key(alike[0]) for alike in groups]
        tokens = [sum(len(chunk.ids) for chunk in alike) for alike in groups]
        missing = []
        for index, key in enumerate(keys):
            if self.store is not None and key in self.store:
                batch.chunk(index).copy_(self.store.get(key))
            else:
                missing.append(index)
        done = sum(tokens) - sum(tokens[index] for index in missing)
        most = _BATCH_TOKENS.get(encoder.base.device.type, 4096)
        while missing:
            check()
            count = max(1, min(len(missing), most // len(rows[missing[0]])))
            try:
                piece = encode_chunks(encoder.base, [rows[index] for index in missing[:count]], check)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    raise _too_large(1, error) from error
                most //= 2
                continue
            for position, index in enumerate(missing[:count]):
                batch.chunk(index).copy_(piece.chunk(position))
                if self.store is not None:
                    self.store.put(keys[index], piece.chunk(position))
                done += tokens[index]
            missing = missing[count:]
            progress(done)
        return batch


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return ``memory.json`` of a saved memory.

    Raises:
        StoreError: absent, unreadable, or of another format.
    """
    path = folder / "memory.json"
    if not path.is_file():
        raise StoreError(f"no saved memory in {folder} (memory.json is missing); make one with `focusllm index`")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); index the documents again") from error
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT}; index again")
    return manifest


def _require(state: MemoryState, document_ids: Sequence[str]) -> None:
    unknown = [key for key in document_ids if key not in state.documents]
    if unknown:
        raise ConfigError(f"no document {unknown[0]!r} in memory; it holds {len(state.documents)} documents")


def _without(state: MemoryState, document_ids: Sequence[str]) -> tuple[MemoryState, list[Document]]:
    """Drop documents; also return documents that shared a packed chunk with them and must be read again."""
    gone = set(document_ids)
    touched = [chunk for chunk in state.chunks if any(span.document_id in gone for span in chunk.spans)]
    sharing = {span.document_id for chunk in touched for span in chunk.spans} - gone
    if sharing:
        again = [state.documents[key] for key in state.documents if key in sharing]
        return _without(state, [*gone, *sharing])[0], again
    lost = set(map(id, touched))
    slabs = tuple(kept for slab in state.slabs if (kept := slab.without(lost)) is not None)
    documents = {key: document for key, document in state.documents.items() if key not in gone}
    chunks = tuple(chunk for chunk in state.chunks if id(chunk) not in lost)
    return MemoryState(documents, chunks, slabs), []


def _too_large(chunks: int, error: BaseException) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{chunks} chunks do not fit in memory ({error}); read fewer documents, or use a smaller chunk size or model"
    )
