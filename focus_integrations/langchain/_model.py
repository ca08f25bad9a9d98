"""Settings and memory that the text model and the chat model share.

Every field can also be given for one call, and an unknown name is refused in both places. The engine is loaded at first
use and never belongs to a model object, so models are cheap to make, copy and pickle. Nothing here generates.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from langchain_core.globals import get_llm_cache
from langchain_core.retrievers import BaseRetriever
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SecretStr

from focus_core.answers import Answer, AnswerStream
from focus_core.config import DecodeConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.session.documents import citations, source_dicts, to_documents, written
from focus_core.session.engines import Held, MemoryHolder, engine_fingerprint, shared_engine
from focus_core.store.memory import Memory

PROVIDER = "focusllm"
CONFIG = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=(), extra="forbid")
"""Of every model class: an unknown parameter is an error, not ignored."""
CAPACITY = 1_000_000
"""Tokens that a prompt may have: memory has no window, so this is what a laptop's RAM holds of chunk KV."""

_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "logprobs",
    "reread",
    "reread_tokens",
    "reread_way",
    "chunk_top_p",
    "chunks_per_batch",
)
_PER_CALL = (
    *_SAMPLING,
    "model",
    "documents",
    "memory",
    "memory_path",
    "memory_filter",
    "template",
    "citations",
    "timeout",
)


class FocusCorpus(BaseModel):
    """Fields that say which model reads what."""

    model_config = CONFIG

    model: str | None = Field(
        default_factory=lambda: os.environ.get("FOCUSLLM_MODEL"), validation_alias=AliasChoices("model", "model_name")
    )
    """Base model: a name of `focusllm bases`, hub name, folder or GGUF file; the installed default if not given."""
    adapter: str | None = Field(default_factory=lambda: os.environ.get("FOCUSLLM_ADAPTER"))
    """Adapter folder or hub name; the shipped one if not given."""
    documents: Any = None
    """What every call reads: a path, texts, LangChain documents, or several of them."""
    memory: Any = Field(default=None, exclude=True, repr=False)
    """A core ``Memory`` that every call reads; what is added to it later is read too."""
    memory_path: str | None = None
    """Folder of a saved memory that every call reads."""
    memory_filter: Any = None
    """Part of the memory to read: ids, metadata that must be equal, or a function of a core ``Document``."""
    retriever: BaseRetriever | None = None
    """Finds documents for the prompt (the last message), which are read besides."""
    chunk_size: int | None = None
    """Most tokens of a chunk; the adapter's if not given."""
    device: str | None = None
    """``cpu`` or ``cuda``; chosen if not given."""
    dtype: str | None = None
    """``float32``, ``bfloat16`` or ``float16``; chosen if not given."""
    engine: FocusEngine | None = Field(default=None, exclude=True, repr=False)
    """A loaded engine to use instead of the process's."""
    holder: MemoryHolder = Field(default_factory=MemoryHolder, exclude=True, repr=False)
    """Shared by copies of the model, so that they read documents once."""

    # -- engine and memory --------------------------------------------------------------------------------------

    def _get_engine(self, kwargs: Mapping[str, Any] | None = None) -> FocusEngine:
        other = (kwargs or {}).get("model")
        if self.engine is not None and other in (None, self.engine.loaded.name):
            return self.engine
        name = other if other not in (None, self.model) else self.model
        return shared_engine(name, self.adapter, self.chunk_size, self.device, self.dtype)

    def _hold(
        self, engine: FocusEngine, query: str, extra: list[Any], kwargs: Mapping[str, Any], check: Callable[[], None]
    ) -> Held:
        """Return what a call reads: documents of model and call, and the call's memory or else the model's."""
        given = kwargs.get("memory", kwargs.get("memory_path"))
        found = written(self.retriever.invoke(query)) if self.retriever is not None else []
        more = [*to_documents(kwargs["documents"]), *extra] if kwargs.get("documents") is not None else extra
        return self.holder.hold(
            engine,
            self.documents,
            given if given is not None else self._own_memory(),
            [*found, *more],
            kwargs.get("memory_filter", self.memory_filter),
            check,
        )

    def _own_memory(self) -> Memory | str | None:
        if self.memory is not None and not isinstance(self.memory, Memory):
            raise ConfigError(f"memory must be made by FocusEngine.remember; got {type(self.memory).__name__}")
        return self.memory if self.memory is not None else self.memory_path


