"""Answer the same trials without candidates: the controls that a result has to beat.

``truncated`` gives the base the end of the text that fits its window; ``gold`` gives it the gold document alone;
``parallel_windows`` lets the local rows attend to every chunk's own KV (no candidates). All use transformers' own
forward and greedy decoding on the same base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from focus_core.engine import FocusEngine
from focus_core.evaluation.tasks import Trial
from focus_core.training.data import SHORT_ANSWER

Baseline = Callable[[FocusEngine, Trial, int], str]


def closed_book(engine: FocusEngine, trial: Trial, max_tokens: int) -> str:
    """Ask the base without any document."""
    return _greedy(engine, _prompt(engine, trial, ""), max_tokens)


def truncated(engine: FocusEngine, trial: Trial, max_tokens: int) -> str:
    """Ask the base with the last part of the text that fits its window."""
    text = "\n\n".join(document.text for document in trial.documents)
    ids = engine.tokenizer.encode(text)
    room = engine.config.window - len(_prompt(engine, trial, "")) - max_tokens - 8
    return _greedy(engine, _prompt(engine, trial, engine.tokenizer.decode(ids[-room:])), max_tokens)


def gold(engine: FocusEngine, trial: Trial, max_tokens: int) -> str:
    """Ask the base with the gold document alone in its context."""
    text = next(document.text for document in trial.documents if document.id == trial.gold)
    return _greedy(engine, _prompt(engine, trial, text), max_tokens)


def parallel_windows(engine: FocusEngine, trial: Trial, max_tokens: int) -> str:
    """Let the local rows attend to every chunk's raw KV, each chunk at positions of its own (Ratner et al., 2023)."""
    model, encoder = engine.loaded.model, engine.encoder
    rows = [encoder.row(chunk) for document in trial.documents for chunk in encoder.cut(document)]
    known: dict[tuple[int, ...], DynamicCache] = {}
    caches = []
    for row in rows:
        if tuple(row) not in known:
            known[tuple(row)] = DynamicCache()
            ids = torch.tensor([row], device=engine.base.device)
            model(ids, past_key_values=known[tuple(row)], use_cache=True, logits_to_keep=1)
        caches.append(known[tuple(row)])
    joined = DynamicCache()
    for layer in range(engine.base.num_layers):
        layers: list[Any] = [cache.layers[layer] for cache in caches]
        keys = torch.cat([item.keys for item in layers], dim=2)
        values = torch.cat([item.values for item in layers], dim=2)
        joined.update(keys, values, layer)
    return _greedy(engine, _prompt(engine, trial, ""), max_tokens, joined, max(map(len, rows)))


BASELINES: dict[str, Baseline] = {
    "closed-book": closed_book,
    "truncated": truncated,
    "gold": gold,
    "parallel-windows": parallel_windows,
}


def _prompt(engine: FocusEngine, trial: Trial, text: str) -> list[int]:
    if trial.raw:
        return engine.tokenizer.encode(f"{text}\n{trial.question}" if text else trial.question)
    question = f"{trial.question}\n{SHORT_ANSWER}"
    return engine.tokenizer.chat(f"{text}\n\n{question}" if text else question)


@torch.no_grad()
def _greedy(
    engine: FocusEngine, ids: Sequence[int], max_tokens: int, cache: DynamicCache | None = None, position: int = 0
) -> str:
    model, device = engine.loaded.model, engine.base.device
    cache = cache if cache is not None else DynamicCache()
    if engine.sink is not None and not position and ids[0] != engine.sink:
        ids = [engine.sink, *ids]
    step, made = torch.tensor([list(ids)], device=device), []
    while True:
        at = torch.arange(position, position + step.shape[1], device=device).unsqueeze(0)
        logits = model(step, past_key_values=cache, position_ids=at, use_cache=True, logits_to_keep=1).logits
        position += step.shape[1]
        token = int(logits[0, -1].argmax())
        made.append(token)
        if token in engine.end_tokens or len(made) >= max_tokens:
            return engine.tokenizer.decode(made)
        step = torch.tensor([[token]], device=device)
