"""Measure speed as ratios inside one run, both sides named.

Timings on shared machines drift; a ratio of interleaved medians does not. Nothing here is a test.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.method.encoding import encode_chunks
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document

_QUESTION = "What is the pass key?"
_ASKED, _READ = 8, 2


@dataclass(frozen=True)
class Line:
    """One comparison.

    Args:
        measure: what was timed.
        first: our side, with its number.
        second: the other side, with its number.
        ratio: how many times faster ours was.
    """

    measure: str
    first: str
    second: str
    ratio: float


@dataclass(frozen=True)
class Setting:
    """Sizes of a benchmark."""

    chunks: int
    chunk_size: int
    steps: int


Measure = Callable[[FocusEngine, Setting], Line]


def measure_prefill(engine: FocusEngine, chunk_size: int, repeats: int = 2) -> float:
    """Return tokens per second of the chunk pass on rows of ``chunk_size`` tokens."""
    rows = [[5] * chunk_size] * max(1, 1024 // chunk_size)
    encode_chunks(engine.base, rows)
    times = [_seconds(lambda: encode_chunks(engine.base, rows)) for _ in range(repeats)]
    return len(rows) * chunk_size / min(times)


def run_bench(
    engine: FocusEngine, chunks: int, chunk_size: int, steps: int, measures: Sequence[str] | None = None
) -> Iterator[Line]:
    """Yield each comparison as soon as it is measured.

    Args:
        engine: model under test.
        chunks: k of the decoding step and of the injection.
        chunk_size: tokens of a chunk.
        steps: decoding steps to time.
        measures: from :func:`choose_measures`; ``None`` for all.
    """
    for name in choose_measures(measures):
        yield MEASURES[name](engine, Setting(chunks, chunk_size, steps))


def choose_measures(names: Sequence[str] | None) -> list[str]:
    """Return the measures to run, in the order of :data:`MEASURES`.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = [name for name in names or () if name not in MEASURES]
    if unknown:
        raise ConfigError(f"unknown measure {unknown[0]!r}; choose from {', '.join(MEASURES)}")
    return [name for name in MEASURES if names is None or name in names]


