"""Run the rows of many training examples through the layers together.

What :mod:`focus_core.method.parallel` computes for one decoding step, for all targets of all local contexts at once:
projections and MLPs see one packed sequence, attention runs example by example with the example's local contexts side
by side. Padding exists inside attention only. Nothing here draws data or computes a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from focus_core.config import Positions
from focus_core.method.attention import (
    HIDDEN,
    Part,
    attend,
    attend_causal,
    attend_chunks,
    attend_self,
    attend_top,
    by_chunk,
    merge,
    packed_rows,
)
from focus_core.method.kv import ChunkKV, move_keys, rotations
from focus_core.method.parallel import Scoring, candidate_positions, local_start
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder, Rope


class Row(NamedTuple):
    """What one local context runs.

    Args:
        ordinary: ids that run behind every chunk as ordinary tokens.
        candidates: (T,) ids that run behind every chunk as candidates.
        visible: ordinary tokens that the first candidate sees; each later one sees one more.
        local: ids of the local rows.
        shared_rows: local rows that see candidate set 0; each later one sees the next set.
        whole: numbers of the chunks that the local row holds token by token; it does not see their candidates.
    """

    ordinary: Sequence[int]
    candidates: Sequence[int]
    visible: int
    local: Sequence[int]
    shared_rows: int
    whole: Sequence[int] = ()


class _Padding:
    """Where rows of different lengths lie when they stand side by side in one tensor, and back."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self.longest = len(lengths), max(lengths)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        within = torch.arange(self.longest)
        last = torch.tensor(lengths)[:, None] - 1
        # padding repeats the last row of its own sequence; of an empty one, any row
        self._in = (starts[:, None] + torch.minimum(within[None, :], last).clamp(min=0)).flatten()
        self._in = self._in.clamp(max=sum(lengths) - 1).to(device)
        out = [index * self.longest + torch.arange(length) for index, length in enumerate(lengths)]
        self._out = torch.cat(out).to(device)

    def pad(self, packed: Tensor) -> Tensor:
        """(batch, heads, sum of lengths, head_dim) -> (batch * count, heads, longest, head_dim)."""
        batch, heads, _, dim = packed.shape
        side = packed.index_select(2, self._in).reshape(batch, heads, self.count, self.longest, dim)
        return side.transpose(1, 2).reshape(batch * self.count, heads, self.longest, dim)

    def unpad(self, part: Part, batch: int) -> Part:
        """Undo :meth:`pad` for ``batch`` sequences of rows."""
        heads, dim = part.out.shape[1], part.out.shape[3]
        out = part.out.reshape(batch, self.count, heads, self.longest, dim).transpose(1, 2)
        lse = part.lse.reshape(batch, self.count, heads, self.longest).transpose(1, 2)
        return Part(
            out.reshape(batch, heads, -1, dim).index_select(2, self._out),
            lse.reshape(batch, heads, -1).index_select(2, self._out),
        )


