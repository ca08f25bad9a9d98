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
from types import MappingProxyType
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from focus_core.method.room import run_together
from focus_core.session import concurrency
from focus_core.session.request import Request, seconds_of
from focus_integrations.langchain._model import CONFIG, PROVIDER, Asked, FocusModel, heard, usage_of

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
        model, given = self._cacheable(kwargs)
        own: Any = super(FocusLLM, model)
        with _set(_call_options, given):
            return own.generate(  # type: ignore[no-any-return]
                prompts, stop, callbacks, tags=tags, metadata=metadata, run_name=run_name, run_id=run_id, **given
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
        model, given = await self._acacheable(kwargs)
        own: Any = super(FocusLLM, model)
        with _set(_call_options, given):
            return await own.agenerate(  # type: ignore[no-any-return]
                prompts, stop, callbacks, tags=tags, metadata=metadata, run_name=run_name, run_id=run_id, **given
            )

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
        runs = _runs.get() or [run_manager] * len(prompts)

        def answer(asked: Asked) -> GenerationChunk:
            chunks = self._chunks(asked)
            return _sum(heard(chunks, asked.run_manager) if self.streaming else chunks)

        def work(cancelled: threading.Event) -> list[GenerationChunk]:
            return run_together(answer, _several(prompts, stop, kwargs, runs, cancelled), cancelled)

        return self._results(concurrency.within(work, seconds_of(kwargs, self.timeout)), kwargs)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        runs = _runs.get() or [run_manager] * len(prompts)
        if self.streaming:
            several = (Asked(prompt, stop, kwargs, run) for prompt, run in zip(prompts, runs, strict=True))
            return self._results(await asyncio.gather(*map(self._aheard, several)), kwargs)

        def work(cancelled: threading.Event) -> list[GenerationChunk]:
            several = _several(prompts, stop, kwargs, runs, cancelled)
            return run_together(lambda asked: _sum(self._chunks(asked)), several, cancelled)

        return self._results(await concurrency.call(work, seconds_of(kwargs, self.timeout)), kwargs)

    async def _aheard(self, asked: Asked) -> GenerationChunk:
        return _sum([chunk async for chunk in self._astreamed(asked, self._chunks)])

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
        yield from self._streamed(Asked(prompt, stop, kwargs, run_manager), self._chunks)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async for chunk in self._astreamed(Asked(prompt, stop, kwargs, run_manager), self._chunks):
            yield chunk

    def _chunks(self, asked: Asked) -> Iterator[GenerationChunk]:
        """Answer a prompt of any length: what does not fit the window becomes memory."""
        template = self._option(asked.kwargs, "template")
        request = Request(self._decode(asked.stop, asked.kwargs), text=asked.what, template=template)
        call = self._begin(asked, request)
        with call.stream:
            for piece in call.pieces():
                if piece.delta.text:
                    yield GenerationChunk(text=piece.delta.text)
            usage = call.stream.answer.usage
            used = usage_of(call) | {"memory_tokens": usage.memory, "chunks": usage.chunks}
        yield GenerationChunk(text="", generation_info={**self._info(call, asked.kwargs), "usage": used})


def _several(
    prompts: list[str], stop: list[str] | None, kwargs: dict[str, Any], runs: Sequence[Any], cancelled: threading.Event
) -> list[Asked]:
    return [Asked(prompt, stop, kwargs, run, cancelled) for prompt, run in zip(prompts, runs, strict=True)]


def _sum(chunks: Iterable[GenerationChunk]) -> GenerationChunk:
    found = list(chunks)
    return GenerationChunk(text="".join(chunk.text for chunk in found), generation_info=found[-1].generation_info)
