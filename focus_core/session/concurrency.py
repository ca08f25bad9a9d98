"""Run the engine's blocking work beside an event loop or a clock, and stop it when the caller goes away.

A request gets an event; cancelling the awaiting task, closing the iterator or running out of time sets the event, and
whatever runs is expected to look at it. No framework is imported here, and no result is kept.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_Item = tuple[str, Any]

_GLANCE = 0.05  # seconds between two looks at whether a caller that waits is still there


async def call(work: Callable[[threading.Event], T], seconds: float | None = None) -> T:
    """Run ``work`` in a thread and return what it returns.

    Args:
        work: given an event that is set when the awaiting task is cancelled or the time is over.
        seconds: most that the caller waits, whatever ``work`` is doing.

    Raises:
        TimeoutError: the time is over.
        Exception: whatever ``work`` raises.
    """
    cancelled = threading.Event()
    try:
        async with asyncio.timeout(seconds) as limit:
            return await asyncio.to_thread(work, cancelled)
    except TimeoutError:
        if limit.expired():
            raise _over(seconds) from None
        raise
    finally:
        cancelled.set()


async def iterate(make: Callable[[threading.Event], Iterator[T]], seconds: float | None = None) -> AsyncIterator[T]:
    """Yield the items of an iterator that is made and consumed in a thread, as they come.

    Args:
        make: given an event that is set when the consumer stops early or the time is over; returns the iterator.
        seconds: most until the last item, whatever the iterator is doing.

    Raises:
        TimeoutError: the time is over.
        Exception: whatever ``make`` or the iterator raises.
    """
    cancelled, items = threading.Event(), asyncio.Queue[_Item]()
    clock = _Clock(seconds)
    _start(lambda: make(cancelled), _putter(items, cancelled), cancelled)
    try:
        while (item := await clock.get(items))[0] != "end":
            yield _taken(item)
    finally:
        cancelled.set()


def within(work: Callable[[threading.Event], T], seconds: float | None = None) -> T:
    """Return what ``work`` returns; with a time limit it runs in a thread, which is left when the time is over.

    Args:
        work: given an event that is set when the time is over, at which it is expected to look.
        seconds: most that the caller waits, whatever ``work`` is doing; ``None`` waits for as long as it takes.

    Raises:
        TimeoutError: the time is over.
        Exception: whatever ``work`` raises.
    """
    if seconds is None:
        return work(threading.Event())
    return next(iterate_within(lambda cancelled: iter([work(cancelled)]), seconds))


def iterate_within(make: Callable[[threading.Event], Iterator[T]], seconds: float | None = None) -> Iterator[T]:
    """Yield the items of an iterator; see :func:`within`. The time is that until the last item."""
    cancelled = threading.Event()
    if seconds is None:
        yield from make(cancelled)
        return
    clock, items = _Clock(seconds), queue.SimpleQueue[_Item]()
    _start(lambda: make(cancelled), items.put, cancelled)
    try:
        while (item := clock.get_now(items))[0] != "end":
            yield _taken(item)
    finally:
        cancelled.set()


class Turns:
    """Lets one caller at a time do what a key names, while others do something else."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[Hashable, _Turn] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    @contextmanager
    def of(self, key: Hashable, check: Callable[[], None]) -> Iterator[None]:
        """Wait for the key's turn; ``check`` is called while waiting and raises to give up."""
        with self._lock:
            turn = self._locks.setdefault(key, _Turn())
        while not turn.lock.acquire(timeout=_GLANCE):
            check()
        try:
            yield
        finally:
            turn.lock.release()


class _Turn:
    def __init__(self) -> None:
        self.lock = threading.Lock()


class _Clock:
    """Waits for items until the time is over."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        bounded = seconds is not None and seconds < threading.TIMEOUT_MAX  # what locks can wait for
        self._end = time.monotonic() + seconds if seconds is not None and bounded else None

    def _left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def get_now(self, items: queue.SimpleQueue[_Item]) -> _Item:
        try:
            return items.get(timeout=self._left())
        except queue.Empty:
            raise _over(self.seconds) from None

    async def get(self, items: asyncio.Queue[_Item]) -> _Item:
        if self._end is None:
            return await items.get()
        try:
            return await asyncio.wait_for(items.get(), self._left())
        except TimeoutError:
            raise _over(self.seconds) from None


def _over(seconds: float | None) -> TimeoutError:
    return TimeoutError(f"the answer took more than {seconds} seconds; raise timeout or lower max_tokens")


def _putter(items: asyncio.Queue[_Item], cancelled: threading.Event) -> Callable[[_Item], None]:
    loop = asyncio.get_running_loop()

    def put(item: _Item) -> None:
        try:
            loop.call_soon_threadsafe(items.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            cancelled.set()

    return put


def _start(make: Callable[[], Iterator[Any]], put: Callable[[_Item], None], cancelled: threading.Event) -> None:
    """Make an iterator in a thread that has the caller's context, and put its items and its end."""

    def work() -> None:
        try:
            for item in make():
                put(("item", item))
                if cancelled.is_set():
                    break
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="focusllm", daemon=True)
    thread.start()


def _taken(item: _Item) -> Any:
    kind, value = item
    if kind == "error":
        raise value
    return value
