"""Compute the training loss of one example, exactly as incremental decoding would score it.

All candidates of an example's targets are made together in one masked pass per chunk (arXiv 2408.11745, equation 6,
with every local token from the split on as a target). Chunk KV and the ordinary rows behind it depend on no trained
weight, so they run without gradient; the graph holds candidate rows and local rows only. A teacher, if one is asked
for, is the frozen base itself, which reads the memory in its own window. These are pure functions: no data, no
optimizer, no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_core.config import Positions, TeacherMemory
from focus_core.errors import ConfigError
from focus_core.method.encoding import encode_chunks
from focus_core.method.kv import ChunkKV
from focus_core.method.layout import PLAIN, Scoring, local_start, sink_before
from focus_core.method.local import Local, LocalRows
from focus_core.method.packed import commit, sweep
from focus_core.method.rows import Behind, ChunkRows
from focus_core.method.suffix import Suffix
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.training.kept import KeptChunks


@dataclass(frozen=True)
class Query:
    """A local context and where its targets begin.

    Args:
        ids: local token ids x_0..x_{n-1}.
        split: s; tokens s..n-1 are targets, tokens before it are given.
        prompt: P, most given tokens before the candidate that run behind the chunks; ``None`` runs all of them.
        gold: numbers of the chunks that hold the answer, if they are known.
        before: token ids of the chunks that are read whole (:meth:`~focus_core.method.reading.Reading.read_whole`), a
            separator behind each; they never run behind the chunks.
        opening: tokens of the local context that stand before them.
        absent: whether its answer is nowhere in memory, and its targets say so.
    """

    ids: tuple[int, ...]
    split: int
    prompt: int | None = None
    gold: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    opening: int = 0
    absent: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.split < len(self.ids):
            raise ConfigError(f"split must be between 1 and {len(self.ids) - 1}; got {self.split}")
        if self.prompt is not None and self.prompt < 1:
            raise ConfigError(f"prompt must be at least 1; got {self.prompt}")

    @property
    def local(self) -> list[int]:
        """All that the local rows hold: ``ids`` with ``before`` behind their opening."""
        return [*self.ids[: self.opening], *self.before, *self.ids[self.opening :]]

    @property
    def targets(self) -> int:
        """Number of supervised tokens, n - s."""
        return len(self.ids) - self.split

    @property
    def injected_from(self) -> int:
        """First local token that runs behind the chunks: s - 1 - P, as the dynamic prompt ends before token s - 1."""
        return 0 if self.prompt is None else max(0, self.split - 1 - self.prompt)


@dataclass(frozen=True)
class Example:
    """Chunks of memory and the local contexts asked over them.

    Args:
        chunks: token ids of each chunk, without sink.
        queries: at least one; they share the chunk pass.
        kind: name of the objective, for the log.
    """

    chunks: tuple[tuple[int, ...], ...]
    queries: tuple[Query, ...]
    kind: str

    @property
    def tokens(self) -> int:
        """Input tokens: memory, and of each local context the local rows and the rows behind every chunk."""
        memory = sum(map(len, self.chunks))
        local = sum(len(query.before) + len(query.ids) for query in self.queries)
        return memory + local + len(self.chunks) * sum(len(query.ids) - query.injected_from for query in self.queries)

    @property
    def targets(self) -> int:
        """Supervised tokens."""
        return sum(query.targets for query in self.queries)


def encode_example(base: BaseDecoder, example: Example, sink: int | None, kept: KeptChunks | None = None) -> ChunkKV:
    """Run the chunk pass of an example, but for chunks whose KV is kept.

    Args:
        base: the frozen decoder.
        example: holds the chunks.
        sink: the token that starts every row, or ``None``.
        kept: of earlier steps, and for later ones.
    """
    head = () if sink is None else (sink,)
    rows = [head + chunk for chunk in example.chunks]
    return encode_chunks(base, rows) if kept is None else kept.encode(base, rows)


@dataclass(frozen=True)
class Task:
    """A query over encoded chunks: what one loss is computed from.

    Args:
        chunks: from :func:`encode_example`; ``None`` where :func:`reads_alone` holds.
        query: the local context.
    """

    chunks: ChunkKV | None
    query: Query


def reads_alone(adapter: CandidateAdapter, query: Query) -> bool:
    """Whether a reader answers from what is read whole, without candidates, so that no chunk has to be encoded."""
    return adapter.reader_rank > 0 and bool(query.before)


def dense_logits(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    tasks: Sequence[Task],
    sink: int | None,
    positions: Positions,
    scoring: Scoring = PLAIN,
    *,
    gradient_checkpointing: bool = False,
    fixed: bool = False,
) -> list[Tensor]:
    """Return the logits of every target of every task; all tasks share one pass through the layers.

    Args:
        base: the frozen decoder.
        adapter: its candidate projections; gradients flow into them.
        tasks: queries with their chunks from :func:`encode_example`.
        sink: as in :func:`encode_example`; a query that begins with it gets no second one.
        positions: of the candidates.
        scoring: of the candidates.
        gradient_checkpointing: see :class:`~focus_core.config.TrainConfig`.
        fixed: gradients flow into the reader's matrices alone.

    Returns:
        One (n - s, vocabulary) float32 tensor a task: row t predicts token s + t from the candidates made at token
        s + t - 1.
    """
    by_chunks: dict[int, list[int]] = {}
    memories: dict[int, ChunkKV] = {}
    alone = []
    for index, task in enumerate(tasks):
        if task.chunks is None or reads_alone(adapter, task.query):
            alone.append(index)
        else:
            memories[id(task.chunks)] = task.chunks
            by_chunks.setdefault(id(task.chunks), []).append(index)
    together = [[tasks[index] for index in indices] for indices in by_chunks.values()]
    groups = [
        _behind(memories[key], [task.query for task in some]) for key, some in zip(by_chunks, together, strict=True)
    ]
    _inject(base, adapter, groups, positions)
    locals_ = []
    for group, some in zip(groups, together, strict=True):
        group.asked = [_candidates(task.query) for task in some]
        asked = [_local(task.query, group.total, sink, positions) for task in some]
        locals_.append(LocalRows(asked, [group], scoring=scoring))
    if alone:
        locals_.append(LocalRows([_read_alone(tasks[index].query, sink) for index in alone], scoring=scoring))
    hidden = sweep(
        base, adapter, [groups], locals_, positions, gradient_checkpointing=gradient_checkpointing, fixed=fixed
    )
    states: dict[int, Tensor] = {}
    for rows, local, indices in zip(hidden, locals_, [*by_chunks.values(), *([alone] if alone else [])], strict=True):
        states |= dict(zip(indices, torch.split(rows[0], [len(it.ids) for it in local.asked]), strict=True))
    targets = [task.query.targets for task in tasks]
    last = torch.cat([states[index][-count:] for index, count in enumerate(targets)])
    return list(torch.split(base.logits(last.unsqueeze(0))[0].float(), targets))


def _behind(chunks: ChunkKV, queries: Sequence[Query]) -> ChunkRows:
    """Return what runs behind chunks as ordinary tokens: all that the last candidate of each local context sees."""
    ordinary = [Behind(query.ids[query.injected_from : -2]) for query in queries]
    suffix = Suffix(chunks, max(len(it.ordinary) for it in ordinary), len(queries))
    return ChunkRows(chunks, suffix, range(chunks.size), chunks.size, ordinary)


def _candidates(query: Query) -> Behind:
    """Return what runs behind the chunks as candidates: one for each target, made at the token before it."""
    visible = query.split - 1 - query.injected_from
    return Behind((), query.ids[query.split - 1 : -1], visible)


@torch.no_grad()
def _inject(base: BaseDecoder, adapter: CandidateAdapter, groups: Sequence[ChunkRows], positions: Positions) -> None:
    """Run ordinary rows, which depend on no trained weight; their K and V stay in the suffixes."""
    some = [group for group in groups if any(it.ordinary for it in group.asked)]
    if some:
        sweep(base, adapter, [some], (), positions)
        commit([some], ())


def _local(query: Query, chunks: int, sink: int | None, positions: Positions) -> Local:
    ids = query.local
    head = sink_before(ids, sink)
    return Local([*head, *ids[:-1]], local_start(chunks, positions), len(head) + len(query.before) + query.split)


def _read_alone(query: Query, sink: int | None) -> Local:
    """Return a local context that stands where the base's own window begins, and takes the reader."""
    rows = [*sink_before(query.local, sink), *query.local[:-1]]
    return Local(rows, 0, len(rows), reads=True)


