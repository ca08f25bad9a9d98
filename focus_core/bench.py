"""Measure speed as ratios inside one run, both sides named.

Timings on shared machines drift; a ratio of interleaved medians does not. Nothing here is a test.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from focus_core.corpus import Document
from focus_core.engine import FocusEngine
from focus_core.memory import Memory
from focus_core.parallel import encode_chunks
from focus_core.reading import Reading


def measure_prefill(engine: FocusEngine, chunk_size: int, repeats: int = 2) -> float:
    """Return tokens per second of the chunk pass on rows of ``chunk_size`` tokens."""
    rows = [[5] * chunk_size] * max(1, 1024 // chunk_size)
    encode_chunks(engine.base, rows)
    times = [_seconds(lambda: encode_chunks(engine.base, rows)) for _ in range(repeats)]
    return len(rows) * chunk_size / min(times)


def run_bench(engine: FocusEngine, chunks: int, chunk_size: int, steps: int) -> list[tuple[str, str, str, str]]:
    """Time the chunk pass against transformers' forward, and a batched step against one chunk at a time."""
    return [_prefill(engine, chunk_size), _step(engine, chunks, chunk_size, steps)]


def _prefill(engine: FocusEngine, chunk_size: int) -> tuple[str, str, str, str]:
    count = max(1, 2048 // chunk_size)
    ids = torch.randint(10, 200, (count, chunk_size), device=engine.base.device)
    body = engine.loaded.model.get_decoder()  # type: ignore[no-untyped-call]

    def theirs() -> None:
        with torch.no_grad():
            body(ids, use_cache=True)

    def ours() -> None:
        encode_chunks(engine.base, ids.tolist())

    first, second = _interleaved(ours, theirs, 5)
    tokens = count * chunk_size
    return (
        f"chunk pass, {count} rows of {chunk_size}",
        f"focusllm {tokens / first:,.0f} tokens/s",
        f"transformers {tokens / second:,.0f} tokens/s",
        f"{second / first:.2f}",
    )


def _step(engine: FocusEngine, chunks: int, chunk_size: int, steps: int) -> tuple[str, str, str, str]:
    memory = _filled(engine, chunks, chunk_size)
    question = engine.local_ids("What is the pass key?")
    readings = []
    for size in (None, 1):
        reading = Reading(
            engine.base,
            engine.adapter,
            engine.config,
            memory.state,
            engine.sink,
            max_tokens=4 * steps + 8,
            chunks_per_batch=size,
        )
        reading.begin(question)
        readings.append(reading)
    batched, single = _interleaved(lambda: readings[0].step(30), lambda: readings[1].step(30), steps)
    return (
        f"decoding step over {len(memory)} chunks of {chunk_size}",
        f"one batch {batched * 1e3:,.0f} ms",
        f"one chunk at a time {single * 1e3:,.0f} ms",
        f"{single / batched:.2f}",
    )


def _filled(engine: FocusEngine, chunks: int, chunk_size: int) -> Memory:
    """Return a memory of ``chunks`` different chunks of exactly ``chunk_size`` tokens."""
    generator = torch.Generator().manual_seed(0)
    words = engine.tokenizer.decode(torch.randint(1000, 9000, (2 * chunk_size,), generator=generator).tolist())
    documents = []
    for index in range(chunks):
        ids = engine.tokenizer.encode(f"{index} {words}")[:chunk_size]
        documents.append(Document(str(index), engine.tokenizer.decode(ids)))
    return engine.with_config(chunk_size=chunk_size + 8).remember(documents)


def _interleaved(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median seconds of both, run in turns."""
    first(), second()
    times = [(_seconds(first), _seconds(second)) for _ in range(repeats)]
    return statistics.median(pair[0] for pair in times), statistics.median(pair[1] for pair in times)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
