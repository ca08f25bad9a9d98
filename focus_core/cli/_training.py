"""Commands that train: train, plot-loss, and what is done with adapters."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from focus_core.cli._shared import Base, Device, app, note, progress

if TYPE_CHECKING:
    from focus_core.config import TrainConfig
    from focus_core.training.loop import StepReport

_LINE_SECONDS = 60.0  # between lines of progress where there is no terminal


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
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements of the held-out loss.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of any TrainConfig setting.")] = None,
    chunk_size: Annotated[int, typer.Option(help="Chunk size the adapter will be served with.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many input tokens.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after this long; run again to go on.")] = None,
    finish: Annotated[
        int | None, typer.Option(min=1, help="End the run: the rate falls to zero over so many more steps.")
    ] = None,
    compact: Annotated[bool, typer.Option(help="Save the adapter as int8 differences, bfloat16 at low rank.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16, of the base. [default: what is fast]")] = None,
    metric: Annotated[
        str | None, typer.Option(help="MODULE:FUNCTION of an engine that returns numbers to log.")
    ] = None,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or another of accelerate's.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: the frozen base in so many bits (torchao).")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share each step, on one GPU too.")] = 1,
    device: Device = None,
) -> None:
    """Train an adapter for a base; run it again with the same settings to resume.

    With --workers, or `accelerate launch -m focus_core.cli train ...`, many processes share each step.
    """
    from focus_core.training.adapter import train_adapter
    from focus_core.training.processes import Processes, launch
    from focus_core.training.stopping import StopOnSignal

    given = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "eval_every": eval_every}
    settings = _settings(config, given | _assigned(set_ or []))
    if workers > 1 and "LOCAL_RANK" not in os.environ:
        launch(workers, "focus_core.cli", sys.argv[1:])
    processes = Processes(device, track or (), output)
    loaded = _load(base, dtype, processes, quantize)
    end = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
    tokens = 0

    def count(step: StepReport) -> None:
        nonlocal tokens
        tokens = step.tokens
        report(step)

    def ended() -> bool:
        return stop() or time.monotonic() >= end or (max_tokens is not None and tokens >= max_tokens)

    with StopOnSignal() as stop, _reporter(settings, processes.is_main) as report:
        totals = train_adapter(
            loaded,
            data,
            output,
            settings,
            init=init,
            chunk_size=chunk_size,
            compact=compact,
            metric=_named(metric) if metric else None,
            processes=processes,
            report=count,
            stop=ended,
            finish=finish,
            notice=note.print,
        )
    if processes.is_main:
        _tell(totals, settings, output)
    if stop.signal is not None:
        raise typer.Exit(128 + stop.signal)


@app.command(name="plot-loss")
def plot(
    run: Annotated[Path, typer.Argument(help="The --output folder of a training run.")],
    picture: Annotated[Path | None, typer.Option(help="File to write. [default: loss.png in the run]")] = None,
    by: Annotated[str, typer.Option(help="step or tokens: what the losses are drawn against.")] = "step",
) -> None:
    """Draw the losses of a training run."""
    from focus_core.training.plot import plot_loss

    note.print(f"losses in {plot_loss(run, picture, by=by)}")


@app.command(name="interpolate-adapters")
def interpolate(
    first: Annotated[Path, typer.Argument(help="Adapter folder.")],
    second: Annotated[Path, typer.Argument(help="Adapter folder, usually trained on from the first.")],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter between them.")],
    share: Annotated[float, typer.Option(help="Of the second, 0 to 1.")] = 0.5,
    base: Base = None,
    device: Device = None,
) -> None:
    """Write the adapter between two: what further training gained, with less of what it lost."""
    from focus_core.model.hub import load_base
    from focus_core.training.export import interpolate_adapters

    interpolate_adapters(load_base(base, device=device, notice=note.print), first, second, output, share)
    note.print(f"adapter in {output}")


@app.command(name="export-adapter")
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that training wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for the compact adapter.")],
    rank: Annotated[int | None, typer.Option(help="Cut to this rank, in bfloat16. [default: int8, full rank]")] = None,
    base: Base = None,
    data: Annotated[list[Path] | None, typer.Option(help="Texts not trained on, to measure the loss with.")] = None,
    examples: Annotated[int, typer.Option(help="Examples drawn from --data.")] = 64,
    config: Annotated[Path | None, typer.Option(help="JSON file with TrainConfig settings of the examples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the examples.")] = None,
    device: Device = None,
) -> None:
    """Write an adapter as int8 or low-rank differences from its base, far smaller, and compare the losses."""
    from focus_core.model.hub import load_base
    from focus_core.text.tokenization import TextTokenizer
    from focus_core.training.data import ExampleStream
    from focus_core.training.export import export_adapter
    from focus_core.training.texts import read_training_texts

    settings = _settings(config, {"seed": seed})
    loaded = load_base(base, device=device, notice=note.print)
    drawn = []
    if data:
        stream = ExampleStream(read_training_texts(data), TextTokenizer(loaded.tokenizer), settings)
        drawn = [stream.fixed(index) for index in range(examples)]
    done = export_adapter(loaded, adapter, output, drawn, rank=rank)
    note.print(f"{done.nbytes / 2**20:.1f} MiB in {done.folder}")
    for name, loss in (("as trained", done.before), ("compact", done.after)):
        if loss is not None:
            kinds = "  ".join(f"{kind} {value:.4f}" for kind, value in loss.by_kind.items())
            note.print(f"{name:<11} loss {loss.loss:.4f} over {loss.queries} questions  ({kinds})")


@app.command(name="import-adapter")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that the paper's published code saved.")],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter.")],
    base: Base = None,
    chunk_size: Annotated[int, typer.Option(help="Chunk size the adapter will be served with.")] = 2048,
) -> None:
    """Take candidate projections over from a checkpoint of the paper's published code."""
    from focus_core.model.hub import load_base
    from focus_core.training.card import write_card
    from focus_core.training.published import import_published

    import_published(load_base(base, device="cpu", notice=note.print), checkpoint, output, chunk_size=chunk_size)
    write_card(output)
    note.print(f"adapter in {output}")


