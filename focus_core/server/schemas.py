"""Describe what clients send, field by field: what is not named here is refused with its name, never ignored.

Fields beside those of OpenAI and Anthropic (``memories``, ``memory_filter``, ``citations``, sampling options) travel in
the ``extra_body`` of their clients.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Metadata = dict[str, str | int | float | bool | None]
Probability = Annotated[float, Field(ge=0, le=1)]
Ends = str | list[str]
Name = Annotated[str, Field(min_length=1, max_length=200)]
_DEPTH = 16  # of metadata


class _Request(BaseModel):
    """Refuses unknown fields by name."""

    model_config = ConfigDict(extra="forbid")


class Sampling(_Request):
    """How an answer is sampled and what it reads; shared by all interfaces."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0, the default, is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: int | None = None
    memories: Annotated[list[Name], Field(max_length=64)] | None = Field(
        None, description="Names of the memories to read."
    )
    memory_filter: Metadata | list[str] | None = Field(
        None, description="Documents of the memories to read: metadata that must be equal, or ids."
    )
    citations: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="Most citations; 3 by default.")
    attention: bool | None = Field(None, description="Also return the attention on passages, word by word.")
    chunk_top_p: Probability | None = None


class StreamOptions(_Request):
    """Of a streamed answer."""

    include_usage: bool = False


class Function(_Request):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_Request):
    """A tool in OpenAI's form."""

    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel):
    """One turn; its content is text or parts of type ``text`` and ``file``."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    citations: list[dict[str, Any]] | None = Field(None, description="Of an answer put back; not read.")
    annotations: list[dict[str, Any]] | None = Field(None, description="Of an answer put back; not read.")
    supported: float | None = Field(None, description="Of an answer put back; not read.")
    attention: dict[str, Any] | None = Field(None, description="Of an answer put back; not read.")


class ResponseFormat(BaseModel):
    """What the answer is held to."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class _Completion(Sampling):
    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Ends | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Whom the request is for; the queue is fair between users.")
    frequency_penalty: Literal[0] | None = Field(None, description="Not supported; 0 only.")
    presence_penalty: Literal[0] | None = Field(None, description="Not supported; 0 only.")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> _Completion:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class ChatCompletionRequest(_Completion):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    template: Literal["chat", "question"] | None = Field(
        None, description="`question` puts the last turn as the adapter was trained: short answers."
    )
    background: bool | None = Field(None, description="Answer at once with an id; the answer is fetched later.")

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.background and self.stream:
            raise ValueError("background and stream exclude each other")
        return self


class CompletionRequest(_Completion):
    """``POST /v1/completions``: text to be continued."""

    prompt: str | list[str]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = Field(None, description="Not supported; false only.")
    best_of: Literal[1] | None = Field(None, description="Not supported; 1 only.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")


class AnthropicMessage(_Request):
    """One turn; its content is text or blocks."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class AnthropicTool(BaseModel):
    """A tool of the caller's own."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = Field(None, description="Not needed here: memories keep what was read.")


class AnthropicChoice(_Request):
    """Which tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicMetadata(_Request):
    """Whom the request is for."""

    user_id: str | None = None


class MessagesCount(_Request):
    """``POST /v1/messages/count_tokens``."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None


class MessagesRequest(Sampling):
    """``POST /v1/messages``."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    metadata: AnthropicMetadata | None = None


class MemoryCreate(_Request):
    """``POST /v1/memories``."""

    name: Name
    pinned: bool = False
    ttl_seconds: Annotated[int, Field(ge=1)] | None = Field(None, description="Dropped so long after its last use.")


class MemoryChange(_Request):
    """``PATCH /v1/memories/NAME``."""

    pinned: bool | None = None
    ttl_seconds: Annotated[int, Field(ge=1)] | None = None


class DocumentUpload(_Request):
    """One document as JSON."""

    id: Annotated[str, Field(min_length=1, max_length=2000)]
    text: str
    metadata: dict[str, Any] = {}

    @field_validator("metadata")
    @classmethod
    def _can_be_listed(cls, value: dict[str, Any]) -> dict[str, Any]:
        level: list[Any] = [value]
        for _ in range(_DEPTH):
            level = [one for item in level if isinstance(item, dict | list) for one in _inside(item)]
        if level:
            raise ValueError(f"is nested more than {_DEPTH} deep")
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        return value


def _inside(item: dict[str, Any] | list[Any]) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item


class DocumentsUpload(_Request):
    """``POST /v1/memories/NAME/documents``; a document whose id is known is replaced."""

    documents: Annotated[list[DocumentUpload], Field(min_length=1)]
