"""Answer ``/v1/messages`` as Anthropic's clients expect it, with citations of documents."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from focus_core.errors import ConfigError
from focus_core.model.chat import Message, Tool
from focus_core.model.tool_calls import ToolCall
from focus_core.server.access import Caller
from focus_core.server.answering import Answering, Finished, Job
from focus_core.server.errors import ApiError, error_body, translate
from focus_core.server.http import Reader, event_stream, while_connected
from focus_core.server.openai_api import citation_body, sampling, sources_body
from focus_core.server.schemas import AnthropicChoice, AnthropicTool, MessagesCount, MessagesRequest
from focus_core.session.attachments import attached_document
from focus_core.session.citations import STANDARD_CITATIONS, Citation
from focus_core.session.request import Request as Asked
from focus_core.text.corpus import Document

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "cancelled": "end_turn"}


def anthropic_router(answering: Answering, model: str) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["Anthropic"])

    def check_model(asked: str) -> None:
        if asked != model:
            raise ApiError(404, f"there is no model {asked!r}; this server has {model!r}", param="model")

    @router.post("/v1/messages")
    async def create(body: MessagesRequest, request: Request, caller: Reader) -> Response:
        """Answer a conversation of any length over memories and attached documents."""
        check_model(body.model)
        job = await asyncio.to_thread(messages_job, body)  # attached files may have to be converted
        await asyncio.to_thread(answering.check, caller, job)
        key = f"msg_{uuid.uuid4().hex}"
        if body.stream:
            return event_stream(request, _events(answering, caller, job, key, model), event=True)

        async def whole() -> dict[str, Any]:
            async with aclosing(answering.run(caller, job)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    if isinstance(piece, Finished):
                        return _message(piece, job, key, model)
            raise AssertionError("an answer ends with Finished")

        return JSONResponse(await while_connected(request, whole()))

    @router.post("/v1/messages/count_tokens")
    async def count(body: MessagesCount, caller: Reader) -> dict[str, int]:
        """Count the tokens of a conversation without answering it."""
        check_model(body.model)
        turns = [turn.model_dump(exclude_none=True) for turn in body.messages]
        messages, documents = await asyncio.to_thread(_messages, body.system, turns)
        tools = _tools(body.tools)
        return {"input_tokens": await asyncio.to_thread(answering.count, messages, tools, documents)}

    return router


def messages_job(body: MessagesRequest) -> Job:
    """Return what a request asks for; raises ``ConfigError`` for malformed turns and tools."""
    messages, documents = _messages(body.system, [turn.model_dump(exclude_none=True) for turn in body.messages])
    tools = _tools(body.tools)
    choice = body.tool_choice or AnthropicChoice(type="auto", name=None, disable_parallel_tool_use=None)
    asked = Asked(
        sampling(body, max_tokens=body.max_tokens, stop=body.stop_sequences),
        messages,
        documents=documents,
        tools=tools,
        choice=_choice(choice, tools),
        parallel=not choice.disable_parallel_tool_use,
    )
    return Job(
        asked,
        memories=tuple(body.memories or ()),
        wanted=body.memory_filter,
        citations=STANDARD_CITATIONS if body.citations is None else body.citations,
        attention=bool(body.attention),
        user=(body.metadata.user_id or "") if body.metadata else "",
    )


# -- requests ---------------------------------------------------------------------------------------------------


def _tools(tools: Sequence[AnthropicTool] | None) -> list[Tool]:
    return [Tool(tool.name, tool.description or "", dict(tool.input_schema)) for tool in tools or ()]


def _choice(choice: AnthropicChoice, tools: Sequence[Tool]) -> str:
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name not in [tool.name for tool in tools]:
        raise ConfigError(f"tool_choice names {choice.name!r}, which is none of the tools")
    return choice.name


def _messages(
    system: str | Sequence[Mapping[str, Any]] | None, turns: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], list[Document]]:
    documents: list[Document] = []
    found = [Message("system", _plain(system))] if system else []
    for turn in turns:
        found += _turn(turn["role"], turn["content"], documents)
    return found, documents


def _turn(role: str, content: str | Sequence[Mapping[str, Any]], documents: list[Document]) -> list[Message]:
    """Return the messages of one turn: results of tools each make one of their own."""
    if isinstance(content, str):
        return [Message("assistant" if role == "assistant" else "user", content)]
    texts: list[str] = []
    results: list[Message] = []
    calls: list[ToolCall] = []
    for block in content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "document":
            documents.append(_document(block, len(documents)))
            texts.append(f"[{documents[-1].id}]")
        elif kind == "tool_use" and role == "assistant":
            calls.append(
                ToolCall(str(block.get("id") or ""), str(block.get("name") or ""), dict(block.get("input") or {}))
            )
        elif kind == "tool_result" and role == "user":
            said = _plain(block.get("content"))
            said = f"Error: {said}" if block.get("is_error") else said
            results.append(Message("tool", said, tool_call_id=str(block.get("tool_use_id") or "")))
        elif kind not in ("thinking", "redacted_thinking"):
            raise ConfigError(f"this model reads text only; got a block of type {kind!r} in a turn of {role}")
    text = "\n".join(texts)
    if role == "assistant":
        return [Message("assistant", text, tuple(calls))]
    return [*results, *([Message("user", text)] if text or not results else [])]


def _plain(content: Any) -> str:
    """Return the text of a string or of text blocks."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for block in content if isinstance(content, Sequence) else [content]:
        if not isinstance(block, Mapping) or not isinstance(block.get("text"), str):
            kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
            raise ConfigError(f"this model reads text only; got a block of type {kind!r}")
        texts.append(block["text"])
    return "\n".join(texts)


