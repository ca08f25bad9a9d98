"""Write files so that they are there whole or not at all, and tell whether they have changed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CATALOGUE = "catalogue.sqlite"
"""The file that makes a folder a store; folders that hold one are never read as documents."""

_UNSURE = 2_000_000_000  # nanoseconds in which a second change may leave size and time as they are


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there takes its place, whole and on disk, or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105 (tests record the calls of os)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has its bytes."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries: without it a power cut may undo a rename."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_store(folder: Path) -> bool:
    """Whether a folder holds saved memory, of this version or an earlier one."""
    return any((folder / name).is_file() for name in (CATALOGUE, "memory.json", "index.sqlite"))


def file_facts(path: str | Path) -> tuple[Any, ...]:
    """Return what differs once a file, or a file of a folder, has changed: names, sizes, times, not contents.

    Of a file that was written a moment ago the content counts too. Hidden entries of a folder are left out, as reading
    leaves them out; what is not there has no facts.
    """
    return tuple(_facts(file) for file in _files(Path(path)))


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _facts(file: Path) -> tuple[Any, ...]:
    try:
        found = file.stat()
        recent = time.time_ns() - found.st_mtime_ns < _UNSURE and file.is_file()
        content = hashlib.sha256(file.read_bytes()).hexdigest() if recent else None
    except OSError:
        return (str(file),)
    return str(file), found.st_mtime_ns, found.st_size, found.st_ino, content
