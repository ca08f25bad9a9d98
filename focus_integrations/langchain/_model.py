"""Settings and memory that the text model and the chat model share.

Every field can also be given for one call, and an unknown name is refused in both places. The engine is loaded at first
use and never belongs to a model object, so models are cheap to make, copy and pickle. Nothing here generates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, Literal, Self

from langchain_core.callbacks import BaseRunManager, CallbackManager
from langchain_core.globals import get_llm_cache
from langchain_core.retrievers import BaseRetriever
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from focus_core.answers import Answer, AnswerStream
from focus_core.config import DecodeConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.session.documents import citations, fingerprint, source_dicts
from focus_core.session.engines import Held, MemoryHolder, engine_fingerprint, shared_engine
from focus_core.store.memory import Memory
from focus_core.text.corpus import canonical

PROVIDER = "focusllm"
CONFIG = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=(), extra="forbid")
"""Of every model class: an unknown parameter is an error, not ignored."""
CAPACITY = 1_000_000
"""Tokens that a prompt may have: memory has no window, so this is what a laptop's RAM holds of chunk KV."""

running: ContextVar[BaseRunManager | None] = ContextVar("focusllm_running", default=None)
"""The traced run that a call belongs to, where langchain-core does not hand it on."""

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

    def _find(self, query: str, run_manager: BaseRunManager | None) -> list[Any]:
        """Return what the retriever finds; its run is traced as a child of ``run_manager``'s."""
        if self.retriever is None:
            return []
        callbacks = _children(run_manager or running.get())
        return self.retriever.invoke(query, config={"callbacks": callbacks} if callbacks is not None else None)

    def _hold(
        self, engine: FocusEngine, extra: Sequence[Any], kwargs: Mapping[str, Any], check: Callable[[], None]
    ) -> Held:
        """Return what a call reads: documents of model and call, and the call's memory or else the model's."""
        more = self._brought(kwargs)
        memory, wanted = self._memory_of(kwargs), _filter_of(self, kwargs)
        return self.holder.hold(engine, self.documents, memory, [*more, *extra], wanted, check)

    def _brought(self, kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the documents and memories that a call brings along."""
        given = kwargs.get("documents")
        if given is None:
            return []
        several = list(given) if isinstance(given, (list, tuple)) else [given]
        memories = [item for item in several if isinstance(item, Memory)]
        if not memories:
            return list(self.holder.documents(given))
        return [*memories, *self.holder.documents([item for item in several if not isinstance(item, Memory)])]

    def _memory_of(self, kwargs: Mapping[str, Any]) -> Memory | str | None:
        for name in ("memory", "memory_path"):
            if kwargs.get(name) is not None:
                return kwargs[name]  # type: ignore[no-any-return]
        return self._own_memory()

    def _own_memory(self) -> Memory | str | None:
        if self.memory is not None and not isinstance(self.memory, Memory):
            raise ConfigError(f"memory must be made by FocusEngine.remember; got {type(self.memory).__name__}")
        return self.memory if self.memory is not None else self.memory_path

    # -- copies -------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Share weights, memory and what was read with the original."""
        memo = {} if memo is None else memo
        several = self.documents if isinstance(self.documents, (list, tuple)) else [self.documents]
        once = [item for item in several if isinstance(item, (Memory, Iterator))]
        memo.update({id(one): one for one in (self.engine, self.memory, *once) if one is not None})
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        """Refuse what no other process could find again."""
        for name, instead in (("engine", "model= and adapter="), ("memory", "memory_path=")):
            if getattr(self, name) is not None:
                raise ConfigError(f"a model with {name}= lives in one process and cannot be pickled; give {instead}")
        return super().__getstate__()


def _filter_of(corpus: FocusCorpus, kwargs: Mapping[str, Any]) -> Any:
    given = kwargs.get("memory_filter")
    return corpus.memory_filter if given is None else given


def _children(run: BaseRunManager | None) -> CallbackManager | None:
    """Return the callbacks of a run's children, for blocking calls."""
    if run is None:
        return None
    manager = CallbackManager(handlers=[], parent_run_id=run.run_id)
    manager.set_handlers(run.inheritable_handlers)
    manager.add_tags(run.inheritable_tags)
    manager.add_metadata(run.inheritable_metadata)
    return manager


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
    streaming: bool = False
    """Stream inside ``invoke``, so that callbacks hear every token."""
    max_retries: int | None = None
    """Taken for compatibility; a local model has nothing to retry."""
    api_key: SecretStr | None = None
    """Taken for compatibility; a local model needs none."""

    @model_validator(mode="before")
    @classmethod
    def _without_none(cls, values: Any) -> Any:
        """Let ``None`` mean the default, as configurations say it."""
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    # -- calls --------------------------------------------------------------------------------------------------

    def _option(self, kwargs: Mapping[str, Any], name: str) -> Any:
        """Return what a call says of an option, or the model where the call says nothing or ``None``."""
        given = kwargs.get(name)
        return getattr(self, name) if given is None else given

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
        if given.get("max_completion_tokens") is not None:
            given["max_tokens"] = given["max_completion_tokens"]
        values = {name: self._option(given, name) for name in _SAMPLING}
        ends = stop if stop is not None else self.stop
        return DecodeConfig(**values, stop=tuple([ends] if isinstance(ends, str) else ends or ()))

    def _seconds(self, kwargs: Mapping[str, Any]) -> float | None:
        """Return the time limit of a call.

        Raises:
            ConfigError: it is no positive number.
        """
        seconds = kwargs.get("timeout", self.timeout)
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise ConfigError(f"timeout must be a number of seconds above 0, or None; got {seconds!r}")
        return seconds

    # -- facts --------------------------------------------------------------------------------------------------

    def _cached(self) -> bool:
        """Whether an LLM cache is in use."""
        cached = getattr(self, "cache", None)
        return cached is not False and (cached is not None or get_llm_cache() is not None)

    def _cacheable(self) -> Self:
        """Return the model as it may be cached: what a retriever finds is known only when it was asked."""
        return self if self.retriever is None else self.model_copy(update={"cache": False})

    def _facts(self, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return everything an answer depends on, the corpus included: this makes the LLM cache's keys.

        Where no cache is in use, weights and corpus are left out: describing a model for a trace loads and reads
        nothing.
        """
        kwargs = kwargs or {}
        options = {name: self._option(kwargs, name) for name in (*_SAMPLING, "template", "citations")}
        facts = {"name": kwargs.get("model") or self.model, **options, "own_stop": self.stop}
        if not self._cached() or self.retriever is not None:
            return facts
        engine = self._get_engine(kwargs)
        wanted = _filter_of(self, kwargs)
        return {
            **facts,
            "model": engine_fingerprint(engine),
            "corpus": fingerprint(self.holder.choice(engine, self.documents, self._memory_of(kwargs), wanted)),
            "call_documents": [
                fingerprint(item.documents if isinstance(item, Memory) else [item]) for item in self._brought(kwargs)
            ],
            "call": canonical({name: value for name, value in kwargs.items() if name not in _PER_CALL}),
            "output_version": getattr(self, "output_version", None),
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
            "supported": answer.supported,
            "sources": source_dicts(answer),
            "citations": citations(answer, stream.documents, self._option(kwargs, "citations")),
            "focus": {"chunks": answer.usage.chunks, "memory_tokens": answer.usage.memory, "read_now": held.created},
        }
        if self._option(kwargs, "logprobs"):
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
