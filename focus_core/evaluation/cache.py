"""Keep chunk KV in memory between trials, so that a fixed haystack is read once and a trial adds one chunk.

It stands where a :class:`~focus_core.store.Store` stands (``in``, ``get``, ``put``) and is addressed like one, by
everything a chunk's KV depends on, so a hit is exact whatever made it. A full cache takes no more and drops nothing:
trials walk through the same haystack in the same order, which is the one order that dropping the oldest never serves.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor


class ChunkCache:
    """Chunk KV by address.

    Args:
        limit: most bytes to hold; a fourth of what is free on the chunks' device if not given.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.nbytes = 0
        self.encoded = 0
        """Chunks that had to be computed so far."""
        self._chunks: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, key: str) -> Tensor:
        """Return one chunk's (layers, 2, kv_heads, length, head_dim)."""
        return self._chunks[key]

    def put(self, key: str, chunk: Tensor) -> bool:
        """Keep a copy of one chunk's KV where there is room; return whether it was kept."""
        self.encoded += 1
        if self.limit is None:
            self.limit = _free_bytes(chunk.device) // 4
        if key in self._chunks or self.nbytes + chunk.nbytes > self.limit:
            return False
        self._chunks[key] = chunk.detach().clone(memory_format=torch.contiguous_format)
        self.nbytes += chunk.nbytes
        return True


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)