def _document(block: Mapping[str, Any], number: int) -> Document:
    source, title = block.get("source"), block.get("title")
    known = {"title": title, "context": block.get("context")}
    kind = source.get("type") if isinstance(source, Mapping) else None
    if isinstance(source, Mapping) and kind == "text" and isinstance(source.get("data"), str):
        text = source["data"]
    elif isinstance(source, Mapping) and kind == "content":
        text = _plain(source.get("content"))
    elif isinstance(source, Mapping) and kind == "base64" and isinstance(source.get("data"), str):
        found = attached_document(str(title or f"document-{number}"), source["data"], source.get("media_type"))
        return replace(found, id=f"document-{number}", metadata={**found.metadata, **_given(known)})
    else:
        raise ConfigError(
            f"a document's source must be of type text, content or base64; got {kind!r}; convert it to text first"
        )
    return Document(f"document-{number}", text, _given(known))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


# -- answers ----------------------------------------------------------------------------------------------------


def _citation(citation: Citation, job: Job) -> dict[str, Any]:
    """Return a citation in Anthropic's form, with ours beside it."""
    order = [document.id for document in job.request.documents]
    index = order.index(citation.document_id) if citation.document_id in order else len(order)
    ours = citation_body(citation)
    del ours["type"]
    return {
        **ours,
        "type": "char_location",
        "cited_text": citation.cited_text,
        "document_index": index,
        "document_title": citation.title,
        "start_char_index": citation.source_start,
        "end_char_index": citation.source_end,
        "file_id": None,
    }


def _usage(finished: Finished) -> dict[str, Any]:
    usage = finished.answer.usage
    return {
        "input_tokens": usage.local,
        "output_tokens": usage.generated,
        "cache_read_input_tokens": finished.cached_tokens,
        "cache_creation_input_tokens": finished.computed,
    }


def _reason(finished: Finished) -> str:
    return "stop_sequence" if finished.stop is not None else _REASONS[finished.reason]


def _head(key: str, model: str) -> dict[str, Any]:
    return {"id": key, "type": "message", "role": "assistant", "model": model}


def _message(finished: Finished, job: Job, key: str, model: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if finished.text or not finished.calls:
        cited = [_citation(citation, job) for citation in finished.citations]
        content.append({"type": "text", "text": finished.text, "citations": cited or None})
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments} for call in finished.calls
    ]
    ended = {"stop_reason": _reason(finished), "stop_sequence": finished.stop, "usage": _usage(finished)}
    return {**_head(key, model), "content": content, **ended, **_beside(finished)}


def _beside(finished: Finished) -> dict[str, Any]:
    """Return what Anthropic's form has no word for; its citations stand in the content."""
    return {name: value for name, value in sources_body(finished).items() if name != "citations"}


async def _events(answering: Answering, caller: Caller, job: Job, key: str, model: str) -> AsyncIterator[str]:
    """Yield ``NAME\\nDATA`` of every event of a streamed message."""

    def event(name: str, **data: Any) -> str:
        return f"{name}\n{json.dumps({'type': name, **data}, ensure_ascii=False)}"

    begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
    usage = {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    try:
        async with aclosing(answering.run(caller, job)) as pieces:  # type: ignore[type-var]
            yield event("message_start", message={**_head(key, model), **begun, "usage": usage})
            blocks = _Blocks()
            async for piece in pieces:
                if isinstance(piece, Finished):
                    for name, data in blocks.finish([_citation(citation, job) for citation in piece.citations]):
                        yield event(name, **data)
                    ended = {"stop_reason": _reason(piece), "stop_sequence": piece.stop}
                    yield event("message_delta", delta=ended, usage=_usage(piece), **_beside(piece))
                    yield event("message_stop")
                    return
                delta = piece.delta
                if delta.index is not None and delta.name is not None:
                    opened: dict[str, Any] = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
                    for name, data in blocks.open(opened):
                        yield event(name, **data)
                if delta.text and blocks.kind != "text":
                    for name, data in blocks.open({"type": "text", "text": "", "citations": None}):
                        yield event(name, **data)
                if delta.text:
                    yield event("content_block_delta", **blocks.delta({"type": "text_delta", "text": delta.text}))
                if delta.arguments:
                    part = {"type": "input_json_delta", "partial_json": delta.arguments}
                    yield event("content_block_delta", **blocks.delta(part))
    except Exception as error:
        yield f"error\n{json.dumps(error_body(translate(error), anthropic=True), ensure_ascii=False)}"


class _Blocks:
    """Numbers the content blocks of a streamed message."""

    def __init__(self) -> None:
        self.index, self.kind = -1, ""

    def open(self, block: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Close the open block and begin another."""
        closed = self._close()
        self.index, self.kind = self.index + 1, block["type"]
        return [*closed, ("content_block_start", {"index": self.index, "content_block": block})]

    def delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a delta to the open block."""
        return {"index": self.index, "delta": delta}

    def finish(self, citations: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        """Add the citations to the text and close it."""
        opened = [] if self.kind else self.open({"type": "text", "text": "", "citations": None})
        cited = [
            ("content_block_delta", self.delta({"type": "citations_delta", "citation": citation}))
            for citation in (citations if self.kind == "text" else ())
        ]
        return [*opened, *cited, *self._close()]

    def _close(self) -> list[tuple[str, dict[str, Any]]]:
        return [("content_block_stop", {"index": self.index})] if self.kind else []
