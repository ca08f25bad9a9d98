"""Commands that measure: eval, bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from focus_core.cli._shared import Adapter, Base, Device, OtherBase, app, note, numbers, open_engine, progress, skipped
from focus_core.errors import ConfigError

if TYPE_CHECKING:
    from focus_core.evaluation.methods.registry import Method
    from focus_core.evaluation.report.tables import Plan

OWN_TABLES = {
    "perplexity": "the end of long texts, with memory and without",
    "heads": "which heads' attention names the sources best; needs --file",
    "supported": "fits the probability that memory holds an answer; needs --file",
    "mine": "your own questions over your own files; needs --questions and files",
}
RELEASE_SEED = 1_000_003  # generated trials of a release are none that development has seen


@app.command(name="eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="What to measure; an unknown name lists all.")],
    paths: Annotated[list[str] | None, typer.Argument(help="mine: your files and folders.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for predictions and metrics.")] = Path("build/eval"),
    lengths: Annotated[str, typer.Option(help="Memory tokens, such as 1k,4k,8k.")] = "1k,4k,8k",
    documents: Annotated[str, typer.Option(help="Documents in memory, such as 10,20.")] = "10",
    chunk_sizes: Annotated[str | None, typer.Option(help="Such as 128,512. [default: the adapter's]")] = None,
    file: Annotated[str | None, typer.Option(help="Data of the task, plain or gzipped: a path or an address.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="mine: JSON lines of question, answer (or answers) and, if known, document.")
    ] = None,
    filler: Annotated[str | None, typer.Option(help="Natural text to hide things in. [default: repeated]")] = None,
    distractors: Annotated[int, typer.Option(help="Passkey: keys of others beside the wanted one.")] = 0,
    needle: Annotated[str, typer.Option(help="Passkey: key, or story for facts in words no training uses.")] = "key",
    distractors_from: Annotated[
        str, typer.Option(help="Questions: other documents from others, nearest, article, or the file's own rows.")
    ] = "others",
    release: Annotated[
        bool, typer.Option("--release", help="Use the test split, once a release. [default: the development split]")
    ] = False,
    prompt_lengths: Annotated[
        str | None, typer.Option(help="Most tokens behind a chunk, such as 16,512. [default: the adapter's]")
    ] = None,
    given: Annotated[
        str | None,
        typer.Option(help="Perplexity: local tokens before the 256 that are scored, such as 64,1k. [default: 256]"),
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials of each row; texts, for perplexity.")] = 20,
    methods: Annotated[
        str | None,
        typer.Option(help="Such as focusllm,focusllm:reread=2,truncated,bm25. [default: focusllm; mine: rivals too]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    base: Base = None,
    adapter: Adapter = None,
    other_base: OtherBase = False,
    device: Device = None,
) -> None:
    """Make a table of results; run it again to resume. Tasks and methods are in docs/evaluation.md."""
    from focus_core.evaluation.files import local_file
    from focus_core.evaluation.methods.registry import parse_methods
    from focus_core.evaluation.report.tables import Grid, make_plans
    from focus_core.evaluation.tasks.registry import TASKS, TaskOptions

    if task not in TASKS and task not in OWN_TABLES:
        known = {name: one.summary for name, one in TASKS.items()} | OWN_TABLES
        lines = [f"{name:<15} {summary}" for name, summary in known.items()]
        raise ConfigError("\n  ".join([f"unknown task {task!r}; choose", *lines]))
    if paths and task != "mine":
        raise ConfigError(f"{task} takes no files and folders, but got {paths[0]!r}; data are given with --file")
    if task == "mine":
        begin = partial(open_engine, base, adapter, None, device, other_base=other_base)
        _run_mine(begin, questions, paths or [], methods, output)
        return
    asked = parse_methods(methods or "focusllm")
    data, text = (local_file(place) if place is not None else None for place in (file, filler))
    engine = open_engine(base, adapter, None, device, other_base=other_base)
    options = TaskOptions(
        engine.tokenizer,
        trials,
        seed + RELEASE_SEED if release else seed,
        chunk_size=0,
        distractors=distractors,
        file=data,
        filler=text,
        distractors_from=cast(Any, distractors_from),
        split="test" if release else "development",
        needle=cast(Any, needle),
    )
    if task == "heads":
        _choose_heads(engine, options, numbers(documents)[0], output)
        return
    if task == "supported":
        _calibrate(engine, options, numbers(documents)[0], output)
        return
    sizes, prompts, before = (numbers(text) if text else None for text in (chunk_sizes, prompt_lengths, given))
    grid = Grid(numbers(lengths), numbers(documents), sizes, prompts, before)
    varies = TASKS[task].varies_for(options) if task in TASKS else "lengths"
    plans = list(make_plans(engine, task, varies, options, grid))
    if task == "perplexity":
        _run_perplexity(plans, output)
    else:
        _run_task(task, plans, asked, output)


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
    console = Console(width=120, highlight=False, markup=False)
    for line in run_bench(engine, chunks, chunk_size, steps, chosen):
        console.print(f"{line.measure}: {line.first}, {line.second}: {line.ratio:.2f} times", soft_wrap=True)


def _run_task(name: str, plans: list[Plan], methods: list[Method], output: Path) -> None:
    from focus_core.evaluation.methods.chunk_cache import ChunkCache
    from focus_core.evaluation.report.tables import HEADER, row_cells
    from focus_core.evaluation.runner import run
    from focus_core.evaluation.tasks.registry import TASKS

    rows = []
    for plan in plans:
        cache = ChunkCache()
        for method in methods:
            with progress(f"{plan.title} {method.text}", plan.options.trials) as bar:
                row = run(
                    plan.engine,
                    plan.title,
                    TASKS[name].make(plan.options),
                    method,
                    TASKS[name].max_tokens,
                    output,
                    partial(_advance, bar),
                    settings=plan.options.facts(),
                    tokens=plan.options.tokens if TASKS[name].varies_for(plan.options) == "lengths" else None,
                    cache=cache,
                    limits=TASKS[name].limits,
                )
            rows.append(row)
    _show(output, name, HEADER, [row_cells(row) for row in rows], plans)


def _run_perplexity(plans: list[Plan], output: Path) -> None:
    from focus_core.evaluation.report.tables import PERPLEXITY_HEADER, perplexity_cells
    from focus_core.evaluation.tasks.perplexity import Known, run_perplexity
    from focus_core.evaluation.tasks.text_windows import read_windows

    first, longest = plans[0].options, max(plan.options.tokens for plan in plans)
    windows = list(read_windows([first.needed_file], first.tokenizer, longest, first.trials, first.seed))
    rows, known = [], Known()
    for plan in plans:
        with progress(plan.title, len(windows)) as bar:
            row = run_perplexity(
                plan.engine,
                plan.title,
                windows,
                plan.options.tokens,
                plan.given,
                output,
                partial(_advance, bar),
                settings=plan.options.facts(),
                known=known,
            )
        rows.append(row)
    _show(output, "perplexity", PERPLEXITY_HEADER, [perplexity_cells(row) for row in rows], plans)


def _show(output: Path, name: str, header: list[str], rows: list[list[str]], plans: list[Plan]) -> None:
    """Print the table, and write that of all rows of the folder, and plots, beside the predictions."""
    from focus_core.evaluation.report.plots import draw_folder
    from focus_core.evaluation.report.tables import filled_columns, gathered_cells, trained_note, write_markdown

    shown, cells = filled_columns(header, rows)
    table = Table(*shown)
    for row in cells:
        table.add_row(*row)
    Console(width=160, markup=False).print(table)
    trained = plans[0].engine.info.trained
    write_markdown(output / f"{name}.md", *filled_columns(header, gathered_cells(output, name)), trained)
    written = [output / f"{name}.md", *draw_folder(output, name)]
    note.print(f"{trained_note(trained)}; written: {', '.join(map(str, written))}", style="dim")


def _run_mine(
    begin: Callable[[], Any], questions: Path | None, paths: list[str], methods: str | None, output: Path
) -> None:
    """Ask a user's questions with FocusLLM and with retrieve-then-read on the same base, and give advice."""
    from focus_core.evaluation.methods.chunk_cache import ChunkCache
    from focus_core.evaluation.methods.registry import parse_methods
    from focus_core.evaluation.methods.retrieval import rankers_here
    from focus_core.evaluation.report.tables import HEADER, filled_columns, row_cells, write_markdown
    from focus_core.evaluation.runner import run
    from focus_core.evaluation.tasks.own_questions import advice, own_questions
    from focus_core.text.corpus import load_documents

    if questions is None or not paths:
        raise ConfigError("mine needs questions and documents: focusllm eval mine --questions q.jsonl DOCS")
    engine = begin()
    documents = load_documents(paths, skipped=skipped)
    trials = list(own_questions(questions, documents))
    rivals = [f"{name}:passages={count}" for name in rankers_here() for count in (1, 3)]
    rows, right, cache = [], [], ChunkCache()
    for method in parse_methods(methods or ",".join(["focusllm", "focusllm:reread=1", *rivals])):
        answered: list[bool] = []
        with progress(f"mine {method.text}", len(trials)) as bar:

            def note_answer(record: dict[str, Any], answered: list[bool] = answered, bar: Any = bar) -> None:
                answered.append(bool(record.get("right")))
                _advance(bar, record)

            rows.append(run(engine, "mine", trials, method, 64, output, note_answer, cache=cache))
        right.append(answered)
    shown, cells = filled_columns(HEADER, [row_cells(row) for row in rows])
    table = Table(*shown)
    for line in cells:
        table.add_row(*line)
    Console(width=160).print(table)
    print(advice(rows, right))
    write_markdown(output / "mine.md", shown, cells, engine.info.trained)


def _calibrate(engine: Any, options: Any, documents: int, output: Path) -> None:
    """Fit ``Answer.supported``; the constants of the best measure go into the adapter's ``focus_config.json``."""
    from dataclasses import replace

    from focus_core.evaluation.tasks.registry import TASKS
    from focus_core.evaluation.tasks.support import calibrate

    asked = replace(options, documents=documents)
    with progress("supported", options.trials) as bar:
        found = calibrate(engine, TASKS["not-there"].make(asked), lambda done: bar(done, ""))
    result = {
        "support": list(found.constants[found.best]),
        "measure": found.best,
        "AUROC on questions not fitted on": found.auroc,
        "Brier score there": found.brier,
        "trials": found.trials,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "supported.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _choose_heads(engine: Any, options: Any, documents: int, output: Path) -> None:
    from focus_core.evaluation.tasks.attribution_heads import choose_heads
    from focus_core.evaluation.tasks.registry import multi_document

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
