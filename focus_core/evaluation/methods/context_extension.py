"""Stretch the base over long texts without training: full attention, NTK, YaRN, and StreamingLLM.

NTK and YaRN are transformers' own rope parameters on the same weights, for as long as one trial runs. All decode
greedily as the other baselines do; none uses candidates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import DynamicCache

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError, ContextTooLongError
from focus_core.evaluation.methods.baselines import greedy, predicted, prompt_of, stop_of, whole_text
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.trial import Prediction, Trial
from focus_core.method.kv import move_keys, rotations
from focus_core.method.layout import sink_before

Stretch = Literal["ntk", "yarn"]


def full(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Ask the base with the whole text, where its own window holds it."""
    ids = prompt_of(engine, trial, whole_text(trial))
    if len(ids) + 1 + max_tokens > engine.base.window:
        raise ContextTooLongError(
            f"the prompt has {len(ids)} tokens, but the base's window holds {engine.base.window}; leave the method out"
        )
    return predicted(engine, trial, greedy(engine, ids, max_tokens, stop=stop_of(engine, trial)), len(ids))


def ntk(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Ask with the whole text and RoPE's base raised for its length (NTK-aware)."""
    return _stretched(engine, trial, max_tokens, "ntk")


def yarn(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
    """Ask with the whole text and YaRN's frequencies for its length (Peng et al., 2023)."""
    return _stretched(engine, trial, max_tokens, "yarn")


def streaming(
    engine: FocusEngine,
    trial: Trial,
    max_tokens: int,
    cache: ChunkCache,
    *,
    sinks: int = 4,
    window: int | None = None,
    block: int | None = None,
) -> Prediction:
    """Ask behind the whole text with the first tokens and the latest ones kept (StreamingLLM, Xiao et al., 2023).

    Args:
        engine: model under test.
        trial: to answer.
        max_tokens: of the answer.
        cache: not used.
        sinks: first tokens that are always kept.
        window: tokens kept in all; the engine's window if not given.
        block: tokens read at once, before the oldest of the window go.
    """
    if not engine.base.rotary:
        raise ConfigError(f"StreamingLLM moves rotary keys, but {engine.base.model_type} has none; leave it out")
    window = window or engine.config.window
    block = block or max(1, min(512, window // 4))
    if sinks + block + max_tokens >= window:
        raise ConfigError(f"window must be above sinks + block + answer, {sinks + block + max_tokens}; got {window}")
    ids = prompt_of(engine, trial, whole_text(trial))
    ids = [*sink_before(ids, engine.sink), *ids]
    kept = DynamicCache()
    while len(ids) > block:
        _read_block(engine, kept, ids[:block])
        ids = ids[block:]
        _drop_oldest(engine, kept, sinks, window - block - max_tokens)
    made = greedy(engine, ids, max_tokens, kept, kept.get_seq_length(), stop_of(engine, trial))
    return predicted(engine, trial, made, kept.get_seq_length())


LONGER: dict[str, Any] = {"full": full, "ntk": ntk, "yarn": yarn, "streaming": streaming}


@contextmanager
def stretched_rope(engine: FocusEngine, kind: Stretch, factor: float) -> Iterator[None]:
    """Give the base rope parameters for ``factor`` times its window; its own come back in any case."""
    decoder: Any = engine.loaded.model.get_decoder()  # type: ignore[no-untyped-call]
    own = decoder.rotary_emb
    config = copy.deepcopy(own.config)
    parameters = dict(config.rope_parameters)
    if kind == "ntk":
        dim = 2 * len(own.inv_freq)
        parameters["rope_theta"] *= factor ** (dim / (dim - 2))
    else:
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": engine.base.window}
    config.rope_parameters = parameters
    config.max_position_embeddings = int(engine.base.window * factor)
    decoder.rotary_emb = type(own)(config=config).to(own.inv_freq.device)
    try:
        yield
    finally:
        decoder.rotary_emb = own


def _stretched(engine: FocusEngine, trial: Trial, max_tokens: int, kind: Stretch) -> Prediction:
    if not engine.base.rotary:
        raise ConfigError(f"{kind} changes rotary positions, but {engine.base.model_type} has none; leave it out")
    ids = prompt_of(engine, trial, whole_text(trial))
    factor = max(1.0, (len(ids) + 1 + max_tokens) / engine.base.window)
    with stretched_rope(engine, kind, factor):
        return predicted(engine, trial, greedy(engine, ids, max_tokens, stop=stop_of(engine, trial)), len(ids))


@torch.no_grad()
def _read_block(engine: FocusEngine, kept: DynamicCache, ids: Sequence[int]) -> None:
    device, used = engine.base.device, kept.get_seq_length()
    at = torch.arange(used, used + len(ids), device=device).unsqueeze(0)
    step = torch.tensor([list(ids)], device=device)
    engine.loaded.model(step, past_key_values=kept, position_ids=at, use_cache=True, logits_to_keep=1)


def _drop_oldest(engine: FocusEngine, kept: DynamicCache, sinks: int, most: int) -> None:
    """Keep the first ``sinks`` tokens and the last, ``most`` in all; what stays moves up to the sinks."""
    dropped = kept.get_seq_length() - most
    if dropped <= 0:
        return
    turns = rotations(engine.base.frequencies, torch.tensor([-dropped], device=engine.base.device))
    layers: list[Any] = kept.layers
    for layer, turn in zip(layers, turns, strict=True):
        late = move_keys(layer.keys[:, :, sinks + dropped :], turn)
        layer.keys = torch.cat([layer.keys[:, :, :sinks], late], dim=2)
        layer.values = torch.cat([layer.values[:, :, :sinks], layer.values[:, :, sinks + dropped :]], dim=2)
