"""Write files so that they are there whole or not at all, and tell whether they have changed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_UNSURE = 2_000_000_000  # nanoseconds in which a second change may leave size and time as they are


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary file, fsync, rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
