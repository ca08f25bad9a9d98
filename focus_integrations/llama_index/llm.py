"""Run FocusLLM as a LlamaIndex LLM: completions, conversations, tools and structured output over any amount of text.

What does not fit the model's window becomes memory chunks instead of being cut off, and tool calls and structured
output are held to their schema while they are generated. The model is loaded at first use and shared by the process.
This module translates; the engine does the work.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from functools import partial
from typing import Any, Self, TypeVar, cast

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import Model, PydanticProgramMode
from llama_index_instrumentation import get_dispatcher

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.session import concurrency
from focus_core.session.engines import MemoryHolder, shared_engine
from focus_core.session.request import seconds_of
from focus_core.session.settings import AnswerSettings
from focus_integrations.llama_index._messages import about, blocks_of, citations_of, message_of, to_messages
from focus_integrations.llama_index._request import MemorySource, start

dispatcher = get_dispatcher(__name__)
Response = TypeVar("Response", CompletionResponse, ChatResponse)


class FocusLLM(AnswerSettings, FunctionCallingLLM):
    """A local model that reads documents and conversations longer than its window.

    Its parameters are those of :class:`~focus_core.session.settings.AnswerSettings` and the fields below. Every field
    of :class:`~focus_core.config.DecodeConfig` may also be given per call, and so may ``documents``, ``template``,
    ``max_sources`` and ``schema`` (a JSON schema that the answer must be a value of).

    Example:
        >>> from focus_integrations.llama_index import FocusLLM
        >>> FocusLLM(documents="contracts/").complete("Who signed the lease?").text  # doctest: +SKIP
    """

    documents: Any = Field(default=None, exclude=True)
    """What every call reads: path, texts, documents or nodes."""
    memory: Any = Field(default=None, exclude=True, repr=False)
    """What every call reads besides: a core ``Memory``, or the name or folder of a saved one."""
    max_sources: int | None = 10
    """Documents to name per answer, best first; all if None."""
    context_window: int | None = None
    """Tokens to report as capacity; what free memory holds as chunk KV if None."""

    _engine: FocusEngine | None = PrivateAttr(default=None)
    _source: MemorySource | None = PrivateAttr(default=None)
    _capacity: int | None = PrivateAttr(default=None)
    _holder: MemoryHolder = PrivateAttr(default_factory=MemoryHolder)

    def __init__(self, *, engine: FocusEngine | None = None, **values: Any) -> None:
        super().__init__(**values)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Name used in serialised settings."""
        return "FocusLLM"

    @property
    def engine(self) -> FocusEngine:
        """The loaded engine; the process's for these settings."""
        return self._engine or shared_engine(self.model, self.adapter, self.chunk_size, self.device, self.dtype)

    @property
    def metadata(self) -> LLMMetadata:
        """Tell how much a prompt may hold (memory plus local context) and what the model can do."""
        if self._capacity is None:
            self._capacity = self.context_window or self.engine.capacity
        return LLMMetadata(
            context_window=self._capacity,
            num_output=self.max_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model or "focusllm",
            system_role=MessageRole.SYSTEM,
        )

    def with_memory(self, memory: MemorySource, **changes: Any) -> Self:
        """Return a model with this one's weights that reads ``memory`` in every call.

        Args:
            memory: a memory of this model's engine, the name or folder of a saved one, or a function that returns the
                memory of the moment.
            **changes: fields to set.

        Raises:
            ConfigError: there is no such field.
        """
        copy = self.with_fields(**changes)
        copy._engine, copy._source = self.engine, memory
        return copy

    def with_fields(self, **changes: Any) -> Self:
        """Return a model with other values of fields; raises ``ConfigError`` where there is no such field."""
        known = type(self).model_fields
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ConfigError(f"FocusLLM has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        copy = self.model_copy(update=changes)
        copy._capacity = None if "context_window" in changes else self._capacity
        return copy

    def get_num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return self.engine.count_tokens(text)

    # -- completions --------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt of any length."""
        work = partial(self._stream_complete, prompt, formatted, kwargs)
        return concurrency.within(lambda cancelled: _last(work(cancelled)), seconds_of(kwargs, self.timeout))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer piece by piece: ``text`` grows, ``delta`` is new; the last item has usage and sources."""
        work = partial(self._stream_complete, prompt, formatted, kwargs)
        return cast(CompletionResponseGen, concurrency.iterate_within(work, seconds_of(kwargs, self.timeout)))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer without blocking the event loop; cancelling the task stops the engine."""
        work = partial(self._stream_complete, prompt, formatted, kwargs)
        return await concurrency.call(lambda cancelled: _last(work(cancelled)), seconds_of(kwargs, self.timeout))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Stream without blocking the event loop; closing the stream stops the engine."""
        work = partial(self._stream_complete, prompt, formatted, kwargs)
        return cast(CompletionResponseAsyncGen, concurrency.iterate(work, seconds_of(kwargs, self.timeout)))

    def _stream_complete(
        self, prompt: str, formatted: bool, kwargs: dict[str, Any], cancelled: threading.Event
    ) -> CompletionResponseGen:
        if not formatted and self.completion_to_prompt is not None:
            prompt = self.completion_to_prompt(prompt)
        call = start(self, kwargs, cancelled, prompt)
        text = ""
        with call.stream:
            for piece in call.texts():
                text += piece
                yield CompletionResponse(text=text, delta=piece)
        yield CompletionResponse(text=text, delta="", **about(call, kwargs.get("max_sources", self.max_sources)))

    # -- conversations ------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer the last message of a conversation of any length."""
        work = partial(self._stream_chat, messages, kwargs)
        return concurrency.within(lambda cancelled: _last(work(cancelled)), seconds_of(kwargs, self.timeout))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer piece by piece: the message grows, ``delta`` is new; the last item has usage and sources."""
        work = partial(self._stream_chat, messages, kwargs)
        return cast(ChatResponseGen, concurrency.iterate_within(work, seconds_of(kwargs, self.timeout)))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer without blocking the event loop; cancelling the task stops the engine."""
        work = partial(self._stream_chat, messages, kwargs)
        return await concurrency.call(lambda cancelled: _last(work(cancelled)), seconds_of(kwargs, self.timeout))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Stream without blocking the event loop; closing the stream stops the engine."""
        work = partial(self._stream_chat, messages, kwargs)
        return cast(ChatResponseAsyncGen, concurrency.iterate(work, seconds_of(kwargs, self.timeout)))

    def _stream_chat(
        self, messages: Sequence[ChatMessage], kwargs: dict[str, Any], cancelled: threading.Event
    ) -> ChatResponseGen:
        turns, carried = to_messages(messages)
        call = start(self, kwargs, cancelled, turns, *carried)
        text = ""
        with call.stream:
            for piece in call.texts():
                text += piece
                yield ChatResponse(message=message_of(blocks_of(text, call.calls)), delta=piece)
        blocks = blocks_of(text, call.calls, citations_of(call, carried))
        facts = about(call, kwargs.get("max_sources", self.max_sources))
        yield ChatResponse(message=message_of(blocks), delta="", **facts)

    # -- tools --------------------------------------------------------------------------------------------------

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of :meth:`chat`."""
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        return {
            "messages": [*(chat_history or []), *([user_msg] if user_msg is not None else [])],
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_choice if tools else "none",
            "tool_required": tool_required,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the tool calls of a response.

        Raises:
            ValueError: there is none and ``error_on_no_tool_call`` is set.
        """
        calls = [block for block in response.message.blocks if block.block_type == "tool_call"]
        if not calls and error_on_no_tool_call:
            raise ConfigError(
                f"the model called no tool, it wrote {response.message.content!r}; pass tool_required=True to hold it "
                "to a call"
            )
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=call.tool_kwargs)  # type: ignore[arg-type]
            for call in calls
        ]

    # -- structured output --------------------------------------------------------------------------------------

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Answer with an object of a pydantic class; the JSON is held to its schema while it is generated.

        Args:
            output_cls: class of the answer.
            prompt: template of the question.
            llm_kwargs: options of the call.
            **prompt_args: for the template.

        Raises:
            ConfigError: the class has no usable schema, or ``max_tokens`` is too small for it.
            ValidationError: a rule that no JSON schema can state does not hold.
        """
        if not self._holds_schemas:
            return cast(Model, super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args))
        dispatcher.event(_structured_start(output_cls, prompt, prompt_args))
        response = self.chat(self._get_messages(prompt, **prompt_args), **_schema_options(output_cls, llm_kwargs))
        result: Model = output_cls.model_validate_json(response.message.content or "")
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Like :meth:`structured_predict`, without blocking the event loop."""
        if not self._holds_schemas:
            return cast(Model, await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args))
        dispatcher.event(_structured_start(output_cls, prompt, prompt_args))
        messages = self._get_messages(prompt, **prompt_args)
        response = await self.achat(messages, **_schema_options(output_cls, llm_kwargs))
        result: Model = output_cls.model_validate_json(response.message.content or "")
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """Yield objects whose fields fill up; the base class sends the events."""
        if not self._holds_schemas:
            yield from super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
            return
        found: Any = None
        messages = self._get_messages(prompt, **prompt_args)
        for part in self.stream_chat(messages, **_schema_options(output_cls, llm_kwargs)):
            found = process_streaming_objects(part, output_cls, [found] if found is not None else None)
            yield found

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """Like :meth:`_structured_stream_call`, without blocking the event loop."""
        if not self._holds_schemas:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)

        async def objects() -> AsyncGenerator[Any, None]:
            found: Any = None
            messages = self._get_messages(prompt, **prompt_args)
            async for part in await self.astream_chat(messages, **_schema_options(output_cls, llm_kwargs)):
                found = process_streaming_objects(part, output_cls, [found] if found is not None else None)
                yield found

        return objects()

    @property
    def _holds_schemas(self) -> bool:
        return self.pydantic_program_mode in (PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION)

    # -- copies -------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Leave weights and memories behind: a copy from a pickle finds its engine by its settings."""
        return {"__dict__": {name: value for name, value in self.__dict__.items() if _pickles(value)}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Share weights and memory with the original."""
        return self.model_copy()


def _last(parts: Generator[Response, None, None]) -> Response:
    """Return the whole answer at the end of a stream."""
    for last in parts:
        response = last
    response.delta = None
    return response


def _schema_options(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    ours = ("tools", "tool_choice", "tool_required", "allow_parallel_tool_calls")
    given = {name: value for name, value in (llm_kwargs or {}).items() if name not in ours}
    return {**given, "schema": output_cls.model_json_schema()}


def _structured_start(output_cls: Any, prompt: Any, prompt_args: dict[str, Any]) -> LLMStructuredPredictStartEvent:
    return LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # whatever a foreign object raises
        return False
    return True
