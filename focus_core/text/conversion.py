"""Convert documents to text in a process of its own, which :mod:`focus_core.text.converters` starts, watches and ends.

Run as a file. Each line on standard input is ``{"kind", "bytes", "seconds"}``, the document's bytes behind it; each
line of the answer ``{"text", "page_starts"}``, ``{"error"}`` or ``{"refused"}``. Nothing of focusllm is imported,
nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import sys
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

_ENTRIES, _UNPACKED, _RATIO = 20_000, 1 << 29, 200
"""Most files of an archive, bytes that they unpack to, and bytes for each packed one (of more than 16 MiB)."""


def main(memory: int) -> None:
    """Answer requests until there are no more.

    Args:
        memory: most bytes that a conversion may take beside what the converter itself does.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    requests = sys.stdin.buffer
    try:
        import kreuzberg
    except ImportError as error:
        _say(answers, {"missing": str(error)})
        return
    _bound(memory)
    _say(answers, {"ready": True})
    for line in requests:
        request = json.loads(line)
        data = requests.read(request["bytes"])
        _alarm(request["seconds"] + 5)
        try:
            answer = _converted(kreuzberg, data, request["kind"])
        except MemoryError:
            raise
        except Exception as error:
            answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        _alarm(0)
        _say(answers, answer)


def _alarm(seconds: float) -> None:
    """End this process after some time even if the one that watches it has died (POSIX); 0 for never."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _say(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _bound(memory: int) -> None:
    """Let the system refuse memory above the limit, where it can (Linux)."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:  # noqa: PTH123 (pathlib is not needed else)
        held = int(file.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))


def _converted(kreuzberg: Any, data: bytes, kind: str) -> dict[str, Any]:
    bomb = _bomb(data) if data.startswith(b"PK") else None
    if bomb is not None:
        return {"refused": bomb}
    mark = f"page-{secrets.token_hex(8)}-"
    config = kreuzberg.ExtractionConfig(
        use_cache=False,
        disable_ocr=True,
        enable_quality_processing=False,
        pages=kreuzberg.PageConfig(
            extract_pages=True, insert_page_markers=True, marker_format=f"\n\n{mark}{{page_num}}\n\n"
        ),
        concurrency=kreuzberg.ConcurrencyConfig(max_threads=1),
    )
    result = kreuzberg.extract_bytes_sync(data, kind, config=config)
    pages = _pages(result, mark)
    if pages is None:
        return {"text": _lines(result.content), "page_starts": None}
    starts, at = [], 0
    for page in pages:
        starts.append(at)
        at += len(page) + 2
    return {"text": "\n\n".join(pages), "page_starts": starts}


def _bomb(data: bytes) -> str | None:
    """Return why an archive is refused, by what it says of itself; what lies is stopped by the limits."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > _ENTRIES:
        return f"packs {len(entries):,} files, more than {_ENTRIES:,}"
    if unpacked > _UNPACKED or unpacked > max(1 << 24, _RATIO * len(data)):
        return f"unpacks from {len(data):,} bytes to {unpacked:,}"
    return None


def _pages(result: Any, mark: str) -> list[str] | None:
    """Return the text of each page, slide or sheet; ``None`` for what has none.

    The converter's whole text holds tables of a PDF a second time, so that pages are taken one by one.
    """
    sheets = result.metadata.get("sheet_names")
    if sheets:
        return _sheets(sheets, result.tables)
    numbered = {page["page_number"]: page["content"] for page in result.pages or []}
    if any(text.strip() for text in numbered.values()):
        return [_lines(numbered.get(number, "")) for number in range(1, max(numbered) + 1)]
    if mark not in result.content:
        return None
    before, *parts = result.content.split(mark)
    numbered = {}
    for part in parts:
        number, _, text = part.partition("\n")
        numbered[int(number)] = _lines(text.strip("\n"))
    pages = [numbered.get(number, "") for number in range(1, max(numbered) + 1)]
    pages[0] = before.strip("\n") + pages[0]
    return pages


def _sheets(names: Sequence[str], tables: Sequence[Any]) -> list[str]:
    """Return each sheet's name and cells, a line a row, tabs between cells."""
    pages = [[name] for name in names]
    for table in tables:
        if 0 < table.page_number <= len(pages):
            pages[table.page_number - 1] += ["\t".join(map(str, row)) for row in table.cells]
    return ["\n".join(lines) for lines in pages]


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
