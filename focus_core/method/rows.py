"""Hold the rows behind chunks, ordinary ones and candidates, and compute what they attend to.

A row behind a chunk sees the chunk, what ran behind it before, and itself (arXiv 2408.11745, equations 2-5). These
equations stand here once: decoding runs one question with one candidate a step, training many questions with a
candidate for each target. Rows of several questions over the same chunks read chunk KV once. Nothing here passes a
layer; candidates' keys and values are returned, not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_core.config import Positions
from focus_core.method.attention import (
    Part,
    attend,
    attend_chunks,
    attend_self,
    by_chunk,
    fold_heads,
    hidden_score,
    merge,
    packed_rows,
)
from focus_core.method.kv import ChunkKV, move_keys, rotations
from focus_core.method.layout import candidate_positions
from focus_core.method.sources import FIRST
from focus_core.method.suffix import Suffix
from focus_core.model.families import BaseDecoder

_FEW = 0.25  # a smaller share of a batch's chunks is copied when the others are left out

Candidates = tuple[Tensor, Tensor]
"""Keys, moved in front of the local rows, and values of a layer's candidates: (sets, kv_heads, chunks, head_dim)."""


class Side:
    """Where rows of several sequences lie when they stand side by side in one tensor, and back.

    Args:
        lengths: rows of each sequence, in order.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self.longest = len(lengths), max(lengths)
        if self.count == 1:
            return
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        last = torch.tensor(lengths)[:, None] - 1
        # padding repeats the last row of its own sequence; of an empty one, any row
        self._in = (starts[:, None] + torch.minimum(torch.arange(self.longest), last).clamp(min=0)).flatten()
        self._in = self._in.clamp(max=sum(lengths) - 1).to(device)
        out = [index * self.longest + torch.arange(length) for index, length in enumerate(lengths)]
        self._out = torch.cat(out).to(device)

    def pad(self, packed: Tensor) -> Tensor:
        """(batch, heads, sum of lengths, head_dim) -> (batch * count, heads, longest, head_dim)."""
        if self.count == 1:
            return packed
        batch, heads, _, dim = packed.shape
        side = packed.index_select(2, self._in).reshape(batch, heads, self.count, self.longest, dim)
        return side.transpose(1, 2).reshape(batch * self.count, heads, self.longest, dim)

    def unpad(self, part: Part) -> Part:
        """Undo :meth:`pad`."""
        if self.count == 1:
            return part
        heads, dim = part.out.shape[1], part.out.shape[3]
        out = part.out.reshape(-1, self.count, heads, self.longest, dim).transpose(1, 2)
        lse = part.lse.reshape(-1, self.count, heads, self.longest).transpose(1, 2)
        return Part(out.flatten(2, 3).index_select(2, self._out), lse.flatten(2, 3).index_select(2, self._out))


class Behind(NamedTuple):
    """What one question runs behind every chunk.

    Args:
        ordinary: ids that run as ordinary tokens and join the suffix.
        candidates: ids that run as candidates; decoding has one.
        visible: tokens of the suffix that the first candidate sees, the new ordinary ones included; each later one
            sees one more.
    """

    ordinary: Sequence[int] = ()
    candidates: Sequence[int] = ()
    visible: int = 0


@dataclass(eq=False)
class ChunkRows:
    """The rows that one sweep runs behind some chunks.

    Args:
        chunks: their chunk KV, read only.
        suffix: what ran behind each chunk so far.
        indices: the chunks' numbers in the memory they belong to.
        total: chunks of that memory.
        asked: what each question runs; of several, either ordinary tokens or candidates.
        rows: of each of ``indices``, its row in ``chunks``: equal chunks share one, and so their candidate, which
            stands in front of the local rows once for each; a row that is not named stands nowhere. ``None`` where
            every chunk has its own, in order.
    """

    chunks: ChunkKV
    suffix: Suffix
    indices: Sequence[int]
    total: int
    asked: Sequence[Behind] = (Behind(),)
    rows: Sequence[int] | None = None
    copies: Tensor | None = field(default=None, init=False)
    ordinary: int = field(default=0, init=False)
    candidates: int = field(default=0, init=False)
    _places: Tensor | None = field(default=None, init=False)

    # -- other views --------------------------------------------------------------------------------------------

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
        return ChunkRows(chunks, suffix, indices, len(numbers), rows=rows)

    def _named(self, numbers: Mapping[int, int]) -> list[tuple[int, int]]:
        rows = range(self.chunks.size) if self.rows is None else self.rows
        return [(numbers[index], row) for index, row in zip(self.indices, rows, strict=True) if index in numbers]

    # -- the plan of a sweep ------------------------------------------------------------------------------------

    def prepare(self, base: BaseDecoder) -> None:
        """Lay out what the questions run: masks, and where their rows lie side by side."""
        ordinary, candidates = (
            [len(rows) for rows in both] for both in zip(*(it[:2] for it in self.asked), strict=True)
        )
        self.ordinary, self.candidates = sum(ordinary), sum(candidates)
        several = self.candidates > len(self.asked) or torch.is_grad_enabled()
        self._apart = not self.ordinary and several  # a column for each own key would be hidden from all other rows
        self._side = Side([sum(both) for both in zip(ordinary, candidates, strict=True)], base.device)
        self._rows = max(ordinary)
        self._bias = self._tail_bias(base, max(candidates))
        if self.rows is not None and self.copies is None and list(self.rows) != list(range(self.chunks.size)):
            self.copies = torch.tensor(self.rows, dtype=torch.long, device=base.device)

    def _tail_bias(self, base: BaseDecoder, targets: int) -> Tensor:
        """Return what each row sees of the first tokens, the suffix and the new rows, candidates last.

        (chunks * questions or 1, 1, heads / kv_heads * rows, FIRST + suffix + m + T)
        """
        used, rows = self.suffix.used, self._rows
        columns = torch.arange(used + rows + (0 if self._apart else targets))
        visible = torch.tensor([it.visible for it in self.asked])[:, None]
        ordinary = (used + torch.arange(rows)).expand(len(self.asked), rows)
        last = torch.cat([ordinary, visible + torch.arange(targets) - 1], dim=1)
        hidden = columns > last[:, :, None]
        if not self._apart:  # a candidate's own key; an ordinary row is behind its own
            hidden &= columns != (torch.arange(-rows, targets) + used + rows)[:, None]
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, hidden_score(base.dtype))
        bias = F.pad(bias.to(base.device, base.dtype), (FIRST, 0)).repeat(1, base.num_heads // base.num_kv_heads, 1)
        first = self.chunks.first_hidden()
        if first is not None:
            return (bias.unsqueeze(1) + F.pad(first, (0, len(columns))).unsqueeze(1)).flatten(0, 1)
        return (bias if len(bias) == 1 else bias.repeat(self.chunks.size, 1, 1)).unsqueeze(1)

    def ids(self) -> tuple[list[int], list[int]]:
        """Return the ordinary and the candidate ids behind one chunk, question by question."""
        ordinary = [token for it in self.asked for token in it.ordinary]
        return ordinary, [token for it in self.asked for token in it.candidates]

    def offsets(self) -> tuple[list[int], list[int]]:
        """Return how far behind the end of a chunk :meth:`ids` stand."""
        ordinary = [self.suffix.used + place for it in self.asked for place in range(len(it.ordinary))]
        return ordinary, [it.visible + place for it in self.asked for place in range(len(it.candidates))]

    def moves(self, positions: Positions) -> Tensor:
        """Return by how far candidate keys are moved in front of the local rows, (chunks shown, candidates)."""
        if self._places is None:
            ends = torch.tensor(self.chunks.lengths)
            ends = ends if self.copies is None else ends[self.copies.cpu()]
            standing = torch.tensor(list(candidate_positions(self.total, positions)), dtype=torch.long)
            self._places = (standing[list(self.indices)] - ends)[:, None]
        return self._places - torch.tensor(self.offsets()[1])

    # -- attention ----------------------------------------------------------------------------------------------

    def attend_tail(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> list[Part]:
        """Attend each row to the chunk's first tokens, the suffix before it, and itself; ordinary rows are written.

        Args:
            layer: layer number.
            query: (chunks, heads, rows, head_dim), of each question ordinary rows, then candidates.
            key: (chunks, kv_heads, rows, head_dim), rotated.
            value: like ``key``.
            scale: of the scores.
            softcap: of the scores.

        Returns:
            Parts of the same rows over different keys, folded by :func:`fold_heads`.
        """
        if self._apart:
            keys, values = self.suffix.layer(layer)
        else:
            keys, values = self.suffix.write(layer, self._side.pad(key), self._side.pad(value))
        kv_heads, rows = key.shape[1], self._side.pad(query)
        if self._side.count == 1:
            part = attend(fold_heads(rows, kv_heads), keys, values, scale, softcap=softcap, bias=self._bias)
        else:
            part = attend(rows, keys, values, scale, softcap=softcap, bias=self._bias)
            part = _folded(self._side.unpad(part), kv_heads)
        own = [_folded(attend_self(query, key, value, scale, softcap=softcap), kv_heads)] if self._apart else []
        return [part, *own]

    def commit(self) -> None:
        """Keep the ordinary rows that a sweep has written."""
        self.suffix.commit(self._rows)


class Read:
    """Rows of several questions behind the same chunks: one read of chunk KV serves all.

    Args:
        members: their rows; all have the same chunks.
    """

    def __init__(self, members: Sequence[ChunkRows]) -> None:
        self.members, self.chunks = members, members[0].chunks

    @classmethod
    def of(cls, groups: Sequence[ChunkRows]) -> list[Read]:
        """Put together what stands behind the same chunks."""
        found: dict[object, list[ChunkRows]] = {}
        for group in groups:
            found.setdefault(group.chunks.key, []).append(group)
        return [cls(members) for members in found.values()]

    def prepare(self, base: BaseDecoder, positions: Positions) -> None:
        """Lay out a sweep; make the rotations that bring candidate keys in front of the local rows."""
        for member in self.members:
            member.prepare(base)
        self._pieces = [(member.ordinary, member.candidates) for member in self.members]
        self.ordinary, self.candidates = (sum(numbers) for numbers in zip(*self._pieces, strict=True))
        self._alike = all(member.copies is None for member in self.members)
        self._turns: list[list[tuple[Tensor, Tensor]]] | None = None
        if base.rotary and self.candidates:
            moves = [member.moves(positions) for member in self.members]
            moves = [torch.cat(moves, dim=1)] if self._alike else moves
            self._turns = [_turns(base, delta) for delta in moves]

    def ids(self) -> tuple[Tensor, Tensor]:
        """Return (chunks * m,) ordinary and (chunks * T,) candidate ids, chunk by chunk."""
        both = zip(*(member.ids() for member in self.members), strict=True)
        ordinary, candidates = (torch.tensor(list(chain(*ids)), dtype=torch.long) for ids in both)
        return ordinary.repeat(self.chunks.size), candidates.repeat(self.chunks.size)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the positions of :meth:`ids`."""
        ends = torch.tensor(self.chunks.lengths)[:, None]
        both = zip(*(member.offsets() for member in self.members), strict=True)
        ordinary, candidates = (torch.tensor(list(chain(*offsets)), dtype=torch.long) for offsets in both)
        return (ends + ordinary).flatten(), (ends + candidates).flatten()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, list[Candidates]]:
        """Attend each row to its chunk, the suffix before it, and itself.

        Args:
            layer: layer number; in the base's last one only the candidates' K and V are wanted.
            query: (1, heads, chunks * (m + T), head_dim), ordinary rows first.
            key: (1, kv_heads, chunks * (m + T), head_dim), rotated.
            value: like ``key``.
            scale: of the scores.
            softcap: of the scores.

        Returns:
            (1, chunks * (m + T), heads, head_dim), and the candidates of each member.
        """
        made = self._in_front(layer, key, value)
        if layer == self.chunks.shape.layers:  # the base's last layer
            return query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3]), made
        (_, heads, _, dim), kv_heads = query.shape, key.shape[1]
        query, key, value = (self._by_chunk(tensor) for tensor in (query, key, value))
        query = query.contiguous()  # so that folding it is a view
        sizes = [sum(pair) for pair in self._pieces]
        split = zip(*(torch.split(tensor, sizes, dim=2) for tensor in (query, key, value)), strict=True)
        tails = [
            member.attend_tail(layer, q, k, v, scale, softcap)
            for member, (q, k, v) in zip(self.members, split, strict=True)
        ]
        if len({len(parts) for parts in tails}) > 1:
            tails = [[merge(parts)] for parts in tails]
        others = [_joined(parts, heads // kv_heads) for parts in zip(*tails, strict=True)]
        rows = fold_heads(query, kv_heads)
        seen = attend_chunks(rows, self.chunks.layer(layer), scale, softcap=softcap, others=others)
        return self._packed(seen.reshape(self.chunks.size, heads, sum(sizes), dim)), made

    @property
    def _paired(self) -> bool:
        return all(pair == (1, 1) for pair in self._pieces)

    def _by_chunk(self, packed: Tensor) -> Tensor:
        """(1, heads, chunks * (m + T), head_dim) -> (chunks, heads, m + T, head_dim), question by question."""
        (_, heads, rows, dim), count = packed.shape, self.chunks.size
        if self._paired:
            every = packed[0].reshape(heads, 2, count, len(self.members), dim).permute(2, 0, 3, 1, 4)
            return every.reshape(count, heads, 2 * len(self.members), dim)
        split = count * self.ordinary
        if split in (0, rows):
            return by_chunk(packed, count)
        both = (by_chunk(packed[:, :, :split], count), by_chunk(packed[:, :, split:], count))
        sizes = zip(*self._pieces, strict=True)
        cut = [torch.split(tensor, list(own), dim=2) for tensor, own in zip(both, sizes, strict=True)]
        return torch.cat([piece for pair in zip(*cut, strict=True) for piece in pair], dim=2)

    def _packed(self, seen: Tensor) -> Tensor:
        """Undo :meth:`_by_chunk`: (chunks, heads, m + T, head_dim) -> (1, chunks * (m + T), heads, head_dim)."""
        count, heads, rows, dim = seen.shape
        if self._paired:
            every = seen.reshape(count, heads, len(self.members), 2, dim).permute(3, 0, 2, 1, 4)
            return every.reshape(1, count * rows, heads, dim)
        if 0 in (self.ordinary, self.candidates):
            return packed_rows(seen)
        pieces = torch.split(seen, list(chain(*self._pieces)), dim=2)
        return torch.cat([packed_rows(torch.cat(pieces[index::2], dim=2)) for index in (0, 1)], dim=1)

    def _in_front(self, layer: int, key: Tensor, value: Tensor) -> list[Candidates]:
        """Return each member's candidates, moved in front of its local rows."""
        (_, kv_heads, rows, dim), count = key.shape, self.chunks.size
        start = rows - count * self.candidates
        key, value = (tensor[0, :, start:].reshape(kv_heads, count, self.candidates, dim) for tensor in (key, value))
        sizes, turns = [member.candidates for member in self.members], self._turns
        if self._alike:
            key = move_keys(key, turns[0][layer] if turns else None)
        made = []
        split = zip(*(torch.split(tensor, sizes, dim=2) for tensor in (key, value)), strict=True)
        for index, (member, (keys, values)) in enumerate(zip(self.members, split, strict=True)):
            if member.copies is not None:
                keys, values = keys.index_select(1, member.copies), values.index_select(1, member.copies)
            if not self._alike:
                keys = move_keys(keys, turns[index][layer] if turns else None)
            made.append((keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)))  # (sets, kv_heads, chunks, head_dim)
        return made


def _turns(base: BaseDecoder, delta: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return every layer's rotations by (chunks, candidates) positions, (chunks, candidates, rotary_dim) each."""
    made = rotations(base.frequencies, delta.flatten().to(base.device))
    return [(cos.unflatten(0, delta.shape), sin.unflatten(0, delta.shape)) for cos, sin in made]  # type: ignore[no-untyped-call]


def _joined(parts: Sequence[Part], group: int) -> Part:
    """Put folded parts of different rows behind each other, ``group`` heads being folded in each."""
    if len(parts) == 1:
        return parts[0]
    outs = [part.out.reshape(*part.out.shape[:2], group, -1, part.out.shape[3]) for part in parts]
    lses = [part.lse.reshape(*part.lse.shape[:2], group, -1) for part in parts]
    return Part(torch.cat(outs, dim=3).flatten(2, 3), torch.cat(lses, dim=3).flatten(2, 3))


def _folded(part: Part, kv_heads: int) -> Part:
    """Fold heads as :func:`fold_heads` folds the queries of the part."""
    return Part(fold_heads(part.out, kv_heads), part.lse.reshape(len(part.lse), kv_heads, -1))
