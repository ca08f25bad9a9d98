"""Settings and memory that the text model and the chat model share.

Every field can also be given for one call, and an unknown name is refused in both places. The engine is loaded at first
use and never belongs to a model object, so models are cheap to make, copy and pickle. Nothing here generates.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Self

from langchain_core.callbacks import BaseRunManager, CallbackManager
from langchain_core.globals import get_llm_cache
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, SecretStr, model_validator

from focus_core.config import DecodeConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.generation import check_cancelled
from focus_core.session import concurrency
from focus_core.session.arguments import refuse_unknown, taken
from focus_core.session.citations import STANDARD_CITATIONS, Citation
from focus_core.session.documents import fingerprint, source_dicts
from focus_core.session.engines import Held, MemoryHolder, Moment, engine_fingerprint, shared_engine
from focus_core.session.request import SAMPLING, Call, Request, begin, decode_of, seconds_of
from focus_core.session.settings import AnswerSettings, CorpusSettings
from focus_core.store.memory import Memory
from focus_core.text.corpus import canonical

PROVIDER = "focusllm"
CONFIG = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=(), extra="forbid")
"""Of every model class: an unknown parameter is an error, not ignored."""


@dataclass(frozen=True)
class Asked:
    """What is asked, and by whom: a prompt or messages, and the arguments of the call."""

    what: Any
    stop: list[str] | None
    kwargs: dict[str, Any]
    run_manager: Any
    cancelled: threading.Event = field(default_factory=threading.Event)


running: ContextVar[BaseRunManager | None] = ContextVar("focusllm_running", default=None)
"""The traced run that a call belongs to, where langchain-core does not hand it on."""

_PER_CALL = (
    *SAMPLING,
    "max_completion_tokens",
    "model",
    "documents",
    "memory",
    "memory_path",
    "memory_filter",
    "template",
    "citations",
    "timeout",
)


class FocusCorpus(CorpusSettings):
    """Fields that say which model reads what, besides those of :class:`~focus_core.session.settings.CorpusSettings`."""

    model_config = CONFIG

    memory: Any = Field(default=None, exclude=True, repr=False)
    """What every call reads: a core ``Memory`` (what is added to it later is read too), or the name or folder of a
    saved one."""
    memory_filter: Any = None
    """Part of the memory to read: ids, metadata that must be equal, or a function of a core ``Document``."""
    retriever: BaseRetriever | None = None
    """Finds documents for the prompt (the last message), which are read besides."""
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

    def _memory_of(self, kwargs: Mapping[str, Any]) -> Any:
        for name in ("memory", "memory_path"):
            if kwargs.get(name) is not None:
                return kwargs[name]
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
        if self.engine is not None:
            raise ConfigError(
                "a model with engine= lives in one process and cannot be pickled; give model= and adapter="
            )
        if isinstance(self.memory, Memory):
            raise ConfigError(
                "a model with a Memory as memory= lives in one process and cannot be pickled; give the name or folder "
                "of a saved one (memory_path=)"
            )
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


class FocusModel(FocusCorpus, AnswerSettings):
    """Fields of :class:`FocusLLM` and :class:`ChatFocusLLM`; each is described in docs/langchain.md."""

    citations: int = Field(default=STANDARD_CITATIONS, ge=0)
    """Most citations of an answer."""
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
        given = {name: value for name, value in kwargs.items() if not name.startswith("ls_")}
        refuse_unknown(given, (*_PER_CALL, *known), "option")
        if given.get("max_completion_tokens") is not None:
            given["max_tokens"] = given["max_completion_tokens"]
        return decode_of({**given, "stop": stop}, self)

    def _begin(self, asked: Asked, request: Request) -> Call:
        """Start a request: what does not fit the window, and attached documents, become memory."""
        engine, run = self._get_engine(asked.kwargs), asked.run_manager

        def hold(question: str, documents: list[Any]) -> Held:
            extra = [*self._find(question, run), *documents]
            return self._hold(engine, extra, asked.kwargs, lambda: check_cancelled(asked.cancelled))

        return begin(engine, request, hold, asked.cancelled)

    def _streamed(self, asked: Asked, chunks: Callable[[Asked], Iterator[Any]]) -> Iterator[Any]:
        """Yield the chunks of an answer within its time, and tell callbacks of each."""
        seconds = seconds_of(asked.kwargs, self.timeout)
        pieces = concurrency.iterate_within(lambda event: chunks(replace(asked, cancelled=event)), seconds)
        yield from heard(pieces, asked.run_manager)

    async def _astreamed(self, asked: Asked, chunks: Callable[[Asked], Iterator[Any]]) -> AsyncIterator[Any]:
        """Like :meth:`_streamed`, beside the event loop."""
        seconds = seconds_of(asked.kwargs, self.timeout)
        async for chunk in concurrency.iterate(lambda event: chunks(replace(asked, cancelled=event)), seconds):
            if asked.run_manager:
                await asked.run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def get_num_tokens(self, text: str) -> int:
        """Count tokens with the model's own tokenizer."""
        return self._get_engine().count_tokens(text)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own token ids."""
        return self._get_engine().tokenizer.encode(text)

    # -- facts --------------------------------------------------------------------------------------------------

    def _cached(self) -> bool:
        """Whether an LLM cache is in use."""
        cached = getattr(self, "cache", None)
        return cached is not False and (cached is not None or get_llm_cache() is not None)

    def _cacheable(self, kwargs: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Return model and call as they may be cached: key and answer are made of what is there at this moment.

        What a retriever finds is known only when it was asked, so nothing is cached then.
        """
        if self.retriever is not None:
            return self.model_copy(update={"cache": False}), dict(kwargs)
        if not self._cached():
            return self, dict(kwargs)
        return concurrency.within(lambda event: self._fixed(kwargs), seconds_of(kwargs, self.timeout))

    async def _acacheable(self, kwargs: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Do the same beside the event loop: a saved memory may have to be loaded."""
        if self.retriever is not None or not self._cached():
            return self._cacheable(kwargs)
        return await concurrency.call(lambda cancelled: self._fixed(kwargs), seconds_of(kwargs, self.timeout))

    def _fixed(self, kwargs: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        now, given = self._moment(kwargs), dict(kwargs)
        for name in ("memory", "memory_path", "memory_filter"):
            given.pop(name, None)
        if given.get("documents") is not None:
            given["documents"] = [one.snapshot() if isinstance(one, Memory) else one for one in self._brought(kwargs)]
        changes = {"memory": now.memory, "memory_path": None, "documents": now.documents, "memory_filter": now.ids}
        return self.model_copy(update=changes), given

    def _moment(self, kwargs: Mapping[str, Any]) -> Moment:
        engine, memory = self._get_engine(kwargs), self._memory_of(kwargs)
        return self.holder.moment(engine, self.documents, memory, _filter_of(self, kwargs))

    def _options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is known of a call before anything is loaded or read."""
        options = {name: self._option(kwargs, name) for name in (*SAMPLING, "template", "citations")}
        return {"name": kwargs.get("model") or self.model, **options, "own_stop": self.stop}

    def _facts(self, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return everything an answer depends on, the corpus included: this makes the LLM cache's keys.

        Where no cache is in use, weights and corpus are left out: describing a model for a trace loads and reads
        nothing.
        """
        kwargs = kwargs or {}
        facts = self._options(kwargs)
        if not self._cached() or self.retriever is not None:
            return facts
        return {
            **facts,
            "model": engine_fingerprint(self._get_engine(kwargs)),
            "corpus": self._moment(kwargs).fingerprint,
            "call_documents": [
                fingerprint(item.documents if isinstance(item, Memory) else [item]) for item in self._brought(kwargs)
            ],
            "call": canonical({name: value for name, value in kwargs.items() if name not in _PER_CALL}),
            "output_version": getattr(self, "output_version", None),
        }

    def _name(self, engine: FocusEngine, kwargs: Mapping[str, Any]) -> str:
        return str(kwargs.get("model") or self.model or engine.loaded.name)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        params = super()._get_ls_params(stop=stop, **kwargs)  # type: ignore[misc]
        return {**params, "ls_provider": PROVIDER, "ls_model_name": kwargs.get("model") or self.model or PROVIDER}

    def _info(self, call: Call, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what chains may want to know of an answer: why it ended, sources with exact spans, probabilities."""
        engine, answer = self._get_engine(kwargs), call.stream.answer
        info: dict[str, Any] = {
            "model_name": self._name(engine, kwargs),
            "finish_reason": call.reason,
            "supported": answer.supported,
            "sources": source_dicts(answer),
            "citations": [annotation_of(one) for one in call.citations(self._option(kwargs, "citations"))],
            "focus": {
                "chunks": answer.usage.chunks,
                "memory_tokens": answer.usage.memory,
                "read_now": call.held.created,
            },
        }
        if self._option(kwargs, "logprobs"):
            info["logprobs"] = {"content": [_logprob(engine, token) for token in answer.tokens]}
        return info


def heard(chunks: Iterator[Any], run_manager: Any) -> Iterator[Any]:
    """Yield chunks after callbacks have heard of them."""
    for chunk in chunks:
        if run_manager:
            run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        yield chunk


def annotation_of(citation: Citation) -> dict[str, Any]:
    """Return LangChain's standard annotation of a citation: what it has no word for is in ``extras``."""
    own = ("document_id", "page", "source_start", "source_end", "score", "spans")
    return {
        "type": "citation",
        "id": f"{citation.document_id}:{citation.source_start}-{citation.source_end}",
        "title": citation.title,
        **({"url": citation.url} if citation.url else {}),
        "cited_text": citation.cited_text,
        "start_index": citation.start,
        "end_index": citation.end,
        "extras": taken(citation.to_dict(), own),
    }


def usage_of(call: Call) -> dict[str, Any]:
    """Return LangChain's usage metadata; memory tokens were served from kept chunk KV or computed for this call."""
    usage = call.stream.answer.usage
    read = usage.local + usage.memory
    return {
        "input_tokens": read,
        "output_tokens": usage.generated,
        "total_tokens": read + usage.generated,
        "input_token_details": {"cache_read": usage.memory - call.computed, "cache_creation": call.computed},
    }


def _logprob(engine: FocusEngine, token: Any) -> dict[str, Any]:
    text = engine.tokenizer.decode
    top = [{"token": text([other]), "logprob": logprob} for other, logprob in token.top]
    return {"token": text([token.id]), "logprob": token.logprob, "top_logprobs": top}
