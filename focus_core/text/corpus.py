"""Read documents from files, folders and standard input, lazily.

A document is an id, its text and free metadata. Only text is read (UTF-8): a binary file named by the user is an error,
one met inside a folder is skipped and reported. The module does not cut or tokenise.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from focus_core.errors import DocumentNotFoundError, EmptyCorpusError, NotTextError
from focus_core.files import is_store

STDIN = "-"


@dataclass(frozen=True)
class Document:
    """A text that memory can hold.

    Args:
        id: unique name; adding another document of the same id replaces it.
        text: its content.
        metadata: anything JSON can hold; carried along, never read by the model.
        source: facts of the file that the text came from (``path``, ``bytes``, ``sha256``); no part of equality.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def text_sum(self) -> bytes:
        """Checksum of the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()


def read_documents(
    paths: Iterable[str | Path], *, skipped: Callable[[Path, str], None] = lambda path, why: None
) -> Iterator[Document]:
    """Yield one document a file; folders are walked in sorted order, hidden entries left out.

    Args:
        paths: files, folders, or ``-`` for standard input.
        skipped: called with the path and the reason for each file of a folder that is not text.

    Raises:
        DocumentNotFoundError: a path does not exist.
        NotTextError: a file named in ``paths`` is not UTF-8 text.
    """
    for path in paths:
        if str(path) == STDIN:
            yield Document("stdin", sys.stdin.read(), {"source": STDIN})
            continue
        path = Path(path)
        if path.is_dir():
            for file in sorted(_files(path, skipped)):
                try:
                    yield _read(file)
                except NotTextError as error:
                    skipped(file, str(error))
        elif path.is_file():
            yield _read(path)
        else:
            raise DocumentNotFoundError(f"no file or folder at {str(path)!r}; check the path")


def load_documents(
    paths: Iterable[str | Path], *, skipped: Callable[[Path, str], None] = lambda path, why: None
) -> list[Document]:
    """Read all of :func:`read_documents` that hold text.

    Raises:
        EmptyCorpusError: there is none.
    """
    paths = list(paths)
    documents = [document for document in read_documents(paths, skipped=skipped) if document.text.strip()]
    if not documents:
        raise EmptyCorpusError(
            f"no text found in {', '.join(map(str, paths)) or 'no paths'}; name files that hold text"
        )
    return documents


def distinct(documents: Iterable[Document], others: Iterable[Document]) -> list[Document]:
    """Rename documents whose id another one has, and leave out what ``others`` hold already.

    Documents are the same if their texts and metadata are.
    """
    known = {document.id: document for document in others}
    found: list[Document] = []
    for document in documents:
        name, number = document.id, 1
        while name in known and not _same(known[name], document):
            number += 1
            name = f"{document.id}#{number}"
        if name not in known:
            known[name] = document
            found.append(document if name == document.id else replace(document, id=name))
    return found


def _same(one: Document, other: Document) -> bool:
    return one.text == other.text and canonical(one.metadata) == canonical(other.metadata)


def canonical(value: Any) -> str:
    """Return a string that two values share only if they are equal and of equal types; the order of keys is no part."""
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{canonical(key)}:{canonical(item)}' for key, item in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[{','.join(map(canonical, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}[{','.join(sorted(map(canonical, value)))}]"
    if value is None or isinstance(value, (str, bytes, bool, int, float, complex)):
        return f"{type(value).__name__} {value!r}"
    try:  # an object's repr may leave parts out
        return f"{type(value).__name__} {hashlib.sha256(pickle.dumps(value)).hexdigest()}"
    except Exception:  # whatever its author chose
        return f"{type(value).__name__} {value!r}"


def _files(folder: Path, skipped: Callable[[Path, str], None]) -> Iterator[Path]:
    """Yield the files under a folder, without hidden ones and without what focusllm itself has saved there."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if is_store(here):
            skipped(here, "it holds saved memory, not documents; read it with --memory")
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (here / name for name in files if not name.startswith(".") and (here / name).is_file())


def _read(path: Path) -> Document:
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        raise NotTextError(f"{path} holds binary data; convert it to text first (PDF and office files: `markitdown`)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(
            f"{path} is not UTF-8 text (byte {error.start}: 0x{data[error.start]:02x}); convert it to UTF-8 first"
        ) from error
    name = printable(str(path))
    facts = {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return Document(name, text, {"source": name}, facts)


def printable(name: str) -> str:
    """Return a file's name with bytes that are no text written as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