class PackedExample:
    """One example's chunks with the rows of all its local contexts.

    Args:
        chunks: chunk KV, read only.
        rows: one item a local context.
    """

    def __init__(self, base: BaseDecoder, chunks: ChunkKV, rows: Sequence[Row], positions: Positions) -> None:
        self.chunks, self.rows = chunks, rows
        self._device = base.device
        count = chunks.size
        self.first_bias = chunks.first_hidden()
        ends = torch.tensor(chunks.lengths)[:, None]

        # 1) ordinary rows: chunk by chunk, in each one local context after the other
        injected = [len(row.ordinary) for row in rows]
        self.ordinary_ids = torch.tensor([token for row in rows for token in row.ordinary] * count, dtype=torch.long)
        within = torch.cat([torch.arange(length) for length in injected])
        self.ordinary_positions = (ends + within).flatten()
        self.injected = _Padding(injected, self._device) if any(injected) else None
        self.suffix: list[tuple[Tensor, Tensor]] = []

        # 2) candidates, in the same order
        targets = [len(row.candidates) for row in rows]
        self.candidate_ids = torch.tensor([token for row in rows for token in row.candidates] * count)
        visible = torch.cat([row.visible + torch.arange(len(row.candidates)) for row in rows])
        self.candidate_positions = (ends + visible).flatten()
        self.asked = _Padding(targets, self._device)
        self.suffix_bias = self._suffix_bias()
        self.turns: list[tuple[Tensor, Tensor]] | None = None
        if base.rotary:
            there = torch.cat([_places(count, row, positions) for row in rows], dim=1)  # (chunks, targets)
            delta = (there - self.candidate_positions.reshape(count, -1)).flatten().to(self._device)
            self.turns = rotations(base.frequencies, delta)

        # 3) local rows; each sees one candidate set
        lengths = [len(row.local) for row in rows]
        self.seen = [count - len(row.whole) for row in rows]
        starts = [local_start(seen, positions) for seen in self.seen]
        self.local_ids = torch.tensor([token for row in rows for token in row.local])
        self.local_positions = torch.cat(
            [start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)]
        )
        self.locals, self.lengths = _Padding(lengths, self._device), torch.tensor(lengths, device=self._device)
        self._index_sets(lengths, targets)
        self.whole_bias = self._whole_bias()

    def _suffix_bias(self) -> Tensor | None:
        """(chunks * rows, 1, targets, ordinary): which ordinary tokens a candidate sees."""
        if self.injected is None:
            return None
        seen = torch.tensor([row.visible for row in self.rows])[:, None] + torch.arange(self.asked.longest)
        hidden = torch.arange(self.injected.longest) >= seen[:, :, None]
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN).to(self._device)[:, None]
        return bias.repeat(self.chunks.size, 1, 1, 1)

    def _whole_bias(self) -> Tensor | None:
        """(sets, 1, 1, chunks): which candidates the local rows that see a set do not see."""
        if not any(row.whole for row in self.rows):
            return None
        bias = torch.zeros(len(self.rows), self.chunks.size)
        for number, row in enumerate(self.rows):
            bias[number, list(row.whole)] = HIDDEN
        targets = torch.tensor([len(row.candidates) for row in self.rows])
        return bias.repeat_interleave(targets, dim=0)[:, None, None].to(self._device)

    def _index_sets(self, lengths: Sequence[int], targets: Sequence[int]) -> None:
        """Find each local row's candidate set: first sets for padded rows, then later sets row by row."""
        first_sets: list[int] = []
        later_sets: list[int] = []
        later_rows: list[int] = []
        places: list[int] = []
        row_start = set_start = later = 0
        for number, (row, length, count) in enumerate(zip(self.rows, lengths, targets, strict=True)):
            first_sets.append(set_start)
            later_sets += range(set_start + 1, set_start + count)
            later_rows += range(row_start + row.shared_rows, row_start + length)
            places += [number * self.locals.longest + index for index in range(row.shared_rows)]
            places += [len(lengths) * self.locals.longest + later + index for index in range(count - 1)]
            row_start, set_start, later = row_start + length, set_start + count, later + count - 1
        self.first_sets, self.later_sets, self.later_rows, self.places = (
            torch.tensor(values, dtype=torch.long, device=self._device)
            for values in (first_sets, later_sets, later_rows, places)
        )

    # -- attention ----------------------------------------------------------------------------------------------

    def attend_ordinary(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attend ordinary rows to their chunk and to those before them; keep their K and V.

        Args:
            layer: layer number.
            query: (1, heads, chunks * rows, head_dim).
            key: (1, kv_heads, chunks * rows, head_dim).
            value: like ``key``.
            scale: of the scores.
            softcap: of the scores.

        Returns:
            (1, chunks * rows, heads, head_dim).
        """
        assert self.injected is not None
        query, key, value = (by_chunk(tensor, self.chunks.size) for tensor in (query, key, value))
        padded = [self.injected.pad(tensor) for tensor in (query, key, value)]
        self.suffix.append((padded[1], padded[2]))
        among = attend_causal(padded[0], padded[1], padded[2], scale, softcap=softcap)
        others = [self.injected.unpad(among, self.chunks.size)]
        return packed_rows(self._attend_chunk(layer, query, scale, softcap, others))

    def attend_candidates(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attend candidates to chunk, ordinary tokens before them and themselves; keep what local rows see of them."""
        moved = move_keys(key, self.turns[layer] if self.turns else None)
        self.keys, self.values = (
            by_chunk(tensor, self.chunks.size).permute(2, 1, 0, 3) for tensor in (moved, value)
        )  # (sets, kv_heads, chunks, head_dim)
        if layer == self.chunks.shape.layers:  # the base's last layer
            return query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])
        query, key, value = (by_chunk(tensor, self.chunks.size) for tensor in (query, key, value))
        parts = []
        if self.injected is not None:
            suffix = attend(self.asked.pad(query), *self.suffix[layer], scale, softcap=softcap, bias=self.suffix_bias)
            parts.append(self.asked.unpad(suffix, self.chunks.size))
        parts.append(attend_self(query, key, value, scale, softcap=softcap))
        return packed_rows(self._attend_chunk(layer, query, scale, softcap, parts))

    def attend_local(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        scoring: Scoring,
    ) -> Tensor:
        """Attend local rows to those before them and to the candidates of their step."""
        padded = [self.locals.pad(tensor) for tensor in (query, key, value)]
        local = self.locals.unpad(attend_causal(padded[0], padded[1], padded[2], scale, softcap=softcap), 1)
        if layer < scoring.first_layer:
            return local.out.transpose(1, 2)
        top = scoring.top or self.chunks.size

        def attend_sets(rows: Tensor, sets: Tensor) -> Part:
            bias = None if self.whole_bias is None else self.whole_bias[sets]
            return attend_top(rows, self.keys[sets], self.values[sets], scale, top, softcap=softcap, bias=bias)

        first = attend_sets(padded[0], self.first_sets)
        out, lse = (_flat(first.out), _flat(first.lse))  # (heads, rows, ...)
        if len(self.later_rows):
            rows = query[0].index_select(1, self.later_rows).transpose(0, 1).unsqueeze(2)
            later = attend_sets(rows, self.later_sets)
            out, lse = torch.cat([out, _flat(later.out)], dim=1), torch.cat([lse, _flat(later.lse)], dim=1)
        lowered = torch.tensor([scoring.lowered(max(seen, 1)) for seen in self.seen], device=lse.device)
        lowered = lowered.repeat_interleave(self.lengths)
        candidates = Part(
            out.index_select(1, self.places).unsqueeze(0), lse.index_select(1, self.places).unsqueeze(0) - lowered
        )
        return merge([local, candidates]).out.transpose(1, 2)

    def _attend_chunk(
        self, layer: int, query: Tensor, scale: float, softcap: float | None, others: Sequence[Part]
    ) -> Tensor:
        first = attend(query, *self.chunks.first(layer), scale, softcap=softcap, bias=self.first_bias)
        return attend_chunks(query, self.chunks.layer(layer), scale, softcap=softcap, others=[first, *others])


