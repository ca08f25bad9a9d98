"""Run the chunk pass: each chunk alone through the frozen base, once, for its keys and values (method step 1).

It knows no question and no candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_core.config import KVFormat
from focus_core.method.attention import attend_causal
from focus_core.method.kv import ChunkKV
from focus_core.method.sources import KVShape
from focus_core.model.families import BaseDecoder

Check = Callable[[], None]
"""Called between layers; raises to cancel."""


def never() -> None:
    """Cancel nothing."""


@torch.no_grad()
def encode_chunks(
    base: BaseDecoder, rows: Sequence[Sequence[int]], check: Check = never, into: ChunkKV | None = None
) -> ChunkKV:
    """Run the chunk pass: each row attends to itself alone, at positions 0.. (method step 1).

    Args:
        base: the frozen decoder.
        rows: token ids of each chunk, its sink included; they may differ in length.
        check: called between layers, may raise to cancel.
        into: room for these rows; made if not given.

    Returns:
        Chunk KV of all layers but the last, whose KV no candidate reads.
    """
    lengths = tuple(len(row) for row in rows)
    kv = into or ChunkKV.allocate(kv_shape(base), lengths)
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.as_tensor(row)
    ids = ids.to(base.device)
    positions = torch.arange(ids.shape[1], device=base.device).expand_as(ids)

    def store_and_attend(
        layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        kv.write(layer, key, value)
        if softcap is not None:
            return attend_causal(query, key, value, scale, softcap=softcap).out.transpose(1, 2)
        groups = query.shape[1] > key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups)
        return out.transpose(1, 2)

    hidden = base.embed(ids, positions)
    rope = base.rope(hidden, positions[:1])
    with base.own_attention():
        for layer in range(base.num_layers - 1):
            check()
            hidden = base.run_layer(layer, hidden, rope, store_and_attend)
    return kv


def kv_shape(base: BaseDecoder, written: KVFormat = "base") -> KVShape:
    """Return what chunk KV of a base looks like."""
    return KVShape(base.num_layers - 1, base.num_kv_heads, base.head_dim, base.dtype, base.device, written)
