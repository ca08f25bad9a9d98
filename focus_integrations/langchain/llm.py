"""Run FocusLLM as a LangChain LLM: text in, text out, over documents and prompts of any length.

Only the underscore methods of BaseLLM are written; chains, batch, async and tracing come from langchain-core. The model
is loaded at first use and shared by the process.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
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


@contextmanager
def _options_of_call(kwargs: Mapping[str, Any]) -> Iterator[None]:
    token = _call_options.set(kwargs)
    try:
        yield
    finally:
        _call_options.reset(token)


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
        with _options_of_call(kwargs):
            return super().generate(
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
        with _options_of_call(kwargs):
            return await super().agenerate(
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

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._generate_all(prompts, stop, kwargs, threading.Event())

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return await concurrency.call(lambda cancelled: self._generate_all(prompts, stop, kwargs, cancelled))

    def _generate_all(
        self, prompts: list[str], stop: list[str] | None, kwargs: dict[str, Any], cancelled: threading.Event
    ) -> LLMResult:
        def answer(prompt: str) -> tuple[Answer, dict[str, Any]]:
            stream, held = self._start(prompt, stop, kwargs, cancelled)
            with self._limited(stream, kwargs):
                return stream.answer, self._about(stream.answer, stream, held, kwargs)

        answers = run_together(answer, prompts, cancelled)
        generations = [[Generation(text=answer.text, generation_info=info)] for answer, info in answers]
        total = {
            "prompt_tokens": sum(answer.usage.local + answer.usage.memory for answer, _ in answers),
            "completion_tokens": sum(answer.usage.generated for answer, _ in answers),
        }
        total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
        name = self._name(self._get_engine(kwargs), kwargs)
        return LLMResult(generations=generations, llm_output={"token_usage": total, "model_name": name})

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        for chunk in self._chunks(prompt, stop, kwargs, threading.Event()):
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async for chunk in concurrency.iterate(lambda cancelled: self._chunks(prompt, stop, kwargs, cancelled)):
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _chunks(
        self, prompt: str, stop: list[str] | None, kwargs: dict[str, Any], cancelled: threading.Event
    ) -> Iterator[GenerationChunk]:
        stream, held = self._start(prompt, stop, kwargs, cancelled)
        with self._limited(stream, kwargs):
            for piece in trimmed(iter(stream)):
                yield GenerationChunk(text=piece)
            yield GenerationChunk(text="", generation_info=self._about(stream.answer, stream, held, kwargs))

    def _start(
        self, prompt: str, stop: list[str] | None, kwargs: dict[str, Any], cancelled: threading.Event
    ) -> tuple[AnswerStream, Held]:
        """Begin an answer to a prompt of any length: what does not fit the window becomes memory."""
        decode, engine = self._decode(stop, kwargs), self._get_engine(kwargs)
        head, tail = engine.split_prompt(prompt)
        extra = [Document("prompt", head)] if head.strip() else []
        held = self._hold(engine, tail, extra, kwargs, lambda: check_cancelled(cancelled))
        template = kwargs.get("template", self.template)
        return engine.stream(tail, held.memory, decode=decode, template=template, cancelled=cancelled), held

    def _about(self, answer: Answer, stream: AnswerStream, held: Held, kwargs: dict[str, Any]) -> dict[str, Any]:
        info = self._info(self._get_engine(kwargs), answer, stream, held, kwargs)
        usage = usage_of(answer, held) | {"memory_tokens": answer.usage.memory, "chunks": answer.usage.chunks}
        return {**info, "usage": usage}
