"""Read one question over a memory: hold its suffixes and local KV between sweeps.

Everything that grows while an answer is decoded lives in a :class:`Reading`; the memory and the model are shared and
unchanged. If a sweep runs out of memory before anything was committed, it is tried again with fewer chunks at a time.
It samples nothing and knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from focus_core.config import FocusConfig
from focus_core.errors import ConfigError, ContextTooLongError, OutOfMemoryError
from focus_core.hardware import free_bytes, is_out_of_memory
from focus_core.method.encoding import Check, never
from focus_core.method.kv import move_keys, rotations
from focus_core.method.layout import Scoring, check_room, local_start, sink_before
from focus_core.method.local import Local, LocalCache, LocalRows
from focus_core.method.packed import commit, sweep
from focus_core.method.passes import Pass, SharedPasses, row_bytes
from focus_core.method.ranks import Ranks
from focus_core.method.room import take_room
from focus_core.method.rows import Behind, ChunkRows
from focus_core.method.state import MemoryState
from focus_core.method.suffix import Suffix, suffix_bytes
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder

_FEW_CHUNKS = 8  # below this a pass of its own for the opening costs more than it saves
_KEPT_SHARE = 0.25  # of the memory's tokens that a kept opening may have behind all chunks
_ROWS_AT_ONCE = {"cpu": 8192, "cuda": 131072}


def check_window(base: BaseDecoder, focus: FocusConfig, rows: int, max_tokens: int) -> None:
    """Raise :class:`ContextTooLongError` if a question's rows and its answer pass the window."""
    if rows + max_tokens > focus.window:
        reason = " (the base's sliding window)" if focus.window == base.sliding_window else ""
        raise ContextTooLongError(
            f"the question has {rows} tokens and {max_tokens} are to be generated, but the window has "
            f"{focus.window}{reason}; shorten the question, put long text into memory, or lower max_tokens"
        )


