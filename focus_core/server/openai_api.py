"""Answer ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models`` as OpenAI's clients expect it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from focus_core.config import DecodeConfig
from focus_core.generation import Token
from focus_core.server.access import Caller
from focus_core.server.answering import Answering, Finished, Job
from focus_core.server.background import Background
from focus_core.server.errors import ApiError, error_body, translate
from focus_core.server.http import Reader, event_stream, while_connected
from focus_core.server.schemas import ChatCompletionRequest, CompletionRequest, Sampling
from focus_core.session.citations import STANDARD_CITATIONS, AttentionMap, Citation
from focus_core.session.openai import to_choice, to_messages, to_schema, to_tools
from focus_core.session.request import Piece
from focus_core.session.request import Request as Asked

STANDARD_TOKENS = 256


@dataclass(frozen=True)
class _Head:
    """What every object of one response carries."""

    id: str
    kind: str
    created: int
    model: str

    def body(self, choices: list[dict[str, Any]], usage: Any, *, chunk: bool) -> dict[str, Any]:
        """Return a response, or a chunk of a streamed one."""
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": usage}


def openai_router(answering: Answering, background: Background, model: str) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["OpenAI"])
    born = int(time.time())

    def named(asked: str) -> str:
        if asked != model:
            raise ApiError(
                404, f"there is no model {asked!r}; this server has {model!r}", param="model", code="model_not_found"
            )
        return model

    @router.get("/v1/models")
    async def models(caller: Reader) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [_model(model, born)]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str, caller: Reader) -> dict[str, Any]:
        """Describe the model."""
        return _model(named(name), born)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatCompletionRequest, request: Request, caller: Reader) -> Response:
        """Answer a conversation of any length over memories."""
        head = _Head(f"chatcmpl-{uuid.uuid4().hex}", "chat.completion", int(time.time()), named(body.model))
        job = await asyncio.to_thread(chat_job, body)  # attached files may have to be converted
        await asyncio.to_thread(answering.check, caller, job)
        jobs = several(job, body.n or 1)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            chunks = _chat_chunks(answering, caller, jobs, head, usage, bool(body.logprobs), body.top_logprobs or 0)
            return event_stream(request, chunks)

        async def whole() -> dict[str, Any]:
            made = await _all(answering, caller, jobs)
            shown = [_chat_choice(at, one, answering, bool(body.logprobs)) for at, one in enumerate(made)]
            return head.body(shown, usage_of(made), chunk=False)

        if body.background:
            return JSONResponse(background.begin(caller, head.id, whole()), 202)
        return JSONResponse(await while_connected(request, whole()))

    @router.get("/v1/chat/completions/{key}")
    async def fetch(key: str, caller: Reader) -> Response:
        """Fetch an answer that was begun with ``background: true``."""
        return JSONResponse(background.fetch(caller, key))

    @router.delete("/v1/chat/completions/{key}")
    async def forget(key: str, caller: Reader) -> dict[str, Any]:
        """Stop and forget an answer that was begun with ``background: true``."""
        background.forget(caller, key)
        return {"id": key, "object": "chat.completion.deleted", "deleted": True}

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request, caller: Reader) -> Response:
        """Continue texts."""
        head = _Head(f"cmpl-{uuid.uuid4().hex}", "text_completion", int(time.time()), named(body.model))
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        jobs = [one for prompt in prompts for one in several(completion_job(body, prompt), body.n or 1)]
        if not jobs or len(jobs) > 64:
            raise ApiError(400, f"prompt times n must be between 1 and 64; got {len(jobs)}", param="prompt")
        for job in jobs:
            await asyncio.to_thread(answering.check, caller, job)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return event_stream(request, _text_chunks(answering, caller, jobs, head, usage))

        async def whole() -> dict[str, Any]:
            made = await _all(answering, caller, jobs)
            shown = [_text_choice(at, one, answering, body.logprobs) for at, one in enumerate(made)]
            return head.body(shown, usage_of(made), chunk=False)

        return JSONResponse(await while_connected(request, whole()))

    return router


# -- requests to jobs -------------------------------------------------------------------------------------------


def chat_job(body: ChatCompletionRequest) -> Job:
    """Return what a chat request asks for; raises ``ConfigError`` for malformed turns and tools."""
    messages, documents = to_messages([message.model_dump(exclude_none=True) for message in body.messages])
    tools = to_tools([tool.model_dump(exclude_none=True) for tool in body.tools or ()])
    form = body.response_format.model_dump(exclude_none=True) if body.response_format is not None else None
    decode = sampling(
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens or STANDARD_TOKENS,
        stop=body.stop,
        logprobs=body.top_logprobs or 0,
    )
    asked = Asked(
        decode,
        messages,
        template="question" if body.template == "question" else "chat",
        documents=documents,
        tools=tools,
        choice=to_choice(body.tool_choice, tools),
        parallel=body.parallel_tool_calls is not False,
        schema=to_schema(form),
    )
    return Job(
        asked,
        memories=tuple(body.memories or ()),
        wanted=body.memory_filter,
        citations=STANDARD_CITATIONS if body.citations is None else body.citations,
        attention=bool(body.attention),
        user=body.user or "",
    )


def completion_job(body: CompletionRequest, prompt: str) -> Job:
    """Return what a completion request asks for one of its prompts."""
    decode = sampling(body, max_tokens=body.max_tokens or 16, stop=body.stop, logprobs=body.logprobs or 0)
    return Job(
        Asked(decode, text=prompt, template="raw"),
        memories=tuple(body.memories or ()),
        wanted=body.memory_filter,
        citations=STANDARD_CITATIONS if body.citations is None else body.citations,
        attention=bool(body.attention),
        user=body.user or "",
    )


def sampling(body: Sampling, *, max_tokens: int, stop: str | Sequence[str] | None, logprobs: int = 0) -> DecodeConfig:
    """Return the sampling options of a request; raises ``ConfigError`` for one out of its bounds."""
    named = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "chunk_top_p")
    given = {name: getattr(body, name) for name in named if getattr(body, name) is not None}
    ends = (stop,) if isinstance(stop, str) else tuple(stop or ())
    return DecodeConfig(max_tokens=max_tokens, stop=ends, logprobs=logprobs, **given)


def several(job: Job, count: int) -> list[Job]:
    """Return one job for each of ``n`` choices; with a seed each has its own."""
    asked = job.request
    if asked.decode.seed is None:
        return [job] * count
    seeds = [replace(asked.decode, seed=asked.decode.seed + at) for at in range(count)]
    return [replace(job, request=replace(asked, decode=decode)) for decode in seeds]


async def _all(answering: Answering, caller: Caller, jobs: Sequence[Job]) -> list[tuple[list[Token], Finished]]:
    async def one(job: Job) -> tuple[list[Token], Finished]:
        tokens: list[Token] = []
        async with aclosing(answering.run(caller, job)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if isinstance(piece, Finished):
                    return tokens, piece
                tokens += piece.tokens
        raise AssertionError("an answer ends with Finished")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(job)) for job in jobs]
    return [task.result() for task in tasks]


# -- whole answers ----------------------------------------------------------------------------------------------


def usage_of(made: Sequence[tuple[list[Token], Finished]]) -> dict[str, Any]:
    """Return the tokens of a request: its prompt once, all of its answers."""
    return _usage([finished for _, finished in made])


def _usage(made: Sequence[Finished]) -> dict[str, Any]:
    prompt = max((one.prompt_tokens for one in made), default=0)
    cached = max((one.cached_tokens for one in made), default=0)
    generated = sum(one.answer.usage.generated for one in made)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def citation_body(citation: Citation) -> dict[str, Any]:
    """Return a citation: the span of the answer with its source, and the span of the source."""
    return {
        "type": "citation",
        "start": citation.start,
        "end": citation.end,
        "spans": [{"start": start, "end": end} for start, end in citation.spans],
        "document_id": citation.document_id,
        "document_title": citation.title,
        "url": citation.url,
        "page": citation.page,
        "start_char_index": citation.source_start,
        "end_char_index": citation.source_end,
        "cited_text": citation.cited_text,
        "score": citation.score,
    }


def attention_body(attention: AttentionMap) -> dict[str, Any]:
    """Return where the model looked: passages, and for each word of the answer the attention on each."""
    words = zip(attention.words, attention.weights, strict=True)
    return {
        "chunks": [citation_body(passage) for passage in attention.passages],
        "words": [{"start": start, "end": end, "weights": weights} for (start, end), weights in words],
    }


def sources_body(finished: Finished) -> dict[str, Any]:
    """Return what an answer stands on: citations, ``supported``, and the attention of its words if asked for."""
    cited = [citation_body(citation) for citation in finished.citations]
    looked = {} if finished.attention is None else {"attention": attention_body(finished.attention)}
    return {"citations": cited, "supported": finished.answer.supported, **looked}


def _calls(finished: Finished) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in finished.calls
    ]


def _chat_choice(at: int, made: tuple[list[Token], Finished], answering: Answering, logprobs: bool) -> dict[str, Any]:
    tokens, finished = made
    message: dict[str, Any] = {"role": "assistant", "content": finished.text, "refusal": None}
    if finished.calls:
        message |= {"content": finished.text or None, "tool_calls": _calls(finished)}
    message |= sources_body(finished)
    shown = {"content": [_logprob(answering, token) for token in tokens], "refusal": None} if logprobs else None
    return {"index": at, "message": message, "logprobs": shown, "finish_reason": finished.reason}


def _text_choice(
    at: int, made: tuple[list[Token], Finished], answering: Answering, logprobs: int | None
) -> dict[str, Any]:
    tokens, finished = made
    shown = None
    if logprobs is not None:
        texts = [_token_text(answering, token.id) for token in tokens]
        shown = {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_token_text(answering, key): value for key, value in token.top} for token in tokens],
            "text_offset": [sum(map(len, texts[:before])) for before in range(len(texts))],
        }
    head = {"index": at, "text": finished.text, "logprobs": shown, "finish_reason": finished.reason}
    return {**head, **sources_body(finished)}


def _token_text(answering: Answering, token: int) -> str:
    return answering.engine.tokenizer.decode([token])


def _logprob(answering: Answering, token: Token) -> dict[str, Any]:
    def one(key: int, logprob: float) -> dict[str, Any]:
        text = _token_text(answering, key)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    return {**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top]}


# -- streamed answers -------------------------------------------------------------------------------------------


async def _merged(
    answering: Answering, caller: Caller, jobs: Sequence[Job]
) -> AsyncIterator[tuple[int, Piece | Finished]]:
    """Yield the pieces of several answers as they come, each with its choice's number."""
    queue: asyncio.Queue[tuple[int, Piece | Finished | Exception]] = asyncio.Queue()

    async def follow(at: int, job: Job) -> None:
        try:
            async with aclosing(answering.run(caller, job)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    queue.put_nowait((at, piece))
        except Exception as error:
            queue.put_nowait((at, error))

    async with AsyncExitStack() as stack:
        tasks = [asyncio.create_task(follow(at, job)) for at, job in enumerate(jobs)]
        stack.push_async_callback(_stopped, tasks)
        left = len(jobs)
        while left:
            at, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= isinstance(piece, Finished)
            yield at, piece


async def _stopped(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _chat_chunks(
    answering: Answering, caller: Caller, jobs: Sequence[Job], head: _Head, usage: bool, logprobs: bool, top: int
) -> AsyncIterator[str]:
    """Yield the events of a streamed chat: role, pieces, citations with the reason it ended, usage if asked for."""
    unset = {"usage": None} if usage else {}
    finished: list[Finished] = []

    def chunk(at: int, delta: dict[str, Any], reason: str | None = None, shown: Any = None) -> str:
        choice = {"index": at, "delta": delta, "logprobs": shown, "finish_reason": reason}
        body = head.body([choice], None, chunk=True)
        del body["usage"]
        return json.dumps({**body, **unset}, ensure_ascii=False)

    try:
        async with aclosing(_merged(answering, caller, jobs)) as merged:  # type: ignore[type-var]
            for at in range(len(jobs)):
                yield chunk(at, {"role": "assistant", "content": ""})
            async for at, piece in merged:
                if isinstance(piece, Finished):
                    finished.append(piece)
                    yield chunk(at, sources_body(piece), piece.reason)
                    continue
                shown = None
                if logprobs and piece.tokens:
                    shown = {"content": [_logprob(answering, token) for token in piece.tokens], "refusal": None}
                delta = _delta(piece)
                if delta or shown:
                    yield chunk(at, delta, shown=shown)
        if usage:
            yield json.dumps(head.body([], _usage(finished), chunk=True), ensure_ascii=False)
    except Exception as error:
        yield json.dumps(error_body(translate(error)), ensure_ascii=False)
    yield "[DONE]"


def _delta(piece: Piece) -> dict[str, Any]:
    delta = piece.delta
    if delta.index is None:
        return {"content": delta.text} if delta.text else {}
    function: dict[str, Any] = {"arguments": delta.arguments}
    call: dict[str, Any] = {"index": delta.index, "function": function}
    if delta.name is not None:
        function["name"] = delta.name
        call |= {"id": delta.id, "type": "function"}
    return {"tool_calls": [call]}


async def _text_chunks(
    answering: Answering, caller: Caller, jobs: Sequence[Job], head: _Head, usage: bool
) -> AsyncIterator[str]:
    unset = {"usage": None} if usage else {}
    finished: list[Finished] = []

    def chunk(at: int, text: str, reason: str | None = None, **more: Any) -> str:
        choice = {"index": at, "text": text, "logprobs": None, "finish_reason": reason, **more}
        body = head.body([choice], None, chunk=True)
        del body["usage"]
        return json.dumps({**body, **unset}, ensure_ascii=False)

    try:
        async with aclosing(_merged(answering, caller, jobs)) as merged:  # type: ignore[type-var]
            async for at, piece in merged:
                if isinstance(piece, Finished):
                    finished.append(piece)
                    yield chunk(at, "", piece.reason, **sources_body(piece))
                elif piece.delta.text:
                    yield chunk(at, piece.delta.text)
        if usage:
            yield json.dumps(head.body([], _usage(finished), chunk=True), ensure_ascii=False)
    except Exception as error:
        yield json.dumps(error_body(translate(error)), ensure_ascii=False)
    yield "[DONE]"


def _model(name: str, born: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": born, "owned_by": "focusllm"}
