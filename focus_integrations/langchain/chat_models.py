"""Run FocusLLM as a LangChain chat model: tools, structured output, citations, over conversations of any length.

Only the underscore methods, ``bind_tools`` and ``with_structured_output`` are written; the rest comes from
langchain-core. Tool calls and structured output are held to their schemas while they are generated, so a small model's
are always well formed. The model is loaded at first use and shared by the process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import model_validator

from focus_core import __version__
from focus_core.errors import ConfigError
from focus_core.model.chat import render_messages
from focus_core.model.tool_calls import ChatDelta
from focus_core.session import concurrency
from focus_core.session.openai import to_choice, to_schema, to_tools
from focus_core.session.request import Call, Request, seconds_of
from focus_integrations.langchain._messages import to_messages
from focus_integrations.langchain._model import CONFIG, PROVIDER, Asked, FocusModel, running, usage_of

_KNOWN = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict", "stream")


class ChatFocusLLM(FocusModel, BaseChatModel):
    """A local chat model that reads documents and conversations longer than its window, and says what it used.

    Its parameters are the fields of :class:`~focus_integrations.langchain._model.FocusModel`; all but those of loading
    can be given for one call too, with ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``response_format``.

    Example:
        >>> from focus_integrations.langchain import ChatFocusLLM
        >>> chat = ChatFocusLLM(documents="contracts/")
        >>> answer = chat.invoke("Who signed the lease?")  # doctest: +SKIP
        >>> answer.content_blocks[0]["annotations"][0]["cited_text"]  # doctest: +SKIP

    Raises:
        ConfigError: an option of a call, a tool or a schema is bad.
        ContextTooLongError: the last turn with the tools does not fit the window.
        CorpusError: documents cannot be read.
    """

    model_config = CONFIG

    context_window: int | None = None
    """Tokens to report in ``profile``; what free memory holds as chunk KV if None and ``engine`` is given."""

    @model_validator(mode="after")
    def _set_focusllm_version(self) -> Self:
        self._add_version("focusllm", __version__)
        return self

    @property
    def _llm_type(self) -> str:
        return f"{PROVIDER}-chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """What traces show of a model; the LLM cache's key is made of :meth:`_get_llm_string`."""
        return self._options({})

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        given = {name: value for name, value in kwargs.items() if not name.startswith("ls_")}
        if "response_format" in given:
            given["response_format"] = _schema_of(given["response_format"])
        return str(sorted({**self._facts(given), "ends": stop}.items()))

    def _resolve_model_profile(self) -> Any:
        capacity = self.context_window or (self.engine.capacity if self.engine is not None else None)
        return {
            "name": self.model or PROVIDER,
            **({"max_input_tokens": capacity} if capacity is not None else {}),
            "max_output_tokens": 2048,
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "pdf_inputs": False,
            "reasoning_output": False,
            "tool_calling": True,
            "tool_choice": True,
            "structured_output": True,
        }

    # -- token counts -------------------------------------------------------------------------------------------

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Count the tokens of a conversation as the model reads it: template, tools and attached documents."""
        if not messages:
            return 0
        engine = self._get_engine()
        said, documents = to_messages(messages)
        offered = to_tools([convert_to_openai_tool(tool) for tool in tools or ()])
        attached = sum(engine.count_tokens(document.text) for document in documents)
        return len(render_messages(engine.tokenizer, engine.with_system(said), offered)) + attached

    # -- answers ------------------------------------------------------------------------------------------------

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        token = running.set(run_manager)
        try:
            model, given = self._cacheable(kwargs)
            own: Any = super(ChatFocusLLM, model)
            return own._generate_with_cache(messages, stop, run_manager, **given)  # type: ignore[no-any-return]
        finally:
            running.reset(token)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        token = running.set(run_manager)
        try:
            model, given = await self._acacheable(kwargs)
            own: Any = super(ChatFocusLLM, model)
            return await own._agenerate_with_cache(messages, stop, run_manager, **given)  # type: ignore[no-any-return]
        finally:
            running.reset(token)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = Asked(messages, stop, kwargs, run_manager)
        return concurrency.within(
            lambda event: self._result(replace(asked, cancelled=event)), seconds_of(kwargs, self.timeout)
        )

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = Asked(messages, stop, kwargs, run_manager)
        return await concurrency.call(
            lambda event: self._result(replace(asked, cancelled=event)), seconds_of(kwargs, self.timeout)
        )

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from self._streamed(Asked(messages, stop, kwargs, run_manager), self._chunks)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for chunk in self._astreamed(Asked(messages, stop, kwargs, run_manager), self._chunks):
            yield chunk

    def _result(self, asked: Asked) -> ChatResult:
        call = self._begin(asked, self._request(asked))
        with call.stream:
            text = "".join(piece.delta.text for piece in call.pieces()).strip()
        message = AIMessage(
            content=text,
            tool_calls=[tool_call(name=one.name, args=one.arguments, id=one.id) for one in call.calls],
            invalid_tool_calls=[
                invalid_tool_call(
                    name=one.name, args=one.arguments, id=one.id, error="the call was cut off or is no JSON"
                )
                for one in (call.parser.broken if call.parser is not None else ())
            ],
            **self._about(call, asked.kwargs),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunks(self, asked: Asked) -> Iterator[ChatGenerationChunk]:
        call = self._begin(asked, self._request(asked))
        with call.stream:
            for piece in call.pieces():
                if piece.delta != ChatDelta():
                    yield ChatGenerationChunk(message=_chunk(piece.delta))
        last = AIMessageChunk(content="", chunk_position="last", **self._about(call, asked.kwargs))
        yield ChatGenerationChunk(message=last)

    def _request(self, asked: Asked) -> Request:
        kwargs = asked.kwargs
        decode = self._decode(asked.stop, kwargs, _KNOWN)
        said, attached = to_messages(asked.what)
        tools = to_tools(kwargs.get("tools") or ())
        return Request(
            decode,
            said,
            template=self._option(kwargs, "template"),
            documents=attached,
            tools=tools,
            choice=to_choice(kwargs.get("tool_choice"), tools),
            parallel=kwargs.get("parallel_tool_calls") is not False,
            schema=_schema_of(kwargs.get("response_format")),
        )

    def _about(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        about = {**self._info(call, kwargs), "model_provider": PROVIDER}
        return {"response_metadata": about, "usage_metadata": usage_of(call)}

    # -- tools and structured output ----------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return a model that may call tools.

        Args:
            tools: functions, tools, pydantic classes or OpenAI dictionaries.
            tool_choice: ``auto``, ``none``, ``any`` or ``required`` or ``True``, a tool's name, or OpenAI's dictionary.
            **kwargs: bound too, for example ``parallel_tool_calls=False``.

        Raises:
            ConfigError: a tool's schema or the choice is bad.
        """
        made = [convert_to_openai_tool(tool) for tool in tools]
        to_choice(tool_choice, to_tools(made))
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return super().bind(tools=made, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a model whose answers are values of a schema.

        Args:
            schema: pydantic class, ``TypedDict`` or JSON schema with a title.
            method: ``json_schema`` holds the answer to the schema; ``function_calling`` asks for a call of a tool with
                its fields; ``json_mode`` holds the answer to JSON of the schema's form too, but expects the prompt to
                describe it.
            include_raw: return ``raw``, ``parsed`` and ``parsing_error``.
            strict: taken for compatibility; answers are always held to the schema.
            **kwargs: bound too.

        Raises:
            ConfigError: the method is none of these, or the schema cannot be used.
        """
        pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
        described = {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
        parser: Runnable[Any, Any]
        if method == "function_calling":
            tool = convert_to_openai_tool(schema)
            name = tool["function"]["name"]
            llm = self.bind_tools([tool], tool_choice=name, parallel_tool_calls=False, **described, **kwargs)
            if pydantic:
                parser = PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
            else:
                parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        elif method in ("json_schema", "json_mode"):
            wanted = convert_to_json_schema(schema)
            form = {"type": "json_schema", "json_schema": {"name": wanted.get("title", "answer"), "schema": wanted}}
            llm = super().bind(response_format=form, **described, **kwargs)
            shape: Any = schema
            parser = PydanticOutputParser(pydantic_object=shape) if pydantic else JsonOutputParser()
        else:
            raise ConfigError(f"method must be json_schema, function_calling or json_mode; got {method!r}")
        if not include_raw:
            return llm | parser
        assign = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=llm) | assign.with_fallbacks([failed], exception_key="parsing_error")


def _chunk(delta: ChatDelta) -> AIMessageChunk:
    if delta.index is None:
        return AIMessageChunk(content=delta.text)
    piece = tool_call_chunk(name=delta.name, args=delta.arguments, id=delta.id, index=delta.index)
    return AIMessageChunk(content="", tool_call_chunks=[piece])


def _schema_of(form: Any) -> Mapping[str, Any] | bool | None:
    """Return the JSON schema of a ``response_format`` in OpenAI's form, or of a schema given as it is."""
    if form is None or (isinstance(form, Mapping) and form.get("type") in ("text", "json_object", "json_schema")):
        return to_schema(form)
    return convert_to_json_schema(form)
