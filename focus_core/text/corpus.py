"""Read documents from files, folders and standard input, lazily.

A document is an id, its text and free metadata. Only text is read (UTF-8): a binary file named by the user is an error,
one met inside a folder is skipped and reported. The module does not cut or tokenise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focus_core.errors import DocumentNotFoundError, EmptyCorpusError, NotTextError

STDIN = "-"


@dataclass(frozen=True)
class Document:
    """A text that memory can hold.

    Args:
        id: unique name; adding another document of the same id replaces it.
        text: its content.
        metadata: anything JSON can hold; carried along, never read by the model.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


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
            for file in sorted(path.rglob("*")):
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
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
    return Document(str(path), text, {"source": str(path)})