def _tokenizer(engine: FocusEngine, setting: Setting) -> Line:
    """Ours against the model's own tokenizer, both with character offsets."""
    text = _words(engine, 20_000)
    own = engine.loaded.tokenizer

    def theirs() -> None:
        own(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    first, second = _interleaved(lambda: engine.tokenizer.encode_with_offsets(text), theirs, 3)
    tokens = engine.count_tokens(text)
    path = "tiktoken path" if engine.tokenizer.is_fast else "plain path"
    return Line(
        f"tokenizer with offsets, {tokens:,} tokens",
        f"focusllm ({path}) {tokens / first:,.0f} tokens/s",
        f"the model's own {tokens / second:,.0f} tokens/s",
        second / first,
    )


def _prefill(engine: FocusEngine, setting: Setting) -> Line:
    count = max(1, 2048 // setting.chunk_size)
    ids = torch.randint(10, 200, (count, setting.chunk_size), device=engine.base.device)
    body = engine.loaded.model.get_decoder()  # type: ignore[no-untyped-call]

    def theirs() -> None:
        with torch.no_grad():
            body(ids, use_cache=True)

    first, second = _interleaved(lambda: encode_chunks(engine.base, ids.tolist()), theirs, 5)
    tokens = count * setting.chunk_size
    return Line(
        f"chunk pass, {count} rows of {setting.chunk_size}",
        f"focusllm {tokens / first:,.0f} tokens/s",
        f"transformers {tokens / second:,.0f} tokens/s",
        second / first,
    )


def _injection(engine: FocusEngine, setting: Setting) -> Line:
    """Putting the question behind every chunk: what a question costs before its first token."""
    memory = _filled(engine, setting)
    question = engine.local_ids(_QUESTION)

    def begin(size: int | None) -> None:
        engine.reading(memory.state, max_tokens=1, chunks_per_batch=size).begin(question)

    batched, single = _interleaved(lambda: begin(None), lambda: begin(1), max(1, setting.steps // 4))
    measure = f"injection of {len(question)} tokens behind {len(memory)} chunks of {setting.chunk_size}"
    return _batched_line(measure, batched, single)


def _step(engine: FocusEngine, setting: Setting) -> Line:
    memory = _filled(engine, setting)
    batched, single = _steps(engine, setting, (memory, None), (memory, 1))
    measure = f"decoding step over {len(memory)} chunks of {setting.chunk_size}"
    return _batched_line(measure, batched, single)


def _grown(engine: FocusEngine, setting: Setting) -> Line:
    """A step over a memory that was read at once, and over one to which the same documents came one by one."""
    whole = _filled(engine, setting)
    grown = whole.subset([])
    for document in whole.documents:
        grown.add([document])
    first, second = _steps(engine, setting, (whole, None), (grown, None))
    return Line(
        f"decoding step over {len(whole)} chunks of {setting.chunk_size}",
        f"read at once {first * 1e3:,.0f} ms",
        f"added one by one {second * 1e3:,.0f} ms",
        second / first,
    )


def _batch(engine: FocusEngine, setting: Setting) -> Line:
    """Different questions over one memory, all at once and one after the other: tokens of all answers a second."""
    memory = _filled(engine, setting)
    questions = [f"{_QUESTION} Number {index}." for index in range(_ASKED)]
    options: dict[str, Any] = {"max_tokens": setting.steps, "template": "raw"}
    tokens: list[int] = []  # of all answers, each time; both sides give the same

    def at_once() -> None:
        tokens.append(sum(len(answer.tokens) for answer in engine.answer_many(questions, memory, **options)))

    def apart() -> None:
        for question in questions:
            engine.answer(question, memory, **options)

    together, single = _interleaved(at_once, apart, 3)
    return Line(
        f"batch of {_ASKED} questions over {len(memory)} chunks of {setting.chunk_size}, {tokens[-1]} tokens in all",
        f"at once {tokens[-1] / together:,.2f} tokens/s",
        f"one after the other {tokens[-1] / single:,.2f} tokens/s",
        single / together,
    )


def _stacked(engine: FocusEngine, setting: Setting) -> Line:
    """A step of several questions over one memory in one sweep, and in a sweep for each."""
    memory, most = _filled(engine, setting), 4 * setting.steps + 8
    question = engine.local_ids(_QUESTION)
    several = [engine.reading(memory.state, max_tokens=most) for _ in range(_ASKED)]
    alone = engine.reading(memory.state, max_tokens=most)
    for reading in (*several, alone):
        reading.begin(question)

    with ThreadPoolExecutor(_ASKED) as pool:
        together, single = _interleaved(
            lambda: list(pool.map(lambda reading: reading.step(30), several)), lambda: alone.step(30), setting.steps
        )
    return Line(
        f"decoding step over {len(memory)} chunks of {setting.chunk_size}, {_ASKED} questions",
        f"at once {_ASKED / together:,.2f} tokens/s",
        f"one alone {1 / single:,.2f} tokens/s",
        _ASKED * single / together,
    )


def _look(engine: FocusEngine, setting: Setting) -> Line:
    """A step behind chunks that are read whole (look, then read), and one without; how long the second look takes."""
    memory, most = _filled(engine, setting), 4 * setting.steps + 8
    question = engine.local_ids(_QUESTION)
    readings = [engine.reading(memory.state, max_tokens=most) for _ in range(2)]
    begun = [_seconds(partial(reading.begin, question)) for reading in readings]
    closer = _seconds(lambda: readings[0].read_whole(range(min(_READ, len(memory)))))
    with_them, without = _interleaved(lambda: readings[0].step(30), lambda: readings[1].step(30), setting.steps)
    return Line(
        f"decoding step over {len(memory)} chunks of {setting.chunk_size}, {len(readings[0].whole)} read whole",
        f"with them {with_them * 1e3:,.0f} ms, and once {closer / min(begun):.2f} of the first pass",
        f"without {without * 1e3:,.0f} ms",
        without / with_them,
    )


MEASURES: dict[str, Measure] = {
    "tokenizer": _tokenizer,
    "prefill": _prefill,
    "injection": _injection,
    "step": _step,
    "grown": _grown,
    "batch": _batch,
    "stacked": _stacked,
    "look": _look,
}


def _steps(engine: FocusEngine, setting: Setting, *sides: tuple[Memory, int | None]) -> tuple[float, float]:
    """Return the median seconds of a decoding step of two sides: a memory and how many chunks run together."""
    most = 4 * setting.steps + 8
    readings = [engine.reading(memory.state, max_tokens=most, chunks_per_batch=size) for memory, size in sides]
    for reading in readings:
        reading.begin(engine.local_ids(_QUESTION))
    return _interleaved(lambda: readings[0].step(30), lambda: readings[1].step(30), setting.steps)


def _batched_line(measure: str, batched: float, single: float) -> Line:
    """Compare seconds of all chunks in one batch with seconds of one chunk at a time."""
    return Line(
        measure, f"one batch {batched * 1e3:,.0f} ms", f"one chunk at a time {single * 1e3:,.0f} ms", single / batched
    )


def _filled(engine: FocusEngine, setting: Setting) -> Memory:
    """Return a memory of different chunks of exactly ``chunk_size`` tokens."""
    size = setting.chunk_size
    words, documents = _words(engine, 2 * size), []
    for index in range(setting.chunks):
        ids = engine.tokenizer.encode(f"{index} {words}")[:size]
        documents.append(Document(str(index), engine.tokenizer.decode(ids)))
    return engine.with_config(chunk_size=size + 8).remember(documents)


def _words(engine: FocusEngine, tokens: int) -> str:
    """Return a text of random tokens from the middle of the vocabulary."""
    known = int(engine.base.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    return engine.tokenizer.decode(torch.randint(known // 20, known // 5, (tokens,), generator=generator).tolist())


def _interleaved(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median seconds of both, run in turns."""
    first(), second()
    times = [(_seconds(first), _seconds(second)) for _ in range(repeats)]
    return statistics.median(pair[0] for pair in times), statistics.median(pair[1] for pair in times)


def _seconds(work: Callable[[], object]) -> float:
    _finish()
    started = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    """Wait for the GPU, which computes behind Python's back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
