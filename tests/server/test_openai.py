"""Check OpenAI's interface with OpenAI's own client: chat, streams, usage, stop, tools, schemas, memories, errors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.server.conftest import CONTRACTS, Running, fill

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
WHO = [{"role": "user", "content": "who signed the lease"}]


@pytest.fixture
def client(scripted: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def endless_client(endless: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endless.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_can_be_used_by_their_id(client: openai.OpenAI, scripted: Running) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    answer = client.chat.completions.create(model=model.id, messages=WHO)
    assert answer.model == model.id
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
        client.chat.completions.create(model="gpt-9", messages=WHO)


def test_chat_answers_with_usage(client: openai.OpenAI, scripted: Running) -> None:
    answer = client.chat.completions.create(model=scripted.model, messages=WHO, seed=1)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Here it is: who signed the lease"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == len(scripted.engine.tokenizer.encode(choice.message.content)) + 1


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, scripted: Running) -> None:
    whole = client.chat.completions.create(model=scripted.model, messages=WHO).choices[0].message.content
    chunks = list(client.chat.completions.create(model=scripted.model, messages=WHO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("stop") == 1
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_is_one_more_chunk_only_where_it_is_asked_for(client: openai.OpenAI, scripted: Running) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=scripted.model, messages=WHO, stream=True, stream_options=options)
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.slow
def test_memories_are_read_and_cited(client: openai.OpenAI, scripted: Running) -> None:
    alone = client.chat.completions.create(model=scripted.model, messages=WHO)
    answer = client.chat.completions.create(
        model=scripted.model, messages=WHO, extra_body={"memories": ["contracts"], "attention": True}
    )
    assert answer.usage is not None
    assert alone.usage is not None
    details = answer.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == answer.usage.prompt_tokens - alone.usage.prompt_tokens > 100
    message = answer.choices[0].message
    citations = message.citations  # type: ignore[attr-defined]
    assert 1 <= len(citations) <= 3
    for citation in citations:
        text = CONTRACTS[citation["document_id"]]
        assert text[citation["start_char_index"] : citation["end_char_index"]] == citation["cited_text"]
        assert 0 <= citation["start"] < citation["end"] <= len(message.content or "")
        assert {"start": citation["start"], "end": citation["end"]} in citation["spans"]
    turns = [*WHO, message, *WHO]  # an answer is put back as it came
    assert client.chat.completions.create(model=scripted.model, messages=turns).choices[0].message.content
    attention = message.attention  # type: ignore[attr-defined]
    words = [(message.content or "")[word["start"] : word["end"]] for word in attention["words"]]
    assert words == (message.content or "").split()
    assert all(len(word["weights"]) == len(attention["chunks"]) for word in attention["words"])


def test_citations_are_streamed_before_the_usage(client: openai.OpenAI, scripted: Running) -> None:
    chunks = list(
        client.chat.completions.create(
            model=scripted.model,
            messages=WHO,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"memories": ["contracts"]},
        )
    )
    assert chunks[-2].choices[0].delta.citations  # type: ignore[attr-defined]
    assert chunks[-1].usage is not None


def test_a_filter_reads_a_part_of_a_memory(client: openai.OpenAI, scripted: Running) -> None:
    answer = client.chat.completions.create(
        model=scripted.model, messages=WHO, extra_body={"memories": ["contracts"], "memory_filter": ["boat.txt"]}
    )
    cited = answer.choices[0].message.citations  # type: ignore[attr-defined]
    assert {citation["document_id"] for citation in cited} == {"boat.txt"}


def test_attached_files_are_read_for_one_answer(client: openai.OpenAI, scripted: Running) -> None:
    file = {"filename": "note.txt", "file_data": "data:text/plain;base64,dGhlIGNhdCBzYXQgb24gdGhlIG1hdC4="}
    content = [{"type": "text", "text": "who sat?"}, {"type": "file", "file": file}]
    answer = client.chat.completions.create(model=scripted.model, messages=[{"role": "user", "content": content}])
    assert answer.choices[0].message.citations[0]["cited_text"] == "the cat sat on the mat."  # type: ignore[attr-defined]


def test_stop_ends_an_answer(client: openai.OpenAI, scripted: Running) -> None:
    answer = client.chat.completions.create(model=scripted.model, messages=WHO, stop=[" is"])
    assert answer.choices[0].message.content == "Here it"
    assert answer.choices[0].finish_reason == "stop"


def test_the_limit_of_tokens_is_kept_under_both_names(endless_client: openai.OpenAI, endless: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = endless_client.chat.completions.create(model=endless.model, messages=WHO, **{name: 5})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5


def test_n_answers_have_seeds_of_their_own(endless_client: openai.OpenAI, endless: Running) -> None:
    options = {"model": endless.model, "messages": WHO, "max_tokens": 12, "temperature": 1.5, "seed": 5}
    answer = endless_client.chat.completions.create(**options, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    again = endless_client.chat.completions.create(**options, n=3)
    assert [choice.message.content for choice in again.choices] == texts
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    streamed = dict.fromkeys(range(3), "")
    for chunk in endless_client.chat.completions.create(**options, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_logprobs_name_each_token_and_its_rivals(endless_client: openai.OpenAI, endless: Running) -> None:
    answer = endless_client.chat.completions.create(
        model=endless.model, messages=WHO, max_tokens=4, logprobs=True, top_logprobs=2
    )
    shown = answer.choices[0].logprobs
    assert shown is not None
    assert shown.content is not None
    assert len(shown.content) == 4
    for token in shown.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy


def test_tools_are_called_and_answered(client: openai.OpenAI, scripted: Running) -> None:
    asked = [{"role": "user", "content": "add 3 and 4"}]
    answer = client.chat.completions.create(model=scripted.model, messages=asked, tools=[ADD])
    (call,) = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"a": 3, "b": 4}
    turns = [*asked, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    said = client.chat.completions.create(model=scripted.model, messages=turns, tools=[ADD])
    assert said.choices[0].message.content == "Here it is: 7"


def test_tool_calls_stream_in_parts(client: openai.OpenAI, scripted: Running) -> None:
    asked = [{"role": "user", "content": "add 3 and 4"}]
    name, arguments, reason = "", "", None
    for chunk in client.chat.completions.create(model=scripted.model, messages=asked, tools=[ADD], stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (name, json.loads(arguments), reason) == ("add", {"a": 3, "b": 4}, "tool_calls")


def test_what_is_no_whole_call_comes_back_as_text(endless: Running) -> None:
    """A call that the limit of tokens cuts off is not lost: the answer says what was written."""
    stream_of = endless.engine.chat

    def cut_off(messages, *more, **named):
        stream = stream_of(messages, *more, **{**named, "tool_choice": "none"})
        left = endless.engine.tokenizer.encode('<tool_call>\n{"name": "add", "arguments": {"a": 3')
        stream._generation._draw = lambda sampler, logits: (left.pop(0) if left else 300, 0.0, ())
        return stream

    endless.engine.chat = cut_off  # type: ignore[method-assign]
    try:
        with endless.client() as client:
            body = {"model": endless.model, "messages": WHO, "tools": [ADD], "max_tokens": 90}
            choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    finally:
        del endless.engine.chat
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith('<tool_call>\n{"name": "add", "arguments": {"a": 3')


def test_tool_choice_none_reads_no_calls(client: openai.OpenAI, scripted: Running) -> None:
    asked = [{"role": "user", "content": "add 3 and 4"}]
    answer = client.chat.completions.create(model=scripted.model, messages=asked, tools=[ADD], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None


def test_a_schema_is_kept(client: openai.OpenAI, scripted: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"enum": [1, 2]}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "toy", "schema": schema}}
    answer = client.chat.completions.create(model=scripted.model, messages=WHO, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["age"] in (1, 2)


def test_completions_continue_texts(endless_client: openai.OpenAI, endless: Running) -> None:
    answer = endless_client.completions.create(model=endless.model, prompt=["the cat", "the dog"], max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].finish_reason == "length"
    chunks = list(endless_client.completions.create(model=endless.model, prompt="the cat", max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_a_continuation_keeps_its_white_space(endless: Running) -> None:
    """Prompt and text put together are the whole text; spans count from its first character, streamed alike."""
    said, stream_of = "  the cat sat \n", endless.engine.stream

    def spaced(*arguments, **named):
        stream = stream_of(*arguments, **named)
        left = endless.engine.tokenizer.encode(said)
        stream._generation._draw = lambda sampler, logits: (left.pop(0), 0.0, ())
        return stream

    endless.engine.stream = spaced  # type: ignore[method-assign]
    body = {"model": endless.model, "prompt": "and", "max_tokens": len(endless.engine.tokenizer.encode(said))}
    try:
        with endless.client() as client:
            fill(endless, "spaced", {"note": "the cat sat on the mat."})
            body |= {"memories": ["spaced"], "attention": True}
            choice = client.post("/v1/completions", json=body).json()["choices"][0]
            lines = client.post("/v1/completions", json={**body, "stream": True}).text.splitlines()
    finally:
        del endless.engine.stream
    assert choice["text"] == said
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(chunk["text"] for chunk in chunks) == said
    assert chunks[-1]["citations"] == choice["citations"]
    words = [said[word["start"] : word["end"]] for word in choice["attention"]["words"]]
    assert words == said.split()
    (cited,) = choice["citations"]
    assert said[cited["start"] : cited["end"]] == "the cat sat"


@pytest.mark.slow
def test_a_text_is_read_whole_as_far_as_the_window_reaches(endless_client: openai.OpenAI, endless: Running) -> None:
    """The base continues it as it would alone; a longer one's head becomes memory that is computed for this answer."""
    engine, text = endless.engine, "the cat sat. " * 1500
    assert engine.config.window // 2 < engine.count_tokens(text) < engine.config.window - 4
    answer = endless_client.completions.create(model=endless.model, prompt=text, max_tokens=3)
    alone = engine.answer(text, template="raw", max_tokens=3)
    assert answer.choices[0].text.strip() == alone.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == alone.usage.local
    longer = endless_client.completions.create(model=endless.model, prompt=text * 3, max_tokens=3).usage
    assert longer is not None
    assert longer.prompt_tokens > engine.config.window
    assert longer.prompt_tokens_details is not None
    assert longer.prompt_tokens_details.cached_tokens == 0


