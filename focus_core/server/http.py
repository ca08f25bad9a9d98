"""What all routes share: who asks, streams of events, and stopping when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from focus_core.errors import CancelledError
from focus_core.server.access import Caller, Scope
from focus_core.server.errors import ApiError

T = TypeVar("T")

_POLL = 0.25  # seconds between two looks whether the client is still there


def _holds(scope: Scope) -> Callable[[Request], Caller]:
    def find(request: Request) -> Caller:
        caller: Caller | None = request.app.state.keys.caller(_presented(request))
        if caller is None:
            message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        if scope not in caller.scopes:
            raise ApiError(403, f"this API key may not {scope}; ask for one with the scope {scope}", code="scope")
        return caller

    return find


Reader = Annotated[Caller, Depends(_holds("read"))]
"""A caller who may ask and list."""
Writer = Annotated[Caller, Depends(_holds("write"))]
"""A caller who may change memories."""
Admin = Annotated[Caller, Depends(_holds("admin"))]
"""A caller who may read metrics."""


def _presented(request: Request) -> str | None:
    header = request.headers.get("authorization", "")
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns; it is cancelled as soon as the client has gone.

    Raises:
        CancelledError: the client has gone.
        Exception: of ``work``; a group of failures is its first.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_POLL)
            if not task.done() and await request.is_disconnected():
                raise CancelledError("the client closed the connection")
        return task.result()
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first single exception of a group."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def event_stream(request: Request, data: AsyncIterator[str], event: bool = False) -> Response:
    """Return a response that sends each item as a server-sent event; a client that goes away ends the iterator.

    Args:
        request: whose connection it is.
        data: the events' data; with ``event`` the event's name and its data, parted by a newline.
        event: events have names.
    """

    async def events() -> AsyncIterator[ServerSentEvent]:
        async with aclosing(data):  # type: ignore[type-var]
            async for item in data:
                name, _, body = item.partition("\n") if event else (None, "", item)
                yield ServerSentEvent(body, event=name, sep="\n")

    return EventSourceResponse(events(), ping=15, sep="\n", headers={"Cache-Control": "no-store"})
