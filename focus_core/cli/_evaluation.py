"""Commands that measure: eval, bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from focus_core.cli._shared import Adapter, Base, Device, app, note, numbers, open_engine, progress
from focus_core.errors import ConfigError

OWN_TABLES = {"heads": "which heads name the source"}


@app.command(name="eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="What to measure; an unknown name lists all.")],
    output: Annotated[Path, typer.Option(help="Folder for predictions and metrics.")] = Path("build/eval"),
    lengths: Annotated[str, typer.Option(help="Memory tokens, such as 1k,4k,8k.")] = "1k,4k,8k",
    documents: Annotated[str, typer.Option(help="Documents in memory, such as 10,20.")] = "10",
    chunk_sizes: Annotated[str | None, typer.Option(help="Such as 128,512. [default: the adapter's]")] = None,
    file: Annotated[Path | None, typer.Option(help="Data of the task, plain or gzipped.")] = None,
    filler: Annotated[Path | None, typer.Option(help="Natural text to hide things in. [default: repeated]")] = None,
    distractors: Annotated[int, typer.Option(help="Passkey: keys of others beside the wanted one.")] = 0,
    trials: Annotated[int, typer.Option(help="Trials of each row.")] = 20,
    methods: Annotated[str, typer.Option(help="Such as focusllm,focusllm:reread=2,truncated,bm25.")] = "focusllm",
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    base: Base = None,
    adapter: Adapter = None,
    device: Device = None,
) -> None:
    """Make a table of results; run it again to resume."""
    from focus_core.evaluation.methods import parse_methods
    from focus_core.evaluation.tasks import TASKS, TaskOptions

    if task not in TASKS and task not in OWN_TABLES:
        raise ConfigError(f"unknown task {task!r}; choose {', '.join([*TASKS, *OWN_TABLES])}")
    asked = parse_methods(methods)
    engine = open_engine(base, adapter, None, device)
    options = TaskOptions(
        engine.tokenizer, trials, seed, chunk_size=0, distractors=distractors, file=file, filler=filler
    )
    if task == "heads":
        _choose_heads(engine, options, numbers(documents)[0], output)
        return
    _run_task(engine, task, options, asked, lengths, documents, chunk_sizes, output)


@app.command()
def bench(
    chunks: Annotated[int, typer.Option(help="k of the decoding step.")] = 32,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 256,
    steps: Annotated[int, typer.Option(help="Decoding steps to time.")] = 8,
    only: Annotated[str | None, typer.Option(help="Such as prefill,step; an unknown name lists all.")] = None,
    base: Base = None,
    adapter: Adapter = None,
    device: Device = None,
) -> None:
    """Compare speeds within one run, a line as soon as it is measured; each is a ratio of two sides timed in turns."""
    from focus_core.bench import choose_measures, run_bench

    chosen = choose_measures(only.split(",") if only else None)
    engine = open_engine(base, adapter, chunk_size, device)
    console = Console(width=120, highlight=False)
    for line in run_bench(engine, chunks, chunk_size, steps, chosen):
        console.print(f"{line.measure}: {line.first}, {line.second}: {line.ratio:.2f} times", soft_wrap=True)


def _run_task(
    engine: Any,
    name: str,
    options: Any,
    methods: list[Any],
    lengths: str,
    documents: str,
    chunk_sizes: str | None,
    output: Path,
) -> None:
    from focus_core.evaluation.cache import ChunkCache
    from focus_core.evaluation.runner import run
    from focus_core.evaluation.tasks import TASKS

    task, rows = TASKS[name], []
    for size in numbers(chunk_sizes) if chunk_sizes else [engine.config.chunk_size]:
        model = engine if size == engine.config.chunk_size else engine.with_config(chunk_size=size)
        for label, changes in _variants(task.varies, numbers(lengths), numbers(documents)):
            made = replace(options, chunk_size=size, **changes)
            title = _title(name, made, label, f"c{size}" if chunk_sizes else "")
            cache = ChunkCache()
            for method in methods:
                with progress(f"{title} {method.text}", options.trials) as bar:
                    rows.append(
                        run(
                            model,
                            title,
                            task.make(made),
                            method,
                            task.max_tokens,
                            output,
                            partial(_advance, bar),
                            settings=made.facts(),
                            cache=cache,
                        )
                    )
    _print_table(rows, engine.info.trained.get("max_chunks"))


def _variants(varies: str, lengths: list[int], documents: list[int]) -> list[tuple[str, dict[str, int]]]:
    if varies == "lengths":
        return [(str(tokens), {"tokens": tokens}) for tokens in lengths]
    if varies == "documents":
        return [(str(count), {"documents": count}) for count in documents]
    return [("", {})]


def _title(name: str, options: Any, label: str, size: str) -> str:
    filler = "natural" if options.filler is not None else ""
    keys = f"keys{options.distractors + 1}" if options.distractors else ""
    return "-".join(part for part in (name, filler, keys, label, size) if part)


def _print_table(rows: list[Any], trained: int | None) -> None:
    table = Table("task", "method", "right", "95% interval", "F1", "recall", "k", "gold @1 @3 @5", "s/trial")
    for row in rows:
        low, high = row.interval
        within = " ".join(f"{share:.0%}" for share in row.gold_within.values())
        right = f"{row.right}/{row.trials}" + (f" ({row.skipped} do not fit)" if row.skipped else "")
        table.add_row(
            *(row.name, row.method, right, f"{low:.0%}-{high:.0%}", f"{row.f1:.2f}", f"{row.recall:.2f}"),
            *(f"{row.chunks:.0f}" if row.chunks else "", within, f"{row.seconds:.1f}"),
        )
    Console(width=140).print(table)
    if trained:
        note.print(f"k seen in training: up to {trained}", style="dim")


def _choose_heads(engine: Any, options: Any, documents: int, output: Path) -> None:
    from focus_core.evaluation.heads import choose_heads
    from focus_core.evaluation.tasks import multi_document

    examples = multi_document(options.needed_file, documents, options.trials, options.seed)
    with progress("heads", options.trials) as bar:
        choice = choose_heads(engine, examples, report=lambda done: bar(done, ""))
    result = {
        "attribution_heads": [list(pair) for pair in choice.heads],
        "gold first with them": choice.recall,
        "gold first with all heads": choice.recall_of_all,
        "share on gold with them": choice.share,
        "share on gold with all heads": choice.share_of_all,
        "trials": choice.trials,
        "best head of each layer": choice.by_head.max(dim=1).values.tolist(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "heads.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _advance(bar: Callable[..., None], prediction: dict[str, Any]) -> None:
    bar(prediction["trial"] + 1, "")