@torch.no_grad()
def inject(base: BaseDecoder, examples: Sequence[PackedExample]) -> None:
    """Run the ordinary rows of all examples through all layers but the last; their K and V stay in the examples."""
    examples = [example for example in examples if example.injected is not None]
    if not examples:
        return
    hidden, rope, sizes = _embedded(
        base,
        [example.ordinary_ids for example in examples],
        [example.ordinary_positions for example in examples],
    )

    def attend_all(
        layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        blocks = zip(*(torch.split(tensor, sizes, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat(
            [
                example.attend_ordinary(layer, q, k, v, scale, softcap)
                for example, (q, k, v) in zip(examples, blocks, strict=True)
            ],
            dim=1,
        )

    with base.own_attention():
        for layer in range(base.num_layers - 1):
            hidden = base.run_layer(layer, hidden, rope, attend_all)


def run(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    examples: Sequence[PackedExample],
    scoring: Scoring,
    *,
    gradient_checkpointing: bool = False,
) -> list[Tensor]:
    """Run candidates and local rows of all examples; gradients flow into the candidate projections.

    Args:
        base: the frozen decoder.
        adapter: its candidate projections.
        examples: after :func:`inject`.
        scoring: of the candidates.
        gradient_checkpointing: keep each layer's input alone for the backward pass and run the layer again there.

    Returns:
        Last-layer states of every local context, example by example, each (1, rows, hidden).
    """
    hidden, rope, sizes = _embedded(
        base,
        [example.local_ids for example in examples] + [example.candidate_ids for example in examples],
        [example.local_positions for example in examples] + [example.candidate_positions for example in examples],
    )
    count, start = len(examples), sum(sizes[: len(examples)])

    def attend_all(
        layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        blocks = list(zip(*(torch.split(tensor, sizes, dim=2) for tensor in (query, key, value)), strict=True))
        candidates = [
            example.attend_candidates(layer, q, k, v, scale, softcap)
            for example, (q, k, v) in zip(examples, blocks[count:], strict=True)
        ]
        locals_ = [
            example.attend_local(layer, q, k, v, scale, softcap, scoring)
            for example, (q, k, v) in zip(examples, blocks[:count], strict=True)
        ]
        return torch.cat([*locals_, *candidates], dim=1)

    def run_layer(layer: int, hidden: Tensor) -> Tensor:
        with base.own_attention(), adapter.rows.starting_at(start):
            return base.run_layer(layer, hidden, rope, attend_all)

    for layer in range(base.num_layers):
        if gradient_checkpointing:
            hidden = checkpoint(run_layer, layer, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = run_layer(layer, hidden)
    lengths = [len(row.local) for example in examples for row in example.rows]
    return list(torch.split(hidden[:, :start], lengths, dim=1))


def _embedded(base: BaseDecoder, ids: list[Tensor], positions: list[Tensor]) -> tuple[Tensor, Rope | None, list[int]]:
    """Return embedded rows (1, rows, hidden), their rotary tables, and how many rows each block has."""
    packed, places = torch.cat(ids).unsqueeze(0).to(base.device), torch.cat(positions).unsqueeze(0).to(base.device)
    hidden = base.embed(packed, places)
    return hidden, base.rope(hidden, places), [len(block) for block in ids]


def _places(chunks: int, row: Row, positions: Positions) -> Tensor:
    """Return (chunks, targets): where a local context sees its candidates; those it does not see stand anywhere."""
    seen = [number for number in range(chunks) if number not in row.whole]
    places = torch.zeros(chunks, len(row.candidates), dtype=torch.long)
    places[seen] = torch.tensor(list(candidate_positions(len(seen), positions)), dtype=torch.long)[:, None]
    return places


def _flat(tensor: Tensor) -> Tensor:
    """(batch, heads, rows, ...) -> (heads, batch * rows, ...)."""
    return tensor.transpose(0, 1).flatten(1, 2)
