"""Ask, chat, index, train, evaluate and measure from the command line.

Answers go to standard output and everything else to standard error, so both can be piped. Exit codes: 0 done, 1
unexpected failure, 2 bad input, 3 model, adapter or stored memory unusable, 4 out of memory, 130 stopped with Ctrl-C.
All logic lives in the library; this module only reads arguments and prints.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from focus_core.errors import (
    AdapterError,
    BaseModelError,
    ConfigError,
    ContextTooLongError,
    CorpusError,
    FocusError,
    OutOfMemoryError,
    StoreError,
)

app = typer.Typer(
    help="Ask questions over a whole corpus: every chunk is read, none is retrieved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
note = Console(stderr=True, highlight=False)

EXIT_CODES: tuple[tuple[type[FocusError], int], ...] = (
    (OutOfMemoryError, 4),
    (BaseModelError, 3),
    (AdapterError, 3),
    (StoreError, 3),
    (ConfigError, 2),
    (CorpusError, 2),
    (ContextTooLongError, 2),
)

Paths = Annotated[list[str] | None, typer.Argument(help="Files and folders; - is standard input.")]
Base = Annotated[str | None, typer.Option(help="Base model: hub name, folder or .gguf file. [default: installed one]")]
Adapter = Annotated[str | None, typer.Option(help="Adapter folder or hub name, or 'untrained'. [default: shipped one]")]
MemoryFolder = Annotated[Path | None, typer.Option("--memory", help="Folder that keeps what was read; made if absent.")]
ChunkSize = Annotated[int | None, typer.Option(help="Most tokens of a chunk. [default: the adapter's]")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. [default: what there is]")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of the answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]


def main() -> None:
    """Run the command line and turn errors into one message and an exit code."""
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == 130:
            note.print("stopped; nothing was lost", style="yellow")
        raise
    except FocusError as error:
        note.print(f"error: {error}", style="red", markup=False)
        sys.exit(next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1))


# -- ask and chat -----------------------------------------------------------------------------------------------


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    paths: Paths = None,
    memory: MemoryFolder = None,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    chunks_per_batch: Annotated[
        int | None, typer.Option(help="Chunks run together. [default: from free memory]")
    ] = None,
    sources: Annotated[int, typer.Option(help="How many sources to show.")] = 5,
    heatmap: Annotated[Path | None, typer.Option(help="Draw the attention on every chunk to this image.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    raw: Annotated[bool, typer.Option(help="The question is text to be continued, not a chat turn.")] = False,
) -> None:
    """Answer one question over files and folders, with its sources."""
    engine = _engine(base, adapter, chunk_size, device)
    held = _memory(engine, paths or [], memory)
    stream = engine.stream(
        question,
        held,
        template="raw" if raw else "question",
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop or (),
        chunks_per_batch=chunks_per_batch,
    )
    started = time.monotonic()
    with stream:
        with _waiting(f"focusing on {len(held)} chunks"):
            pieces = iter(stream)
            first = next(pieces, "")
        if not as_json:
            print(first.lstrip(), end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
        answer = stream.answer
    seconds = time.monotonic() - started
    if heatmap is not None:
        from focus_core.attribution import save_heatmap

        labels = [f"{chunk.document_id}:{chunk.start}" for chunk in held.chunks]
        texts = [engine.tokenizer.decode([token.id]) or "(end)" for token in answer.tokens]
        save_heatmap(answer.attention, texts, labels, heatmap)
        note.print(f"heat map in {heatmap}")
    if as_json:
        result = {
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "sources": [asdict(item) for item in answer.evidence[:sources]],
            "passages": [asdict(item) for item in answer.passages[:sources]],
            "usage": asdict(answer.usage),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    _print_sources(answer, sources)
    note.print(
        f"{answer.usage.chunks} chunks, {answer.usage.memory:,} tokens read; "
        f"{answer.usage.generated} tokens in {seconds:.1f} s",
        style="dim",
    )


@app.command()
def chat(
    paths: Paths = None,
    memory: MemoryFolder = None,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
) -> None:
    """Talk about files and folders; an empty line or Ctrl-D ends it, Ctrl-C stops an answer."""
    engine = _engine(base, adapter, chunk_size, device)
    held = _memory(engine, paths or [], memory)
    turns: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        turns.append({"role": "user", "content": engine.info.question_template.replace("{question}", question)})
        local = engine.tokenizer.render(turns, engine.info.system)
        while len(local) + max_tokens + 1 > engine.config.window and len(turns) > 1:
            turns = turns[2:]  # the oldest exchange is forgotten first
            local = engine.tokenizer.render(turns, engine.info.system)
        with engine.stream_ids(local, held, max_tokens=max_tokens, temperature=temperature, seed=seed) as stream:
            try:
                for piece in stream:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                stream.close()
            print()
            answer = stream.answer
        _print_sources(answer, 3)
        turns.append({"role": "assistant", "content": answer.text})


@app.command()
def index(
    memory: Annotated[Path, typer.Option("--memory", help="Folder to keep the memory in.")],
    paths: Paths = None,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    remove: Annotated[list[str] | None, typer.Option(help="Document id to forget; may be repeated.")] = None,
) -> None:
    """Read files and folders into a memory on disk; only new and changed documents are computed."""
    engine = _engine(base, adapter, chunk_size, device)
    held = _memory(engine, paths or [], memory, remove=remove or [])
    note.print(f"{len(held.documents)} documents, {len(held)} chunks, {held.tokens:,} tokens in {memory}")


# -- info -------------------------------------------------------------------------------------------------------


@app.command()
def info(
    paths: Paths = None,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show model and adapter, and what reading PATHS would cost, before anything is read into memory."""
    from focus_core.bench import measure_prefill
    from focus_core.corpus import load_documents

    engine = _engine(base, adapter, chunk_size, device)
    facts: dict[str, Any] = {
        "base": engine.loaded.name,
        "family": engine.base.model_type,
        "weights": engine.loaded.fingerprint[:12],
        "device": str(engine.base.device),
        "dtype": str(engine.base.dtype).removeprefix("torch."),
        "layers": engine.base.num_layers,
        "base window": engine.base.window,
        "adapter trained on": engine.info.trained or "nothing (untrained)",
        **{name.replace("_", " "): value for name, value in engine.config.to_dict().items()},
    }
    if paths:
        documents = load_documents(paths, skipped=_skipped)
        chunks = [chunk for document in documents for chunk in engine.encoder.cut(document)]
        tokens = sum(len(chunk.ids) for chunk in chunks)
        each = (engine.base.num_layers - 1) * 2 * engine.base.num_kv_heads * engine.base.head_dim
        with _waiting("measuring this machine"):
            speed = measure_prefill(engine, min(engine.config.chunk_size, max(len(chunk.ids) for chunk in chunks)))
        facts |= {
            "documents": len(documents),
            "characters": sum(len(document.text) for document in documents),
            "tokens": tokens,
            "chunks": len(chunks),
            "chunk KV bytes": (tokens + len(chunks)) * each * engine.base.dtype.itemsize,
            "seconds to read": round(tokens / speed, 1),
        }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


