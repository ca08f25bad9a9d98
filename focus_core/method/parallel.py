"""Run the method: every chunk in parallel, one candidate per chunk and step, candidates in front of the local context.

This is parallel decoding of FocusLLM (arXiv 2408.11745, section 2.3, equations 1-5), one sweep through the layers for
all rows: at layer l the local rows need only layer l's candidate keys and values, which the same layer has just made.
Training runs the same rows with many targets at once. Nothing here tokenises, samples or prints; a sweep that fails or
is cancelled leaves what was committed before it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_core.config import CandidateBias, FocusConfig, Positions, TrainConfig
from focus_core.errors import ContextTooLongError
from focus_core.method.attention import (
    Front,
    Part,
    attend,
    attend_causal,
    attend_chunks,
    attend_front,
    causal_bias,
    fold_heads,
    hidden_score,
    packed_rows,
    rows_by_chunk,
    scores_of,
)
from focus_core.method.encoding import Check, never
from focus_core.method.kv import ChunkKV, move_keys, rotations
from focus_core.method.sources import FIRST
from focus_core.method.suffix import GrowingKV, Suffix
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder

_FEW = 0.25  # a smaller share of a batch's chunks is copied when the others are left out


# -- positions --------------------------------------------------------------------------------------------------


def candidate_positions(chunks: int, positions: Positions) -> range | list[int]:
    """Return where the candidates stand in front of the local row: 0..k-1 if ``ordered``, all at 0 if ``shared``."""
    return range(chunks) if positions == "ordered" else [0] * chunks


def local_start(chunks: int, positions: Positions) -> int:
    """Return the position of the first local row: behind all candidates, or 0 when there are none."""
    return chunks if positions == "ordered" else min(chunks, 1)


def sink_before(local: Sequence[int], sink: int | None) -> list[int]:
    """Return what stands before a local context: the sink, unless there is none or the context begins with it."""
    return [] if sink is None or (len(local) > 0 and local[0] == sink) else [sink]


# -- rows of a sweep --------------------------------------------------------------------------------------------


@dataclass
class ChunkRows:
    """The rows that one sweep runs behind some chunks: ordinary tokens, then candidates.

    Args:
        chunks: their chunk KV, read only.
        suffix: what this question put behind each chunk so far.
        indices: the chunks' numbers in the memory they belong to.
        total: chunks of that memory.
        ordinary: (m,) ids that run as ordinary tokens and join the suffix.
        candidates: (T,) ids that run as candidates; decoding has T = 1.
        visible: (T,) suffix tokens each candidate sees, the new ordinary ones included.
        rows: of each of ``indices``, its row in ``chunks``: equal chunks share one, and so their candidate, which
            stands in front of the local rows once for each; a row that is not named stands nowhere. ``None`` where
            every chunk has its own, in order.
    """

    chunks: ChunkKV
    suffix: Suffix
    indices: Sequence[int]
    total: int
    ordinary: Tensor
    candidates: Tensor
    visible: Tensor
    rows: Sequence[int] | None = None
    turns: list[tuple[Tensor, Tensor]] | None = None
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    _tail_bias: Tensor | None = None
    _copies: Tensor | None = None

    def beside(self, numbers: Mapping[int, int]) -> ChunkRows:
        """Return rows of which the local rows see some chunks' candidates alone; the suffixes of all go on growing.

        Args:
            numbers: of the chunks to see, ``indices`` to what they shall be.
        """
        kept = self._named(numbers)
        indices, rows, none = [number for number, _ in kept], [row for _, row in kept], torch.empty(0, dtype=torch.long)
        return ChunkRows(self.chunks, self.suffix, indices, len(numbers), none, none, none, rows=rows)

    def _named(self, numbers: Mapping[int, int]) -> list[tuple[int, int]]:
        rows = range(self.chunks.size) if self.rows is None else self.rows
        return [(numbers[index], row) for index, row in zip(self.indices, rows, strict=True) if index in numbers]

    def only(self, numbers: Mapping[int, int]) -> ChunkRows | None:
        """Return the rows of some chunks alone, with what their suffixes hold; ``None`` if no such chunk is here.

        Their KV is copied where they are few; where they are many they stay where they are, beside rows not shown.

        Args:
            numbers: of the wanted chunks, ``indices`` to what they shall be.
        """
        kept = self._named(numbers)
        if not kept:
            return None
        chunks, suffix, places = self.chunks, self.suffix, sorted({row for _, row in kept})
        if len(places) <= _FEW * chunks.size:
            chunks, suffix = chunks.choose(places), suffix.choose(places)
            kept = [(number, places.index(row)) for number, row in kept]
        indices, rows = [number for number, _ in kept], [row for _, row in kept]
        none = torch.empty(0, dtype=torch.long)
        return ChunkRows(chunks, suffix, indices, len(numbers), none, none, none, rows=rows)

    def prepare(self, base: BaseDecoder, positions: Positions) -> None:
        """Make masks and the rotation that brings candidate keys in front of the local row."""
        device = base.device
        self._tail_bias = self._hidden_tail(base)
        self._copies = None
        lengths = torch.tensor(self.chunks.lengths)
        if self.rows is not None and list(self.rows) != list(range(self.chunks.size)):
            copies = torch.tensor(self.rows, dtype=torch.long)
            lengths, self._copies = lengths[copies], copies.to(device)
        if base.rotary:
            here = lengths[:, None] + self.visible[None, :]
            there = torch.tensor(list(candidate_positions(self.total, positions)))
            delta = (there[list(self.indices), None] - here).flatten().to(device)
            self.turns = rotations(base.frequencies, delta.to(device))

    def _hidden_tail(self, base: BaseDecoder) -> Tensor:
        """Return what each row sees of the first tokens, the suffix and the new rows, candidates last.

        (chunks or 1, 1, heads / kv_heads * rows, FIRST + suffix + m + T)
        """
        rows, targets = len(self.ordinary), len(self.candidates)
        seen, columns = self.suffix.used + rows, torch.arange(self.suffix.used + rows + targets)
        last = torch.cat([self.suffix.used + torch.arange(rows), self.visible - 1])
        own = torch.arange(-rows, targets) + seen  # a candidate's own key; an ordinary row is behind its own
        hidden = (columns > last[:, None]) & (columns != own[:, None])
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, hidden_score(base.dtype))
        bias = F.pad(bias.to(base.device, base.dtype), (FIRST, 0)).repeat(base.num_heads // base.num_kv_heads, 1)
        first = self.chunks.first_hidden()
        return bias[None, None] if first is None else bias + F.pad(first, (0, len(columns)))

    def ids(self) -> tuple[Tensor, Tensor]:
        """Return (chunks * m,) ordinary and (chunks * T,) candidate ids."""
        return self.ordinary.repeat(self.chunks.size), self.candidates.repeat(self.chunks.size)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the positions of :meth:`ids`: behind the chunk and the suffix."""
        ends = torch.tensor(self.chunks.lengths)[:, None]
        ordinary = ends + self.suffix.used + torch.arange(len(self.ordinary))
        return ordinary.flatten(), (ends + self.visible).flatten()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attend each row to its chunk, the suffix before it, and (candidates) itself.

        Args:
            layer: layer number; in the base's last one only the candidates' K and V are kept.
            query: (1, heads, chunks * (m + T), head_dim), ordinary rows first.
            key: (1, kv_heads, chunks * (m + T), head_dim), rotated.
            value: like ``key``.
            scale: of the scores.
            softcap: of the scores.

        Returns:
            (1, chunks * (m + T), heads, head_dim).
        """
        count, targets = self.chunks.size, len(self.candidates)
        split, (_, kv_heads, _, dim) = key.shape[2] - count * targets, key.shape
        turn, chunks = self.turns[layer] if self.turns else None, len(self.indices)
        moved = move_keys(self._shown(key[:, :, split:]), turn)
        self.keys = moved.reshape(kv_heads, chunks, targets, dim).permute(2, 0, 1, 3)  # (T, kv_heads, chunks, head_dim)
        self.values = self._shown(value[:, :, split:]).reshape(kv_heads, chunks, targets, dim).permute(2, 0, 1, 3)
        if layer == self.chunks.shape.layers:  # the base's last layer
            return query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])
        rows, tail_key, tail_value = (rows_by_chunk(tensor, count, split) for tensor in (query, key, value))
        _, heads, each, _ = rows.shape
        rows = fold_heads(rows, kv_heads)
        tail_key, tail_value = self.suffix.write(layer, tail_key, tail_value)
        behind = attend(rows, tail_key, tail_value, scale, softcap=softcap, bias=self._tail_bias)
        seen = attend_chunks(rows, self.chunks.layer(layer), scale, softcap=softcap, others=[behind])
        seen = seen.reshape(count, heads, each, dim)
        if split == count == split * targets:
            return seen.permute(2, 0, 1, 3).reshape(1, 2 * count, heads, dim)
        ordinary, candidate = torch.split(seen, [split // count, targets], dim=2)
        return torch.cat([packed_rows(ordinary), packed_rows(candidate)], dim=1)

    def _shown(self, candidates: Tensor) -> Tensor:
        """Repeat what equal chunks share: (1, kv_heads, rows * T, head_dim) -> (1, kv_heads, chunks * T, head_dim)."""
        if self._copies is None:
            return candidates
        _, kv_heads, _, dim = candidates.shape
        each = candidates.reshape(1, kv_heads, self.chunks.size, len(self.candidates), dim)
        return each[:, :, self._copies].reshape(1, kv_heads, -1, dim)


class LocalCache(GrowingKV):
    """Local KV of all layers, kept between the steps of ``incremental`` mode."""

    def __init__(self, base: BaseDecoder, capacity: int) -> None:
        shape = (base.num_layers, 2, 1, base.num_kv_heads, max(capacity, 1), base.head_dim)
        super().__init__(torch.empty(shape, dtype=base.dtype, device=base.device))


@dataclass(frozen=True)
class Scoring:
    """How local rows weigh candidates; the defaults leave the base's attention as it is.

    Args:
        bias: ``log_k`` lowers every candidate's score by log k.
        top: candidates that a head attends to; 0 is all.
        first_layer: local rows of layers before it attend to no candidates.
    """

    bias: CandidateBias = "none"
    top: int = 0
    first_layer: int = 0

    @classmethod
    def of(cls, settings: FocusConfig | TrainConfig) -> Self:
        """Return what an adapter's or a training run's settings say."""
        return cls(settings.candidate_bias, settings.top_candidates, settings.first_candidate_layer)

    def lowered(self, candidates: int) -> float:
        """Return what is taken off each of the scores of ``candidates`` candidates."""
        return math.log(candidates) if self.bias == "log_k" else 0.0


PLAIN = Scoring()


@dataclass
class LocalRows:
    """The local rows of one sweep, and what they see of the candidates.

    Args:
        ids: (n,) token ids, the sink included at the first sweep.
        position: of the first row.
        cache: local KV before these rows; ``None`` runs them alone (training).
        groups: the chunk rows whose candidates these rows see.
        shared_rows: rows that see candidate set 0; each row after them sees the next set.
        record: keep the attention mass of the last row on every candidate, then on every one of ``spans``.
        scoring: of the candidates.
        spans: (start, stop) columns of the local keys, those of chunks that are read whole.
        absent: (start, stop) columns that the base's last layer does not have: chunk KV that was moved here.
    """

    ids: Tensor
    position: int
    cache: LocalCache | None
    groups: Sequence[ChunkRows]
    shared_rows: int
    record: bool = False
    mass: list[Tensor] = field(default_factory=list)
    scoring: Scoring = PLAIN
    spans: Sequence[tuple[int, int]] = ()
    absent: tuple[int, int] | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attend each local row to the local rows up to it and to the candidates of its step.

        Args:
            layer: layer number; the groups have made their candidates of this layer.
            query: (1, heads, n, head_dim).
            key: (1, kv_heads, n, head_dim).
            value: like ``key``.
            scale: of the scores.
            softcap: of the scores.

        Returns:
            (1, n, heads, head_dim).
        """
        rows = query.shape[2]
        if self.cache is not None:
            key, value = (self._present(layer, tensor) for tensor in self.cache.write(layer, key, value))
        if key.shape[2] == rows:
            local = attend_causal(query, key, value, scale, softcap=softcap)
        else:
            bias = causal_bias(rows, key.shape[2], query.device) if rows > 1 else None
            local = attend(query, key, value, scale, softcap=softcap, bias=bias)
        shown = [group for group in self.groups if len(group.indices)] if layer >= self.scoring.first_layer else []
        if not shown:
            self._record(layer, query, key, None, local, scale, softcap)
            return local.out.transpose(1, 2)
        key_front, value_front = _joined([group.keys for group in shown]), _joined([group.values for group in shown])
        front = self._attend_candidates(local, query, key_front, value_front, scale, softcap)
        self._record(layer, query, key, front, local, scale, softcap)
        return front.out.transpose(1, 2)

    def _lacks(self, layer: int) -> bool:
        return self.absent is not None and self.cache is not None and layer == self.cache.data.shape[0] - 1

    def _present(self, layer: int, tensor: Tensor) -> Tensor:
        """Leave out the columns that the last layer does not have."""
        if self.absent is None or not self._lacks(layer):
            return tensor
        return torch.cat([tensor[:, :, : self.absent[0]], tensor[:, :, self.absent[1] :]], dim=2)

    def _record(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        front: Front | None,
        local: Part,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Keep the mass of the last row: (heads, candidates + spans) of this layer."""
        if not self.record:
            return
        last = query[:, :, -1:]
        lse = (local if front is None else front).lse[0, :, -1:]
        if front is None:
            mass = query.new_zeros(query.shape[1], sum(len(group.indices) for group in self.groups)).float()
        else:
            mass = front.mass[0, :, -1]
        if self.spans and self._lacks(layer):
            mass = torch.cat([mass, mass.new_zeros(mass.shape[0], len(self.spans))], dim=1)
        elif self.spans:
            whole = torch.exp(scores_of(last, key, scale, softcap)[0, :, 0] - lse)
            mass = torch.cat([mass, *(whole[:, start:stop].sum(1, keepdim=True) for start, stop in self.spans)], dim=1)
        self.mass.append(mass)

    def _attend_candidates(
        self, local: Part, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Front:
        """Attend to the candidates of each row's step: the first set for the shared rows, then the next for each."""
        shared = self.shared_rows
        weigh = partial(
            attend_front,
            scale=scale,
            top=self.scoring.top,
            lowered=self.scoring.lowered(key.shape[2]),
            softcap=softcap,
            with_lse=bool(self.spans),
        )
        if query.shape[2] == shared:
            return weigh(local, query, key, value)
        before = Part(local.out[:, :, :shared], local.lse[:, :, :shared])
        first = weigh(before, query[:, :, :shared], key[:1], value[:1])
        each = [tensor[0, :, shared:].transpose(0, 1).unsqueeze(2) for tensor in (query, local.out, local.lse)]
        later = weigh(Part(*each[1:]), each[0], key[1:], value[1:])
        parts = zip(first, (item.squeeze(2).transpose(0, 1).unsqueeze(0) for item in later), strict=True)
        return Front(*(torch.cat(pair, dim=2) for pair in parts))


def _joined(sets: Sequence[Tensor]) -> Tensor:
    """Put candidates of several groups behind each other, (T, kv_heads, chunks, head_dim) each."""
    return sets[0] if len(sets) == 1 else torch.cat(list(sets), dim=2)


# -- the sweep --------------------------------------------------------------------------------------------------


def sweep(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    calls: Sequence[Sequence[ChunkRows]],
    locals_: Sequence[LocalRows],
    positions: Positions,
    check: Check = never,
) -> list[Tensor]:
    """Run ordinary, candidate and local rows through the layers together (method steps 2-5).

    At each layer the calls run one after the other and the local rows ride with the last, when every candidate's K
    and V of that layer is known; so weights are read once a step whatever the number of calls.

    Args:
        base: the frozen decoder.
        adapter: its candidate projections.
        calls: chunk rows that pass a layer together, call by call; decoding cuts a large memory into several calls,
            training puts several memories into one.
        locals_: local contexts; none only extends the suffixes.
        positions: of the candidates in front of the local rows.
        check: called between layers, may raise to cancel.

    Returns:
        Last-layer states of each local context, (1, n, hidden). Nothing is committed: see :func:`commit`.
    """
    groups = [group for call in calls for group in call]
    for local in locals_:
        local.mass = []  # an earlier try may have failed half-way
    for group in groups:
        group.prepare(base, positions)
    spec = list(calls) or [()]
    running = [_LayerCall(base, call, locals_ if index == len(spec) - 1 else ()) for index, call in enumerate(spec)]
    with base.own_attention():
        for layer in range(base.num_layers):
            check()
            if layer == base.num_layers - 1:
                if not locals_:
                    break
                for call in running:
                    call.drop_ordinary()
            for call in running:
                call.run(base, adapter, layer)
    return running[-1].local_hidden()


def commit(calls: Sequence[Sequence[ChunkRows]], locals_: Sequence[LocalRows]) -> None:
    """Keep the rows that a sweep has written: later ones see them. Called once for each sweep that succeeded."""
    for call in calls:
        for group in call:
            group.suffix.commit(len(group.ordinary))
    for local in locals_:
        if local.cache is not None:
            local.cache.commit(len(local.ids))


class _LayerCall:
    """Rows that pass a layer together, packed into one sequence: [local rows | ordinary rows | candidate rows]."""

    def __init__(self, base: BaseDecoder, groups: Sequence[ChunkRows], locals_: Sequence[LocalRows]) -> None:
        self.groups, self.locals = groups, locals_
        ids, at = [group.ids() for group in groups], [group.positions() for group in groups]
        blocks = [local.ids for local in locals_] + [pair[0] for pair in ids] + [pair[1] for pair in ids]
        places = [torch.arange(len(local.ids)) + local.position for local in locals_]
        places += [pair[0] for pair in at] + [pair[1] for pair in at]
        self.sizes = [len(block) for block in blocks]
        packed = torch.cat(blocks).unsqueeze(0).to(base.device)
        positions = torch.cat(places).unsqueeze(0).to(base.device)
        self.hidden = base.embed(packed, positions)
        self.rope = base.rope(self.hidden, positions)
        self.candidates = sum(self.sizes[len(groups) + len(locals_) :])

    def run(self, base: BaseDecoder, adapter: CandidateAdapter, layer: int) -> None:
        """Pass one layer."""
        start = self.hidden.shape[1] - self.candidates if self.candidates else None
        with adapter.rows.starting_at(start):
            self.hidden = base.run_layer(layer, self.hidden, self.rope, self._attend)

    def drop_ordinary(self) -> None:
        """Leave out the ordinary rows: behind the last layer nothing reads them."""
        first, count = len(self.locals), len(self.groups)
        before = sum(self.sizes[:first])
        after = before + sum(self.sizes[first : first + count])
        self.sizes[first : first + count] = [0] * count
        self.hidden = torch.cat([self.hidden[:, :before], self.hidden[:, after:]], dim=1)
        if self.rope is not None:
            self.rope = self.rope.without(before, after)

    def local_hidden(self) -> list[Tensor]:
        """Return the states of each local context, (1, n, hidden)."""
        return list(torch.split(self.hidden, self.sizes, dim=1))[: len(self.locals)]

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        blocks = list(zip(*(torch.split(tensor, self.sizes, dim=2) for tensor in (query, key, value)), strict=True))
        first, count, outs = len(self.locals), len(self.groups), [query] * len(blocks)
        for index, group in enumerate(self.groups):
            if count == 1:
                rows = [tensor[:, :, sum(self.sizes[:first]) :] for tensor in (query, key, value)]
            else:
                pairs = zip(blocks[first + index], blocks[first + count + index], strict=True)
                rows = [torch.cat(pair, dim=2) for pair in pairs]
            out = group.attend(layer, rows[0], rows[1], rows[2], scale, softcap)
            both = [self.sizes[first + index], self.sizes[first + count + index]]
            outs[first + index], outs[first + count + index] = torch.split(out, both, dim=1)
        for index, local in enumerate(self.locals):
            own = blocks[index]
            outs[index] = local.attend(layer, own[0], own[1], own[2], scale, softcap)
        return torch.cat(outs, dim=1)


def check_room(base: BaseDecoder, chunks: int, positions: Positions, local_rows: int) -> None:
    """Raise :class:`ContextTooLongError` if the candidates and local rows pass the base's last position."""
    needed = local_start(chunks, positions) + local_rows
    if needed > base.window:
        raise ContextTooLongError(
            f"{chunks} candidates and {local_rows} local tokens need {needed} positions, but the base has "
            f"{base.window}; use positions='shared', larger chunks, or a shorter question"
        )