def dense_losses(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    tasks: Sequence[Task],
    sink: int | None,
    positions: Positions,
    scoring: Scoring = PLAIN,
) -> list[Tensor]:
    """Return each task's mean negative log-likelihood of its targets (equation 6), scalars in nats per token."""
    logits = dense_logits(base, adapter, tasks, sink, positions, scoring)
    return [likelihood_loss(scores, task.query) for scores, task in zip(logits, tasks, strict=True)]


def likelihood_loss(logits: Tensor, query: Query) -> Tensor:
    """Return the mean negative log-likelihood of the targets, given their (n - s, vocabulary) logits."""
    return F.cross_entropy(logits, torch.tensor(query.ids[query.split :], device=logits.device))


# -- distillation -----------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_logits(
    base: BaseDecoder, example: Example, query: Query, sink: int | None, memory: TeacherMemory
) -> Tensor | None:
    """Return what the base says when it reads memory and local context as one text in its own window.

    Args:
        base: the frozen decoder; attached candidate projections do not change it.
        example: holds the chunks.
        query: one of its local contexts.
        sink: starts the text, or ``None``.
        memory: ``all`` chunks, the last ones that fit (``end``), or the query's ``gold`` ones where they are known.

    Returns:
        (n - s, vocabulary) float32 logits of the targets; ``None`` where the text is longer than the window.
    """
    wanted = query.gold if memory == "gold" and query.gold else range(len(example.chunks))
    chunks = [example.chunks[index] for index in wanted]
    head = [] if sink is None else [sink]
    if memory == "end":
        room = base.window - len(head) - len(query.ids[:-1])
        while len(chunks) > 1 and sum(map(len, chunks)) > room:
            chunks = chunks[1:]
    text = [*head, *(token for chunk in chunks for token in chunk), *query.ids[:-1]]
    if len(text) > base.window:
        return None
    ids = torch.tensor([text], device=base.device)
    logits: Tensor = base.model(ids, use_cache=False, logits_to_keep=query.targets).logits
    return logits[0].float()


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of (targets, vocabulary) ``logits`` from ``teacher``, mean over targets in nats."""
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
