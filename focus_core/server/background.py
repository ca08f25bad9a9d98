"""Keep answers that outlive their connection until they are fetched, dropped, or too old."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from focus_core.server.access import Caller
from focus_core.server.errors import ApiError, error_body, translate
from focus_core.server.http import first_error

MOST = 256
SECONDS = 3600.0


@dataclass
class _Kept:
    owner: Caller
    task: asyncio.Task[dict[str, Any]]
    since: float


class Background:
    """Answers by id; only the caller that began one sees it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def begin(self, caller: Caller, key: str, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Start making an answer and return its id.

        Raises:
            ApiError: too many are kept.
        """
        self._forget_old()
        if len(self._kept) >= MOST:
            work.close()
            raise ApiError(429, f"{MOST} answers are kept already; fetch or delete some", retry_after=60)
        self._kept[key] = _Kept(caller, asyncio.ensure_future(work), time.monotonic())
        return {"id": key, "object": "chat.completion", "status": "in_progress"}

    def fetch(self, caller: Caller, key: str) -> dict[str, Any]:
        """Return an answer, or that it is still being made; raises :class:`ApiError` for an unknown id."""
        task = self._find(caller, key).task
        if not task.done():
            return {"id": key, "object": "chat.completion", "status": "in_progress"}
        if task.cancelled():
            return {"id": key, "object": "chat.completion", "status": "cancelled"}
        error = task.exception()
        if error is not None:
            error = first_error(error) if isinstance(error, BaseExceptionGroup) else error
            body = error_body(translate(error if isinstance(error, Exception) else RuntimeError("stopped")))
            return {"id": key, "object": "chat.completion", "status": "failed", **body}
        return {**task.result(), "status": "completed"}

    def forget(self, caller: Caller, key: str) -> None:
        """Stop and drop an answer; raises :class:`ApiError` for an unknown id."""
        self._find(caller, key).task.cancel()
        del self._kept[key]

    async def close(self, grace: float) -> None:
        """Give running answers ``grace`` seconds, then stop them."""
        tasks = [kept.task for kept in self._kept.values() if not kept.task.done()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _find(self, caller: Caller, key: str) -> _Kept:
        self._forget_old()
        kept = self._kept.get(key)
        if kept is None or (kept.owner.tenant, kept.owner.name) != (caller.tenant, caller.name):
            raise ApiError(404, f"there is no answer {key!r}; it was fetched too late, or its id is wrong", param="id")
        return kept

    def _forget_old(self) -> None:
        limit = time.monotonic() - SECONDS
        for key in [key for key, kept in self._kept.items() if kept.since < limit and kept.task.done()]:
            del self._kept[key]
