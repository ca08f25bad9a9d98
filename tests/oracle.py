"""Compute FocusLLM slowly from the equations of method.md with nothing but transformers' forward.

One chunk at a time, one token at a time, no code of the engine: ordinary rows are a plain forward with a cache; the
candidate is the same forward with the candidate matrices put in the place of the base's; the local pass is a forward
whose cache begins with the candidates' keys and values. Keys are moved with complex numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache


class Oracle:
    """``model``: a decoder in float64; ``weights``: name of an nn.Linear in it -> candidate matrix."""

    def __init__(self, model, weights: dict[str, Tensor], positions: str, sink: int | None) -> None:
        self.model, self.weights, self.positions, self.sink = model, weights, positions, sink

    def logits(
        self, chunks: list[list[int]], local: list[int], given: int, mode: str, front: list[int] | None = None
    ) -> Tensor:
        """Return the logits after ``local[:given]``, then after each later token, teacher-forced.

        ``front`` stands in front of the local tokens in the local row alone; the chunks never see it.
        """
        head = [] if self.sink is None or (front or local)[0] == self.sink else [self.sink]
        head = head + (front or [])
        kept: list[tuple[Tensor, Tensor]] | None = None
        out = []
        for end in range(given, len(local) + 1):
            seen = local[:end]
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
            new = (head + seen)[before:]
            at = torch.arange(offset + before, offset + before + len(new))[None]
            result = self.model(torch.tensor([new]), position_ids=at, past_key_values=cache, use_cache=True)
            kept = [(layer.keys[:, :, len(chunks) :], layer.values[:, :, len(chunks) :]) for layer in cache.layers]
            out.append(result.logits[0, -1])
        return torch.stack(out)

    def _candidate(self, chunk: list[int], seen: list[int], index: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the candidate token of one chunk, moved in front of the local context."""
        row = ([] if self.sink is None else [self.sink]) + chunk + seen[:-1]
        cache = DynamicCache()
        self.model(
            torch.tensor([row]), position_ids=torch.arange(len(row))[None], past_key_values=cache, use_cache=True
        )
        saved = {name: self.model.get_submodule(name).weight.data for name in self.weights}
        for name, weight in self.weights.items():
            self.model.get_submodule(name).weight.data = weight
        try:
            at = torch.tensor([[len(row)]])
            self.model(torch.tensor([seen[-1:]]), position_ids=at, past_key_values=cache, use_cache=True)
        finally:
            for name, weight in saved.items():
                self.model.get_submodule(name).weight.data = weight
        target = index if self.positions == "ordered" else 0
        return [
            (self._moved(layer.keys[:, :, -1:], target - len(row)), layer.values[:, :, -1:]) for layer in cache.layers
        ]

    def _moved(self, key: Tensor, delta: int) -> Tensor:
        body = self.model.get_decoder()
        if not hasattr(body, "rotary_emb"):
            return key
        angles = body.rotary_emb.inv_freq.double() * delta
        half = len(angles)
        turned = torch.complex(key[..., :half], key[..., half : 2 * half]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([turned.real, turned.imag, key[..., 2 * half :]], dim=-1)
