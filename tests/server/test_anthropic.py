"""Check ``/v1/messages`` with Anthropic's own client: messages, streams, documents with citations, tools, errors."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import anthropic
import pytest

from tests.server.conftest import Running

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
WHO = [{"role": "user", "content": "who signed the lease"}]
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}


@pytest.fixture
def client(scripted: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted.url, api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.slow
def test_a_message_is_answered(client: anthropic.Anthropic, scripted: Running) -> None:
    answer = client.messages.create(model=scripted.model, max_tokens=64, messages=WHO, system="Be brief.")
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "Here it is: who signed the lease"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0
    counted = client.messages.count_tokens(model=scripted.model, messages=WHO, system="Be brief.")
    assert counted.input_tokens == answer.usage.input_tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "base64"])
def test_documents_are_cited_by_their_characters(client: anthropic.Anthropic, scripted: Running, kind: str) -> None:
    text = "Ada Miller signed the lease of the mill."
    data = text if kind == "text" else base64.b64encode(text.encode("utf-16")).decode()
    block = {"type": "document", "title": "Lease", "source": {"type": kind, "media_type": "text/plain", "data": data}}
    content = [block, {"type": "text", "text": "who signed?"}]
    answer = client.messages.create(
        model=scripted.model, max_tokens=64, messages=[{"role": "user", "content": content}]
    )
    (citation,) = answer.content[0].citations or []
    assert citation.type == "char_location"
    assert (citation.document_index, citation.document_title) == (0, "Lease")
    assert text[citation.start_char_index : citation.end_char_index] == citation.cited_text == text


def test_a_stream_adds_up(client: anthropic.Anthropic, scripted: Running) -> None:
    extra = {"memories": ["contracts"]}
    with client.messages.stream(model=scripted.model, max_tokens=64, messages=WHO, extra_body=extra) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()
    assert text == whole.content[0].text == "Here it is: who signed the lease"
    assert whole.content[0].citations
    assert whole.stop_reason == "end_turn"
    assert whole.usage.output_tokens > 0


def test_a_stop_sequence_is_named(client: anthropic.Anthropic, scripted: Running) -> None:
    answer = client.messages.create(model=scripted.model, max_tokens=64, messages=WHO, stop_sequences=["never", " is"])
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", " is", "Here it")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_answered(client: anthropic.Anthropic, scripted: Running, stream: bool) -> None:
    turns = [{"role": "user", "content": "add 3 and 4"}]
    options = {"model": scripted.model, "max_tokens": 128, "tools": [ADD]}
    if stream:
        with client.messages.stream(messages=turns, **options) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(messages=turns, **options)
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use"
    assert (call.name, call.input) == ("add", {"a": 3, "b": 4})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "7"}
    turns += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    said = client.messages.create(messages=turns, **options)
    assert said.content[0].text == "Here it is: 7"


def test_errors_are_in_anthropics_form(client: anthropic.Anthropic, scripted: Running) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model"):
        client.messages.create(model="claude", max_tokens=8, messages=WHO)
    with pytest.raises(anthropic.BadRequestError, match="unknown parameter 'thinking'"):
        client.messages.create(
            model=scripted.model, max_tokens=8, messages=WHO, extra_body={"thinking": {"type": "enabled"}}
        )
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        client.messages.create(model=scripted.model, max_tokens=8, messages=[{"role": "user", "content": [image]}])
