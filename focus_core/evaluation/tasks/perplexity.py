"""Measure perplexity of the last tokens of long texts: with memory, without, and by the base on its own window.

Candidates are renewed at every token (arXiv 2408.11745, section 3.1), in one masked pass instead of one sweep a token:
the dense pass of training, chunk group by chunk group so that hundreds of chunks fit, and without gradient. It equals
incremental decoding token for token. All lengths of a text share the same last tokens, so only memory differs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError, ContextTooLongError
from focus_core.evaluation.report.records import Record, RecordFile, engine_facts, machine_facts, write_metrics
from focus_core.evaluation.tasks.text_windows import Window
from focus_core.method.encoding import encode_chunks
from focus_core.method.layout import Scoring, check_room, local_start, sink_before
from focus_core.method.local import Local, LocalRows
from focus_core.method.packed import commit, sweep
from focus_core.method.rows import Behind, ChunkRows
from focus_core.method.suffix import Suffix
from focus_core.text.chunking import cut
from focus_core.text.tokenization import Encoded

TARGETS = 256
GIVEN = 256
# 97.5% quantiles of Student's distribution by degrees of freedom; beyond, the normal one's
_STUDENT = dict(enumerate((12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179), 1))
_STUDENT |= dict(enumerate((2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064), 13))
_ROWS_AT_ONCE = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class PerplexityRow:
    """One line of the table: perplexities over the last tokens of all texts.

    Args:
        name: length and chunk size.
        ratio: with memory divided by without; below 1 memory helps.
        memory: perplexity with memory.
        local: perplexity of the same local context without memory.
        window: perplexity of the base on the last tokens that its window holds.
        by_text: ratio of each text and place.
        by_text_window: the same against the base on its own window.
        texts: how many.
        chunks: mean k.
        seconds: mean time of the pass with memory, chunks read anew.
        settings: what made it.
    """

    name: str
    ratio: float
    memory: float
    local: float
    window: float
    by_text: dict[str, float]
    texts: int
    chunks: float
    seconds: float
    settings: Record = field(default_factory=dict)
    by_text_window: dict[str, float] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of ``ratio`` over texts, see :func:`ratio_interval`."""
        return ratio_interval(self.by_text)

    @property
    def window_ratio(self) -> float:
        """Perplexity with memory divided by that of the base on its own window."""
        return self.memory / self.window


@torch.no_grad()
def memory_logits(
    engine: FocusEngine,
    chunks: Sequence[Sequence[int]],
    ids: Sequence[int],
    split: int,
    rows_at_once: int | None = None,
) -> Tensor:
    """Return the logits of the last tokens of a local context over chunks, as incremental decoding gives them.

    Args:
        engine: base, adapter and settings.
        chunks: token ids of each chunk, without sink.
        ids: the local context; the last given tokens before its candidate are the dynamic prompt, as many as
            ``prompt_length`` allows, and grow with the targets as an answer does.
        split: number of the first target; tokens before it are given.
        rows_at_once: candidate rows that run together; ``None`` chooses for the device.

    Returns:
        (len(ids) - split, vocabulary) float32: row t predicts token ``split + t``.

    Raises:
        ConfigError: the settings decode in another way, which one pass cannot compute.
        ContextTooLongError: the local context does not fit the window.
    """
    base, positions = engine.base, engine.config.positions
    head = sink_before(ids, engine.sink)
    _check_settings(engine, len(head) + len(ids))
    first = max(0, split - 1 - engine.config.prompt_length)
    check_room(base, len(chunks), positions, len(head) + len(ids))
    most = rows_at_once or _ROWS_AT_ONCE.get(base.device.type, 4096)
    size = max(1, most // (len(ids) - split))
    order = sorted(range(len(chunks)), key=lambda index: -len(chunks[index]))
    groups = []
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        rows = [[*sink_before([], engine.sink), *chunks[index]] for index in indices]
        batch = encode_chunks(base, rows)
        suffix = Suffix(batch, len(ids) - first)
        group = ChunkRows(batch, suffix, indices, len(chunks), [Behind(ids[first:-2])])
        sweep(base, engine.adapter, [[group]], (), positions)
        commit([[group]], ())
        group.asked = [Behind((), ids[split - 1 : -1], split - 1 - first)]
        groups.append(group)
    asked = Local([*head, *ids[:-1]], local_start(len(chunks), positions), len(head) + split)
    local = LocalRows([asked], groups, scoring=Scoring.of(engine.config))
    hidden = sweep(base, engine.adapter, [[group] for group in groups], [local], positions)[0]
    return base.logits(hidden[:, split - len(ids) :])[0].float()


def ratio_interval(ratios: Mapping[str, float]) -> tuple[float, float]:
    """Return the 95% interval of a geometric mean of ratios over texts: places of one text count as one.

    Args:
        ratios: by ``TEXT@PLACE``. With a single text its places stand in for texts.
    """
    by_text: dict[str, list[float]] = {}
    for name, ratio in ratios.items():
        by_text.setdefault(name.split("@")[0], []).append(math.log(ratio))
    means = [sum(logs) / len(logs) for logs in by_text.values()]
    values = means if len(means) > 1 else [math.log(ratio) for ratio in ratios.values()]
    if len(values) < 2:
        return 0.0, math.inf
    middle = sum(values) / len(values)
    error = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))
    spread = _STUDENT.get(len(values) - 1, 1.96) * error
    return math.exp(middle - spread), math.exp(middle + spread)


