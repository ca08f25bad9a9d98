"""Run FocusLLM as a LangChain LLM: text in, text out, over documents and prompts of any length.

Only the underscore methods of BaseLLM are written; chains, batch, async and tracing come from langchain-core. The model
is loaded at first use and shared by the process.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from focus_core.answers import Answer, AnswerStream
from focus_core.generation import check_cancelled
from focus_core.method.passes import run_together
from focus_core.session import concurrency
from focus_core.session.engines import Held
from focus_core.session.pieces import trimmed
from focus_core.text.corpus import Document
from focus_integrations.langchain._model import CONFIG, PROVIDER, FocusModel, usage_of

_call_options: ContextVar[Mapping[str, Any]] = ContextVar("focusllm_call_options", default=MappingProxyType({}))
_runs: ContextVar[Sequence[Any]] = ContextVar("focusllm_runs", default=())
"""Of every prompt of a call, where langchain-core hands on the first one's alone."""


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class FocusLLM(FocusModel, BaseLLM):
    """A local model that reads documents and prompts longer than its window.

    Its parameters are the fields of :class:`~focus_integrations.langchain._model.FocusModel`; all but those of loading
    can be given for one call too.

    Example:
        >>> from focus_integrations.langchain import FocusLLM
        >>> llm = FocusLLM(documents="contracts/")
        >>> llm.invoke("Who signed the lease?")  # doctest: +SKIP

    Raises:
        ConfigError: an option of a call is unknown or out of its bounds.
        CorpusError: documents cannot be read.
    """

    model_config = CONFIG

    @property
    def _llm_type(self) -> str:
        return PROVIDER

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """Everything an answer depends on, the corpus included: this is the LLM cache's key."""
        return self._facts(_call_options.get())

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        tags: list[str] | list[list[str]] | None = None,
        metadata: dict[str, Any] | list[dict[str, Any]] | None = None,
        run_name: str | list[str] | None = None,
        run_id: uuid.UUID | list[uuid.UUID | None] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer several prompts; what the call itself gives is part of the cache's key here."""
        own: Any = super(FocusLLM, self._cacheable())
        with _set(_call_options, kwargs):
            return own.generate(  # type: ignore[no-any-return]
                prompts, stop, callbacks, tags=tags, metadata=metadata, run_name=run_name, run_id=run_id, **kwargs
            )

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        tags: list[str] | list[list[str]] | None = None,
        metadata: dict[str, Any] | list[dict[str, Any]] | None = None,
        run_name: str | list[str] | None = None,
        run_id: uuid.UUID | list[uuid.UUID | None] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer several prompts beside the event loop; see :meth:`generate`."""
        own: Any = super(FocusLLM, self._cacheable())
        with _set(_call_options, kwargs):
            return await own.agenerate(  # type: ignore[no-any-return]
                prompts, stop, callbacks, tags=tags, metadata=metadata, run_name=run_name, run_id=run_id, **kwargs
            )

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = PROVIDER
        params["ls_model_name"] = kwargs.get("model") or self.model or PROVIDER
        return params

    def get_num_tokens(self, text: str) -> int:
        """Count tokens with the model's own tokenizer."""
        return self._get_engine().count_tokens(text)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own token ids."""
        return self._get_engine().tokenizer.encode(text)

    def _generate_helper(
        self, prompts: list[str], stop: list[str] | None, run_managers: list[CallbackManagerForLLMRun], **kwargs: Any
    ) -> LLMResult:
        with _set(_runs, run_managers):
            return super()._generate_helper(prompts, stop, run_managers, **kwargs)

    async def _agenerate_helper(
        self,
        prompts: list[str],
        stop: list[str] | None,
        run_managers: list[AsyncCallbackManagerForLLMRun],
        **kwargs: Any,
    ) -> LLMResult:
        with _set(_runs, run_managers):
            return await super()._agenerate_helper(prompts, stop, run_managers, **kwargs)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        cancelled, runs = threading.Event(), _runs.get() or [run_manager] * len(prompts)

        def answer(request: _Request) -> GenerationChunk:
            if not self.streaming:
                return _sum(self._chunks(request))
            return _sum(_heard(self._chunks(request), request.run_manager))

        def work() -> list[GenerationChunk]:
            return run_together(answer, _requests(prompts, stop, kwargs, cancelled, runs), cancelled)

        return self._results(concurrency.within(self._seconds(kwargs), work, cancelled), kwargs)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        runs = _runs.get() or [run_manager] * len(prompts)
        if self.streaming:
            several = zip(prompts, runs, strict=True)
            found = await asyncio.gather(*(self._aheard(prompt, stop, run, kwargs) for prompt, run in several))
            return self._results(found, kwargs)

        def work(cancelled: threading.Event) -> list[GenerationChunk]:
            requests = _requests(prompts, stop, kwargs, cancelled, runs)
            return run_together(lambda request: _sum(self._chunks(request)), requests, cancelled)

        return self._results(await concurrency.call(work, self._seconds(kwargs)), kwargs)

    async def _aheard(self, prompt: str, stop: list[str] | None, run: Any, kwargs: dict[str, Any]) -> GenerationChunk:
        return _sum([chunk async for chunk in self._astream(prompt, stop, run, **kwargs)])

    def _results(self, found: Sequence[GenerationChunk], kwargs: dict[str, Any]) -> LLMResult:
        infos = [one.generation_info or {} for one in found]
        generations = [[Generation(text=one.text, generation_info=one.generation_info)] for one in found]
        total = {
            "prompt_tokens": sum(info["usage"]["input_tokens"] for info in infos),
            "completion_tokens": sum(info["usage"]["output_tokens"] for info in infos),
            "total_tokens": sum(info["usage"]["total_tokens"] for info in infos),
        }
        name = self._name(self._get_engine(kwargs), kwargs)
        return LLMResult(generations=generations, llm_output={"token_usage": total, "model_name": name})

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        request = _Request(prompt, stop, kwargs, threading.Event(), run_manager)
        pieces = concurrency.iterate_within(self._seconds(kwargs), lambda: self._chunks(request), request.cancelled)
        yield from _heard(pieces, run_manager)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        pieces = concurrency.iterate(
            lambda cancelled: self._chunks(_Request(prompt, stop, kwargs, cancelled, run_manager)),
            self._seconds(kwargs),
        )
        async for chunk in pieces:
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _chunks(self, request: _Request) -> Iterator[GenerationChunk]:
        stream, held = self._start(request)
        with stream:
            for piece in trimmed(iter(stream)):
                yield GenerationChunk(text=piece)
            info = self._about(stream.answer, stream, held, request.kwargs)
        yield GenerationChunk(text="", generation_info=info)

    def _start(self, request: _Request) -> tuple[AnswerStream, Held]:
        """Begin an answer to a prompt of any length: what does not fit the window becomes memory."""
        kwargs, cancelled = request.kwargs, request.cancelled
        check_cancelled(cancelled)
        decode, engine = self._decode(request.stop, kwargs), self._get_engine(kwargs)
        head, tail = engine.split_prompt(request.prompt)
        extra = [*self._find(tail, request.run_manager), *([Document("prompt", head)] if head.strip() else [])]
        held = self._hold(engine, extra, kwargs, lambda: check_cancelled(cancelled))
        template = self._option(kwargs, "template")
        return engine.stream(tail, held.memory, decode=decode, template=template, cancelled=cancelled), held

    def _about(self, answer: Answer, stream: AnswerStream, held: Held, kwargs: dict[str, Any]) -> dict[str, Any]:
        info = self._info(self._get_engine(kwargs), answer, stream, held, kwargs)
        usage = usage_of(answer, held) | {"memory_tokens": answer.usage.memory, "chunks": answer.usage.chunks}
        return {**info, "usage": usage}


@dataclass(frozen=True)
class _Request:
    """What is asked, and by whom."""

    prompt: str
    stop: list[str] | None
    kwargs: dict[str, Any]
    cancelled: threading.Event
    run_manager: Any


def _requests(
    prompts: list[str], stop: list[str] | None, kwargs: dict[str, Any], cancelled: threading.Event, runs: Sequence[Any]
) -> list[_Request]:
    return [_Request(prompt, stop, kwargs, cancelled, run) for prompt, run in zip(prompts, runs, strict=True)]


def _heard(chunks: Iterator[GenerationChunk], run_manager: Any) -> Iterator[GenerationChunk]:
    for chunk in chunks:
        if run_manager:
            run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        yield chunk


def _sum(chunks: Iterable[GenerationChunk]) -> GenerationChunk:
    found = list(chunks)
    return GenerationChunk(text="".join(chunk.text for chunk in found), generation_info=found[-1].generation_info)
