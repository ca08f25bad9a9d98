"""Answer the same trials without candidates: the controls that a result has to beat.

Each reads with transformers' own forward and greedy decoding on the same base: the end of the text (``truncated``), the
gold document alone (``gold``), nothing (``closed-book``), the best passages of a retriever (``bm25``, ``minilm``), or
every chunk's own KV without candidates (``parallel-windows``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from focus_core.engine import FocusEngine
from focus_core.errors import ContextTooLongError
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.methods.prompts import find_prompt
from focus_core.evaluation.methods.retrieval import rank_bm25, rank_minilm
from focus_core.evaluation.trial import Prediction, Trial
from focus_core.method.layout import sink_before
from focus_core.text.chunking import Chunk


@dataclass(frozen=True)
class Asked:
    """What is put to the base.

    Args:
        ids: the prompt.
        ranking: document ids, best first, where they were ranked.
    """

    ids: list[int]
    ranking: tuple[str, ...] | None = None


_SPARE = 8  # tokens of joints between passages and question


def closed_book(engine: FocusEngine, trial: Trial, max_tokens: int) -> Asked:
    """Ask the base without any document."""
    return Asked(prompt_of(engine, trial, ""))


def truncated(engine: FocusEngine, trial: Trial, max_tokens: int) -> Asked:
    """Ask the base with the last part of the text that fits the engine's window."""
    ids = engine.tokenizer.encode(whole_text(trial))
    text = engine.tokenizer.decode(ids[-_room(engine, trial, max_tokens) :])
    return Asked(prompt_of(engine, trial, text))


def gold(engine: FocusEngine, trial: Trial, max_tokens: int) -> Asked:
    """Ask the base with the gold document alone in its context."""
    if trial.gold is None:
        raise ContextTooLongError(f"trial {trial.label!r} has no single gold document; leave the method gold out")
    text = next(document.text for document in trial.documents if document.id == trial.gold)
    return Asked(prompt_of(engine, trial, text))


def bm25(
    engine: FocusEngine, trial: Trial, max_tokens: int, *, passages: int | None = None, tokens: int | None = None
) -> Asked:
    """Ask the base with the passages that BM25 ranks best; see :func:`retrieved`."""
    return retrieved(engine, trial, max_tokens, rank_bm25, passages, tokens)


def minilm(
    engine: FocusEngine, trial: Trial, max_tokens: int, *, passages: int | None = None, tokens: int | None = None
) -> Asked:
    """Ask the base with the passages that MiniLM ranks best; see :func:`retrieved`."""
    return retrieved(engine, trial, max_tokens, rank_minilm, passages, tokens)


def retrieved(
    engine: FocusEngine,
    trial: Trial,
    max_tokens: int,
    rank: Callable[[str, Sequence[str]], list[int]],
    passages: int | None,
    tokens: int | None,
) -> Asked:
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
    return Asked(prompt_of(engine, trial, text), ranking)


def parallel_windows(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Let the local rows attend to every chunk's raw KV, all at the same positions (Ratner et al., 2023).

    Every chunk is read behind a sink of its own, which stands in front of the local rows once.
    """
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
        sinks = [0 if number == 0 or engine.sink is None else 1 for number in range(len(layers))]
        keys = torch.cat([item.keys[:, :, sink:] for sink, item in zip(sinks, layers, strict=True)], dim=2)
        values = torch.cat([item.values[:, :, sink:] for sink, item in zip(sinks, layers, strict=True)], dim=2)
        joined.update(keys, values, layer)
    prompt = prompt_of(engine, trial, "")
    made = greedy(engine, prompt, max_tokens, joined, max(map(len, rows)), stop_of(engine, trial))
    return predicted(engine, trial, made, len(prompt))


ASKS: dict[str, Callable[..., Asked]] = {
    "closed-book": closed_book,
    "truncated": truncated,
    "gold": gold,
    "bm25": bm25,
    "minilm": minilm,
}
"""Baselines that put one prompt to the base: these can be decoded side by side."""


WINDOWS: dict[str, Any] = {"parallel-windows": parallel_windows}


def read_prompts(
    engine: FocusEngine, trials: Sequence[Trial], asked: Sequence[Asked], max_tokens: int
) -> list[Prediction]:
    """Answer prompts side by side."""
    stops = [stop_of(engine, trial) for trial in trials]
    made = greedy_many(engine, [prompt.ids for prompt in asked], max_tokens, stops)
    return [
        predicted(engine, trial, ids, len(prompt.ids), prompt.ranking)
        for trial, prompt, ids in zip(trials, asked, made, strict=True)
    ]


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
def greedy_many(
    engine: FocusEngine, prompts: Sequence[Sequence[int]], max_tokens: int, stops: Sequence[str | None]
) -> list[list[int]]:
    """Decode several prompts greedily side by side, shorter ones padded in front; each as :func:`greedy` would."""
    model, device = engine.loaded.model, engine.base.device
    rows = [[*sink_before(ids, engine.sink), *ids] for ids in prompts]
    longest, made = max(map(len, rows)), [list[int]() for _ in rows]
    step = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    at, cache, open_rows = (seen.cumsum(1) - 1).clamp_min(0), DynamicCache(), set(range(len(rows)))
    while True:
        logits = model(
            step, attention_mask=seen, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        tokens = logits[:, -1].argmax(-1)
        for row in list(open_rows):
            made[row].append(int(tokens[row]))
            stop = stops[row]
            stopped = stop is not None and stop in engine.tokenizer.decode(made[row][-4:])
            if made[row][-1] in engine.end_tokens or stopped or len(made[row]) >= max_tokens:
                open_rows.discard(row)
        if not open_rows:
            return made
        step, at = tokens[:, None], at[:, -1:] + 1
        seen = torch.cat([seen, torch.ones_like(step)], dim=1)


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
