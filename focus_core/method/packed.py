"""Run the method: every chunk in parallel, candidates in front of the local context, one pass through the layers.

This is FocusLLM (arXiv 2408.11745, sections 2.2 and 2.3), one sweep for all rows: at layer l the local rows need only
layer l's candidate keys and values, which the same layer has just made. Decoding runs it a step at a time, without
gradient; training runs the candidates of all targets in one sweep, with gradient. Nothing here tokenises, samples or
computes a loss; a sweep that fails or is cancelled leaves what was committed before it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from focus_core.config import Positions
from focus_core.method.encoding import Check, never
from focus_core.method.local import LocalRows
from focus_core.method.rows import Candidates, ChunkRows, Read
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder


def sweep(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    calls: Sequence[Sequence[ChunkRows]],
    locals_: Sequence[LocalRows],
    positions: Positions,
    check: Check = never,
    *,
    gradient_checkpointing: bool = False,
    fixed: bool = False,
) -> list[Tensor]:
    """Run ordinary, candidate and local rows through the layers together (method steps 2-5).

    At each layer the calls run one after the other and the local rows ride with the last, when every candidate's K
    and V of that layer is known; so weights are read once a step whatever the number of calls. Gradients flow into the
    candidate projections alone; ordinary rows depend on none of them and run without.

    Args:
        base: the frozen decoder.
        adapter: its candidate projections.
        calls: chunk rows that pass a layer together, call by call; those behind the same chunks read them once.
        locals_: local contexts; none only extends the suffixes.
        positions: of the candidates in front of the local rows.
        check: called between layers, may raise to cancel.
        fixed: no gradient is wanted of the candidates: local rows go apart from them, and they alone are in the graph.
        gradient_checkpointing: keep each layer's input alone for the backward pass and run the layer again there.

    Returns:
        Last-layer states of each of ``locals_``, (1, rows, hidden). Nothing is committed: see :func:`commit`.
    """
    for local in locals_:
        local.prepare(base)
    spec = [Read.of(call) for call in calls] or [[]]
    spec = [*spec, []] if fixed and any(spec) else spec
    running = [
        _LayerCall(base, reads, locals_ if index == len(spec) - 1 else (), positions)
        for index, reads in enumerate(spec)
    ]
    hidden = tuple(call.embed(base) for call in running)

    def run_layer(layer: int, *hidden: Tensor) -> tuple[Tensor, ...]:
        candidates: dict[ChunkRows, Candidates] = {}
        with base.own_attention():
            passed = []
            for call, rows in zip(running, hidden, strict=True):
                with torch.no_grad() if fixed and not call.locals else nullcontext():
                    passed.append(call.run(base, adapter, layer, rows, candidates))
            return tuple(passed)

    with base.own_attention():  # so that sweeps take turns
        for layer in range(base.num_layers):
            check()
            if layer == base.num_layers - 1:
                if not locals_:
                    break
                hidden = tuple(call.drop_ordinary(rows) for call, rows in zip(running, hidden, strict=True))
            if gradient_checkpointing:
                hidden = checkpoint(run_layer, layer, *hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = run_layer(layer, *hidden)
    return running[-1].of_locals(hidden[-1])


def commit(calls: Sequence[Sequence[ChunkRows]], locals_: Sequence[LocalRows]) -> None:
    """Keep the rows that a sweep has written: later ones see them. Called once for each sweep that succeeded."""
    for call in calls:
        for group in call:
            group.commit()
    for local in locals_:
        if local.cache is not None:
            local.cache.commit(sum(len(it.ids) for it in local.asked))


class _LayerCall:
    """Rows that pass a layer together, packed into one sequence: [local rows | ordinary rows | candidate rows]."""

    def __init__(
        self, base: BaseDecoder, reads: Sequence[Read], locals_: Sequence[LocalRows], positions: Positions
    ) -> None:
        self.reads, self.locals = reads, locals_
        for read in reads:
            read.prepare(base, positions)
        ids, at = [read.ids() for read in reads], [read.positions() for read in reads]
        local = [rows.ids() for rows in locals_]
        blocks = [pair[0] for pair in (*local, *ids)] + [pair[1] for pair in ids]
        places = [pair[1] for pair in local] + [pair[0] for pair in at] + [pair[1] for pair in at]
        self.sizes = [len(block) for block in blocks]
        self.candidates = sum(self.sizes[len(reads) + len(locals_) :])
        readers = [flag for rows in locals_ for flag in rows.readers()]
        self._readers = torch.tensor(readers, device=base.device)[:, None] if any(readers) else None
        self._ids = torch.cat(blocks).unsqueeze(0).to(base.device)
        self._positions = torch.cat(places).unsqueeze(0).to(base.device)

    def embed(self, base: BaseDecoder) -> Tensor:
        """Return what enters the first layer, (1, rows, hidden)."""
        hidden = base.embed(self._ids, self._positions)
        self._rope = base.rope(hidden, self._positions)
        return hidden

    def run(
        self,
        base: BaseDecoder,
        adapter: CandidateAdapter,
        layer: int,
        hidden: Tensor,
        candidates: dict[ChunkRows, Candidates],
    ) -> Tensor:
        """Pass one layer; its candidates join ``candidates``, which has those of the calls before."""
        start = hidden.shape[1] - self.candidates if self.candidates else None

        def attend(
            layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
        ) -> Tensor:
            return self._attend(layer, (query, key, value), scale, softcap, candidates)

        with adapter.rows.starting_at(start, self._readers):
            return base.run_layer(layer, hidden, self._rope, attend)

    def drop_ordinary(self, hidden: Tensor) -> Tensor:
        """Leave out the ordinary rows: behind the last layer nothing reads them."""
        first, count = len(self.locals), len(self.reads)
        before = sum(self.sizes[:first])
        after = before + sum(self.sizes[first : first + count])
        if before == after:
            return hidden
        self.sizes[first : first + count] = [0] * count
        if self._rope is not None:
            self._rope = self._rope.without(before, after)
        return torch.cat([hidden[:, :before], hidden[:, after:]], dim=1)

    def of_locals(self, hidden: Tensor) -> list[Tensor]:
        """Return the states of the local rows, (1, rows, hidden) each."""
        return list(torch.split(hidden, self.sizes, dim=1))[: len(self.locals)]

    def _attend(
        self,
        layer: int,
        rows: tuple[Tensor, Tensor, Tensor],
        scale: float,
        softcap: float | None,
        candidates: dict[ChunkRows, Candidates],
    ) -> Tensor:
        blocks = list(zip(*(torch.split(tensor, self.sizes, dim=2) for tensor in rows), strict=True))
        first, count, outs = len(self.locals), len(self.reads), [rows[0]] * len(blocks)
        for index, read in enumerate(self.reads):
            both = (first + index, first + count + index)
            if count == 1:
                own = [tensor[:, :, sum(self.sizes[:first]) :] for tensor in rows]
            else:
                own = [torch.cat(pair, dim=2) for pair in zip(*(blocks[place] for place in both), strict=True)]
            out, made = read.attend(layer, own[0], own[1], own[2], scale, softcap)
            candidates.update(zip(read.members, made, strict=True))
            outs[both[0]], outs[both[1]] = torch.split(out, [self.sizes[place] for place in both], dim=1)
        for index, local in enumerate(self.locals):
            query, key, value = blocks[index]
            outs[index] = local.attend(layer, query, key, value, scale, softcap, candidates)
        return torch.cat(outs, dim=1)
