"""Commands that keep collections: index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from focus_core.cli._shared import Adapter, Base, ChunkSize, Device, Paths, app, note, open_engine, progress, skipped
from focus_core.errors import ConfigError

if TYPE_CHECKING:
    from focus_core.store.places import Place

Name = Annotated[str | None, typer.Option(help="Of the collection.")]
Folder = Annotated[
    Path | None, typer.Option("--memory", help="Folder of the store. [default: FOCUSLLM_STORE, or the user's own]")
]


@app.command()
def index(
    paths: Paths = None,
    name: Name = None,
    memory: Folder = None,
    sync: Annotated[bool, typer.Option(help="Take out documents whose files under PATHS have vanished.")] = False,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
) -> None:
    """Read files and folders into a collection on disk; only what is new or has changed is computed.

    Stopped at any moment, the next run goes on from there.
    """
    from focus_core.session.corpus import index_paths

    if name is None and memory is None:
        raise ConfigError("give the collection a name: focusllm index PATH --name contracts")
    place = _place(name, memory)
    engine = open_engine(base, adapter, chunk_size, device)
    with progress("reading") as bar:
        report = index_paths(
            engine,
            place,
            paths or ["-"],
            sync=sync,
            progress=lambda done, total: bar(done, "", total),
            skipped=skipped,
        )
    counts = {"new": report.added, "changed": report.changed, "removed": report.removed, "unchanged": report.unchanged}
    said = ", ".join(f"{len(names)} {word}" for word, names in counts.items() if names)
    note.print(f"{said or 'nothing new'}; {place.name} in {place.folder}", markup=False)
    if report.vanished:
        note.print(
            f"{len(report.vanished)} documents are no longer there ({', '.join(report.vanished[:3])}"
            f"{', ...' if len(report.vanished) > 3 else ''}); --sync takes them out",
            style="dim",
            markup=False,
        )


def _place(name: str | None, memory: Path | None) -> Place:
    from focus_core.store.migration import DEFAULT_NAME
    from focus_core.store.places import Place, own_store

    return Place(memory or own_store(), name or DEFAULT_NAME)
