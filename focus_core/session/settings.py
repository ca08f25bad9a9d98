"""Declare the settings that models of every framework share: which model reads what, and how it answers.

A framework's model inherits them beside the framework's own class; the descriptions are the field's docstrings. Needs
pydantic, which every framework brings. No framework is imported here, and nothing is loaded.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field


class CorpusSettings(BaseModel):
    """Which model reads what."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    model: str | None = Field(
        default_factory=lambda: os.environ.get("FOCUSLLM_MODEL"), validation_alias=AliasChoices("model", "model_name")
    )
    """Base model: a name of `focusllm bases`, hub name, folder or GGUF file; the installed default if not given."""
    adapter: str | None = Field(default_factory=lambda: os.environ.get("FOCUSLLM_ADAPTER"))
    """Adapter folder or hub name; the shipped one if not given."""
    documents: Any = None
    """What every call reads: a path, texts, the framework's documents, or several of them."""
    memory_path: str | None = None
    """Folder or name of a saved memory that every call reads."""
    chunk_size: int | None = None
    """Most tokens of a chunk; the adapter's if not given."""
    device: str | None = None
    """``cpu``, ``cuda`` or ``mps``; chosen if not given."""
    dtype: str | None = None
    """``float32``, ``bfloat16`` or ``float16``; chosen if not given."""


class AnswerSettings(CorpusSettings):
    """How a model answers; every field can be given for one call too."""

    template: Literal["chat", "question", "raw"] = "chat"
    """``chat`` puts prompts as a user turn, ``question`` as the adapter was trained (briefly), ``raw`` as text."""
    max_tokens: int = Field(default=128, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: from the likeliest tokens that make up this probability."""
    top_k: int = 0
    """Sample from the k likeliest; 0 from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens that were there before."""
    seed: int | None = None
    """Makes sampling reproducible."""
    stop: Annotated[list[str] | None, BeforeValidator(lambda given: [given] if isinstance(given, str) else given)] = (
        Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    )
    """Strings that end an answer."""
    logprobs: int = 0
    """Alternatives to report per token; 0 reports no log-probabilities."""
    chunk_top_p: float | None = None
    """Answers are read from the chunks that got this share of the attention; 1 for all, the adapter's if not given."""
    reread: int | None = None
    """Chunks with most attention that are read whole; 0 for none, the adapter's if not given."""
    reread_tokens: int = 2048
    """Most tokens of the chunks that are read whole."""
    reread_way: Literal["run", "moved"] = "run"
    """How they are read: run in front of the question, or their chunk KV moved there."""
    chunks_per_batch: int | None = None
    """Chunks run together in a step; chosen from free memory if not given."""
    timeout: float | None = Field(default=None, gt=0)
    """Most seconds that a caller waits, for whatever; then the call is stopped and raises ``TimeoutError``."""
