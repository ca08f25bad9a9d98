"""Let questions that are asked together run as many at a time as memory holds suffixes for.

What a question adds lies behind every chunk, so its bytes are known when it begins. Whoever finds no room waits for
those before; one alone always runs. It knows no model.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from focus_core.errors import CancelledError
from focus_core.hardware import free_bytes

_T = TypeVar("_T")
_R = TypeVar("_R")
_SHARE = 0.5  # of free memory that suffixes may take
_PAUSE = 0.05  # seconds between looks at whether a waiting question was cancelled


class Room:
    """The memory that some questions share.

    Args:
        cancelled: ends the waiting.
    """

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled, self._change = cancelled, threading.Condition()
        self._held: dict[int, int] = {}
        self._budget = 0
        self._coming = 0

    def take(self, nbytes: int, device: torch.device) -> None:
        """Wait until there is room for ``nbytes`` more, or for nobody else; hold it until the question is over.

        Raises:
            CancelledError: the questions were cancelled.
        """
        own = threading.get_ident()
        with self._change:
            while self._held.keys() - {own} and sum(self._held.values()) + nbytes > self._budget:
                if self._cancelled.is_set():
                    raise CancelledError("the request was cancelled")
                self._change.wait(_PAUSE)
            if not self._held:
                self._budget = int(_SHARE * free_bytes(device))
            self._held[own] = self._held.get(own, 0) + nbytes
            self._came()

    def wait(self) -> None:
        """Wait until the question that came last has found room or is over."""
        with self._change:
            self._change.wait_for(lambda: not self._coming)
            self._coming = 1

    @contextmanager
    def question(self) -> Iterator[None]:
        """Hold what the block takes until it ends."""
        own, before = threading.get_ident(), _room.set(self)
        try:
            yield
        finally:
            _room.reset(before)
            with self._change:
                self._held.pop(own, None)
                self._came()

    def _came(self) -> None:
        self._coming = 0
        self._change.notify_all()


_room: contextvars.ContextVar[Room | None] = contextvars.ContextVar("room", default=None)


def take_room(nbytes: int, device: torch.device) -> None:
    """Wait until there is room for a question's suffixes beside those that were asked together with it."""
    room = _room.get()
    if room is not None:
        room.take(nbytes, device)


def run_together(work: Callable[[_T], _R], items: Sequence[_T], cancelled: threading.Event) -> list[_R]:
    """Return ``work`` of every item; they run in threads, so that their requests meet and share sweeps.

    As many run at the same time as memory holds suffixes for, in their order. Each runs in a copy of the caller's
    context.

    Args:
        work: makes one request to an engine.
        items: any number.
        cancelled: set when one fails, so that the others can end.

    Raises:
        Exception: of the first item that failed.
    """
    if len(items) <= 1:
        return [work(item) for item in items]
    room = Room(cancelled)

    def ask(item: _T) -> _R:
        with room.question():
            return work(item)

    with ThreadPoolExecutor(len(items), thread_name_prefix="focusllm-batch") as pool:
        futures = []
        try:
            for item in items:
                room.wait()
                futures.append(pool.submit(contextvars.copy_context().run, ask, item))
            return [future.result() for future in futures]
        except BaseException:
            cancelled.set()
            raise
