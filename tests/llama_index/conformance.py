"""State what LlamaIndex expects of a function-calling LLM, as tests to inherit (LlamaIndex has no standard suite).

Subclass :class:`LLMConformance` and give it an ``llm`` fixture; nothing here knows FocusLLM. Modelled on
langchain-tests: each test is one promise of the interface, checked from outside. The model may write nonsense, but it
must be able to hold itself to a required tool call and to a schema.
"""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMStructuredPredictEndEvent,
)
from llama_index.core.llms import LLM, ChatMessage, MessageRole
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

HELLO = [ChatMessage(role="user", content="the cat sat?")]


class Toy(BaseModel):
    """A toy."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=9)
    tags: list[bool] = Field(max_length=2)


def add(a: bool, b: bool) -> int:
    """Add two bits."""
    return a + b


def shout(text: str) -> str:
    """Say it loudly."""
    return text.upper()


ADD, SHOUT = FunctionTool.from_defaults(add), FunctionTool.from_defaults(shout)


async def collect(stream: AsyncIterator) -> list:
    return [item async for item in stream]


class LLMConformance:
    """Promises of ``llama_index.core.llms.function_calling.FunctionCallingLLM``."""

    tool_kwargs: ClassVar[dict] = {"max_tokens": 240}  # enough for a call of either tool

    # -- what it is ---------------------------------------------------------------------------------------------

    def test_mro(self, llm):
        names = [base.__name__ for base in type(llm).__mro__]
        for base in (BaseLLM, LLM, FunctionCallingLLM):
            assert base.__name__ in names

    def test_metadata(self, llm):
        found = llm.metadata
        assert found.context_window > found.num_output > 0
        assert found.is_function_calling_model
        assert found.model_name

    def test_settings_are_plain_json(self, llm):
        settings = json.loads(json.dumps(llm.to_dict()))
        assert settings["class_name"] == llm.class_name() == type(llm).__name__
        assert json.dumps(llm.to_payload() if hasattr(llm, "to_payload") else {})  # newer releases have it

    def test_pickle_is_small_and_keeps_settings(self, llm):
        data = pickle.dumps(llm)
        assert len(data) < 50_000
        assert pickle.loads(data).to_dict() == llm.to_dict()

    def test_deepcopy_answers_alike(self, llm):
        assert copy.deepcopy(llm).complete("the cat").text == llm.complete("the cat").text

    # -- the eight methods --------------------------------------------------------------------------------------

    async def test_completions_agree(self, llm):
        whole = llm.complete("the cat sat")
        assert whole.text == str(whole)
        assert whole.text
        streams = [list(llm.stream_complete("the cat sat"))]
        streams.append(await collect(await llm.astream_complete("the cat sat")))
        for items in streams:
            text = ""
            for item in items:
                text += item.delta
                assert item.text == text
            assert text == whole.text
            assert items[-1].raw["usage"] == whole.raw["usage"]
        assert len(streams[0]) > 2
        assert (await llm.acomplete("the cat sat")).text == whole.text

    async def test_conversations_agree(self, llm):
        messages = [
            ChatMessage(role="system", content="a mat"),
            *HELLO,
            ChatMessage(role="assistant", content="the dog"),
            ChatMessage(role="user", content="the hat?"),
        ]
        whole = llm.chat(messages)
        assert whole.message.role == MessageRole.ASSISTANT
        assert whole.message.content
        for items in (list(llm.stream_chat(messages)), await collect(await llm.astream_chat(messages))):
            text = ""
            for item in items:
                text += item.delta
                assert (item.message.content or "") == text
                assert item.message.role == MessageRole.ASSISTANT
            assert text == whole.message.content
            assert items[-1].raw["usage"] == whole.raw["usage"]
        assert (await llm.achat(messages)).message.content == whole.message.content
        assert whole.message.content != llm.chat(messages[-1:]).message.content

    async def test_predict_and_stream_of_templates(self, llm):
        template = PromptTemplate("the {what} sat")
        said = llm.predict(template, what="cat")
        assert said
        assert "".join(llm.stream(template, what="cat")) == said
        assert await llm.apredict(template, what="cat") == said
        assert "".join(await collect(await llm.astream(template, what="cat"))) == said

    def test_formatted_skips_the_prompt_wrapper(self, llm):
        wrapped = copy.deepcopy(llm)
        wrapped.completion_to_prompt = lambda prompt: f"the dog ate. {prompt}"
        assert wrapped.complete("the cat").text == llm.complete("the dog ate. the cat").text
        assert wrapped.complete("the cat", formatted=True).text == llm.complete("the cat").text

    # -- options ------------------------------------------------------------------------------------------------

    def test_options_of_a_call(self, llm):
        assert llm.complete("the cat", max_tokens=3).raw["usage"]["completion_tokens"] <= 3
        assert llm.chat(HELLO, max_tokens=2).raw["usage"]["completion_tokens"] <= 2
        one, two = (llm.complete("the cat", temperature=1.5, seed=seed).text for seed in (1, 2))
        assert one == llm.complete("the cat", temperature=1.5, seed=1).text != two

    def test_stop_strings_are_left_out(self, llm):
        text = llm.complete("the cat").text
        stop = text[2:4]
        stopped = llm.complete("the cat", stop=[stop]).text
        assert stop not in stopped
        assert text.startswith(stopped)
        assert "".join(part.delta for part in llm.stream_complete("the cat", stop=[stop])) == stopped

    def test_unknown_options_are_refused(self, llm):
        with pytest.raises(ValueError, match="tempreature"):
            llm.complete("the cat", tempreature=1)

    def test_no_messages_are_refused(self, llm):
        with pytest.raises(ValueError, match="message"):
            llm.chat([])

    # -- tools --------------------------------------------------------------------------------------------------

    @pytest.mark.slow
    def test_a_required_tool_is_called(self, llm):
        response = llm.chat_with_tools([ADD, SHOUT], "the cat", tool_required=True, **self.tool_kwargs)
        calls = llm.get_tool_calls_from_response(response)
        assert {call.tool_name for call in calls} <= {"add", "shout"}
        assert len({call.tool_id for call in calls}) == len(calls) >= 1

    @pytest.mark.slow
    async def test_a_named_tool_is_called_everywhere(self, llm):
        options = {"tool_choice": "add", **self.tool_kwargs}
        responses = [
            llm.chat_with_tools([ADD, SHOUT], "the cat", **options),
            await llm.achat_with_tools([ADD, SHOUT], "the cat", **options),
            list(llm.stream_chat_with_tools([ADD, SHOUT], "the cat", **options))[-1],
            (await collect(await llm.astream_chat_with_tools([ADD, SHOUT], "the cat", **options)))[-1],
        ]
        for response in responses:
            (call,) = llm.get_tool_calls_from_response(response)
            assert call.tool_name == "add"
            assert set(call.tool_kwargs) == {"a", "b"}
            assert all(isinstance(value, bool) for value in call.tool_kwargs.values())
        blocks = [[one.model_dump(exclude={"tool_call_id"}) for one in found.message.blocks] for found in responses]
        assert all(found == blocks[0] for found in blocks)

    @pytest.mark.slow
    def test_tool_results_are_read(self, llm):
        asked = llm.chat_with_tools([ADD], "the cat", tool_required=True, **self.tool_kwargs)
        (call,) = llm.get_tool_calls_from_response(asked)

        def after(result: str):
            extra = {"tool_call_id": call.tool_id, "name": "add"}
            tool = ChatMessage(role="tool", content=result, additional_kwargs=extra)
            return llm.chat_with_tools([ADD], chat_history=[*HELLO, asked.message, tool], tool_choice="none")

        assert after("the dog ate the hat").message.content != after("2").message.content
        assert not llm.get_tool_calls_from_response(after("2"), error_on_no_tool_call=False)

    def test_no_tool_call_is_an_error_if_asked(self, llm):
        response = llm.chat(HELLO)
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        with pytest.raises(ValueError, match="no tool"):
            llm.get_tool_calls_from_response(response)

    @pytest.mark.slow
    async def test_predict_and_call(self, llm):
        options = {"tool_required": True, **self.tool_kwargs}
        done = llm.predict_and_call([ADD], "the cat", **options)
        assert done.sources[0].tool_name == "add"
        assert not done.sources[0].is_error
        assert str(done) == str(await llm.apredict_and_call([ADD], "the cat", **options))

    def test_a_tool_without_parameters(self, llm):
        def now() -> str:
            """Tell the time."""
            return "noon"

        done = llm.predict_and_call([FunctionTool.from_defaults(now)], "x", tool_required=True, **self.tool_kwargs)
        assert str(done) == "noon"
        assert done.sources[0].raw_input["kwargs"] == {}

    # -- structured output --------------------------------------------------------------------------------------

    @pytest.mark.slow
    async def test_structured_prediction(self, llm):
        template = PromptTemplate("a toy for the {who}")
        toy = llm.structured_predict(Toy, template, llm_kwargs=self.tool_kwargs, who="cat")
        assert isinstance(toy, Toy)
        assert toy == await llm.astructured_predict(Toy, template, llm_kwargs=self.tool_kwargs, who="cat")
        parts = list(llm.stream_structured_predict(Toy, template, llm_kwargs=self.tool_kwargs, who="cat"))
        assert parts[-1] == toy
        stream = await llm.astream_structured_predict(Toy, template, llm_kwargs=self.tool_kwargs, who="cat")
        assert (await collect(stream))[-1] == toy

    @pytest.mark.slow
    def test_structured_llm_and_program(self, llm):
        template = ChatPromptTemplate([ChatMessage(role="user", content="a toy")])
        answer = llm.as_structured_llm(Toy).chat(HELLO, **self.tool_kwargs)
        assert isinstance(answer.raw, Toy)
        program = FunctionCallingProgram.from_defaults(Toy, prompt=template, llm=llm)
        assert isinstance(program(llm_kwargs=dict(self.tool_kwargs)), Toy)

    # -- callbacks and events -----------------------------------------------------------------------------------

    def test_callbacks_and_token_counts(self, llm):
        debug, counter = LlamaDebugHandler(print_trace_on_end=False), TokenCountingHandler()
        observed = copy.deepcopy(llm)
        observed.callback_manager = CallbackManager([debug, counter])
        usage = observed.complete("the cat").raw["usage"]
        assert counter.prompt_llm_token_count == usage["prompt_tokens"]
        assert counter.completion_llm_token_count == usage["completion_tokens"]
        list(observed.stream_complete("the cat"))
        assert counter.total_llm_token_count == 2 * usage["total_tokens"]
        observed.chat(HELLO)
        list(observed.stream_chat(HELLO))
        assert len(debug.get_event_pairs(CBEventType.LLM)) == 4
        with pytest.raises(ValueError, match="message"):
            observed.chat([])
        assert len(debug.get_event_pairs(CBEventType.LLM)) == 5

    async def test_instrumentation(self, llm):
        seen: list[str] = []

        class Handler(BaseEventHandler):
            def handle(self, event, **kwargs):
                seen.append(type(event).__name__)

        root = get_dispatcher()
        root.add_event_handler(handler := Handler())
        try:
            llm.complete("the cat")
            await collect(await llm.astream_chat(HELLO))
            llm.structured_predict(Toy, PromptTemplate("a toy"), llm_kwargs=self.tool_kwargs)
        finally:
            root.event_handlers.remove(handler)
        wanted = (LLMCompletionEndEvent, LLMChatStartEvent, LLMChatInProgressEvent, LLMChatEndEvent)
        for event in (*wanted, LLMStructuredPredictEndEvent):
            assert event.__name__ in seen

    # -- concurrency --------------------------------------------------------------------------------------------

    async def test_cancelling_frees_the_engine(self, llm):
        """A cancelled task and a closed stream leave no thread that goes on generating."""
        task = asyncio.create_task(llm.achat(HELLO, max_tokens=400))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = await llm.astream_chat(HELLO, max_tokens=400)
        await anext(stream)
        await stream.aclose()
        del stream
        began = time.perf_counter()
        while any(thread.name == "focusllm" for thread in threading.enumerate()):
            assert time.perf_counter() - began < 1.0
            await asyncio.sleep(0.01)
        assert (await llm.acomplete("the cat")).text == llm.complete("the cat").text

    async def test_concurrent_calls_equal_sequential_ones(self, llm):
        prompts = ["the cat", "the dog", "the hat", "the mat"]
        expected = [llm.complete(prompt).text for prompt in prompts]
        found = await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))
        assert [item.text for item in found] == expected
        with ThreadPoolExecutor(4) as pool:
            assert [item.text for item in pool.map(llm.complete, prompts)] == expected

    def test_abandoned_streams_do_no_harm(self, llm):
        stream = llm.stream_complete("the cat", max_tokens=400)
        next(stream)
        stream.close()
        assert llm.complete("the cat").text
