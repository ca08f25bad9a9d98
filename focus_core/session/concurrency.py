"""Run the engine's blocking work beside an event loop, and stop it when the caller goes away.

A request gets a thread of its own and an event; cancelling the awaiting task, or closing the asynchronous iterator,
sets the event, and whatever runs is expected to look at it. No framework is imported here, and no result is kept.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


async def call(work: Callable[[threading.Event], T]) -> T:
    """Run ``work`` in a thread and return what it returns.

    Args:
        work: given an event that is set when the awaiting task is cancelled.

    Raises:
        Exception: whatever ``work`` raises.
    """
    cancelled = threading.Event()
    try:
        return await asyncio.to_thread(work, cancelled)
    except asyncio.CancelledError:
        cancelled.set()
        raise


async def iterate(make: Callable[[threading.Event], Iterator[T]]) -> AsyncIterator[T]:
    """Yield the items of an iterator that is made and consumed in a thread, as they come.

    Args:
        make: given an event that is set when the consumer stops early; returns the iterator.

    Raises:
        Exception: whatever ``make`` or the iterator raises.
    """
    cancelled, loop = threading.Event(), asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[str, T | BaseException | None]] = asyncio.Queue()

    def put(kind: str, value: T | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, (kind, value))
        except RuntimeError:  # the loop is closed: nobody listens any more
            cancelled.set()

    def work() -> None:
        try:
            for item in make(cancelled):
                put("item", item)
                if cancelled.is_set():
                    break
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="focusllm", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = await queue.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        cancelled.set()
