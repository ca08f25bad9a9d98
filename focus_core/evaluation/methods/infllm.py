"""Read a long text with block memory and no training, after InfLLM (Xiao et al., 2024).

The text runs through the base in pieces. What has left the local window is kept in blocks, each with a few
representative keys; a piece attends to the first tokens, to the blocks whose representatives match its queries best,
and to the local window. Everything outside stands at one distance from every query. It is a baseline: its KV
stays on the device, and it trains and caches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.evaluation.methods.baselines import predicted, prompt_of, whole_text
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.trial import Prediction, Trial
from focus_core.method.attention import attend, causal_bias, merge
from focus_core.method.kv import move_keys, rotation
from focus_core.method.layout import sink_before
from focus_core.model.families import BaseDecoder


def block_memory(
    engine: FocusEngine,
    trial: Trial,
    max_tokens: int,
    cache: ChunkCache,
    *,
    window: int | None = None,
    blocks: int = 8,
    block: int | None = None,
    representatives: int = 4,
    first: int | None = None,
) -> Prediction:
    """Ask behind the whole text, read with block memory.

    Args:
        engine: its base reads.
        trial: to answer.
        max_tokens: of the answer.
        cache: not used.
        window: local tokens; by default what the engine's window leaves beside the blocks and a piece.
        blocks: looked up for every piece, in every layer.
        block: tokens of a block; by default 1/32 of the engine's window.
        representatives: keys that stand for a block.
        first: first tokens of the text that are always seen; by default 1/64 of the engine's window.

    Raises:
        ConfigError: the base has no rotary positions, or the window has no room.
    """
    if not engine.base.rotary:
        raise ConfigError(f"block memory moves rotary keys, but {engine.base.model_type} has none; leave it out")
    block = block if block is not None else max(representatives, engine.config.window // 32)
    first = first if first is not None else max(1, engine.config.window // 64)
    piece = 4 * block
    window = window if window is not None else engine.config.window - first - blocks * block - piece
    if window < piece or representatives > block:
        raise ConfigError(
            f"block memory needs a window of at least {piece} tokens and at most {block} representatives; got {window} "
            f"and {representatives}"
        )
    ids = prompt_of(engine, trial, whole_text(trial))
    ids = [*sink_before(ids, engine.sink), *ids]
    reader = _Reader(engine.base, len(ids) + max_tokens, window, blocks, block, representatives, first)
    made = reader.answer(ids, piece, max_tokens, engine.end_tokens)
    return predicted(engine, trial, made, first + blocks * block + window)


BLOCKS: dict[str, Any] = {"blocks": block_memory}


class _Reader:
    """Keys and values of one text, unrotated, and the pass that reads them."""

    def __init__(
        self, base: BaseDecoder, capacity: int, window: int, blocks: int, block: int, representatives: int, first: int
    ) -> None:
        self.base, self.window, self.blocks, self.block = base, window, blocks, block
        self.representatives, self.first = representatives, first
        shape = (base.num_layers, 2, 1, base.num_kv_heads, capacity, base.head_dim)
        self.kv = torch.empty(shape, dtype=base.dtype, device=base.device)
        self.known: list[list[Tensor]] = [[] for _ in range(base.num_layers)]  # (kv_heads, representatives, head_dim)
        self.used = 0

    def answer(self, ids: Sequence[int], piece: int, max_tokens: int, end_tokens: frozenset[int]) -> list[int]:
        """Read ``ids`` piece by piece, then decode greedily."""
        made: list[int] = []
        waiting = list(ids)
        while True:
            logits = self.read(waiting[:piece])
            waiting = waiting[piece:]
            if waiting:
                continue
            token = int(logits.argmax())
            made.append(token)
            if token in end_tokens or len(made) == max_tokens:
                return made
            waiting = [token]

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Read the next tokens and return the (vocabulary,) logits behind the last."""
        base, rows = self.base, len(ids)
        tokens = torch.tensor([list(ids)], device=base.device)
        hidden = base.embed(tokens, torch.arange(rows, device=base.device).unsqueeze(0))
        rope = base.rope(hidden, torch.zeros(1, rows, dtype=torch.long, device=base.device))  # turned in _attend
        past = max(0, self.used - self.window - self.first) // self.block
        with base.own_attention():
            for layer in range(base.num_layers):
                hidden = base.run_layer(layer, hidden, rope, partial(self._attend, past))
        self.used += rows
        return base.logits(hidden[:, -1:])[0, 0]

    def _attend(
        self, past: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        rows, stop = query.shape[2], self.used + query.shape[2]
        self.kv[layer, 0, :, :, self.used : stop], self.kv[layer, 1, :, :, self.used : stop] = key, value
        self._represent(past, layer, query)
        start = self.first + past * self.block if past else 0
        keys = move_keys(self.kv[layer, 0, :, :, start:stop], self._turn(layer, start, stop))
        bias = causal_bias(rows, stop - start, query.device)
        parts = [
            attend(
                move_keys(query, self._turn(layer, self.used, stop)),
                keys,
                self.kv[layer, 1, :, :, start:stop],
                scale,
                softcap=softcap,
                bias=bias,
            )
        ]
        if past:
            places = self._look_up(layer, query)
            far = move_keys(query, self._turn(layer, self.window, self.window + 1))
            parts.append(
                attend(far, self.kv[layer, 0][:, :, places], self.kv[layer, 1][:, :, places], scale, softcap=softcap)
            )
        return merge(parts).out.transpose(1, 2)

    def _represent(self, past: int, layer: int, query: Tensor) -> None:
        """Choose representatives of the blocks that have just left the window: the keys that queries match best."""
        mean = _by_kv_head(query, self.base.num_kv_heads)
        for number in range(len(self.known[layer]), past):
            start = self.first + number * self.block
            keys = self.kv[layer, 0, 0, :, start : start + self.block]  # (kv_heads, block, head_dim)
            scores = (keys.float() @ mean.unsqueeze(-1)).squeeze(-1).sum(0)
            self.known[layer].append(keys[:, scores.topk(self.representatives).indices])

    def _look_up(self, layer: int, query: Tensor) -> Tensor:
        """Return the places of the first tokens and of the best blocks' tokens."""
        known = torch.stack(self.known[layer]).float()  # (past, kv_heads, representatives, head_dim)
        scores = torch.einsum("phrd,hd->p", known, _by_kv_head(query, self.base.num_kv_heads))
        best = scores.topk(min(self.blocks, len(known))).indices.sort().values
        within = torch.arange(self.block, device=best.device)
        places = (self.first + best[:, None] * self.block + within).flatten()
        return torch.cat([torch.arange(self.first, device=best.device), places])

    def _turn(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        device = self.base.device
        return rotation(self.base.frequencies[layer].to(device), torch.arange(start, stop, device=device))


def _by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """(1, heads, rows, head_dim) -> (kv_heads, head_dim): mean over rows and the heads that share keys."""
    return query[0].float().mean(1).reshape(kv_heads, -1, query.shape[3]).mean(1)
