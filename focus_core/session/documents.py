"""Turn framework documents into core documents, and answers' sources into plain values.

Ids are unique within a call, and ``document.text[start:end]`` of every source is exactly the cited text. No framework
is imported here: documents and nodes are known by their attributes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from focus_core.answers import Answer
from focus_core.errors import ConfigError, EmptyCorpusError
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document, canonical, distinct, load_documents, named_path

MemoryFilter = Collection[str] | Mapping[str, Any] | Callable[[Document], bool]
"""Ids to keep, metadata that must be equal, or a function that tells whether a document is kept."""


def to_documents(
    documents: Any, read: Callable[[str | Path], list[Document]] = lambda path: load_documents([path])
) -> list[Document]:
    """Turn what users hand over into core documents.

    Args:
        documents: a path (str or Path), a text in a :class:`~focus_core.text.corpus.Document`, framework documents or
            nodes (anything with ``page_content`` or ``text``), a memory (its documents), or several. A plain string is
            a path if it names one, else a text; alone it must not look like a path that is not there. What holds no
            text is left out.
        read: reads the files of a path.

    Returns:
        Documents with different ids: of two with one id, the second is called ``id#2`` unless it is the same text with
        the same metadata. They share nothing that can change with what was handed over.

    Raises:
        ConfigError: an item is none of these.
        DocumentNotFoundError: a string alone looks like a path, and nothing is there.
        EmptyCorpusError: there are items, and none holds text.
    """
    alone = (
        isinstance(documents, (str, Path, Document, Memory))
        or not isinstance(documents, Iterable)
        or _is_framework(documents)
    )
    path = named_path(documents) if isinstance(documents, str) else None
    several: Sequence[Any] = [path or documents] if alone else list(documents)
    found: list[Document] = []
    for item in several:
        if isinstance(item, Document):
            found.append(replace(item, metadata=_copied(item.metadata)))
        elif isinstance(item, Memory):
            found.extend(item.documents)
        elif isinstance(item, Path) or (isinstance(item, str) and _is_path(item)):
            found.extend(read(item))
        elif isinstance(item, str):
            found.append(Document(f"document-{len(found)}", item))
        else:
            found.append(_from_framework(item, len(found)))
    texts = written(found)
    if found and not texts:
        raise EmptyCorpusError(f"document {found[0].id!r} is empty; give one that holds text")
    return distinct(texts, ())


def written(documents: Iterable[Any]) -> list[Any]:
    """Leave out texts, documents, framework documents and nodes that hold no text."""
    texts = [(item, item if isinstance(item, str) else _text_of(item)) for item in documents]
    return [item for item, text in texts if not isinstance(text, str) or text.strip()]


def fingerprint(documents: Iterable[Document]) -> str:
    """Return a hash of ids, texts and metadata."""
    digest = hashlib.sha256()
    for document in documents:
        parts = f"{document.id}\0{document.text}\0{canonical(document.metadata)}\0"
        digest.update(parts.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def kept_ids(documents: Iterable[Document], wanted: MemoryFilter) -> list[str]:
    """Return the ids that a filter keeps.

    Raises:
        ConfigError: the filter is none, or names an id that is not there.
    """
    documents = list(documents)
    if callable(wanted):
        return [one.id for one in documents if wanted(replace(one, metadata=_copied(one.metadata)))]
    if isinstance(wanted, Mapping):
        items, absent = wanted.items(), object()
        return [one.id for one in documents if all(one.metadata.get(key, absent) == value for key, value in items)]
    if isinstance(wanted, str) or not isinstance(wanted, Collection):
        raise ConfigError(f"memory_filter must be ids, a metadata dict or a function; got {wanted!r}")
    unknown = sorted(set(wanted) - {document.id for document in documents})
    if unknown:
        raise ConfigError(f"memory_filter names {unknown[0]!r}, which is not in memory")
    return [document.id for document in documents if document.id in set(wanted)]


def keeps(wanted: MemoryFilter, document: Document) -> bool:
    """Whether a filter keeps a document."""
    if callable(wanted) or isinstance(wanted, Mapping):
        return bool(kept_ids([document], wanted))
    return document.id in wanted


def source_dicts(answer: Answer) -> list[dict[str, Any]]:
    """Return an answer's documents as plain dictionaries, best first, with exact spans."""
    return [asdict(item) for item in answer.evidence]


def _is_path(text: str) -> bool:
    try:
        return len(text) < 1024 and "\n" not in text and Path(text).exists()
    except (OSError, ValueError):
        return False


def _is_framework(item: Any) -> bool:
    return any(hasattr(item, name) for name in ("page_content", "get_content", "text"))


def _from_framework(item: Any, number: int) -> Document:
    text = _text_of(item)
    if not isinstance(text, str):
        raise ConfigError(f"a document must be a path, a text or a framework document; got {type(item).__name__}")
    metadata = dict(getattr(item, "metadata", None) or {})
    return Document(own_name(item) or f"document-{number}", text, _copied(metadata))


def own_name(item: Any) -> str | None:
    """Return the id of a document, or a framework document's source where it has no id."""
    metadata = getattr(item, "metadata", None) or {}
    own = getattr(item, "id", None) or getattr(item, "node_id", None) or metadata.get("source")
    return str(own) if own else None


def _text_of(item: Any) -> Any:
    text = getattr(item, "page_content", None)
    if text is None and callable(getattr(item, "get_content", None)):
        text = item.get_content()
    return text if text is not None else getattr(item, "text", None)


def _copied(metadata: dict[str, Any]) -> dict[str, Any]:
    if all(value is None or isinstance(value, (str, int, float)) for value in metadata.values()):
        return dict(metadata)
    try:
        return copy.deepcopy(metadata)
    except Exception:  # a value that cannot be copied is shared
        return dict(metadata)
