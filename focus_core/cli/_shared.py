"""What every command shares: the app, common options, progress, and opening engines and memories."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from focus_core.errors import ConfigError, CorpusError

app = typer.Typer(
    help="Ask questions over a whole corpus: every chunk is read, none is retrieved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Replace control characters: a document must not move the cursor or rename the window."""
    return _CONTROL.sub("\ufffd", text)


class _Notes(Console):
    """What goes to standard error: no markup in it, lines as long as they are, so that file names stay whole."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, texts without control characters."""
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)


note = _Notes(stderr=True, highlight=False, markup=False, soft_wrap=True)

Paths = Annotated[list[str] | None, typer.Argument(help="Files and folders; - is standard input.")]
Base = Annotated[
    str | None,
    typer.Option(help="A name of `focusllm bases`, hub name, folder or .gguf file. [default: installed one]"),
]
Adapter = Annotated[str | None, typer.Option(help="Adapter folder or hub name, or 'untrained'. [default: shipped one]")]
OtherBase = Annotated[bool, typer.Option(help="Let the adapter serve another base than its own, if the shapes fit.")]
Strict = Annotated[bool, typer.Option("--strict", help="Make it an error if a file under PATHS is left out.")]
SavedMemory = Annotated[
    str | None, typer.Option("--memory", help="What was indexed: the name of a collection, a folder, or an address.")
]
MemoryBudget = Annotated[
    str | None, typer.Option(help="Most memory for chunk KV, such as 4GiB; the rest is read from disk. [default: most]")
]
ChunkSize = Annotated[int | None, typer.Option(help="Most tokens of a chunk. [default: the adapter's]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps. [default: the fastest there is]")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of the answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
ChunkTopP = Annotated[
    float | None,
    typer.Option(help="Answer from the chunks with this share of the attention; 1 for all. [default: the adapter's]"),
]
Reread = Annotated[
    int | None,
    typer.Option(help="Read this many chunks whole, those with most attention; 0 for none. [default: the adapter's]"),
]
RereadTokens = Annotated[int, typer.Option(help="Most tokens of the chunks that are read whole.")]
RereadWay = Annotated[
    str, typer.Option(help="run: their tokens in front of the question. moved: their chunk KV as it is.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]


def open_engine(
    base: str | None, adapter: str | None, chunk_size: int | None, device: str | None, *, other_base: bool = False
) -> Any:
    with waiting("loading the model"):
        from focus_core.engine import FocusEngine

        return FocusEngine.from_pretrained(
            base,
            adapter,
            chunk_size=chunk_size,
            device=device,
            other_base=other_base,
            notice=lambda text: note.print(text),
        )


def join(engine: Any) -> Any:
    """Share chunks with the other processes that torchrun or accelerate started; the first one alone speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return engine
    from focus_core.method.ranks import Ranks

    ranks = Ranks()
    if ranks.rank:
        sys.stdout, note.quiet = Path(os.devnull).open("w", encoding="utf-8"), True  # noqa: SIM115 (until the end)
    return engine.with_ranks(ranks)


def open_memory(engine: Any, paths: list[str], place: str | None, *, strict: bool = False) -> Any:
    """Load a saved memory if one is named, and read ``paths`` beside it; nothing is written."""
    from focus_core.session.engines import beside
    from focus_core.text.corpus import load_documents

    if not paths and place is None and not sys.stdin.isatty():
        paths = ["-"]
    documents = load_documents(paths, skipped=skipped, strict=strict) if paths else []
    tell_encodings({one.id: one.source.get("encoding", "") for one in documents})
    if place is None and not documents:
        raise CorpusError("nothing to read; name files or folders, or a --memory made by `focusllm index`")
    memory = None
    if place is not None:
        with progress("loading memory") as bar:
            memory = engine.load_memory(place, progress=lambda done, total: bar(done, "", total))
    if memory is None or documents:
        with progress("reading") as bar:
            held = beside(engine, memory, documents, progress=lambda done, total: bar(done, "", total))
        memory = held.memory
    return memory


def skipped(path: Path, why: str) -> None:
    from focus_core.text.corpus import printable as shown

    note.print(f"left out {shown(str(path))}: {why}", style="dim")


def tell_encodings(encodings: Mapping[str, str]) -> None:
    """Say which files were read in an encoding that they do not name themselves."""
    guessed: dict[str, list[str]] = {}
    for name, encoding in encodings.items():
        if encoding and not encoding.startswith("utf"):
            guessed.setdefault(encoding, []).append(name)
    for encoding, names in guessed.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        note.print(f"no UTF-8, read as {encoding}: {', '.join(names[:3])}{more}", style="dim")


def size_of(text: str | None) -> int | None:
    """Return the bytes that ``4GiB``, ``500MB`` or ``1000000`` means."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None:
        raise ConfigError(f"cannot read the size {text!r}; write it like 4GiB or 500MB")
    number, unit, binary = found.groups()
    return int(float(number) * float((1024 if binary else 1000) ** " kmgt".index(unit or " ")))


def numbers(text: str) -> list[int]:
    thousands = {"k": 1_000, "m": 1_000_000}
    try:
        parts = [part.strip().lower() for part in text.split(",")]
        return [round(float(part[:-1]) * thousands[part[-1]]) if part[-1] in thousands else int(part) for part in parts]
    except (ValueError, IndexError) as error:
        raise ConfigError(f"cannot read the numbers {text!r}; write them like 1k,4000 or 1m") from error


@contextmanager
def waiting(text: str) -> Iterator[None]:
    if not note.is_terminal:
        yield
        return
    with note.status(Text(text)):
        yield


@contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[extra]}", markup=False)]
    with Progress(*columns, console=note, transient=True, disable=not note.is_terminal) as bar:
        task = bar.add_task(text, total=total, extra="")

        def update(done: int, extra: str, total: int | None = None) -> None:
            if total is not None:
                bar.update(task, total=total)
            bar.update(task, completed=done, extra=extra)

        yield update


@contextmanager
def transfer(text: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback of bytes done and in all; the bar comes with its first call."""
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    live = note.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=note, transient=True, disable=not live) as bar:

        def update(done: int, total: int) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task(text, total=total)
            bar.update(task, completed=done, total=total)
            if not live:
                note.print(f"{text}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

        yield update
