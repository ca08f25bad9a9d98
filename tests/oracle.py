"""Compute FocusLLM slowly from the equations of method.md with nothing but transformers' forward.

One chunk at a time, one token at a time, no code of the engine: ordinary rows are a plain forward with a cache; the
candidate is the same forward with the candidate matrices put in the place of the base's; the local pass is a forward
whose cache begins with the candidates' keys and values. Keys are moved with complex numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache


class Oracle:
    """``model``: a decoder in float64; ``weights``: name of an nn.Linear in it -> candidate matrix.

    ``reader``: the same for the matrices of local rows with chunks in front of them, which then see no candidates; the
    base's if not given.
    """

    def __init__(
        self,
        model,
        weights: dict[str, Tensor],
        positions: str,
        sink: int | None,
        reader: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.weights, self.positions, self.sink = model, weights, positions, sink
        self.reader = reader or {}

    def logits(
        self,
        chunks: list[list[int]],
        local: list[int],
        given: int,
        mode: str,
        front: list[int] | None = None,
        opening: int = 0,
    ) -> Tensor:
        """Return the logits after ``local[:given]``, then after each later token, teacher-forced.

        ``front`` stands behind the first ``opening`` local tokens in the local row alone; the chunks never see it.
        """
        front = front or []
        first = [*local[:opening], *front, *local[opening:]][0]
        head = [] if self.sink is None or first == self.sink else [self.sink]
        kept: list[tuple[Tensor, Tensor]] | None = None
        out = []
        for end in range(given, len(local) + 1):
            seen = local[:end]
            if front and self.reader:
                chunks = []
            candidates = [self._candidate(chunk, seen, index, len(chunks)) for index, chunk in enumerate(chunks)]
            offset = 0 if not chunks else (len(chunks) if self.positions == "ordered" else 1)
            cache, before = DynamicCache(), 0
            for layer in range(self.model.config.num_hidden_layers):
                parts = [candidate[layer] for candidate in candidates]
                if mode == "incremental" and kept is not None:
                    parts.append(kept[layer])
                    before = kept[layer][0].shape[2]
                if parts:
                    cache.update(
                        torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2), layer
                    )
            new = [*head, *seen[:opening], *front, *seen[opening:]][before:]
            at = torch.arange(offset + before, offset + before + len(new))[None]
            with self._matrices(self.reader if front else {}):
                result = self.model(torch.tensor([new]), position_ids=at, past_key_values=cache, use_cache=True)
            kept = [(layer.keys[:, :, len(chunks) :], layer.values[:, :, len(chunks) :]) for layer in cache.layers]
            out.append(result.logits[0, -1])
        return torch.stack(out)

    def moved_logits(self, chunks: list[list[int]], whole: list[list[int]], local: list[int]) -> Tensor:
        """Return the logits after ``local`` behind all candidates and the KV of ``whole`` chunks, computed alone and
        turned, once.

        The sink is the one of the pass without whole chunks. The last layer has no KV of them. Layers are run one by
        one, so that its mask and cache may differ.
        """
        before = [self._candidate(chunk, local, 0, 0) for chunk in chunks]
        first, last, fronts = self._behind(before, [self.sink, *local]), self.model.config.num_hidden_layers - 1, []
        for layer in range(last + 1):
            keys, values = ([part[:, :, len(chunks) : len(chunks) + 1]] for part in first[layer])
            at = 2
            for chunk in whole if layer < last else []:
                cache = DynamicCache()
                self.model(torch.tensor([[self.sink, *chunk]]), past_key_values=cache, use_cache=True)
                keys.append(self._moved(layer, cache.layers[layer].keys[:, :, 1:], at - 1))
                values.append(cache.layers[layer].values[:, :, 1:])
                at += len(chunk)
            fronts.append((torch.cat(keys, 2), torch.cat(values, 2)))
        place = 2 + sum(map(len, whole))
        seen = self._states(before, [*fronts[:-1], fronts[-2]], local, place)[last]  # what enters the last layer
        body = self.model.get_decoder()
        hook = body.layers[last].register_forward_pre_hook(
            lambda module, arguments, keywords: ((seen, *arguments[1:]), keywords), with_kwargs=True
        )
        try:  # every cache as short as the last layer's, whose mask is then right; the layers before do not count
            return self._states(before, [fronts[-1]] * (last + 1), local, place)[-1][0, -1]
        finally:
            hook.remove()

    def _states(self, before, fronts, local: list[int], place: int) -> list[Tensor]:
        """What enters each layer, then the logits, of a pass behind candidates and what stands in front."""
        cache = DynamicCache()
        for layer, front in enumerate(fronts):
            keys = torch.cat([*(item[layer][0] for item in before), front[0]], 2)
            cache.update(keys, torch.cat([*(item[layer][1] for item in before), front[1]], 2), layer)
        at = torch.arange(place, place + len(local))[None]
        result = self.model(
            torch.tensor([local]), position_ids=at, past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        return [*result.hidden_states[: len(fronts)], result.logits]

    def _behind(self, candidates: list[list[tuple[Tensor, Tensor]]], row: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all layers, those of the candidates in front, after a pass of ``row`` behind them."""
        cache = DynamicCache()
        for layer in range(self.model.config.num_hidden_layers):
            parts = [candidate[layer] for candidate in candidates]
            cache.update(torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2), layer)
        at = torch.arange(1, 1 + len(row))[None]
        self.model(torch.tensor([row]), position_ids=at, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _candidate(self, chunk: list[int], seen: list[int], index: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the candidate token of one chunk, moved in front of the local context."""
        row = ([] if self.sink is None else [self.sink]) + chunk + seen[:-1]
        cache = DynamicCache()
        self.model(
            torch.tensor([row]), position_ids=torch.arange(len(row))[None], past_key_values=cache, use_cache=True
        )
        with self._matrices(self.weights):
            at = torch.tensor([[len(row)]])
            self.model(torch.tensor([seen[-1:]]), position_ids=at, past_key_values=cache, use_cache=True)
        target = index if self.positions == "ordered" else 0
        return [
            (self._moved(number, layer.keys[:, :, -1:], target - len(row)), layer.values[:, :, -1:])
            for number, layer in enumerate(cache.layers)
        ]

    @contextmanager
    def _matrices(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Put matrices in the place of the base's."""
        saved = {name: self.model.get_submodule(name).weight.data for name in weights}
        for name, weight in weights.items():
            self.model.get_submodule(name).weight.data = weight
        try:
            yield
        finally:
            for name, weight in saved.items():
                self.model.get_submodule(name).weight.data = weight

    def _moved(self, layer: int, key: Tensor, delta: int) -> Tensor:
        body, config = self.model.get_decoder(), self.model.config
        if not hasattr(body, "rotary_emb") or getattr(config, "no_rope_layers", {layer: 1})[layer] == 0:
            return key
        own = f"{config.layer_types[layer]}_inv_freq" if getattr(config, "layer_types", None) else ""
        angles = getattr(body.rotary_emb, own if hasattr(body.rotary_emb, own) else "inv_freq").double() * delta
        half = len(angles)
        turned = torch.complex(key[..., :half], key[..., half : 2 * half]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([turned.real, turned.imag, key[..., 2 * half :]], dim=-1)
