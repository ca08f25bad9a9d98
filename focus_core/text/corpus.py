"""Read documents from files, folders and standard input, lazily.

A document is an id, its text and free metadata. Text of any encoding is decoded, PDF, office files, HTML, books and
e-mail are converted; a file named by the user that holds no text is an error, one met inside a folder is left out and
reported. The module does not cut or tokenise.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from focus_core.errors import ConfigError, CorpusError, DocumentNotFoundError, EmptyCorpusError
from focus_core.files import is_store
from focus_core.text.converters import KINDS, Converter, kind_of
from focus_core.text.encodings import decode

STDIN = "-"
_SURROGATE = re.compile("[\ud800-\udfff]")
_PATH_LIKE = re.compile(r"(~|\.{0,2}[/\\]|[A-Za-z]:[/\\]).*|.*[/\\]|\S*[/\\]\S*|\S*\w\.[A-Za-z][A-Za-z0-9]{0,4}")
Skipped = Callable[[Path, str], None]
Held = Callable[[str, str], "Document | None"]


@dataclass(frozen=True)
class Document:
    """A text that memory can hold.

    Half a surrogate pair, which no encoding can write, is replaced by U+FFFD in id and text, with a warning; offsets
    stay what they were.

    Args:
        id: unique name; adding another document of the same id replaces it.
        text: its content.
        metadata: anything JSON can hold; carried along, never read by the model.
        source: facts of the file that the text came from (``path``, ``bytes``, ``sha256``, and the ``encoding`` or the
            media type ``converted``); no part of equality.
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


def read_documents(
    paths: Iterable[str | Path],
    *,
    skipped: Skipped = lambda path, why: None,
    strict: bool = False,
    held: Held = lambda name, digest: None,
) -> Iterator[Document]:
    """Yield one document a file; folders are walked in sorted order, hidden entries left out.

    Of converted documents with pages, slides or sheets ``metadata["page_starts"]`` is the first character of each. A
    name that is no text is written with ``\\xff``; its ``metadata["url"]`` leads to the file.

    Args:
        paths: files, folders, or ``-`` for standard input.
        skipped: called once with the path and the reason for each entry of a folder that cannot be read.
        strict: raise at the end if any was left out.
        held: returns the document that was made of a file of this id and SHA-256 before, so that it is not converted
            again; ``None`` if there is none.

    Raises:
        DocumentNotFoundError: a path does not exist.
        NotTextError: a file named in ``paths`` holds no text.
        CorpusError: one cannot be read, or ``strict`` and something was left out.
    """
    left_out: dict[Path, str] = {}

    def leave_out(path: Path, why: str) -> None:
        if path not in left_out:
            left_out[path] = why
            skipped(path, why)

    with Converter() as converter:
        names: dict[str, Path] = {}
        for path, named in _walk(paths, leave_out):
            try:
                document = _standard_input(converter) if path is None else _read(path, converter, held)
            except CorpusError as error:
                if path is None or named:
                    raise
                leave_out(path, str(error).removeprefix(f"{printable(str(path))} "))
                continue
            yield _distinct(document, path, names)
    if strict and left_out:
        path, why = next(iter(left_out.items()))
        raise CorpusError(
            f"{len(left_out)} of the entries cannot be read, the first {printable(str(path))} ({why}); leave them out "
            "yourself, or do not ask to be strict"
        )


def _walk(paths: Iterable[str | Path], leave_out: Skipped) -> Iterator[tuple[Path | None, bool]]:
    """Yield each file once, and whether it was named; ``None`` is standard input."""
    seen: set[Path | None] = set()
    for path in map(Path, paths):
        if str(path) == STDIN:
            found: list[Path | None] = [None]
        elif path.is_dir():
            found = [*_files(path, leave_out)]
        elif path.is_file() or path.is_fifo():  # the output of another command is a pipe in bash
            found = [path]
        else:
            raise DocumentNotFoundError(f"no file or folder at {printable(str(path))!r}; check the path")
        yield from ((file, file == path) for file in found if file not in seen)
        seen.update(found)


def _distinct(document: Document, path: Path | None, names: dict[str, Path]) -> Document:
    """Rename a document whose id another file has: ``a\\xff`` may be a name, or how another is written."""
    name, number = document.id, 1
    while name in names:
        number += 1
        name = f"{document.id}#{number}"
    names[name] = path or Path(STDIN)
    return document if name == document.id else replace(document, id=name)


def load_documents(
    paths: Iterable[str | Path], *, skipped: Skipped = lambda path, why: None, strict: bool = False
) -> list[Document]:
    """Read all of :func:`read_documents` that hold text.

    Raises:
        EmptyCorpusError: there is none.
    """
    paths = list(paths)
    found = read_documents(paths, skipped=skipped, strict=strict)
    documents = [document for document in found if document.text.strip()]
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
    """Return a string that two values share only if they are equal and of equal types; the order of keys is no part.

    Raises:
        ConfigError: a value contains itself.
    """
    try:
        return _canonical(value)
    except RecursionError as error:
        raise ConfigError(
            "metadata, or an option of a call, contain themselves or are nested too deeply; give plain values"
        ) from error


def _canonical(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{','.join(sorted(f'{_canonical(key)}:{_canonical(item)}' for key, item in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[{','.join(map(_canonical, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}[{','.join(sorted(map(_canonical, value)))}]"
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
        for name in folders:
            if (here / name).is_symlink():
                skipped(here / name, "it is a link to a folder; name it to read it")
        found += [here / name for name in names if not name.startswith(".") and _is_file(here / name, skipped)]
    return sorted(found)


def _is_file(path: Path, skipped: Skipped) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        skipped(path, f"cannot be read ({error.strerror})")
        return False
    if not stat.S_ISREG(mode):
        skipped(path, "it is no file but a pipe, socket or device")
    return stat.S_ISREG(mode)


def _read(path: Path, converter: Converter, held: Held) -> Document:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    name = printable(str(path))
    before = held(name, hashlib.sha256(data).hexdigest()) if kind_of(name, data) else None
    if before is not None:
        return before
    document = document_of(name, data, converter=converter)
    source = {"source": name} if name == str(path) else {"source": name, "url": path.absolute().as_uri()}
    return replace(document, metadata={**source, **document.metadata})


def document_of(name: str, data: bytes, *, kind: str | None = None, converter: Converter | None = None) -> Document:
    """Return the document that a file's bytes hold.

    Args:
        name: of the file; the document's id.
        data: its bytes.
        kind: its media type. ``None``: told by its name, or else by its first bytes.
        converter: used for what is no plain text. ``None``: one of its own.

    Raises:
        NotTextError: they hold no text, or cannot be converted.
        CorpusError: the converter is not installed.
    """
    kind = kind if kind in KINDS.values() else kind_of(name, data)
    facts: dict[str, Any] = {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if kind is None:
        text, encoding = decode(data, name)
        return Document(name, text, {}, {**facts, "encoding": encoding})
    if converter is None:
        with Converter() as converter:
            converted = converter.convert(data, kind, name)
    else:
        converted = converter.convert(data, kind, name)
    metadata = {} if converted.page_starts is None else {"page_starts": converted.page_starts}
    return Document(name, converted.text, metadata, {**facts, "converted": kind})


def _standard_input(converter: Converter) -> Document:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        return Document("stdin", sys.stdin.read(), {"source": STDIN})
    found = document_of("standard input", stream.read(), converter=converter)
    return replace(found, id="stdin", metadata={"source": STDIN, **found.metadata}, source={})


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
