"""Read documents from files, folders and standard input, lazily.

A document is an id, its text and free metadata. Only text is read (UTF-8, or UTF-16 and UTF-32 with their mark): a
file named by the user that is none is an error, one met inside a folder is skipped and reported. The module does not
cut or tokenise.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from focus_core.errors import ConfigError, CorpusError, DocumentNotFoundError, EmptyCorpusError, NotTextError
from focus_core.files import is_store

STDIN = "-"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = (  # longest first: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PATH_LIKE = re.compile(r"(~|\.{0,2}[/\\]|[A-Za-z]:[/\\]).*|.*[/\\]|\S*[/\\]\S*|\S*\w\.[A-Za-z][A-Za-z0-9]{0,4}")
Skipped = Callable[[Path, str], None]


@dataclass(frozen=True)
class Document:
    """A text that memory can hold.

    Half a surrogate pair, which no encoding can write, is replaced by U+FFFD in id and text, with a warning; offsets
    stay what they were.

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

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            value = getattr(self, name)
            if isinstance(value, str) and _SURROGATE.search(value):
                object.__setattr__(self, name, read_well_formed(value, f"the {name} of document {self.id!r}"))

    @property
    def text_sum(self) -> bytes:
        """Checksum of the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()


def well_formed(text: str) -> str:
    """Replace each lone surrogate by U+FFFD: as many characters, and every encoding can write them."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def read_well_formed(text: str, name: str = "a text") -> str:
    """Do what :func:`well_formed` does, with a warning where anything is replaced."""
    replaced = well_formed(text)
    if replaced is not text and replaced != text:
        warnings.warn(f"{name} holds half a surrogate pair, which is no character; it is read as U+FFFD", stacklevel=4)
    return replaced


def named_path(text: str) -> Path | None:
    """Return the path that a string names, ``~`` expanded, or ``None`` where it is a text.

    Raises:
        DocumentNotFoundError: it looks like a path, and nothing is there.
    """
    if "\n" in text or len(text) > 1024:
        return None
    try:
        path = Path(text).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError):  # no name that this system could have
        return None
    if _PATH_LIKE.fullmatch(text.strip()):
        raise DocumentNotFoundError(
            f"no file or folder at {text!r}; check the path (a text is given in a list, or as a Document)"
        )
    return None


def read_documents(paths: Iterable[str | Path], *, skipped: Skipped = lambda path, why: None) -> Iterator[Document]:
    """Yield one document a file; folders are walked in sorted order, hidden entries left out.

    Args:
        paths: files, folders, or ``-`` for standard input.
        skipped: called with the path and the reason for each entry of a folder that cannot be read as text.

    Raises:
        DocumentNotFoundError: a path does not exist.
        NotTextError: a file named in ``paths`` is no text.
        CorpusError: one cannot be read.
    """
    for path in paths:
        if str(path) == STDIN:
            yield Document("stdin", _standard_input(), {"source": STDIN})
            continue
        path = Path(path)
        if path.is_dir():
            for file in _files(path, skipped):
                try:
                    yield _read(file)
                except CorpusError as error:
                    skipped(file, str(error))
        elif path.is_file() or path.is_fifo():  # the output of another command is a pipe in bash
            yield _read(path)
        else:
            raise DocumentNotFoundError(f"no file or folder at {str(path)!r}; check the path")


def load_documents(paths: Iterable[str | Path], *, skipped: Skipped = lambda path, why: None) -> list[Document]:
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


def _files(folder: Path, skipped: Skipped) -> list[Path]:
    """Return the files below a folder, sorted, without hidden entries and saved memories."""

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise CorpusError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
        skipped(Path(error.filename), f"cannot be read ({error.strerror})")

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(place)
        if is_store(here):
            skipped(here, "it holds saved memory, not documents; read it with --memory")
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [here / name for name in names if not name.startswith(".")]
    return sorted(file for file in found if _is_file(file, skipped))


def _is_file(path: Path, skipped: Skipped) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a folder that may be listed and not entered
        skipped(path, f"cannot be read ({error.strerror})")
        return False


def _read(path: Path) -> Document:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    name = printable(str(path))
    facts = {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return Document(name, _text(data, name), {"source": name}, facts)


def _standard_input() -> str:
    stream = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if stream is None else _text(stream.read(), "standard input")


def _text(data: bytes, name: str) -> str:
    """Decode a file's bytes; ``name`` is for messages."""
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in data[:8192]:
        raise NotTextError(f"{name} holds binary data; convert it to text first (PDF and office files: `markitdown`)")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise NotTextError(
            f"{name} is not {kind} text (byte {error.start}: 0x{data[error.start]:02x}); convert it to UTF-8 first"
        ) from error


def printable(name: str) -> str:
    """Return a file's name with bytes that are no text written as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


Documents = Document | str | Path | Iterable[Document | str | Path]
"""What a reader of documents takes: documents, texts and paths, one or many."""


def as_documents(documents: Documents) -> list[Document]:
    """Turn texts, paths and documents, one or many, into a list of documents.

    A string alone is the path of a file or folder if there is one, else a text; in a list it is a text.

    Raises:
        DocumentNotFoundError: a string alone looks like a path, and nothing is there.
    """
    if isinstance(documents, str):
        documents = named_path(documents) or documents
    several = [documents] if isinstance(documents, (Document, str, Path)) else list(documents)
    found: list[Document] = []
    for item in several:
        if isinstance(item, Document):
            found.append(item)
        elif isinstance(item, Path):
            found.extend(load_documents([item]))
        elif isinstance(item, str):
            found.append(Document(f"text-{len(found)}", item))
        else:
            raise ConfigError(f"a document must be a Document, a text or a Path; got {type(item).__name__}")
    return found