def _check_settings(engine: FocusEngine, rows: int) -> None:
    if engine.config.local_mode != "incremental":
        raise ConfigError(
            f"perplexity is computed as incremental decoding, but local_mode is {engine.config.local_mode!r}; "
            "use an adapter with local_mode='incremental'"
        )
    if rows > engine.config.window:
        raise ContextTooLongError(
            f"a local context of {rows} tokens does not fit the window of {engine.config.window}; give fewer (--given)"
        )


@torch.no_grad()
def window_logits(engine: FocusEngine, ids: Sequence[int], targets: int) -> Tensor:
    """Return the base's own (targets, vocabulary) logits of the last tokens of ``ids``, by transformers' forward."""
    row = torch.tensor([[*sink_before(ids, engine.sink), *ids[:-1]]], device=engine.base.device)
    logits: Tensor = engine.loaded.model(row, use_cache=False, logits_to_keep=targets).logits[0].float()
    return logits


Known = dict[tuple[str, int], float]
"""Losses of the base by window and how many of its last tokens are read: no memory changes them."""


def measure_window(
    engine: FocusEngine, window: Window, tokens: int, given: int, targets: int = TARGETS, known: Known | None = None
) -> Record:
    """Return the mean negative log-likelihoods of a window's last ``targets`` tokens.

    Args:
        engine: model under test.
        window: of at least ``tokens`` tokens.
        tokens: memory and local context together.
        given: tokens of the local context before the targets.
        targets: how many tokens are scored.
        known: losses of the base; a missing one is computed and put in.
    """
    started = time.monotonic()
    if given < 1:
        raise ConfigError(f"perplexity needs at least 1 local token before the scored ones; got {given} (--given)")
    local = given + targets
    if tokens <= local:
        raise ConfigError(f"a length of {tokens} tokens leaves no memory beside {local} local tokens; ask for more")
    whole = window.end(tokens)
    ids = whole.encoded.ids.tolist()
    places = whole.encoded
    stop = len(ids) - local
    before = Encoded(places.ids[:stop], places.starts[:stop], places.clean[:stop], int(places.starts[stop]))
    chunks = [chunk.ids for chunk in cut("text", whole.text, before, engine.config.chunk_size)]
    scored = torch.tensor(ids[-targets:], device=engine.base.device)

    def nll(logits: Tensor) -> float:
        return float(F.cross_entropy(logits, scored))

    memory = nll(memory_logits(engine, chunks, ids[-local:], given))
    seconds = round(time.monotonic() - started, 2)
    known = {} if known is None else known

    def alone(tokens: int) -> float:
        key = (window.fingerprint, tokens)
        if key not in known:
            known[key] = nll(window_logits(engine, window.encoded.ids[-tokens:].tolist(), targets))
        return known[key]

    return {
        "text": window.name,
        "memory": memory,
        "local": alone(local),
        "window": alone(engine.base.window - 1),
        "chunks": len(chunks),
        "seconds": seconds,
    }


def run_perplexity(
    engine: FocusEngine,
    name: str,
    windows: Sequence[Window],
    tokens: int,
    given: int,
    output: Path,
    report: Callable[[Record], None] = lambda record: None,
    *,
    settings: Record | None = None,
    known: Known | None = None,
    targets: int = TARGETS,
) -> PerplexityRow:
    """Measure all windows, resumable like :func:`~focus_core.evaluation.runner.run`, and summarise.

    Args:
        engine: model under test.
        name: of the files.
        windows: from :func:`read_windows`, the same for all lengths.
        tokens: memory and local context together.
        given: tokens of the local context before the targets.
        output: folder.
        report: called with each record.
        settings: what made the windows.
        known: as in :func:`measure_window`; share it between lengths.
        targets: how many tokens are scored.
    """
    settings = {**(settings or {}), "tokens": tokens, "given": given, "targets": targets}
    file = RecordFile(output / f"{name}.jsonl", {"task": name, "settings": settings, **engine_facts(engine)})
    records = []
    for record in file.extend(
        windows,
        lambda window: window.fingerprint,
        lambda window: measure_window(engine, window, tokens, given, targets, known),
    ):
        records.append(record)
        report(record)

    def mean(key: str) -> float:
        return float(sum(record[key] for record in records)) / len(records)

    memory, local, window = (math.exp(mean(key)) for key in ("memory", "local", "window"))
    by_text = {record["text"]: math.exp(record["memory"] - record["local"]) for record in records}
    against_window = {record["text"]: math.exp(record["memory"] - record["window"]) for record in records}
    row = PerplexityRow(
        name,
        memory / local,
        memory,
        local,
        window,
        by_text,
        len(records),
        mean("chunks"),
        mean("seconds"),
        settings,
        against_window,
    )
    facts = {"run": file.identity, "trained": engine.info.trained, **machine_facts(engine)}
    write_metrics(output / f"{name}.json", {**asdict(row), **facts})
    return row
