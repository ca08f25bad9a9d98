"""Put the server together: routes, limits, keys, errors, and what happens at its start and end."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from focus_core import __version__
from focus_core.engine import FocusEngine
from focus_core.errors import FocusError
from focus_core.hardware import free_bytes
from focus_core.server.access import read_keys
from focus_core.server.admission import Admission, QueueFullError
from focus_core.server.answering import Answering
from focus_core.server.anthropic_api import anthropic_router
from focus_core.server.background import Background
from focus_core.server.errors import ApiError, answer_error, error_body
from focus_core.server.http import Admin
from focus_core.server.memories import Memories
from focus_core.server.memories_api import Indexer, memories_router
from focus_core.server.metrics import CONTENT_TYPE, Metrics
from focus_core.server.openai_api import openai_router
from focus_core.server.settings import ServerSettings, is_loopback

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(engine: FocusEngine, settings: ServerSettings) -> FastAPI:
    """Return the application.

    Args:
        engine: answers and reads.
        settings: of the server.

    Raises:
        ConfigError: the key file cannot be read.
        StoreError: the store cannot be opened.
    """
    metrics, memories = Metrics(), Memories(engine, settings.store)
    budget = settings.answer_bytes or free_bytes(engine.base.device) // 4
    admission = Admission(settings.running, settings.waiting, budget)
    answering = Answering(engine, memories, admission, metrics, settings.seconds, settings.prompt_tokens)
    background, indexer = Background(), Indexer(memories, metrics)
    metrics.gauge("answers_running", "Answers being made", lambda: admission.running)
    metrics.gauge("answers_waiting", "Answers that wait", lambda: admission.waiting)
    metrics.gauge("resident_bytes", "Memory of the process", lambda: psutil.Process().memory_info().rss)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.ready = True
        yield
        app.state.ready = False
        await background.close(settings.grace)
        await indexer.close(settings.grace)
        answering.cancel_all()

    app = FastAPI(title="focusllm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.keys, app.state.ready = read_keys(settings.keys), False
    for kind in (ApiError, FocusError, QueueFullError, TimeoutError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    model = settings.model or model_id(engine.loaded.name)
    app.include_router(openai_router(answering, background, model))
    app.include_router(anthropic_router(answering, model))
    app.include_router(memories_router(memories, indexer, settings.document_bytes))

    @app.get("/health", tags=["Server"])
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["Server"])
    async def ready() -> dict[str, str]:
        """Say whether the server takes requests."""
        if not app.state.ready:
            raise ApiError(503, "the server is starting or ending", code="not_ready", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics", tags=["Server"])
    async def show_metrics(caller: Admin) -> Response:
        """Return the counters in Prometheus' text format."""
        return PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE)

    app.mount("/", _Page(directory=str(files("focus_core.server") / "page"), html=True))
    app.add_middleware(_BodyLimit, most=settings.body_bytes)
    app.add_middleware(_Unexpected)
    app.add_middleware(_SameOrigin, origins=frozenset(settings.origins), local=settings.keys is None)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["*"],
            allow_headers=["authorization", "content-type", "x-api-key"],
        )
    return app


def model_id(name: str) -> str:
    """Return a base's name as clients can type it: ``SmolLM2-135M-Instruct.Q4_1.gguf`` -> ``smollm2-135m-instruct``."""
    stem = re.sub(r"(\.(Q\d\w*|BF16|F16|F32))?\.gguf$", "", Path(name).name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-") or "focusllm"


class _Page(StaticFiles):
    """The page's files, which may load nothing from anywhere else."""

    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = PAGE_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-cache"
        return response


class _Unexpected:
    """Answers what nobody foresaw; a handler of FastAPI's would let it go on to the socket, which is closed then."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await (await answer_error(Request(scope), error))(scope, receive, send)


class _SameOrigin:
    """Refuses browsers that act for another site: a form can be sent anywhere, and a name can be made to point here."""

    def __init__(self, app: ASGIApp, origins: Collection[str], local: bool) -> None:
        self.app, self.origins, self.local = app, origins, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may come from where it does."""
        if scope["type"] == "http":
            headers = Request(scope).headers
            origin, host = headers.get("origin"), headers.get("host", "")
            foreign = origin is not None and origin not in self.origins and urlsplit(origin).netloc != host
            if foreign or (self.local and not is_loopback(urlsplit(f"//{host}").hostname or "")):
                said = f"origin {origin!r}" if foreign else f"host {host!r}"
                error = ApiError(403, f"requests of {said} are refused; name it with --origin", code="origin")
                if not foreign:
                    error = ApiError(403, f"this server has no keys and is no {said}; use 127.0.0.1", code="host")
                await JSONResponse(error_body(error), 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _BodyLimit:
    """Refuses bodies above a size, told or untold."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.most:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:  # an HTTPException, which FastAPI passes on while it reads a body
                raise HTTPException(413, f"the request's body is larger than {self.most:,} bytes; send less")
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(413, f"the request's body is larger than {self.most:,} bytes; send less", code="too_large")
        response = JSONResponse(error_body(error), 413)
        await response(scope, receive, send)
