"""Compute the chunk KV of documents into a store, holding one batch of it at a time.

A stopped run is taken up where it stopped: chunks are addressed by their content, and each document is committed with
the documents beside it in one transaction as soon as all of its chunks are there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

from focus_core.errors import EmptyCorpusError, OutOfMemoryError, StoreError
from focus_core.hardware import is_out_of_memory
from focus_core.method.encoding import Check, encode_chunks
from focus_core.method.kv import ChunkKV
from focus_core.store.collections import Change, MissingChunksError
from focus_core.store.database import Store
from focus_core.store.encoder import ChunkEncoder
from focus_core.store.memory import checked_contents
from focus_core.text.chunking import Chunk
from focus_core.text.corpus import Document

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_COMMIT_TOKENS = 16_384


class Encode(Protocol):
    """Computes the chunk KV that a store has not, and puts it there; calls ``report`` with tokens done."""

    @property
    def tokens_at_once(self) -> int:
        """Tokens of the documents that are given together, and then committed."""

    def __call__(
        self, store: Store, encoder: ChunkEncoder, chunks: Iterable[Chunk], report: Callable[[int], None], check: Check
    ) -> None:
        """Compute what is missing."""


class LocalEncoder:
    """Computes with the base of this process."""

    tokens_at_once = _COMMIT_TOKENS

    def __call__(
        self, store: Store, encoder: ChunkEncoder, chunks: Iterable[Chunk], report: Callable[[int], None], check: Check
    ) -> None:
        """See :func:`encode_missing`."""
        encode_missing(store, encoder, chunks, report, check)


def index_documents(
    store: Store,
    name: str,
    encoder: ChunkEncoder,
    documents: Sequence[Document],
    removed: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Check = lambda: None,
    encode: Encode | None = None,
) -> None:
    """Put documents into a collection and take others out; those that are there unchanged cost nothing.

    Args:
        store: where to.
        name: of the collection; made if absent.
        encoder: of the engine that reads.
        documents: with text.
        removed: ids to take out, in the last transaction.
        progress: called with tokens done and to do.
        check: called often; raises to stop, and then what was committed stays.
        encode: computes what the store has not, on other machines; this one's base if not given.

    Raises:
        EmptyCorpusError: a document holds no text; nothing is changed then.
        StoreError: the store cannot be written, or the collection was made by another model.
    """
    for document in documents:
        if not document.text.strip():
            raise EmptyCorpusError(f"document {document.id!r} is empty; leave it out")
    cut = {document.id: encoder.cut(document) for document in documents}
    total, done = sum(len(chunk.ids) for chunks in cut.values() for chunk in chunks), 0
    encode = encode or LocalEncoder()
    for group in _groups(documents, cut, encode.tokens_at_once):
        held = {document.id: document for document in group}
        chunks = [chunk for document in group for chunk in cut[document.id]]

        def report(tokens: int, before: int = done) -> None:
            progress(before + tokens, total)

        gone = () if group[-1] is not documents[-1] else removed
        _commit(store, name, encoder, held, chunks, gone, report, check, encode)
        done += sum(len(chunk.ids) for chunk in chunks)
        progress(done, total)
    if removed and not documents:
        _commit(store, name, encoder, {}, [], removed, lambda tokens: None, check, encode)


def repair_collection(store: Store, name: str, encoder: ChunkEncoder, check: Check = lambda: None) -> int:
    """Compute chunk KV of a collection that is damaged or lost again, and return how many chunks that were.

    Indexes of the catalogue that are damaged are made anew first.

    Raises:
        StoreError: the collection's rows are damaged, or it was made by another model.
    """
    store.mend()
    bad = {}
    for key, chunk in checked_contents(store, name, encoder).chunks:
        try:
            store.get(encoder.key(chunk))
        except StoreError:
            bad[key] = chunk
    for chunk in bad.values():
        check()
        row = encoder.row(chunk)
        kv = encode_chunks(encoder.base, [row], check, ChunkKV.allocate(encoder.shape, [len(row)]))
        store.put_all({encoder.key(chunk): kv.get(0)})
    return len(bad)


def encode_missing(
    store: Store, encoder: ChunkEncoder, chunks: Iterable[Chunk], report: Callable[[int], None], check: Check
) -> None:
    """Compute the KV of the chunks that the store has not, and put it there."""
    wanted = {encoder.key(chunk): chunk for chunk in chunks}
    held = store.holds(wanted)
    missing = sorted(((key, wanted[key]) for key in wanted if key not in held), key=lambda item: -len(item[1].ids))
    done = sum(len(wanted[key].ids) for key in held)
    most = _BATCH_TOKENS.get(encoder.base.device.type, 4096)
    while missing:
        check()
        count = max(1, min(len(missing), most // (len(missing[0][1].ids) + 1)))
        batch, rest = missing[:count], missing[count:]
        try:
            rows = [encoder.row(chunk) for _, chunk in batch]
            kv = encode_chunks(encoder.base, rows, check, ChunkKV.allocate(encoder.shape, list(map(len, rows))))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1:
                raise OutOfMemoryError(
                    f"not even one chunk fits in memory ({error}); use a smaller chunk size or model"
                ) from error
            most //= 2
            continue
        store.put_all({key: kv.get(row) for row, (key, _) in enumerate(batch)})
        missing, done = rest, done + sum(len(chunk.ids) for _, chunk in batch)
        report(done)


def _commit(
    store: Store,
    name: str,
    encoder: ChunkEncoder,
    documents: dict[str, Document],
    chunks: Sequence[Chunk],
    removed: Collection[str],
    report: Callable[[int], None],
    check: Check,
    encode: Encode,
) -> None:
    rows = [(store.address(encoder.key(chunk)), chunk) for chunk in chunks]
    change = Change(documents, rows, set(documents), removed)
    for last in (False, True):
        encode(store, encoder, chunks, report, check)
        try:
            store.commit(name, encoder.facts(), encoder.config.of_answers(), change)
        except MissingChunksError:  # pruned since they were looked for
            if last:
                raise
        else:
            return


def _groups(documents: Sequence[Document], cut: dict[str, list[Chunk]], most: int) -> Iterator[list[Document]]:
    """Yield documents that are committed together: so many that a commit costs little beside their chunk KV."""
    group: list[Document] = []
    tokens = 0
    for document in documents:
        group.append(document)
        tokens += sum(len(chunk.ids) for chunk in cut[document.id])
        if tokens >= most:
            yield group
            group, tokens = [], 0
    if group:
        yield group
