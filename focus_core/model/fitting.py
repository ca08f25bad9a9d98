"""Fit settings to a base: the window that its layers see, the sink that it knows, and what its family cannot do."""

from __future__ import annotations

from dataclasses import replace

from focus_core.config import FocusConfig
from focus_core.errors import UnsupportedModelError
from focus_core.model.families import BaseDecoder
from focus_core.model.hub import LoadedBase


def fitted(config: FocusConfig, base: BaseDecoder) -> FocusConfig:
    """Shrink the window to what the base's every layer sees and refuse what the family cannot do.

    A window that has no room for a chunk row is left for :class:`ChunkEncoder` to refuse, with what would fit.
    """
    if not base.rotary and config.positions == "shared":
        raise UnsupportedModelError(
            f"{base.model_type} adds learned positions to its embeddings, so candidate keys cannot be moved to one "
            "shared position; use positions='ordered'"
        )
    sliding = base.sliding_window
    if sliding is not None and config.window - config.largest_chunk + config.chunk_size <= sliding < config.window:
        return fitted(replace(config, window=sliding), base)
    if base.window >= config.window:
        return config
    prompt = min(config.prompt_length, max(1, base.window // 4))
    room = base.window - prompt - int(config.sink) - 1
    return replace(config, window=base.window, prompt_length=prompt, chunk_size=min(config.chunk_size, room))


def sink_of(loaded: LoadedBase) -> int:
    """Return the token that starts every row: BOS, or the end token for bases without one."""
    config = loaded.model.config
    for token in (
        loaded.tokenizer.bos_token_id,
        config.bos_token_id,
        loaded.tokenizer.eos_token_id,
        config.eos_token_id,
    ):
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    raise UnsupportedModelError(
        "this base has neither a BOS nor an EOS token to use as sink; use a config with sink=False"
    )