# -- train ------------------------------------------------------------------------------------------------------


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
    with _progress("training", settings.steps) as bar:

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


# -- eval and bench ---------------------------------------------------------------------------------------------


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

    engine = _engine(base, adapter, None, device)
    if task == "heads":
        _choose_heads(engine, file, _numbers(documents)[0], trials, seed, output)
        return
    plans: list[tuple[str, Any, Callable[[], Any], int]] = []
    if task == "passkey":
        for tokens in _numbers(lengths):
            for size in _numbers(chunk_sizes):
                made = partial(tasks.passkey, engine.tokenizer, tokens, trials, seed)
                plans.append((f"passkey-{tokens}-c{size}", engine.with_config(chunk_size=size), made, 8))
    elif task == "questions":
        for count in _numbers(documents):
            made = partial(tasks.multi_document, _question_file(file), count, trials, seed)
            plans.append((f"questions-{count}", engine, made, 24))
    else:
        raise ConfigError(f"unknown task {task!r}; choose passkey, questions or heads")
    rows = []
    for name, model, examples, most in plans:
        for method in methods.split(","):
            with _progress(f"{name} {method}", trials) as bar:
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

    engine = _engine(base, adapter, chunk_size, device)
    table = Table("measure", "first", "second", "ratio")
    for line in run_bench(engine, chunks, chunk_size, steps):
        table.add_row(*line)
    Console(width=120).print(table)


