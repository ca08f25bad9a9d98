"""Answer the same trials without candidates: the controls that a result has to beat.

Each reads with transformers' own forward and greedy decoding on the same base: the end of the text (``truncated``), the
gold document alone (``gold``), nothing (``closed-book``), the best passages of a retriever (``bm25``, ``minilm``), or
every chunk's own KV without candidates (``parallel-windows``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from focus_core.engine import FocusEngine
from focus_core.errors import ContextTooLongError
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.methods.prompts import find_prompt
from focus_core.evaluation.methods.retrieval import rank_bm25, rank_minilm
from focus_core.evaluation.trial import Prediction, Trial
from focus_core.text.chunking import Chunk

_SPARE = 8  # tokens of joints between passages and question


def closed_book(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Ask the base without any document."""
    return _read(engine, trial, prompt_of(engine, trial, ""), max_tokens)


def truncated(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Ask the base with the last part of the text that fits the engine's window."""
    ids = engine.tokenizer.encode(whole_text(trial))
    text = engine.tokenizer.decode(ids[-_room(engine, trial, max_tokens) :])
    return _read(engine, trial, prompt_of(engine, trial, text), max_tokens)


def gold(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Ask the base with the gold document alone in its context."""
    if trial.gold is None:
        raise ContextTooLongError(f"trial {trial.label!r} has no single gold document; leave the method gold out")
    text = next(document.text for document in trial.documents if document.id == trial.gold)
    return _read(engine, trial, prompt_of(engine, trial, text), max_tokens)


def bm25(
    engine: FocusEngine,
    trial: Trial,
    max_tokens: int,
    cache: ChunkCache,
    *,
    passages: int | None = None,
    tokens: int | None = None,
) -> Prediction:
    """Ask the base with the passages that BM25 ranks best; see :func:`retrieved`."""
    return retrieved(engine, trial, max_tokens, rank_bm25, passages, tokens)


def minilm(
    engine: FocusEngine,
    trial: Trial,
    max_tokens: int,
    cache: ChunkCache,
    *,
    passages: int | None = None,
    tokens: int | None = None,
) -> Prediction:
    """Ask the base with the passages that MiniLM ranks best; see :func:`retrieved`."""
    return retrieved(engine, trial, max_tokens, rank_minilm, passages, tokens)


def retrieved(
    engine: FocusEngine,
    trial: Trial,
    max_tokens: int,
    rank: Callable[[str, Sequence[str]], list[int]],
    passages: int | None,
    tokens: int | None,
) -> Prediction:
    """Ask the base with the best-ranked passages, the best one next to the question.

    Args:
        engine: its chunks are the passages; its window is the budget.
        trial: to answer.
        max_tokens: of the answer.
        rank: orders passages.
        passages: at most so many are read; ``None`` for as many as fit.
        tokens: at most so many tokens are read; ``None`` for what the window holds.
    """
    texts = {document.id: document.text for document in trial.documents}
    chunks = [chunk for document in trial.documents for chunk in engine.encoder.cut(document)]
    order = rank(trial.question, [texts[chunk.document_id][chunk.start : chunk.end] for chunk in chunks])
    room = _room(engine, trial, max_tokens)
    room = room if tokens is None else min(room, tokens)
    kept: list[Chunk] = []
    for index in order[:passages]:
        room -= len(chunks[index].ids) + 1
        if room < 0:
            break
        kept.insert(0, chunks[index])
    text = "\n\n".join(texts[chunk.document_id][chunk.start : chunk.end].strip() for chunk in kept)
    ranking = tuple(dict.fromkeys(chunks[index].document_id for index in order))
    return _read(engine, trial, prompt_of(engine, trial, text), max_tokens, ranking=ranking)


def parallel_windows(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Let the local rows attend to every chunk's raw KV, each chunk at positions of its own (Ratner et al., 2023)."""
    model, encoder = engine.loaded.model, engine.encoder
    rows = [encoder.row(chunk) for document in trial.documents for chunk in encoder.cut(document)]
    known: dict[tuple[int, ...], DynamicCache] = {}
    caches = []
    for row in rows:
        if tuple(row) not in known:
            known[tuple(row)] = DynamicCache()
            ids = torch.tensor([row], device=engine.base.device)
            with torch.no_grad():
                model(ids, past_key_values=known[tuple(row)], use_cache=True, logits_to_keep=1)
        caches.append(known[tuple(row)])
    joined = DynamicCache()
    for layer in range(engine.base.num_layers):
        layers: list[Any] = [item.layers[layer] for item in caches]
        keys = torch.cat([item.keys for item in layers], dim=2)
        values = torch.cat([item.values for item in layers], dim=2)
        joined.update(keys, values, layer)
    return _read(engine, trial, prompt_of(engine, trial, ""), max_tokens, joined, max(map(len, rows)))


BASELINES: dict[str, Any] = {
    "closed-book": closed_book,
    "truncated": truncated,
    "gold": gold,
    "bm25": bm25,
    "minilm": minilm,
    "parallel-windows": parallel_windows,
}


def whole_text(trial: Trial) -> str:
    """Return all documents as one text."""
    return "\n\n".join(document.text for document in trial.documents)


def prompt_of(engine: FocusEngine, trial: Trial, text: str) -> list[int]:
    """Return the base's prompt over ``text``, in the words of the trial's prompt."""
    if trial.raw:
        return engine.tokenizer.encode(f"{text}\n{trial.question}" if text else trial.question)
    return find_prompt(engine, trial.prompt, trial).ids(engine, text, trial.question)


def _room(engine: FocusEngine, trial: Trial, max_tokens: int) -> int:
    return engine.config.window - len(prompt_of(engine, trial, "")) - max_tokens - _SPARE


def _read(
    engine: FocusEngine,
    trial: Trial,
    ids: Sequence[int],
    max_tokens: int,
    cache: DynamicCache | None = None,
    position: int = 0,
    ranking: tuple[str, ...] | None = None,
) -> Prediction:
    made = greedy(engine, ids, max_tokens, cache, position, stop_of(engine, trial))
    return predicted(engine, trial, made, len(ids), ranking)


def stop_of(engine: FocusEngine, trial: Trial) -> str | None:
    """Return what ends an answer to the trial's prompt besides the end token."""
    return None if trial.raw else find_prompt(engine, trial.prompt, trial).stop


def predicted(
    engine: FocusEngine, trial: Trial, made: Sequence[int], local: int, ranking: tuple[str, ...] | None = None
) -> Prediction:
    """Return what the base said, up to its prompt's stop."""
    text, stop = engine.tokenizer.decode(list(made)), stop_of(engine, trial)
    return Prediction(text.lstrip().split(stop)[0] if stop else text, 0, local, ranking, tuple(made))


@torch.no_grad()
def greedy(
    engine: FocusEngine,
    ids: Sequence[int],
    max_tokens: int,
    cache: DynamicCache | None = None,
    position: int = 0,
    stop: str | None = None,
) -> list[int]:
    """Decode greedily behind ``cache``, whose tokens end before ``position``; ``stop`` ends it like an end token."""
    model, device = engine.loaded.model, engine.base.device
    cache = cache if cache is not None else DynamicCache()
    if engine.sink is not None and not position and ids[0] != engine.sink:
        ids = [engine.sink, *ids]
    made: list[int] = []
    step = torch.tensor([list(ids)], device=device)
    while True:
        at = torch.arange(position, position + step.shape[1], device=device).unsqueeze(0)
        logits = model(step, past_key_values=cache, position_ids=at, use_cache=True, logits_to_keep=1).logits
        position += step.shape[1]
        token = int(logits[0, -1].argmax())
        made.append(token)
        stopped = stop is not None and stop in engine.tokenizer.decode(made[-4:])
        if token in engine.end_tokens or stopped or len(made) >= max_tokens:
            return made
        step = torch.tensor([[token]], device=device)
