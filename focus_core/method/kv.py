"""Own the keys and values of chunks, and those that a question puts behind them.

Chunk KV is written once and only read afterwards. Of each layer, the keys of all chunks lie behind each other,
(kv_heads, tokens, head_dim), each chunk from a multiple of a block's tokens on, and the values likewise; so chunks of
any length lie together, and attention runs over blocks. The first :data:`FIRST` tokens of a chunk, its sink among
them, lie apart in the base's dtype: they take much attention, so no format rounds them. The last layer's chunk KV is
never read by any candidate, so ``layers`` here is the base's number minus one. What the numbers look like is the
format's affair, where they lie that of a source. Nothing here runs a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from focus_core.method.attention import hidden_score
from focus_core.method.formats import BaseFormat, format_of
from focus_core.method.sources import FIRST, KVShape, Resident, Source

_BLOCKS = (32, 64, 128, 256, 512)
_BLOCK_COST = 16  # tokens that one more block is worth
_LIVE = 0.75  # a smaller share of blocks in use makes a copy of those worth while
_SPARE = 0.25  # room that a growing source takes beside what it needs


class Alike(NamedTuple):
    """Chunks with equally many blocks.

    Args:
        rows: their numbers, among those read.
        blocks: (len(rows) * pieces,) their blocks, chunk by chunk; a slice where they follow each other.
        slots: (len(rows),) where the arrays by chunk hold them.
        pieces: blocks of each.
    """

    rows: Tensor
    blocks: Tensor | slice
    slots: Tensor
    pieces: int


@dataclass(frozen=True)
class Table:
    """Which block belongs to which chunk.

    Args:
        first: number of the first block in the source.
        owner: (blocks,) number of the chunk, among those read; any for a block that belongs to none.
        slots: (blocks,) where the arrays by chunk hold that chunk.
        pieces: (chunks, most) numbers of a chunk's blocks; ``len(owner)`` where it has fewer than ``most``.
        bias: (blocks, 1, 1, block) hides what is behind the end of a chunk.
        alike: the chunks by number of blocks.
        starts: (chunks,) first token of each chunk's blocks, among those read.
        bodies: (chunks,) tokens of each chunk in blocks.
        chunk_slots: (chunks,) where the arrays by chunk hold each.
    """

    first: int
    owner: Tensor
    slots: Tensor
    pieces: Tensor
    bias: Tensor
    alike: tuple[Alike, ...]
    starts: Tensor
    bodies: Tensor
    chunk_slots: Tensor
    _made: dict[tuple[object, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    def places(self, others: int) -> Tensor:
        """(chunks * (most + others),): where a chunk's parts lie behind each other, and ``others`` more, one a chunk.

        All parts over blocks come first, then for each of the others one a chunk, then one that counts nothing.
        """
        if (others,) not in self._made:
            blocks, chunks = len(self.owner), len(self.pieces)
            own = self.pieces.masked_fill(self.pieces == blocks, blocks + others * chunks)
            rows = torch.arange(chunks, device=own.device)
            more = [blocks + number * chunks + rows for number in range(others)]
            self._made[others,] = (torch.cat([own, *(item[:, None] for item in more)], dim=1).flatten(),)
        return self._made[others,][0]

    def nothing(self, heads: int, rows: int, dim: int, wide: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``lse`` and ``out`` of the part that counts nothing."""
        if (heads, rows, dim, wide, dtype) not in self._made:
            device = self.owner.device
            lse = torch.full((1, heads, rows), hidden_score(wide), dtype=wide, device=device)
            out = torch.zeros(1, heads, rows, dim, dtype=dtype, device=device)
            self._made[heads, rows, dim, wide, dtype] = (lse, out)
        lse, out = self._made[heads, rows, dim, wide, dtype]
        return lse, out


