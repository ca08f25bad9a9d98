"""Commands that read and answer: ask, chat, info."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from focus_core.cli._shared import (
    Adapter,
    Base,
    ChunkSize,
    ChunkTopP,
    Device,
    MaxTokens,
    MemoryBudget,
    OtherBase,
    Paths,
    Reread,
    RereadTokens,
    RereadWay,
    SavedMemory,
    Seed,
    Strict,
    Temperature,
    app,
    join,
    note,
    open_engine,
    open_memory,
    printable,
    size_of,
    skipped,
    waiting,
)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    paths: Paths = None,
    strict: Strict = False,
    memory: SavedMemory = None,
    memory_budget: MemoryBudget = None,
    base: Base = None,
    adapter: Adapter = None,
    other_base: OtherBase = False,
    chunk_size: ChunkSize = None,
    device: Device = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    chunks_per_batch: Annotated[
        int | None, typer.Option(help="Chunks run together. [default: from free memory]")
    ] = None,
    chunk_top_p: ChunkTopP = None,
    reread: Reread = None,
    reread_tokens: RereadTokens = 2048,
    reread_way: RereadWay = "run",
    sources: Annotated[int, typer.Option(help="How many sources to show.")] = 5,
    heatmap: Annotated[Path | None, typer.Option(help="Draw the attention on every chunk to this image.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    raw: Annotated[bool, typer.Option(help="The question is text to be continued, not a chat turn.")] = False,
) -> None:
    """Answer one question over files and folders, with its sources.

    The head of a question that is too long is read from memory.
    """
    from focus_core.config import DecodeConfig
    from focus_core.session.citations import source_dict
    from focus_core.session.engines import holding
    from focus_core.session.request import Request, begin

    engine = join(open_engine(base, adapter, chunk_size, device, other_base=other_base))
    engine = engine.with_config(memory_budget=size_of(memory_budget)) if memory_budget is not None else engine
    held = open_memory(engine, paths or [], memory, strict=strict)
    decode = DecodeConfig(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=tuple(stop or ()),
        chunks_per_batch=chunks_per_batch,
        chunk_top_p=chunk_top_p,
        reread=reread,
        reread_tokens=reread_tokens,
        reread_way=reread_way,  # type: ignore[arg-type]
    )
    asked = Request(decode, text=question, template="raw" if raw else "question")
    started = time.monotonic()
    call = begin(engine, asked, holding(engine, held), threading.Event())
    with call.stream:
        with waiting(f"focusing on {len(held)} chunks"):
            pieces = call.pieces()
            first = next(pieces, None)
        if not as_json:
            _say(first.delta.text if first is not None else "")
            for piece in pieces:
                _say(piece.delta.text)
            print()
        answer = call.stream.answer
    seconds, documents = time.monotonic() - started, call.stream.documents
    if heatmap is not None:
        from focus_core.method.attribution import save_heatmap

        read = call.held.memory or held
        labels = [f"{chunk.document_id}:{chunk.start}" for chunk in read.chunks]
        texts = [engine.tokenizer.decode([token.id]) or "(end)" for token in answer.tokens]
        save_heatmap(answer.attention, texts, labels, heatmap)
        note.print(f"heat map in {heatmap}")
    if as_json:
        result = {
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "supported": answer.supported,
            "sources": [source_dict(item, documents) for item in answer.evidence[:sources]],
            "passages": [source_dict(item, documents) for item in answer.passages[:sources]],
            "usage": asdict(answer.usage),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    _print_sources(answer, documents, sources)
    note.print(
        f"{answer.usage.chunks} chunks, {answer.usage.memory:,} tokens read"
        + (f", answered from {answer.usage.kept} of them" if answer.usage.kept < answer.usage.chunks else "")
        + (f", {answer.usage.reread:,} tokens of them whole; " if answer.usage.reread else "; ")
        + f"{answer.usage.generated} tokens in {seconds:.1f} s"
        + ("" if answer.supported is None else f"; supported {answer.supported:.2f}"),
        style="dim",
    )


@app.command()
def chat(
    paths: Paths = None,
    strict: Strict = False,
    memory: SavedMemory = None,
    memory_budget: MemoryBudget = None,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    chunk_top_p: ChunkTopP = None,
    reread: Reread = None,
    reread_tokens: RereadTokens = 2048,
    reread_way: RereadWay = "run",
) -> None:
    """Talk about files and folders; an empty line or Ctrl-D ends it, Ctrl-C stops an answer.

    Turns that no longer fit the window are read from memory.
    """
    from focus_core.config import DecodeConfig
    from focus_core.model.chat import Message
    from focus_core.session.engines import holding
    from focus_core.session.request import Request, begin

    engine = open_engine(base, adapter, chunk_size, device)
    engine = engine.with_config(memory_budget=size_of(memory_budget)) if memory_budget is not None else engine
    held = open_memory(engine, paths or [], memory, strict=strict)
    decode = DecodeConfig(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        chunk_top_p=chunk_top_p,
        reread=reread,
        reread_tokens=reread_tokens,
        reread_way=reread_way,  # type: ignore[arg-type]
    )
    turns: list[Message] = []
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        turns.append(Message("user", question))
        asked = Request(decode, tuple(turns), template="question")
        call = begin(engine, asked, holding(engine, held), threading.Event())
        with call.stream:
            try:
                for piece in call.pieces():
                    _say(piece.delta.text)
            except KeyboardInterrupt:
                call.stream.close()
            print()
            answer = call.stream.answer
        _print_sources(answer, call.stream.documents, 3)
        turns.append(Message("assistant", answer.text))


# -- info -------------------------------------------------------------------------------------------------------


@app.command()
def info(
    paths: Paths = None,
    strict: Strict = False,
    memory: SavedMemory = None,
    memory_budget: MemoryBudget = None,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show model and adapter, and what reading PATHS, or a question to a memory, would cost, before it is read."""
    from focus_core.bench import measure_prefill
    from focus_core.session.corpus import memory_costs
    from focus_core.text.corpus import load_documents

    engine = open_engine(base, adapter, chunk_size, device)
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
        documents = load_documents(paths, skipped=skipped, strict=strict)
        chunks = [chunk for document in documents for chunk in engine.encoder.cut(document)]
        tokens = sum(len(chunk.ids) for chunk in chunks)
        with waiting("measuring this machine"):
            speed = measure_prefill(engine, min(engine.config.chunk_size, max(len(chunk.ids) for chunk in chunks)))
        facts |= {
            "documents": len(documents),
            "characters": sum(len(document.text) for document in documents),
            "tokens": tokens,
            "chunks": len(chunks),
            "chunk KV bytes": engine.encoder.shape.nbytes(tokens + len(chunks), len(chunks)),
            "seconds to read": round(tokens / speed, 1),
        }
    if memory is not None:
        engine = engine.with_config(memory_budget=size_of(memory_budget)) if memory_budget is not None else engine
        costs = memory_costs(engine.load_memory(memory))
        with waiting("measuring this machine"):
            speed = measure_prefill(engine, engine.config.chunk_size)
        facts |= costs | {
            "seconds a question, about": round(costs["rows a question"] / speed, 2),
            "seconds a token, about": round(costs["rows a token"] / speed, 2),
        }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console(markup=False).print(table)


def _say(piece: str) -> None:
    """Print a piece of an answer; a terminal gets no control characters, a pipe gets what the model wrote."""
    print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def _print_sources(answer: Any, documents: Any, count: int) -> None:
    from focus_core.session.citations import source_dict

    if not answer.evidence:
        return
    note.print("score  source, passage", style="dim")
    for item in answer.evidence[:count]:
        page = source_dict(item, documents).get("page")
        where = f"{item.start}-{item.end}" + (f", page {page}" if page else "")
        note.print(f"{item.score:.3f}  {' '.join(item.document_id.splitlines())}:{where}")
        passage = " ".join(item.text.split())
        note.print(f"       {passage}", style="dim", soft_wrap=False, no_wrap=True, overflow="ellipsis")
