"""Hold the local rows of a sweep, and compute what they attend to: each other, and the candidates in front of them.

Candidates of a layer stand in front of the local rows of the same layer (arXiv 2408.11745, section 2.2). Decoding has
one local context, whose KV is kept; training has many, side by side, each row with the candidates of its own step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from focus_core.method.attention import (
    Part,
    attend,
    attend_causal,
    attend_front,
    causal_bias,
    scores_of,
)
from focus_core.method.layout import PLAIN, Scoring
from focus_core.method.ranks import Ranks
from focus_core.method.rows import Candidates, ChunkRows, Side
from focus_core.method.suffix import GrowingKV
from focus_core.model.families import BaseDecoder


class LocalCache(GrowingKV):
    """Local KV of all layers, kept between the steps of ``incremental`` mode."""

    def __init__(self, base: BaseDecoder, capacity: int) -> None:
        shape = (2, 1, base.num_kv_heads, max(capacity, 1), base.head_dim)
        super().__init__([torch.empty(shape, dtype=base.dtype, device=base.device) for _ in range(base.num_layers)])


class Local(NamedTuple):
    """One local context.

    Args:
        ids: (n,) token ids, the sink included at the first sweep.
        position: of the first row.
        shared_rows: rows that see candidate set 0; each row after them sees the next set.
        reads: whether chunks are read whole in it: its rows then take the adapter's reader.
    """

    ids: Sequence[int]
    position: int
    shared_rows: int
    reads: bool = False


class _Sets(NamedTuple):
    """Which candidate sets rows see whose local context has more than one.

    Args:
        first: (contexts,) the first set of each, for all its rows side by side.
        later: (later rows,) the set of each row that sees a later one.
        rows: (later rows,) where these rows lie side by side.
        places: (rows,) where each row's result lies: those side by side, then those of later sets.
    """

    first: Tensor
    later: Tensor
    rows: Tensor
    places: Tensor


@dataclass(eq=False)
class LocalRows:
    """The local rows of one sweep, and what they see of the candidates.

    Args:
        asked: local contexts; those of ``groups``' questions, in order.
        groups: the chunk rows whose candidates these rows see.
        cache: local KV before these rows, of one local context; ``None`` runs them alone (training).
        record: keep the attention mass of the last row on every candidate, then on every one of ``spans``; of one
            local context.
        scoring: of the candidates.
        spans: (start, stop) columns of the local keys, those of chunks that are read whole.
        absent: (start, stop) columns that the base's last layer does not have: chunk KV that was moved here.
        ranks: processes that have candidates of other chunks.
    """

    asked: Sequence[Local]
    groups: Sequence[ChunkRows] = ()
    cache: LocalCache | None = None
    record: bool = False
    scoring: Scoring = PLAIN
    spans: Sequence[tuple[int, int]] = ()
    absent: tuple[int, int] | None = None
    ranks: Ranks | None = None
    mass: list[Tensor] = field(default_factory=list, init=False)
    _causal: dict[int, Tensor] = field(default_factory=dict, init=False)

    def ids(self) -> tuple[Tensor, Tensor]:
        """Return (rows,) ids and positions, local context by local context."""
        places = [it.position + torch.arange(len(it.ids)) for it in self.asked]
        return torch.tensor([token for it in self.asked for token in it.ids]), torch.cat(places)

    def readers(self) -> list[float]:
        """Return 1 at every row that reads chunks whole and 0 at the others."""
        return [float(it.reads) for it in self.asked for _ in it.ids]

    def prepare(self, base: BaseDecoder) -> None:
        """Lay out a sweep: which candidate set each row sees, and which candidates of it."""
        self.mass = []  # an earlier try may have failed half-way
        self._side = Side([len(it.ids) for it in self.asked], base.device)
        self._sets = self._index_sets(base.device)
        self._bias = self._front_bias(base.device)

    def _index_sets(self, device: torch.device) -> _Sets | None:
        """Find each row's candidate set: the first ones serve all rows side by side, later ones a row each."""
        longest = self._side.longest
        first: list[int] = []
        later: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        at, behind = 0, len(self.asked) * longest
        for number, it in enumerate(self.asked):
            more, start = len(it.ids) - it.shared_rows, number * longest
            first.append(at)
            later += range(at + 1, at + 1 + more)
            places += range(start, start + it.shared_rows)
            places += range(behind + len(rows), behind + len(rows) + more)
            rows += range(start + it.shared_rows, start + len(it.ids))
            at += 1 + more
        if not rows:
            return None
        return _Sets(*(torch.tensor(table, dtype=torch.long, device=device) for table in (first, later, rows, places)))

    def _front_bias(self, device: torch.device) -> Tensor | None:
        """(1, 1, 1, 1): what is added to the scores of all candidates."""
        lowered = self.scoring.lowered(self._shown())
        return torch.full((1, 1, 1, 1), -lowered, device=device) if lowered else None

    def _shown(self) -> int:
        """Return how many candidates these rows see."""
        return sum(len(group.indices) for group in self.groups) if self.ranks is None else self.ranks.candidates

    # -- attention ----------------------------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        candidates: Mapping[ChunkRows, Candidates],
    ) -> Tensor:
        """Attend each local row to the local rows up to it and to the candidates of its step.

        Args:
            layer: layer number.
            query: (1, heads, rows, head_dim).
            key: (1, kv_heads, rows, head_dim).
            value: like ``key``.
            scale: of the scores.
            softcap: of the scores.
            candidates: of this layer, at least those of ``groups``.

        Returns:
            (1, rows, heads, head_dim).
        """
        query, key, value = (self._side.pad(tensor) for tensor in (query, key, value))
        if self.cache is not None:
            key, value = (self._present(layer, tensor) for tensor in self.cache.write(layer, key, value))
        local = self._attend_local(query, key, value, scale, softcap)
        if layer < self.scoring.first_layer or not self._shown():
            self._record(layer, query, key, None, local.lse, scale, softcap)
            return self._side.unpad(local).out.transpose(1, 2)
        keys, values = self._in_front(key, candidates)
        weigh = partial(
            attend_front, scale=scale, top=self.scoring.top, softcap=softcap, with_lse=bool(self.spans and self.record)
        )
        if self._sets is None:
            front = weigh(local, query, keys, values, self._bias)
            self._record(layer, query, key, front.mass[0, :, -1], front.lse, scale, softcap)
            return self._side.unpad(Part(front.out, front.lse)).out.transpose(1, 2)
        first = weigh(local, query, keys[self._sets.first], values[self._sets.first], self._bias)
        rows = [_flat(tensor).index_select(1, self._sets.rows).transpose(0, 1) for tensor in (query, *local)]
        alone, out, lse = (tensor.unsqueeze(2) for tensor in rows)
        later = weigh(Part(out, lse), alone, keys[self._sets.later], values[self._sets.later], self._bias)
        out = torch.cat([_flat(first.out), _flat(later.out)], dim=1).index_select(1, self._sets.places)
        return out.transpose(0, 1).unsqueeze(0)

    def _in_front(self, local: Tensor, candidates: Mapping[ChunkRows, Candidates]) -> Candidates:
        """Return the candidates of all groups, and of other processes."""
        shown = [candidates[group] for group in self.groups if len(group.indices)]
        if not shown:
            shown = [(local[:, :, :0], local[:, :, :0])]  # this process has no chunk
        keys, values = (_joined(tensors) for tensors in zip(*shown, strict=True))
        return (keys, values) if self.ranks is None else self.ranks.gather(keys, values)

    def _attend_local(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Part:
        rows, columns = query.shape[2], key.shape[2]
        if rows == 1:
            return attend(query, key, value, scale, softcap=softcap)
        if columns not in self._causal:
            self._causal[columns] = causal_bias(rows, columns, query.device)
        if rows == columns:
            return attend_causal(query, key, value, scale, softcap=softcap, bias=self._causal[columns])
        return attend(query, key, value, scale, softcap=softcap, bias=self._causal[columns])

    def _lacks(self, layer: int) -> bool:
        return self.absent is not None and self.cache is not None and layer == self.cache.layers - 1

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
        mass: Tensor | None,
        lse: Tensor,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Keep the mass of the last row: (heads, candidates + spans) of this layer."""
        if not self.record:
            return
        if mass is None:
            mass = query.new_zeros(query.shape[1], self._shown()).float()
        if self.spans and self._lacks(layer):
            mass = torch.cat([mass, mass.new_zeros(mass.shape[0], len(self.spans))], dim=1)
        elif self.spans:
            whole = torch.exp(scores_of(query[:, :, -1:], key, scale, softcap)[0, :, 0] - lse[0, :, -1:])
            mass = torch.cat([mass, *(whole[:, start:stop].sum(1, keepdim=True) for start, stop in self.spans)], dim=1)
        self.mass.append(mass)


def _joined(sets: Sequence[Tensor]) -> Tensor:
    """Put candidates of several groups behind each other, (T, kv_heads, chunks, head_dim) each."""
    return sets[0] if len(sets) == 1 else torch.cat(list(sets), dim=2)


def _flat(tensor: Tensor) -> Tensor:
    """(batch, heads, rows, ...) -> (heads, batch * rows, ...)."""
    return tensor.transpose(0, 1).flatten(1, 2)