class FocusModel(FocusCorpus):
    """Fields of :class:`FocusLLM` and :class:`ChatFocusLLM`; each is described in docs/langchain.md."""

    template: Literal["chat", "question", "raw"] = "chat"
    """``chat`` puts prompts as a user turn, ``question`` as the adapter was trained (briefly), ``raw`` as text."""
    citations: int = Field(default=3, ge=0)
    """Most citations of an answer."""
    max_tokens: int = Field(default=128, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling."""
    top_k: int = 0
    """Sample from the k likeliest; 0 from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens that were there before."""
    seed: int | None = None
    """Makes sampling reproducible."""
    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
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
    timeout: float | None = None
    """Most seconds of a call; then it is stopped and raises ``TimeoutError``."""
    streaming: bool = False
    """Stream inside ``invoke``, so that callbacks hear every token."""
    max_retries: int | None = None
    """Taken for compatibility; a local model has nothing to retry."""
    api_key: SecretStr | None = None
    """Taken for compatibility; a local model needs none."""

    # -- calls --------------------------------------------------------------------------------------------------

    def _decode(self, stop: list[str] | None, kwargs: Mapping[str, Any], known: tuple[str, ...] = ()) -> DecodeConfig:
        """Return the sampling options of a call.

        Raises:
            ConfigError: the call has an option that is not known, or one out of its bounds.
        """
        allowed = {*_PER_CALL, *known, "max_completion_tokens"}
        unknown = sorted(name for name in kwargs if name not in allowed and not name.startswith("ls_"))
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; a call takes {', '.join(sorted(allowed))}")
        given = dict(kwargs)
        if "max_completion_tokens" in given:
            given["max_tokens"] = given["max_completion_tokens"]
        values = {name: given.get(name, getattr(self, name)) for name in _SAMPLING}
        ends = stop if stop is not None else self.stop
        return DecodeConfig(**values, stop=tuple([ends] if isinstance(ends, str) else ends or ()))

    @contextmanager
    def _limited(self, stream: AnswerStream, kwargs: Mapping[str, Any]) -> Iterator[AnswerStream]:
        """Stop the stream when the block is left or the time is over."""
        seconds = kwargs.get("timeout", self.timeout)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            stream.cancel()

        timer = threading.Timer(seconds, expire) if seconds is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            with stream:
                yield stream
        finally:
            if timer is not None:
                timer.cancel()
        if expired.is_set() and stream.answer.finish_reason == "cancelled":
            raise TimeoutError(f"the answer took more than {seconds} seconds; raise timeout or lower max_tokens")

    # -- facts --------------------------------------------------------------------------------------------------

    def _facts(self, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return everything an answer depends on, the corpus included: this makes the LLM cache's keys.

        Weights are named by their hash when they are loaded or a cache is in use, else by name: describing a model for
        a trace loads nothing.
        """
        kwargs = kwargs or {}
        cached = getattr(self, "cache", None)
        in_use = cached is not False and (bool(cached) or get_llm_cache() is not None)
        if self.engine is not None or in_use:
            model = engine_fingerprint(self._get_engine(kwargs))
        else:
            model = f"{kwargs.get('model') or self.model}-{self.adapter}-{self.dtype}-{self.chunk_size}-{self.device}"
        given = kwargs.get("memory", kwargs.get("memory_path"))
        own = given if given is not None else self._own_memory()
        wanted = kwargs.get("memory_filter", self.memory_filter)
        return {
            "model": model,
            "memory": self.holder.fingerprint(self.documents, own),
            "memory_filter": repr(wanted),
            "call_documents": self.holder.fingerprint(kwargs.get("documents")),
            "retriever": repr(self.retriever),
            **{name: kwargs.get(name, getattr(self, name)) for name in (*_SAMPLING, "template", "citations")},
            "stop": self.stop,
        }

    def _name(self, engine: FocusEngine, kwargs: Mapping[str, Any]) -> str:
        return str(kwargs.get("model") or self.model or engine.loaded.name)

    def _info(
        self, engine: FocusEngine, answer: Answer, stream: AnswerStream, held: Held, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what chains may want to know of an answer: why it ended, sources with exact spans, probabilities."""
        info: dict[str, Any] = {
            "model_name": self._name(engine, kwargs),
            "finish_reason": answer.finish_reason,
            "sources": source_dicts(answer),
            "citations": citations(answer, stream.documents, kwargs.get("citations", self.citations)),
            "focus": {"chunks": answer.usage.chunks, "memory_tokens": answer.usage.memory, "read_now": held.created},
        }
        if kwargs.get("logprobs", self.logprobs):
            info["logprobs"] = {"content": [_logprob(engine, token) for token in answer.tokens]}
        return info


def usage_of(answer: Answer, held: Held) -> dict[str, Any]:
    """Return LangChain's usage metadata; memory tokens were served from kept chunk KV or computed for this call."""
    created = min(held.created, answer.usage.memory)
    read, written = answer.usage.local + answer.usage.memory, answer.usage.generated
    return {
        "input_tokens": read,
        "output_tokens": written,
        "total_tokens": read + written,
        "input_token_details": {"cache_read": answer.usage.memory - created, "cache_creation": created},
    }


def _logprob(engine: FocusEngine, token: Any) -> dict[str, Any]:
    text = engine.tokenizer.decode
    top = [{"token": text([other]), "logprob": logprob} for other, logprob in token.top]
    return {"token": text([token.id]), "logprob": token.logprob, "top_logprobs": top}
