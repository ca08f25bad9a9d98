"""Commands that keep collections: index, list, show, remove, verify, prune, export, publish, import."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from focus_core.cli._shared import (
    Adapter,
    Base,
    ChunkSize,
    Device,
    Paths,
    Strict,
    app,
    note,
    open_engine,
    progress,
    skipped,
    tell_encodings,
)
from focus_core.errors import ConfigError, StoreError
from focus_core.files import is_store

if TYPE_CHECKING:
    from focus_core.store.places import Place

Name = Annotated[str | None, typer.Option(help="Of the collection.")]
Collection = Annotated[str, typer.Argument(help="Name of a collection, folder of a store, or address.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[
    Path | None, typer.Option("--memory", help="Folder of the store. [default: FOCUSLLM_STORE, or the user's own]")
]


@app.command()
def index(
    paths: Paths = None,
    name: Name = None,
    memory: Folder = None,
    sync: Annotated[bool, typer.Option(help="Take out documents whose files under PATHS have vanished.")] = False,
    strict: Strict = False,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    kv_format: Annotated[
        str,
        typer.Option(help="How chunk KV is written: base, int8 or int4; the same at every run."),
    ] = "base",
    ray: Annotated[
        str | None,
        typer.Option(help="Compute on a Ray cluster: auto, local (this machine's cores) or ray://HOST:PORT."),
    ] = None,
) -> None:
    """Read files and folders into a collection on disk; only what is new or has changed is computed.

    Stopped at any moment, the next run goes on from there.
    """
    from focus_core.session.cluster import RayEncoder
    from focus_core.session.corpus import index_paths

    if name is None and memory is None:
        raise ConfigError("give the collection a name: focusllm index PATH --name contracts")
    place = _place(name, memory)
    engine = open_engine(base, adapter, chunk_size, device)
    engine = engine.with_config(kv_format=kv_format) if kv_format != engine.config.kv_format else engine
    with progress("reading") as bar:
        report = index_paths(
            engine,
            place,
            paths or ["-"],
            sync=sync,
            progress=lambda done, total: bar(done, "", total),
            skipped=skipped,
            strict=strict,
            encode=RayEncoder(ray, base) if ray is not None else None,
        )
    tell_encodings(report.encodings)
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


@app.command(name="list")
def list_(memory: Folder = None, as_json: AsJson = False) -> None:
    """Show the collections of a store."""
    from focus_core.store.database import Store
    from focus_core.store.places import own_store

    folder = memory or own_store()
    found = Store(folder, read_only=True).collections() if is_store(folder) else []
    if as_json:
        print(json.dumps([asdict(info) for info in found]))
        return
    table = Table("name", "documents", "chunks", "chunk KV", "changed", box=None, header_style="dim")
    for info in found:
        changed = datetime.fromtimestamp(info.changed).isoformat(" ", "minutes")
        table.add_row(info.name, f"{info.documents:,}", f"{info.chunks:,}", decimal(info.nbytes), changed)
    if found:
        Console().print(table)
    else:
        note.print(f"no collections in {folder}", markup=False)


@app.command()
def show(name: Collection, memory: Folder = None, as_json: AsJson = False) -> None:
    """Show what a collection was made with, and its documents."""
    place = _existing(name, memory)
    store = place.open()
    info = store.counted(place.name)
    documents = store.listing(place.name)
    if as_json:
        rows = [{"id": one.id, "metadata": one.metadata, "source": one.source} for one in documents.values()]
        print(json.dumps({**asdict(info), "store": str(store.folder), "entries": rows}))
        return
    note.print(
        f"{info.name} in {store.folder}: {info.documents:,} documents, {info.chunks:,} chunks, {decimal(info.nbytes)}"
        f" of chunk KV, of base {str(info.facts.get('base'))[:12]} in {info.facts.get('dtype')}",
        markup=False,
    )
    for one in documents:
        print(one)


@app.command()
def remove(
    name: Collection,
    documents: Annotated[list[str] | None, typer.Argument(help="Ids; the whole collection if none is given.")] = None,
    memory: Folder = None,
) -> None:
    """Take documents, or all of a collection, out of a store; `focusllm prune` frees the space."""
    place = _existing(name, memory)
    store = place.open(read_only=False)
    if documents:
        store.remove(place.name, documents)
    else:
        store.drop(place.name)
    note.print(f"{len(documents)} documents removed" if documents else f"{place.name} removed", markup=False)


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="Of the collection, or a folder. [default: all]")] = None,
    memory: Folder = None,
    repair: Annotated[bool, typer.Option(help="Compute damaged and lost chunk KV again.")] = False,
    base: Base = None,
    device: Device = None,
) -> None:
    """Read every byte of a store and compare it with its checksums."""
    from focus_core.store.indexing import repair_collection
    from focus_core.store.places import Place, own_store

    place = _existing(name, memory) if name is not None else Place(memory or own_store())
    store = place.open(read_only=not repair)
    if repair:
        store.mend()
    names = [info.name for info in store.collections()] if name is None else [place.name]
    contents = {one: store.read(one) for one in names}
    if repair:
        engine = open_engine(base, "untrained", None, device)
        mended = sum(repair_collection(store, one, engine.encoder) for one in names)
        note.print(f"{mended} chunks computed again")
    wanted = {key for one in contents.values() for key, _ in one.chunks}
    bad = sorted(wanted & set(store.verify()))
    if bad:
        raise StoreError(
            f"{len(bad)} chunks of {store.folder} are damaged or lost ({', '.join(key[:12] for key in bad[:3])}); run "
            "focusllm verify --repair"
        )
    note.print(f"{len(names)} collections, {len(wanted)} chunks: all as they were written")


@app.command()
def prune(
    memory: Folder = None,
    older_than: Annotated[
        float, typer.Option(help="Hours since it was last used; a running `index` may need what is younger.")
    ] = 24.0,
) -> None:
    """Delete chunk KV that no collection refers to any more."""
    from focus_core.store.database import Store
    from focus_core.store.places import own_store

    folder = memory or own_store()
    if not is_store(folder):
        raise StoreError(f"no store in {folder}")
    note.print(f"{Store(folder).prune(older_than * 3600)} chunks deleted")


@app.command()
def export(
    name: Collection,
    file: Annotated[Path, typer.Argument(help="To write.")],
    memory: Folder = None,
) -> None:
    """Write a collection, chunk KV and all, to one file that another machine can import."""
    from focus_core.store.portable import export_collection

    note.print(f"{_written(name, memory, export_collection, file)} in {file}", markup=False)


@app.command()
def publish(
    name: Collection,
    address: Annotated[
        str, typer.Argument(help="s3://BUCKET/PATH, file:///SHARE/PATH, or another that fsspec writes.")
    ],
    memory: Folder = None,
) -> None:
    """Write a collection to an address, for machines that read it from there with --memory ADDRESS."""
    from focus_core.store.published import publish_collection

    note.print(f"{_written(name, memory, publish_collection, address)} at {address}", markup=False)


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="Written by `focusllm export`.")],
    name: Name = None,
    memory: Folder = None,
) -> None:
    """Read a collection from a file into a store; nothing is computed."""
    from focus_core.store.database import Store
    from focus_core.store.places import own_store
    from focus_core.store.portable import import_collection

    store = Store(memory or own_store())
    with progress("reading") as bar:
        info = import_collection(store, file, name, lambda done, total: bar(done, "", total))
    note.print(f"{info.name} in {store.folder}", markup=False)


def decimal(size: float) -> str:
    """Return ``1.2 GB`` for bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _existing(name: str, memory: Path | None) -> Place:
    from focus_core.store.places import Place, find_place

    place = Place(memory, name) if memory is not None else find_place(name)
    place.open().collection(place.name)
    return place


def _written(name: str, memory: Path | None, write: Callable[..., object], target: Path | str) -> str:
    """Write a collection to a file or an address, showing how far it is; return the collection's name."""
    place = _existing(name, memory)
    with progress("writing") as bar:
        write(place.open(), place.name, target, lambda done, total: bar(done, "", total))
    return place.name


def _place(name: str | None, memory: Path | None) -> Place:
    from focus_core.store.migration import DEFAULT_NAME
    from focus_core.store.places import Place, own_store

    return Place(memory or own_store(), name or DEFAULT_NAME)
