"""Admit answers up to a number and a sum of bytes, the others in a bounded queue that is fair between clients.

The queue is walked client by client, so one that sends a hundred requests delays another's by one answer, not by a
hundred. It knows nothing of models or HTTP, and lives in one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class QueueFullError(Exception):
    """No more may wait; ``retry_after`` seconds are an estimate of when there will be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} seconds")
        self.retry_after = retry_after


class Admission:
    """Bounds what runs at the same time.

    Args:
        running: most answers at once.
        waiting: most answers that wait.
        budget: most bytes of all running answers; one alone is always admitted.
    """

    def __init__(self, running: int, waiting: int, budget: int) -> None:
        self.most_running, self.most_waiting, self.budget = running, waiting, budget
        self.running = 0
        self.used = 0
        self._queues: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()
        self._seconds = 1.0  # a moving mean of what an answer takes

    @property
    def waiting(self) -> int:
        """Answers that wait now."""
        return sum(len(queue) for queue in self._queues.values())

    @asynccontextmanager
    async def admitted(self, client: str, nbytes: int) -> AsyncIterator[None]:
        """Wait for room, hold it while the block runs.

        Raises:
            QueueFullError: too many wait already.
        """
        if self._queues or not self._fits(nbytes):
            await self._wait(client, nbytes)
        else:
            self._take(nbytes)
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            yield
        finally:
            self._seconds += 0.2 * (loop.time() - started - self._seconds)
            self.running -= 1
            self.used -= nbytes
            self._admit()

    async def _wait(self, client: str, nbytes: int) -> None:
        if self.waiting >= self.most_waiting:
            ahead = self.waiting / max(1, self.most_running)
            raise QueueFullError(max(1, round(self._seconds * (1 + ahead))))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (nbytes, turn)
        self._queues.setdefault(client, deque()).append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted in the same moment: hand it on
                self.running -= 1
                self.used -= nbytes
            elif place in self._queues.get(client, ()):
                self._queues[client].remove(place)
                if not self._queues[client]:
                    del self._queues[client]
            self._admit()
            raise

    def _fits(self, nbytes: int) -> bool:
        return self.running == 0 or (self.running < self.most_running and self.used + nbytes <= self.budget)

    def _take(self, nbytes: int) -> None:
        self.running += 1
        self.used += nbytes

    def _admit(self) -> None:
        """Let in whoever is next, one of each client in turn, while there is room."""
        while self._queues:
            client, queue = next(iter(self._queues.items()))
            nbytes, turn = queue[0]
            if not self._fits(nbytes):
                return
            queue.popleft()
            self._queues.move_to_end(client)
            if not queue:
                del self._queues[client]
            if not turn.done():
                self._take(nbytes)
                turn.set_result(None)