# -- helpers ----------------------------------------------------------------------------------------------------


def _engine(base: str | None, adapter: str | None, chunk_size: int | None, device: str | None) -> Any:
    with _waiting("loading the model"):
        from transformers.utils import logging

        from focus_core.engine import FocusEngine

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        return FocusEngine.from_pretrained(
            base, adapter, chunk_size=chunk_size, device=device, notice=lambda text: note.print(text)
        )


def _memory(engine: Any, paths: list[str], folder: Path | None, remove: list[str] | None = None) -> Any:
    """Load the memory in ``folder`` if there is one, read ``paths`` into it, and save what changed."""
    from focus_core.corpus import load_documents
    from focus_core.store import Store

    if not paths and not sys.stdin.isatty() and (folder is None or not (folder / "memory.json").exists()):
        paths = ["-"]
    documents = load_documents(paths, skipped=_skipped) if paths else []
    if folder is not None and (folder / "memory.json").exists():
        with _progress("loading memory") as bar:
            memory = engine.load_memory(folder, progress=lambda done, total: bar(done, "", total))
    else:
        if not documents:
            raise CorpusError("nothing to read; name files or folders, or a --memory folder made before")
        memory = engine.remember([])
        if folder is not None:
            memory.store = Store(folder / "kv")
    before = memory.state
    with _progress("reading") as bar:
        memory.add(documents, progress=lambda done, total: bar(done, "", total))
    if remove:
        memory.remove(remove)
    if folder is not None and memory.state is not before:
        with _progress("saving") as bar:
            memory.save(folder, progress=lambda done, total: bar(done, "", total))
    return memory


def _print_sources(answer: Any, count: int) -> None:
    if not answer.evidence:
        return
    columns = (
        Column("score", width=6),
        Column("source", overflow="fold", ratio=1),
        Column("passage", no_wrap=True, overflow="ellipsis", ratio=1),
    )
    table = Table(*columns, box=None, header_style="dim", expand=True)
    for item in answer.evidence[:count]:
        passage = " ".join(item.text.split())
        table.add_row(f"{item.score:.3f}", f"{item.document_id}:{item.start}-{item.end}", passage[:90])
    note.print(table)


def _skipped(path: Path, why: str) -> None:
    note.print(f"left out {path}: {why}", style="dim", markup=False)


def _numbers(text: str) -> list[int]:
    try:
        return [int(float(part[:-1]) * 1000) if part[-1] in "kK" else int(part) for part in text.split(",")]
    except (ValueError, IndexError) as error:
        raise ConfigError(f"cannot read the numbers {text!r}; write them like 1k,4000") from error


def _question_file(file: Path | None) -> Path:
    if file is None:
        raise ConfigError("this task needs --file with JSON lines of question, answers and ctxs")
    return file


def _choose_heads(engine: Any, file: Path | None, documents: int, trials: int, seed: int, output: Path) -> None:
    from focus_core.evaluation.heads import choose_heads
    from focus_core.evaluation.tasks import multi_document

    examples = multi_document(_question_file(file), documents, trials, seed)
    with _progress("heads", trials) as bar:
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


def _is_past(moment: float) -> bool:
    return time.monotonic() >= moment


def _advance(bar: Callable[..., None], prediction: dict[str, Any]) -> None:
    bar(prediction["trial"] + 1, "")


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    with note.status(text):
        yield


@contextmanager
def _progress(text: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(
        *columns, TimeRemainingColumn(), TextColumn("{task.fields[extra]}"), console=note, transient=True
    ) as bar:
        task = bar.add_task(text, total=total, extra="")

        def update(done: int, extra: str, total: int | None = None) -> None:
            if total is not None:
                bar.update(task, total=total)
            bar.update(task, completed=done, extra=extra)

        yield update


if __name__ == "__main__":
    main()