def test_an_answer_may_outlive_its_connection(client: openai.OpenAI, scripted: Running) -> None:
    with scripted.client() as http:
        body = {"model": scripted.model, "messages": WHO, "background": True}
        begun = http.post("/v1/chat/completions", json=body)
        assert begun.status_code == 202
        for _ in range(200):
            found = http.get(f"/v1/chat/completions/{begun.json()['id']}").json()
            if found["status"] != "in_progress":
                break
            time.sleep(0.02)
        assert found["status"] == "completed"
        assert found["choices"][0]["message"]["content"] == "Here it is: who signed the lease"
        assert http.delete(f"/v1/chat/completions/{begun.json()['id']}").json()["deleted"]
        assert http.get(f"/v1/chat/completions/{begun.json()['id']}").status_code == 404


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"memories": ["nowhere"]}, "memories"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(scripted: Running, changes: dict, param: str | None) -> None:
    with scripted.client() as client:
        answer = client.post("/v1/chat/completions", json={"model": scripted.model, "messages": WHO, **changes})
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff\xfe", b"null", b"{}"])
def test_a_body_that_is_no_request_is_one_clear_error(scripted: Running, body: bytes) -> None:
    with scripted.client() as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_images_are_refused_by_name(client: openai.OpenAI, scripted: Running) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    with pytest.raises(openai.BadRequestError, match=r"reads text only.*image_url"):
        client.chat.completions.create(model=scripted.model, messages=[{"role": "user", "content": content}])


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_connection_stops_its_answer(endless: Running, stream: bool) -> None:
    body = {"model": endless.model, "messages": WHO, "max_tokens": 6000, "stream": stream}
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=endless.url) as client:
        task = asyncio.create_task(_read_some(client, body))
        await asyncio.sleep(0.5)
        assert _running(endless) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    while _running(endless):
        assert time.monotonic() - started < 10
        await asyncio.sleep(0.05)


async def _read_some(client: httpx.AsyncClient, body: dict) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body, timeout=60) as answer:
        async for _ in answer.aiter_bytes():
            pass


def _running(running: Running) -> float:
    with running.client() as client:
        text = client.get("/metrics").text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("focusllm_answers_running "))
