"""Know documents that are no plain text, and have them converted by a process that is ended at its limits.

PDF, office files, HTML, books and e-mail are converted by kreuzberg (``focusllm[documents]``), whose parsers read what
strangers wrote: they run in :mod:`focus_core.text.conversion`, never in this process.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

import psutil

from focus_core.errors import ConfigError, CorpusError, NotTextError
from focus_core.text.encodings import decode

_OFFICE = "application/vnd.openxmlformats-officedocument."
_OPEN = "application/vnd.oasis.opendocument."
HTML = "text/html"
KINDS = {
    ".pdf": "application/pdf",
    ".docx": f"{_OFFICE}wordprocessingml.document",
    ".pptx": f"{_OFFICE}presentationml.presentation",
    ".xlsx": f"{_OFFICE}spreadsheetml.sheet",
    ".odt": f"{_OPEN}text",
    ".ods": f"{_OPEN}spreadsheet",
    ".doc": "application/msword",
    ".xls": "application/vnd.ms-excel",
    ".ppt": "application/vnd.ms-powerpoint",
    ".rtf": "application/rtf",
    ".epub": "application/epub+zip",
    ".eml": "message/rfc822",
    ".msg": "application/vnd.ms-outlook",
    ".html": HTML,
    ".htm": HTML,
    ".xhtml": HTML,
}
"""Media types of what is converted, by the ends of file names."""
_PACKED = ((b"word/document.xml", ".docx"), (b"ppt/presentation.xml", ".pptx"), (b"xl/workbook.xml", ".xlsx"))
_POLL = 0.05  # seconds between looks at a conversion's memory
_MOST = 1 << 29  # bytes of an answer


@dataclass(frozen=True)
class Converted:
    """A document's text.

    Args:
        text: without markup.
        page_starts: first character of each page, slide or sheet; ``None`` where there are none.
    """

    text: str
    page_starts: list[int] | None


def kind_of(name: str, data: bytes) -> str | None:
    """Return the media type of a document that must be converted, by its name or else its first bytes."""
    known = KINDS.get(PurePath(name).suffix.lower())
    if known is not None:
        return known
    if data.startswith(b"%PDF-"):
        return KINDS[".pdf"]
    if data.startswith(b"PK\x03\x04"):
        if data[30:58] == b"mimetypeapplication/epub+zip":
            return KINDS[".epub"]
        return next((KINDS[suffix] for part, suffix in _PACKED if part in data), None)
    return None


class Converter:
    """Converts documents one after the other in a process that lives as long as this, or until a limit.

    Args:
        seconds: most time for one document. ``None``: ``FOCUSLLM_CONVERT_SECONDS``, or 120.
        memory: most bytes for one. ``None``: ``FOCUSLLM_CONVERT_MEMORY`` (in GiB), or 2 GiB.

    Raises:
        ConfigError: a limit is no positive number.
    """

    def __init__(self, seconds: float | None = None, memory: int | None = None) -> None:
        self.seconds = _limit("FOCUSLLM_CONVERT_SECONDS", 120) if seconds is None else seconds
        self.memory = int(_limit("FOCUSLLM_CONVERT_MEMORY", 2) * 2**30) if memory is None else memory
        self._worker: _Worker | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def convert(self, data: bytes, kind: str, name: str) -> Converted:
        """Return a document's text.

        Args:
            data: its bytes.
            kind: its media type.
            name: for messages.

        Raises:
            NotTextError: it is damaged, locked, empty or dangerous, or took more than the limits.
            CorpusError: the converter is not installed.
        """
        if kind == HTML:
            data = decode(data, name, markup=True)[0].encode("utf-8", "replace")
        try:
            if self._worker is None:
                self._worker = _Worker(self.memory)
                self._greet(name)
            request = json.dumps({"kind": kind, "bytes": len(data), "seconds": self.seconds}).encode()
            answer = self._worker.ask(request + b"\n" + data, self.seconds, self.memory)
        except _StoppedError as stopped:
            self.close()
            raise NotTextError(f"{name} {stopped}") from None
        except BaseException:  # a process in the middle of a document is of no use for the next
            self.close()
            raise
        if "refused" in answer:
            raise NotTextError(f"{name} {answer['refused']}, as a zip bomb does; unpack it yourself if you trust it")
        if "error" in answer:
            raise NotTextError(f"{name} cannot be converted ({answer['error']}); check that it opens elsewhere")
        if not answer["text"].strip():
            raise NotTextError(f"{name} holds no text; pages that are pictures need OCR first")
        return Converted(answer["text"], answer["page_starts"])

    def _greet(self, name: str) -> None:
        assert self._worker is not None
        if "missing" in self._worker.ask(b"", 60 + self.seconds, sys.maxsize):
            self.close()
            raise CorpusError(f"{name} needs a converter; pip install 'focusllm[documents]'")


class _StoppedError(Exception):
    """A conversion was ended, or ended itself."""


class _Worker:
    """The process and a thread that waits for its answers."""

    def __init__(self, memory: int) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("conversion.py")), str(memory)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the one who waits
            env={**os.environ, "MALLOC_ARENA_MAX": "2", "PYTHONIOENCODING": "utf-8"},
        )

    def ask(self, request: bytes, seconds: float, memory: int) -> dict[str, Any]:
        """Send a request and return the answer; ends the process at a limit."""
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._exchange, args=(request, answers), daemon=True).start()
        until = time.monotonic() + seconds
        while True:
            try:
                answer = answers.get(timeout=_POLL)
                break
            except queue.Empty:
                pass
            if time.monotonic() > until:
                self.end()
                raise _StoppedError(
                    f"took more than {seconds:g} seconds to convert and was stopped; "
                    "FOCUSLLM_CONVERT_SECONDS allows more"
                )
            if self._held() > memory:
                self.end()
                raise _StoppedError(_too_large(memory))
        if not answer.endswith(b"\n"):
            self.end()
            code = self.process.returncode
            raise _StoppedError(
                f"ended its converter (exit code {code}), as one does that needs more than {memory / 2**30:.2g} GiB; "
                "FOCUSLLM_CONVERT_MEMORY allows more"
            )
        found: dict[str, Any] = json.loads(answer)
        return found

    def _exchange(self, request: bytes, answers: queue.SimpleQueue[bytes]) -> None:
        try:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(request)
            self.process.stdin.flush()
            answers.put(self.process.stdout.readline(_MOST))
        except (OSError, ValueError):  # it has ended, or was
            answers.put(b"")

    def _held(self) -> int:
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what it had not read
                pass


def _too_large(memory: int) -> str:
    return (
        f"took more than {memory / 2**30:.2g} GiB to convert and was stopped; FOCUSLLM_CONVERT_MEMORY (GiB) allows more"
    )


def _limit(name: str, default: float) -> float:
    said = os.environ.get(name)
    try:
        value = default if said is None else float(said)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number; got {said!r}")
    return value
