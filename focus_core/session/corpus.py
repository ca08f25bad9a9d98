"""Keep a collection like the files that it was read from: read what is new or changed, tell what has vanished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from focus_core.engine import FocusEngine
from focus_core.errors import EmptyCorpusError, StoreError
from focus_core.method.encoding import Check
from focus_core.method.suffix import suffix_bytes
from focus_core.store.collections import CollectionInfo
from focus_core.store.indexing import Encode, encode_missing, index_documents
from focus_core.store.memory import Memory, Progress
from focus_core.store.places import Place
from focus_core.store.tiers import STAGED_LAYERS, Staged
from focus_core.text.corpus import Document, Held, printable, read_documents


@dataclass(frozen=True)
class IndexReport:
    """What indexing did.

    Args:
        added, changed, unchanged, removed: ids of documents.
        vanished: ids of documents whose files are gone and that were kept.
        encodings: of the new and changed documents that are plain text.
        collection: as it is now.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    encodings: dict[str, str] = field(default_factory=dict)
    collection: CollectionInfo | None = None


def index_paths(
    engine: FocusEngine,
    place: Place,
    paths: Sequence[str | Path],
    *,
    sync: bool = False,
    progress: Progress = lambda done, total: None,
    check: Check = lambda: None,
    skipped: Callable[[Path, str], None] = lambda path, why: None,
    strict: bool = False,
    encode: Encode | None = None,
) -> IndexReport:
    """Read files and folders into a collection; only what is new or has changed is converted and computed.

    Documents whose files are there but cannot be read stay as they are.

    Args:
        engine: reads.
        place: the collection; made if absent.
        paths: files, folders, or ``-`` for standard input.
        sync: take out documents whose files under ``paths`` have vanished.
        progress: called with tokens done and to do.
        check: called often; raises to stop; the next run goes on from there.
        skipped: called with a path and the reason for each file that is left out.
        strict: raise if any is left out, before anything is changed.
        encode: computes chunk KV on other machines; ``engine`` does if not given.

    Raises:
        CorpusError: a path cannot be read, nothing to read was found, or ``strict`` and something was left out.
        StoreError: the store cannot be written, or the collection is another model's.
    """
    left_out: list[Path] = []

    def leave_out(path: Path, why: str) -> None:
        left_out.append(path)
        skipped(path, why)

    found = read_documents(paths, skipped=leave_out, strict=strict, held=_converted_before(place))
    documents = {one.id: one for one in found if one.text.strip()}
    store = place.open(read_only=False)
    known = store.listing(place.name) if store.has(place.name) else {}
    sources = {name: known[name].metadata.get("source") for name in known if name not in documents}
    vanished = [name for name, source in sources.items() if _belongs(source, paths) and not _belongs(source, left_out)]
    if not documents and not (sync and vanished):
        raise EmptyCorpusError(
            f"no text found in {', '.join(map(str, paths)) or 'no paths'}; name files that hold text"
        )
    sums = store.text_sums(place.name) if known else {}
    fresh = [one for one in documents.values() if sums.get(one.id) != one.text_sum]
    index_documents(store, place.name, engine.encoder, fresh, vanished if sync else (), progress, check, encode)
    if known:
        held = [chunk for _, chunk in store.read(place.name).chunks]
        encode_missing(store, engine.encoder, held, lambda tokens: None, check)  # files that were lost
    return IndexReport(
        added=[one.id for one in fresh if one.id not in known],
        changed=[one.id for one in fresh if one.id in known],
        unchanged=[name for name in documents if sums.get(name) == documents[name].text_sum],
        removed=vanished if sync else [],
        vanished=[] if sync else vanished,
        encodings={one.id: one.source["encoding"] for one in fresh if "encoding" in one.source},
        collection=store.collection(place.name),
    )


def memory_costs(memory: Memory, question: int = 64, answer: int = 128) -> dict[str, int]:
    """Say, before any of it is read, where a saved memory's chunk KV will lie, and what a question and a token cost.

    Args:
        memory: loaded, not read.
        question: tokens of a question.
        answer: most tokens of an answer.

    Returns:
        Bytes of chunk KV; those that will stay in memory, and those that pass through it a layer at a time; bytes that
        a question adds behind the chunks; bytes read from disk for each token of an answer (a question that passes the
        chunks in batches reads them once a batch besides); and the rows of the model that a question and each token
        run.
    """
    shape, budget = memory.encoder.shape, memory.encoder.budget
    sources = [slab.kv.source for slab in memory.state.slabs]
    staged = [source for source in sources if isinstance(source, Staged)]
    rows = sum(slab.kv.size for slab in memory.state.slabs)
    behind = min(question, memory.encoder.config.prompt_length)
    suffixes = suffix_bytes(shape, rows, behind + answer)
    room, held = max(0, budget.room() - suffixes), {}
    for source in staged:
        held[source] = source.stay(room)
        room = max(0, room - held[source] * source.layer_bytes)
    passing = {source: source.shape.layers - stay for source, stay in held.items()}
    return {
        "documents": len(memory.documents),
        "tokens": memory.tokens,
        "chunks": len(memory),
        "chunk KV bytes": memory.nbytes,
        "chunk KV bytes in memory": sum(source.layer_bytes * stay for source, stay in held.items()),
        "chunk KV bytes passing through memory": sum(
            source.layer_bytes * min(STAGED_LAYERS, left) for source, left in passing.items()
        ),
        "bytes behind the chunks a question": suffixes,
        "chunk KV bytes from disk a token": sum(source.layer_bytes * left for source, left in passing.items()),
        "rows a question": rows * behind + question,
        "rows a token": 2 * rows + 1,
    }


def _converted_before(place: Place) -> Held:
    """Return what finds the text that a file of the same bytes was converted to, if it is in the collection."""
    try:
        store = place.open(read_only=True)
        known = store.listing(place.name) if store.has(place.name) else {}
    except (StoreError, OSError):  # there is none yet; if it is damaged, opening it to write says so
        known = {}

    def held(name: str, digest: str) -> Document | None:
        facts = known[name].source if name in known else {}
        if "converted" not in facts or facts.get("sha256") != digest:
            return None
        try:
            return store.read(place.name, [name]).documents[name]
        except StoreError:
            return None

    return held


def _belongs(source: object, paths: Iterable[str | Path]) -> bool:
    """Whether a document came from under one of the paths."""
    if not isinstance(source, str):
        return False
    places = [Path(printable(str(path))) for path in paths]
    return any(Path(source) == place or place in Path(source).parents for place in places)
