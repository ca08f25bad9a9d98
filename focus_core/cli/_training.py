"""Commands that train: train, export-adapter."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from focus_core.cli._shared import Base, Device, app, note, progress


@app.command()
def train(
    data: Annotated[list[Path], typer.Option(help="Text or JSON-lines files and folders; may be repeated.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, log and adapter.")],
    base: Base = None,
    init: Annotated[Path | None, typer.Option(help="Adapter folder to start from.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with TrainConfig settings.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the whole schedule.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the example stream.")] = None,
    chunk_size: Annotated[int, typer.Option(help="Chunk size the adapter will be served with.")] = 512,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after this long; run again to go on.")] = None,
    compact: Annotated[bool, typer.Option(help="Save the adapter as int8 differences.")] = False,
    device: Device = None,
) -> None:
    """Train an adapter for a base; run it again with the same settings to resume."""
    from focus_core.config import TrainConfig
    from focus_core.hub import load_base
    from focus_core.training.adapter import train_adapter
    from focus_core.training.loop import StepReport

    values = json.loads(config.read_text()) if config else {}
    given = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    settings = TrainConfig.from_dict(values | {name: value for name, value in given.items() if value is not None})
    loaded = load_base(base, device=device, notice=note.print)
    end = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
    losses: list[float] = []
    with progress("training", settings.steps) as bar:

        def report(step: StepReport) -> None:
            losses.append(step.loss)
            recent = sum(losses[-20:]) / len(losses[-20:])
            bar(step.step, f"loss {recent:.3f}  {step.tokens / max(step.seconds, 1e-9):,.0f} tokens/s")

        folder = train_adapter(
            loaded,
            data,
            output,
            settings,
            init=init,
            chunk_size=chunk_size,
            compact=compact,
            report=report,
            stop=partial(_is_past, end),
        )
    note.print(f"adapter in {folder}; use it with --adapter {folder}")


@app.command(name="export-adapter")
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that training wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for the compact adapter.")],
    base: Base = None,
    data: Annotated[list[Path] | None, typer.Option(help="Texts not trained on, to measure the loss with.")] = None,
    examples: Annotated[int, typer.Option(help="Examples drawn from --data.")] = 64,
    config: Annotated[Path | None, typer.Option(help="JSON file with TrainConfig settings of the examples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the examples.")] = None,
    device: Device = None,
) -> None:
    """Write an adapter as int8 differences from its base, a quarter of the size, and compare the losses."""
    from focus_core.config import TrainConfig
    from focus_core.hub import load_base
    from focus_core.tokenization import TextTokenizer
    from focus_core.training.data import ExampleStream, read_training_texts
    from focus_core.training.export import export_adapter

    loaded = load_base(base, device=device, notice=note.print)
    drawn = []
    if data:
        values = (json.loads(config.read_text()) if config else {}) | ({} if seed is None else {"seed": seed})
        settings = TrainConfig.from_dict(values)
        stream = ExampleStream(read_training_texts(data), TextTokenizer(loaded.tokenizer), settings)
        drawn = [stream.fixed(index) for index in range(examples)]
    done = export_adapter(loaded, adapter, output, drawn)
    note.print(f"{done.nbytes / 2**20:.1f} MiB in {done.folder}")
    for name, loss in (("as trained", done.before), ("compact", done.after)):
        if loss is not None:
            kinds = "  ".join(f"{kind} {value:.4f}" for kind, value in loss.by_kind.items())
            note.print(f"{name:<11} loss {loss.loss:.4f} over {loss.queries} questions  ({kinds})")


def _is_past(moment: float) -> bool:
    return time.monotonic() >= moment
