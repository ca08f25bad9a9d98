"""Commands that measure: eval, bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from focus_core.cli._shared import Adapter, Base, Device, app, numbers, open_engine, progress
from focus_core.errors import ConfigError


@app.command(name="eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="passkey, questions, or heads (which heads name the source).")],
    output: Annotated[Path, typer.Option(help="Folder for predictions and metrics.")] = Path("build/eval"),
    lengths: Annotated[str, typer.Option(help="Passkey: memory tokens, such as 1k,4k,8k.")] = "1k,4k,8k",
    chunk_sizes: Annotated[str, typer.Option(help="Passkey: chunk sizes.")] = "512",
    file: Annotated[Path | None, typer.Option(help="Questions: JSON lines with question, answers, ctxs.")] = None,
    documents: Annotated[str, typer.Option(help="Questions: documents in memory.")] = "10",
    trials: Annotated[int, typer.Option(help="Trials of each row.")] = 20,
    methods: Annotated[str, typer.Option(help="focusllm and baselines, separated by commas.")] = "focusllm",
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    base: Base = None,
    adapter: Adapter = None,
    device: Device = None,
) -> None:
    """Make a table of results; run it again to resume."""
    from focus_core.evaluation import tasks
    from focus_core.evaluation.runner import run

    engine = open_engine(base, adapter, None, device)
    if task == "heads":
        _choose_heads(engine, file, numbers(documents)[0], trials, seed, output)
        return
    plans: list[tuple[str, Any, Callable[[], Any], int]] = []
    if task == "passkey":
        for tokens in numbers(lengths):
            for size in numbers(chunk_sizes):
                made = partial(tasks.passkey, engine.tokenizer, tokens, trials, seed)
                plans.append((f"passkey-{tokens}-c{size}", engine.with_config(chunk_size=size), made, 8))
    elif task == "questions":
        for count in numbers(documents):
            made = partial(tasks.multi_document, _question_file(file), count, trials, seed)
            plans.append((f"questions-{count}", engine, made, 24))
    else:
        raise ConfigError(f"unknown task {task!r}; choose passkey, questions or heads")
    rows = []
    for name, model, examples, most in plans:
        for method in methods.split(","):
            with progress(f"{name} {method}", trials) as bar:
                rows.append(run(model, name, examples(), method, most, output, partial(_advance, bar)))
    table = Table("task", "method", "right", "95% interval", "mean k", "gold first", "s/trial")
    for row in rows:
        low, high = row.interval
        recall = "" if row.recall_at_1 is None else f"{row.recall_at_1:.0%}"
        table.add_row(
            row.name,
            row.method,
            f"{row.right}/{row.trials}",
            f"{low:.0%}-{high:.0%}",
            f"{row.chunks:.0f}",
            recall,
            f"{row.seconds:.1f}",
        )
    Console(width=120).print(table)


@app.command()
def bench(
    chunks: Annotated[int, typer.Option(help="k of the decoding step.")] = 32,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 256,
    steps: Annotated[int, typer.Option(help="Decoding steps to time.")] = 8,
    base: Base = None,
    adapter: Adapter = None,
    device: Device = None,
) -> None:
    """Compare speeds within one run: batched and single chunks, our chunk pass and transformers' forward."""
    from focus_core.bench import run_bench

    engine = open_engine(base, adapter, chunk_size, device)
    table = Table("measure", "first", "second", "ratio")
    for line in run_bench(engine, chunks, chunk_size, steps):
        table.add_row(*line)
    Console(width=120).print(table)


def _question_file(file: Path | None) -> Path:
    if file is None:
        raise ConfigError("this task needs --file with JSON lines of question, answers and ctxs")
    return file


def _choose_heads(engine: Any, file: Path | None, documents: int, trials: int, seed: int, output: Path) -> None:
    from focus_core.evaluation.heads import choose_heads
    from focus_core.evaluation.tasks import multi_document

    examples = multi_document(_question_file(file), documents, trials, seed)
    with progress("heads", trials) as bar:
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