class Reading:
    """The state of one question.

    Args:
        base: the frozen decoder.
        adapter: its candidate projections.
        focus: settings.
        state: the memory to read; later changes of the memory do not reach this reading.
        sink: token that starts the local row, or ``None``.
        max_tokens: most tokens that will be generated.
        chunks_per_batch: chunks run together; ``None`` chooses from free memory.
        check: called between layers, may raise to cancel.
        passes: runs the sweeps, together with those of other readings that share it; its own if not given.
        ranks: processes that share the chunks.
    """

    def __init__(
        self,
        base: BaseDecoder,
        adapter: CandidateAdapter,
        focus: FocusConfig,
        state: MemoryState,
        sink: int | None,
        *,
        max_tokens: int,
        chunks_per_batch: int | None = None,
        check: Check = lambda: None,
        passes: SharedPasses | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        state = state if ranks is None else ranks.own(state)
        self.passes = passes or SharedPasses(base, adapter)
        self.base, self.adapter, self.focus, self.state, self.sink = base, adapter, focus, state, sink
        self.max_tokens, self.chunks_per_batch = max_tokens, chunks_per_batch
        self.check = check
        self.ids: list[int] = []
        self.local: list[int] = []
        self.mass: list[Tensor] = []
        self.prompt_tokens = 0
        self.reread_tokens = 0
        self.whole: list[int] = []
        self._kept: list[int] | None = None
        self._spans: list[tuple[int, int]] = []
        self._absent: tuple[int, int] | None = None
        self._alone = False
        self._rows = self._opening = 0
        self._all: list[ChunkRows] = []
        self._groups: list[ChunkRows] = []
        self._cache: LocalCache | None = None

    @property
    def chunks(self) -> int:
        """k, the number of chunks in memory."""
        return len(self.state.chunks)

    @property
    def candidates(self) -> int:
        """How many of them stand in front of the local rows by their candidates.

        All k, fewer after :meth:`narrow`, none while a reader reads chunks whole.
        """
        if self._alone:
            return 0
        return self.chunks if self._kept is None else len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that this question holds: behind every chunk, and its local KV."""
        local = self._cache.nbytes if self._cache is not None else 0
        return local + sum({id(group.suffix): group.suffix.nbytes for group in (*self._all, *self._groups)}.values())

    def begin(self, ids: Sequence[int], opening: int = 0) -> Tensor:
        """Inject the dynamic prompt behind every chunk and read the local context (method steps 2-4).

        Args:
            ids: the local context, at least one token.
            opening: how many of its first tokens other questions begin with too, such as a system turn: what they are
                behind every chunk is kept with the memory for the next question.

        Returns:
            (vocabulary,) float32 logits of the next token.

        Raises:
            ContextTooLongError: the local context or a chunk row would not fit the window.
            OutOfMemoryError: not even one chunk at a time fits.
        """
        head = sink_before(ids, self.sink)
        check_window(self.base, self.focus, len(head) + len(ids), self.max_tokens)
        check_room(self.base, self.chunks, self.focus.positions, len(head) + len(ids) + self.max_tokens)
        self.prompt_tokens = self._prompt_length(len(ids))
        take_room(self._suffix_bytes(), self.base.device)
        size = self.chunks_per_batch or self._fitting_batch()
        while True:
            try:
                return self._begin(ids, head, opening, size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1 or not self.chunks or self.ranks is not None:  # the others cannot begin again
                    raise OutOfMemoryError(
                        f"reading {self.chunks} chunks does not fit in memory, even one at a time ({error}); use a "
                        "shorter question, a smaller chunk size or fewer documents"
                    ) from error
                self._all, self._groups, self._cache = [], [], None  # free before the next try makes new ones
                size = max(1, min(size, self.chunks) // 2)

    def _begin(self, ids: Sequence[int], head: list[int], opening: int, size: int) -> Tensor:
        self.ids, self.local = list(ids), list(ids)
        self._rows, self._opening = len(ids) + self.max_tokens, opening
        self._all = self._groups = self._make_groups(size)
        calls = [[group] for group in self._groups]
        injected = ids[len(ids) - 1 - self.prompt_tokens : -1]
        if self._opens_alike(len(ids), opening):
            self._open(injected[:opening], calls)
            injected = injected[opening:]
        return self._sweep(injected, [*head, *ids], calls)

    def step(self, token: int) -> Tensor:
        """Append a generated token, renew every candidate, and return the next (vocabulary,) logits (step 5)."""
        previous = [self.ids[-1]]
        self.ids.append(token)
        self.local.append(token)
        local = [token] if self.focus.local_mode == "incremental" else self._local_row()
        return self._go_on(previous, local)

    def narrow(self, chunks: Sequence[int]) -> Tensor:
        """Go on with some chunks alone: what follows is what a memory of these would give.

        The local context is read again with their candidates; steps renew no other ones, and :attr:`mass` is zero at
        the others. Call it after :meth:`begin` and before any :meth:`step`.

        Args:
            chunks: their numbers, at least one.

        Returns:
            (vocabulary,) float32 logits of the next token.
        """
        self._kept = sorted(set(chunks))
        numbers = {index: number for number, index in enumerate(self._kept)}
        self._groups = [kept for group in self._groups if (kept := group.only(numbers)) is not None]
        self._cache = None
        return self._go_on([], self._local_row())

    def read_whole(self, chunks: Sequence[int], separator: Sequence[int] = (), *, moved: bool = False) -> Tensor | None:
        """Put whole chunks into the local context, behind its opening, and read it again.

        The opening is what :meth:`begin` was told of, such as a system turn and the head of the user's: so the chunks
        are read where the base expects what it is asked about. The local rows then attend to these chunks token by
        token as well as to their candidates, which say what the adapter has learned to say of them; :attr:`mass` then
        holds for these chunks what candidate and tokens receive together. An adapter's reader, where it has one, reads
        them alone: no candidate stands in front of it, and none is renewed, so a step costs what it costs without a
        memory. Call it after :meth:`begin` and before any :meth:`narrow`, again to change the choice.

        Args:
            chunks: numbers of chunks, best first; those that the window has no room for are left out.
            separator: token ids put behind each (not with ``moved``).
            moved: take the chunk KV that is there, its keys turned to their new places, instead of running the tokens
                before the question. They then stand in front of the opening. Nothing is computed again but the
                question's rows; the chunks have not seen one another, and the last layer, whose chunk KV is not kept,
                does not see them.

        Returns:
            (vocabulary,) float32 logits of the next token, or ``None`` if not one of them fits.

        Raises:
            ConfigError: keys cannot be moved in this base, or the local context is read anew at every step.
        """
        if moved and self.ranks is not None:
            raise ConfigError("chunk KV cannot be moved between processes; use reread_way='run'")
        if moved and (not self.base.rotary or self.focus.local_mode != "incremental"):
            raise ConfigError(
                "chunk KV can be moved in bases with rotary positions and local_mode='incremental' alone; use "
                "reread_way='run'"
            )
        separator = () if moved else separator
        kept = self._fitting(chunks, len(separator))
        if not kept:
            return None
        self.whole, self._alone = sorted(kept), self.adapter.reader_rank > 0 and not moved
        if moved:
            return self._behind_moved()
        self._cache = None
        starts, passages, opening = [], list[int](), self._opening
        first = self.ids if opening else self.state.chunks[self.whole[0]].ids
        head = len(sink_before(first, self.sink)) + opening
        for index in self.whole:
            starts.append(head + len(passages))
            passages += [*self.state.chunks[index].ids, *separator]
        sizes = [len(self.state.chunks[index].ids) for index in self.whole]
        self._spans = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        self.reread_tokens = len(passages)
        self.local = [*self.ids[:opening], *passages, *self.ids[opening:]]
        return self._go_on([], self._local_row())

    def _fitting(self, chunks: Sequence[int], separator: int) -> list[int]:
        """Return the first of ``chunks`` that the window holds beside the question and its answer."""
        positions = self.base.window - local_start(self.chunks, self.focus.positions)
        room = min(self.focus.window, positions) - 1 - self._rows
        kept = []
        for index in chunks:
            room -= len(self.state.chunks[index].ids) + separator
            if room < 0:
                break
            kept.append(index)
        return kept

    def _behind_moved(self) -> Tensor:
        """Read the local context behind its sink and the moved KV of the whole chunks."""
        old, start = self._cache, local_start(self.candidates, self.focus.positions)
        assert old is not None
        head = 1 if self.sink is not None else 0
        held = {id(chunk): (slab.kv, row) for slab in self.state.slabs for chunk, row in slab.between(0, slab.kv.size)}
        parts, at, self._spans = [], head, []
        for index in self.whole:
            chunk = self.state.chunks[index]
            kv, number = held[id(chunk)]
            size, tensor = len(chunk.ids), kv.dense(number)
            own = tensor.shape[3] - size  # its own sink
            parts.append(self._turned(tensor[:, :, :, own:], start + at - own))
            self._spans.append((at, at + size))
            at += size
        self.local, self._absent, self.reread_tokens = list(self.ids), (head, at), at - head
        row = self._local_row()
        body = torch.cat(parts, dim=3)
        body = torch.cat([body, torch.zeros_like(body[:1])])  # the last layer has none
        self._cache = LocalCache(self.base, at + len(row) + self.max_tokens)
        self._cache.write_all(torch.cat([old.read()[:, :, 0, :, :head], body], dim=3).unsqueeze(2))
        return self._go_on([], row[head:])

    def _turned(self, kv: Tensor, by: int) -> Tensor:
        """Move the keys of (layers, 2, kv_heads, rows, head_dim) by so many positions."""
        delta = torch.full((kv.shape[3],), by, device=kv.device)
        turns = rotations(self.base.frequencies, delta)
        keys = torch.stack([move_keys(layer, turn) for layer, turn in zip(kv[:, 0], turns, strict=False)])
        return torch.stack([keys, kv[:, 1]], dim=1)

    def _opens_alike(self, tokens: int, opening: int) -> bool:
        """Whether an opening runs, and is kept, apart from the rest: a rule that knows nothing of earlier questions.

        So an answer is the same whether its opening was there already or not.
        """
        whole = self.prompt_tokens == tokens - 1
        small = opening * self.chunks <= _KEPT_SHARE * sum(len(chunk.ids) for chunk in self.state.chunks)
        return whole and small and 0 < opening < tokens - 1 and self.chunks >= _FEW_CHUNKS

    def _open(self, ids: Sequence[int], calls: list[list[ChunkRows]]) -> None:
        """Put an opening behind every chunk: the kept one, or a new one that is kept."""
        kept = self.state.openings.get(ids)
        if kept is None:
            for group in self._groups:
                group.asked = [Behind(ids)]
            with torch.no_grad():
                check = self.check if self.ranks is None else never
                sweep(self.base, self.adapter, calls, (), self.focus.positions, check)
            commit(calls, ())
            parts = iter(group.suffix.read() for group in self._groups)
            kept = []
            for slab in self.state.slabs:
                own = [next(parts)]
                while sum(part.shape[2] for part in own) < slab.kv.size:
                    own.append(next(parts))
                kept.append(torch.cat(own, dim=2))
            self._keep_opening(ids, kept)
            return
        groups = iter(self._groups)
        for tensor in kept:
            start = 0
            while start < tensor.shape[2]:
                group = next(groups)
                stop = start + group.chunks.size
                group.suffix.write_all(tensor[:, :, start:stop])
                start = stop

    def _keep_opening(self, ids: Sequence[int], kept: list[Tensor]) -> None:
        """Keep an opening for the next question, where it is small beside the memory that chunk KV may take."""
        sources = [slab.kv.source for slab in self.state.slabs]
        bounds = [room for room in (source.room for source in sources) if room is not None]
        if bounds and sum(tensor.nbytes for tensor in kept) > _KEPT_SHARE * min(bounds):
            return
        for source, tensor in zip(sources, kept, strict=True):
            source.count(tensor, tensor.nbytes)
        self.state.openings.put(ids, kept, int(_KEPT_SHARE * sum(slab.kv.nbytes for slab in self.state.slabs)))

    def _local_row(self) -> list[int]:
        """Return the whole local context as the base reads it, its sink included."""
        return [*sink_before(self.local, self.sink), *self.local]

    def _calls(self) -> list[list[ChunkRows]]:
        if self._alone:
            return []
        if self.chunks_per_batch is not None:
            return [[group] for group in self._groups]
        return [self._groups] if self._groups else []

    def _go_on(self, ordinary: Sequence[int], local_ids: list[int]) -> Tensor:
        """Sweep after :meth:`begin`."""
        try:
            return self._sweep(ordinary, local_ids, self._calls())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"memory ran out while answering over {self.chunks} chunks ({error}); use fewer documents or a shorter "
                "question, or set chunks_per_batch"
            ) from error

    def _sweep(self, ordinary: Sequence[int], local_ids: list[int], calls: list[list[ChunkRows]]) -> Tensor:
        for group in self._groups if calls else ():
            group.asked = [Behind(ordinary, [self.ids[-1]], group.suffix.used + len(ordinary))]
        if self.focus.local_mode == "incremental" and self._cache is None:
            self._cache = LocalCache(self.base, len(local_ids) + self.max_tokens)
        used = self._cache.used if self._cache is not None else 0
        position = local_start(self.candidates, self.focus.positions) + used
        groups = [group for call in calls for group in call]
        local = LocalRows(
            [Local(local_ids, position, len(local_ids), self._alone)],
            groups,
            self._cache,
            record=bool(self.candidates or self._spans),
            scoring=Scoring.of(self.focus),
            spans=self._spans,
            absent=self._absent,
            ranks=self.ranks,
        )
        indices = [index for group in groups for index in group.indices]
        indices = indices if self.ranks is None else self.ranks.indices(indices)
        small = len(ordinary) <= 1 and self.chunks_per_batch is None
        logits = self._run(Pass(calls, local, self.focus.positions, self.check, small))
        with torch.no_grad():
            order = torch.tensor(indices, dtype=torch.long).argsort()
            self.mass = []
            if local.mass:
                mass = torch.stack(local.mass)
                self.mass = list(self._in_memory(mass, order.to(mass.device)).unbind())
        return logits

    def _run(self, own: Pass) -> Tensor:
        """Run a pass; of several processes in all of them or in none."""
        if self.ranks is None:
            return self.passes.run(own)
        self.ranks.check(self.check)
        own.check = never  # all of them stop between sweeps
        try:
            return self.ranks.first(self.passes.run(own))
        except BaseException:
            self.ranks.leave()
            raise

    def _in_memory(self, mass: Tensor, order: Tensor) -> Tensor:
        """(layers, heads, candidates + chunks read whole) -> (layers, heads, k)."""
        found = mass.new_zeros(*mass.shape[:2], self.chunks)
        if len(order):
            found[..., slice(None) if self._kept is None else self._kept] = mass[..., order]
        found[..., self.whole] += mass[..., len(order) :]
        return found

    def _make_groups(self, size: int) -> list[ChunkRows]:
        place = {id(chunk): index for index, chunk in enumerate(self.state.chunks)}
        groups = []
        for slab in self.state.slabs:
            for start in range(0, slab.kv.size, size):
                stop = min(start + size, slab.kv.size)
                kv = slab.kv.rows(start, stop)
                held = [(place[id(chunk)], row) for chunk, row in slab.between(start, stop)]
                indices, rows = [index for index, _ in held], [row for _, row in held]
                suffix = Suffix(kv, self.prompt_tokens + 1)
                groups.append(ChunkRows(kv, suffix, indices, self.chunks, rows=rows))
        return groups

    def _prompt_length(self, local_tokens: int) -> int:
        """Tokens of the dynamic prompt: all but the last, within its limit and the room behind the longest chunk."""
        longest = max((max(slab.kv.lengths) for slab in self.state.slabs), default=0)
        longest = longest if self.ranks is None else self.ranks.most(longest)
        room = self.focus.window - longest - 1 - self.max_tokens
        if self.chunks and room < 1:
            raise ContextTooLongError(
                f"a chunk row of {longest} tokens and {self.max_tokens} to generate leave no room for the question in "
                f"a window of {self.focus.window}; generate less or use a smaller chunk size"
            )
        return max(0, min(local_tokens - 1, self.focus.prompt_length, room))

    def _fitting_batch(self) -> int:
        """Chunks whose prompt injection fits in half of the free memory, and in a batch that is worth while."""
        device = self.base.device
        rows = max(1, self.prompt_tokens)
        by_memory = free_bytes(device) // 2 // (rows * row_bytes(self.base))
        by_rows = _ROWS_AT_ONCE.get(device.type, 8192) // rows
        return int(max(1, min(by_memory, by_rows, max(self.chunks, 1))))

    def _suffix_bytes(self) -> int:
        """Bytes that the suffixes will have behind the longest answer."""
        tokens = self.prompt_tokens + self.max_tokens
        return sum(suffix_bytes(slab.kv.shape, slab.kv.size, tokens) for slab in self.state.slabs)