class LayerKV(NamedTuple):
    """One layer's chunk KV in blocks, as attention reads it.

    Args:
        arrays: of the format; those by token cut to the blocks.
        format: reads them.
        table: which block belongs to which chunk.
        dtype: of the base.
    """

    arrays: Mapping[str, Tensor]
    format: BaseFormat
    table: Table
    dtype: torch.dtype

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.arrays["keys"].shape[0]

    def query(self, query: Tensor, slots: Tensor) -> Tensor:
        """Return queries (n, heads, rows, width) that score :meth:`keys`, for chunks in these slots."""
        return self.format.query(query, self.arrays, slots)

    def keys(self) -> Tensor:
        """Return (kv_heads, blocks * BLOCK, width)."""
        return self.format.keys(self.arrays, self.dtype)

    def values(self) -> Tensor:
        """Return (kv_heads, blocks * BLOCK, width)."""
        return self.format.values(self.arrays, self.dtype)


class ChunkKV:
    """Keys and values of some chunks: a view of a source. Immutable once written.

    Args:
        shape: of all of them.
        source: where they lie.
        starts: first token of each chunk's blocks in the source.
        slots: entry of each chunk in the arrays by chunk.
        lengths: tokens of each chunk row, the sink included.
    """

    def __init__(
        self, shape: KVShape, source: Source, starts: Sequence[int], slots: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.shape, self.source = shape, source
        self.starts, self.slots, self.lengths = tuple(starts), tuple(slots), tuple(lengths)

    @classmethod
    def allocate(cls, shape: KVShape, lengths: Sequence[int], spare: float = 0.0) -> ChunkKV:
        """Make room for chunks of these lengths, and for a share of ``spare`` more."""
        block = best_block(lengths)
        tokens, chunks = sum(blocked(length, block) for length in lengths), len(lengths)
        room = blocked(FIRST + int(tokens * (1 + spare)), block)
        source = Resident(shape, room, int(chunks * (1 + spare)), block)
        taken = source.take(tokens, chunks)
        assert taken is not None
        return cls(shape, source, *_places(taken, lengths, block), lengths)

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of chunks."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of these chunks, the rest of their last blocks included."""
        return self.shape.nbytes(sum(map(self._blocked, self.lengths)), self.size)

    @property
    def key(self) -> object:
        """Equal for views of the same chunks, and for those alone."""
        return id(self.source), self.slots

    @cached_property
    def ends(self) -> Tensor:
        """(chunks,) lengths on the device."""
        return torch.tensor(self.lengths, device=self.shape.device)

    @cached_property
    def table(self) -> Table:
        """Which block belongs to which chunk; made once."""
        (first, last), size = self._span(), self.source.block
        owner, slots = [0] * (last - first), [self.slots[0] if self.slots else 0] * (last - first)
        used, most = [0] * (last - first), max((self._blocked(length) // size for length in self.lengths), default=0)
        pieces = [[last - first] * most for _ in self.lengths]
        for row, (start, slot, length) in enumerate(zip(self.starts, self.slots, self.lengths, strict=True)):
            for piece in range(self._blocked(length) // size):
                block = start // size - first + piece
                owner[block], slots[block], pieces[row][piece] = row, slot, block
                used[block] = min(size, length - FIRST - piece * size)
        device = self.shape.device
        hidden = torch.arange(size, device=device) >= torch.tensor(used, device=device)[:, None]
        bias = torch.zeros(hidden.shape, dtype=self.shape.dtype, device=device).masked_fill_(
            hidden, hidden_score(self.shape.dtype)
        )
        return Table(
            first,
            self._index(owner),
            self._index(slots),
            self._index(pieces).reshape(self.size, most),
            bias[:, None, None],
            tuple(self._alike(pieces, last - first)),
            self._index([start - first * size for start in self.starts]),
            self._index([max(0, length - FIRST) for length in self.lengths]),
            self._index(self.slots),
        )

    def _alike(self, pieces: Sequence[Sequence[int]], none: int) -> Iterator[Alike]:
        """Yield the chunks by number of blocks; ``none`` is the number of no block."""
        counts = [sum(block != none for block in row) for row in pieces]
        for count in sorted(set(counts), reverse=True):
            rows = [row for row, own in enumerate(counts) if own == count]
            blocks = [block for row in rows for block in pieces[row][:count]]
            index = (
                slice(blocks[0], blocks[0] + len(blocks)) if blocks and _consecutive(blocks) else self._index(blocks)
            )
            yield Alike(self._index(rows), index, self._index([self.slots[row] for row in rows]), count)

    def _index(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.shape.device)

    # -- reading ------------------------------------------------------------------------------------------------

    def layer(self, index: int) -> LayerKV:
        """Return a layer for attention to read: no copy."""
        arrays, first = self.source.layer(index), self.table.first * self.source.block
        stop = first + len(self.table.owner) * self.source.block
        cut = {
            name: arrays[name][:, first:stop] if array.per == "token" else arrays[name]
            for name, array in self.shape.arrays.items()
        }
        return LayerKV(cut, format_of(self.shape.format), self.table, self.shape.dtype)

    def first(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of the first tokens, (chunks, kv_heads, FIRST, head_dim)."""
        arrays = self.source.layer(index)
        return tuple(arrays[name][_range(self.slots)] for name in ("first_keys", "first_values"))  # type: ignore[return-value]

    def first_hidden(self) -> Tensor | None:
        """(chunks, 1, 1, FIRST) bias of chunks shorter than that; ``None`` if there are none."""
        if min(self.lengths, default=FIRST) >= FIRST:
            return None
        hidden = torch.arange(FIRST, device=self.shape.device) >= self.ends[:, None]
        bias = torch.zeros(hidden.shape, dtype=self.shape.dtype, device=self.shape.device)
        return bias.masked_fill_(hidden, hidden_score(self.shape.dtype))[:, None, None]

    def read(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Return one chunk's keys and values of a layer, (kv_heads, length, head_dim) in the base's dtype."""
        one, length = self.rows(row, row + 1), self.lengths[row]
        kv, slot = one.layer(layer), self.slots[row]
        bodies = kv.format.plain(kv.arrays, slot)
        keys, values = (
            torch.cat([head[0], body.to(head.dtype)], dim=1)[:, :length]
            for head, body in zip(one.first(layer), bodies, strict=True)
        )
        return keys, values

    def dense(self, row: int) -> Tensor:
        """Return one chunk's (layers, 2, kv_heads, length, head_dim) in the base's dtype."""
        return torch.stack([torch.stack(self.read(layer, row)) for layer in range(self.shape.layers)])

    def views(self, row: int) -> dict[str, list[Tensor]]:
        """Return one chunk's arrays as they are written: by name, one a layer, without padding; no copy.

        By token (kv_heads, tokens, ...), without the first ones; by chunk (...).
        """
        alone = getattr(self.source, "chunk", None)
        if alone is not None:  # a source that would read every chunk's layer for one chunk of it
            return cast(dict[str, list[Tensor]], alone(self.slots[row]))
        start, stop = self.starts[row], self.starts[row] + max(0, self.lengths[row] - FIRST)
        found: dict[str, list[Tensor]] = {name: [] for name in self.shape.arrays}
        for layer in range(self.shape.layers):
            held = self.source.layer(layer)
            for name, array in self.shape.arrays.items():
                part = held[name][:, start:stop] if array.per == "token" else held[name][self.slots[row]]
                found[name].append(part)
        return found

    def get(self, row: int) -> dict[str, Tensor]:
        """Return a copy of one chunk's arrays, (layers, ...) each of what :meth:`views` says."""
        return {name: torch.stack(parts) for name, parts in self.views(row).items()}

    # -- writing, once ------------------------------------------------------------------------------------------

    def put(self, row: int, arrays: Mapping[str, Tensor]) -> None:
        """Write one chunk as :meth:`views` or :meth:`get` returned it."""
        for name, parts in self.views(row).items():
            for place, part in zip(parts, arrays[name], strict=True):
                place.copy_(part)

    def put_dense(self, row: int, dense: Tensor) -> None:
        """Write one chunk given as (layers, 2, kv_heads, length, head_dim)."""
        one, dense = self.rows(row, row + 1), dense.to(self.shape.device)
        for layer in range(self.shape.layers):
            one.write(layer, dense[layer, 0].unsqueeze(0), dense[layer, 1].unsqueeze(0))

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write a layer of all chunks, wherever they lie.

        Args:
            layer: number of the layer.
            keys: (chunks, kv_heads, at least the longest chunk, head_dim), rotated.
            values: like ``keys``.
        """
        held, writer = self.source.layer(layer), format_of(self.shape.format)
        slots = _range(self.slots)
        some = min(FIRST, keys.shape[2])
        held["first_keys"][slots, :, :some] = keys[:, :, :some]
        held["first_values"][slots, :, :some] = values[:, :, :some]
        for start, stop in self._runs():
            width = min(self._blocked(self.lengths[start]), keys.shape[2] - FIRST)
            if width <= 0:
                continue
            seen = torch.arange(FIRST, FIRST + width, device=keys.device) < self.ends[start:stop, None]
            shown = slice(FIRST, FIRST + width)
            written = writer.write(keys[start:stop, :, shown], values[start:stop, :, shown], seen)
            for name, tensor in written.items():
                if self.shape.arrays[name].per == "chunk":
                    held[name][_range(self.slots[start:stop])] = tensor.to(held[name].dtype)
                    continue
                first = self.starts[start]
                place = held[name][:, first : first + (stop - start) * self._blocked(self.lengths[start])]
                split_tokens(place, stop - start)[:, :, :width] = tensor.transpose(0, 1).to(place.dtype)

    # -- other views --------------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> ChunkKV:
        """Return chunks ``start`` to ``stop``: no copy."""
        return self if (start, stop) == (0, self.size) else self.select(range(start, stop))

    def select(self, rows: Sequence[int]) -> ChunkKV:
        """Return some chunks, where they lie: no copy."""
        return ChunkKV(
            self.shape,
            self.source,
            [self.starts[row] for row in rows],
            [self.slots[row] for row in rows],
            [self.lengths[row] for row in rows],
        )

    def choose(self, rows: Sequence[int]) -> ChunkKV:
        """Return some chunks: where they lie if what lies between them is little, else a copy."""
        chosen = self.select(rows)
        return chosen if chosen._live() >= _LIVE else chosen.copied()

    def copied(self, more: Sequence[int] = ()) -> ChunkKV:
        """Return a copy with room for more chunks of these lengths behind it."""
        grown = ChunkKV.allocate(self.shape, [*self.lengths, *more], _SPARE if more and self.size else 0.0)
        tokens: list[int] = []
        for start, length in zip(self.starts, self.lengths, strict=True):
            body = range(start, start + max(0, length - FIRST))
            tokens += [*body, *[start] * (blocked(length, grown.source.block) - len(body))]
        index, slots = self._index(tokens), self._index(self.slots)
        for layer in range(self.shape.layers if self.size else 0):
            old, new = self.source.layer(layer), grown.source.layer(layer)
            for name, array in self.shape.arrays.items():
                if array.per == "chunk":
                    new[name][: self.size] = old[name].index_select(0, slots)
                else:
                    new[name][:, : len(tokens)] = old[name].index_select(1, index)
        return grown

    def extended(self, lengths: Sequence[int]) -> ChunkKV:
        """Return these chunks and room for more: behind them in the same source if there is some, else in a copy."""
        if isinstance(self.source, Resident):
            taken = self.source.take(sum(map(self._blocked, lengths)), len(lengths))
            if taken is not None:
                starts, slots = _places(taken, lengths, self.source.block)
                both = ChunkKV(
                    self.shape,
                    self.source,
                    [*self.starts, *starts],
                    [*self.slots, *slots],
                    [*self.lengths, *lengths],
                )
                if both._live() >= _LIVE:
                    return both
        return self.copied(lengths)

    def extension_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes that :meth:`extended` may have to allocate."""
        both = [*self.lengths, *lengths]
        tokens = sum(blocked(length, best_block(both)) for length in both)
        return int(self.shape.nbytes(tokens, self.size + len(lengths)) * (1 + _SPARE))

    # -- inside -------------------------------------------------------------------------------------------------

    def _span(self) -> tuple[int, int]:
        """First block and the one behind the last."""
        held = [
            (start // self.source.block, (start + self._blocked(length)) // self.source.block)
            for start, length in zip(self.starts, self.lengths, strict=True)
            if self._blocked(length)
        ]
        return (min(first for first, _ in held), max(last for _, last in held)) if held else (0, 0)

    def _blocked(self, length: int) -> int:
        return blocked(length, self.source.block)

    def _live(self) -> float:
        first, last = self._span()
        blocks = sum(map(self._blocked, self.lengths)) // self.source.block
        return blocks / (last - first) if last > first else 1.0

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield runs of chunks with equally many blocks that lie behind each other."""
        start = 0
        for row in range(1, self.size + 1):
            size = self._blocked(self.lengths[start])
            alike = row < self.size and self._blocked(self.lengths[row]) == size
            if not alike or self.starts[row] != self.starts[row - 1] + size:
                yield start, row
                start = row


def split_tokens(tensor: Tensor, parts: int) -> Tensor:
    """(kv_heads, tokens, ...) -> (kv_heads, parts, tokens / parts, ...), a view."""
    return tensor.view(tensor.shape[0], parts, tensor.shape[1] // parts, *tensor.shape[2:])


def blocked(length: int, block: int) -> int:
    """Tokens that the blocks of a chunk row of ``length`` tokens take."""
    return -(-max(0, length - FIRST) // block) * block


def best_block(lengths: Sequence[int]) -> int:
    """Return the size of blocks that costs least: small ones leave little padding, large ones are few."""
    counts = Counter(lengths)

    def cost(block: int) -> int:
        many = sum(count * (blocked(length, block) // block) for length, count in counts.items())
        return many * (block + _BLOCK_COST)

    return min(_BLOCKS, key=cost)


def _places(taken: tuple[int, int], lengths: Sequence[int], block: int) -> tuple[list[int], list[int]]:
    """Return the starts and slots of chunks that lie behind each other from ``taken`` on."""
    starts = list(accumulate((blocked(length, block) for length in lengths), initial=taken[0]))[: len(lengths)]
    return starts, [taken[1] + row for row in range(len(lengths))]


def _range(slots: Sequence[int]) -> Any:
    """Return what indexes ``slots``: a slice, which copies nothing, where they follow each other."""
    if not slots:
        return slice(0, 0)
    return slice(slots[0], slots[0] + len(slots)) if _consecutive(slots) else list(slots)


def _consecutive(numbers: Sequence[int]) -> bool:
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def rotation(inverse_frequencies: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (rows, rotary_dim) cosine and signed sine that move keys by ``delta`` (rows,) positions."""
    angles = delta.to(inverse_frequencies.dtype)[:, None] * inverse_frequencies
    sine = angles.sin()
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-sine, sine], dim=-1)


def rotations(frequencies: Sequence[Tensor], delta: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return :func:`rotation` of every layer; layers that share a table share the result."""
    tables = {id(table): table for table in frequencies}
    made = {key: rotation(table.to(delta.device), delta) for key, table in tables.items()}
    return [made[id(table)] for table in frequencies]


def move_keys(keys: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate keys to new positions: RoPE of a sum of positions is the product of the rotations.

    Args:
        keys: (..., rows, head_dim), rotated for their present positions.
        turn: from :func:`rotation`, one row a key; ``None`` leaves keys as they are (learned positions).

    Returns:
        Keys at their new positions, same shape and dtype.
    """
    if turn is None:
        return keys
    cos, sin = turn
    dim = cos.shape[-1]
    part = keys[..., :dim].to(cos.dtype)
    moved = torch.addcmul(part * cos, part.roll(dim // 2, -1), sin).to(keys.dtype)
    return moved if dim == keys.shape[-1] else torch.cat([moved, keys[..., dim:]], dim=-1)