@app.command(name="push-adapter")
def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder; a model card is written if it has none.")],
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option(help="For a new one.")] = False,
) -> None:
    """Put an adapter with its model card on the hub; others name it with --adapter OWNER/NAME."""
    from focus_core.training.card import push_adapter

    note.print(push_adapter(adapter, name, private=private))


# -- inside -----------------------------------------------------------------------------------------------------


def _settings(config: Path | None, given: dict[str, Any]) -> TrainConfig:
    from focus_core.config import TrainConfig
    from focus_core.errors import ConfigError

    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config} is no readable JSON file ({error}); see docs/recipes/") from error
    return TrainConfig.from_dict(values | {name: value for name, value in given.items() if value is not None})


def _named(text: str) -> Any:
    """Return the function of MODULE:FUNCTION."""
    import importlib

    from focus_core.errors import ConfigError

    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--metric wants MODULE:FUNCTION that can be imported; got {text!r} ({error})") from error


def _assigned(pairs: list[str]) -> dict[str, Any]:
    """Return the settings of NAME=VALUE pairs; values are JSON, or text where they are not."""
    from focus_core.errors import ConfigError

    values: dict[str, Any] = {}
    for pair in pairs:
        name, mark, text = pair.partition("=")
        if not mark:
            raise ConfigError(f"--set wants NAME=VALUE, such as --set positions=ordered; got {pair!r}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _load(base: str | None, dtype: str | None, processes: Any, quantize: str | None) -> Any:
    """Load the base on this process's device; the first process converts it, if that is needed."""
    import torch

    from focus_core.errors import ConfigError
    from focus_core.hardware import default_dtype
    from focus_core.model.hub import load_base

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in kinds:
        raise ConfigError(f"--dtype must be one of {', '.join(kinds)}; got {dtype!r}")
    kind = kinds[dtype] if dtype else default_dtype(processes.device)
    if kind == torch.float16:
        kind = torch.float32  # gradients of half precision would need scaling
    with processes.accelerator.main_process_first():
        silent = lambda text: None  # noqa: E731
        notice = note.print if processes.is_main else silent
        return load_base(base, dtype=kind, device=processes.device, quantize=quantize, notice=notice)


@contextmanager
def _reporter(settings: TrainConfig, shown: bool) -> Iterator[Any]:
    """Yield a callback that shows loss, speed and time left: a bar in a terminal, a line a minute elsewhere."""
    if not shown:
        yield lambda step: None
        return
    from focus_core.training.speed import Speed

    speed, last = Speed(settings.steps), time.monotonic()
    with progress("training", settings.steps) as bar:

        def report(step: StepReport) -> None:
            nonlocal last
            text = speed.line(step)
            bar(step.step, text)
            if step.held_out is not None:
                note.print(f"step {step.step}: held-out loss {step.held_out.loss:.4f}")
            if not note.is_terminal and time.monotonic() - last > _LINE_SECONDS:
                note.print(f"step {step.step}/{settings.steps}  {text}")
                last = time.monotonic()

        yield report


def _tell(totals: Any, settings: TrainConfig, output: Path) -> None:
    from focus_core.errors import FocusError
    from focus_core.training.plot import plot_loss

    try:
        note.print(f"losses in {plot_loss(output)}")
    except FocusError as error:  # no matplotlib, or stopped before the first step
        note.print(f"no plot: {error}", style="dim")
    last = totals.last_step(settings.steps)
    if totals.step < last:
        note.print(
            f"stopped after step {totals.step} of {last}; run the same command again to go on, with --finish STEPS to "
            "let the rate fall to zero and end"
        )
    if totals.best is not None:
        note.print(f"lowest held-out loss {totals.best:.4f} after step {totals.best_step}: {output / 'best'}")
    note.print(f"adapter in {output / 'adapter'}; use it with --adapter {output / 'adapter'}")
