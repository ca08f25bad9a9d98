"""Let requests that wait for the model pass its layers together.

Whoever finds the model free leads: it takes along what others have brought meanwhile, and one sweep serves all, so
weights are read once for all of them. There is no thread of its own and no queue to configure; a request alone runs at
once. A request may join at any step of another and leave at any. One request's failure is its own: after a failed
common sweep each runs alone. It knows nothing of text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from focus_core.config import Positions
from focus_core.errors import CancelledError
from focus_core.hardware import free_bytes
from focus_core.method.encoding import Check
from focus_core.method.local import LocalRows
from focus_core.method.packed import commit, sweep
from focus_core.method.rows import ChunkRows
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder

_PATIENCE = 0.004  # seconds that a leader waits for those who came along last time, at least
_SHARE = 0.1  # of the time the last sweep took that it waits for them, if that is longer


@dataclass(eq=False)
class Pass:
    """What one request wants of a sweep.

    Args:
        calls: chunk rows, see :func:`~focus_core.method.packed.sweep`.
        local: its local rows.
        positions: of its candidates.
        check: raises to cancel.
        small: whether its rows are few, so that they may join those of other requests in one call.
    """

    calls: Sequence[Sequence[ChunkRows]]
    local: LocalRows
    positions: Positions
    check: Check
    small: bool
    logits: Tensor | None = None
    error: Exception | None = field(default=None, repr=False)
    done: bool = False

    @property
    def rows(self) -> int:
        """Rows that pass the layers."""
        behind = sum(
            group.chunks.size * (len(it.ordinary) + len(it.candidates))
            for call in self.calls
            for group in call
            for it in group.asked
        )
        return behind + sum(len(it.ids) for it in self.local.asked)

    def failure(self) -> Exception | None:
        """Hand over what went wrong: kept here, it and the frames that it names would hold each other."""
        error, self.error = self.error, None
        return error


class SharedPasses:
    """Runs the sweeps of all requests to one base and adapter, several together where several wait.

    Args:
        base: the frozen decoder.
        adapter: its candidate projections.
    """

    def __init__(self, base: BaseDecoder, adapter: CandidateAdapter) -> None:
        self.base, self.adapter = base, adapter
        self._change = threading.Condition()
        self._waiting: list[Pass] = []
        self._busy = False
        self._together = 1
        self._patience = _PATIENCE

    def run(self, own: Pass) -> Tensor:
        """Run a pass, alone or with others, keep its rows, and return the (vocabulary,) float32 logits of its last row.

        Raises:
            CancelledError: its ``check`` said so.
        """
        with self._change:
            self._waiting.append(own)
            self._change.notify_all()
            try:
                while self._busy and not own.done:
                    self._change.wait()
            except BaseException:  # interrupted: nobody wants it any more
                self._waiting = [item for item in self._waiting if item is not own]
                raise
            leads = not own.done
            self._busy = self._busy or leads
        if leads:
            self._lead(own)
        error = own.failure()
        if error is not None:
            try:
                raise error
            finally:
                del error
        own.check()  # in a common sweep one that is cancelled does not stop the others
        assert own.logits is not None
        commit(own.calls, [own.local])  # in its own thread, so that an interrupt of the leader cannot part them
        return own.logits

    def _lead(self, own: Pass) -> None:
        batch: list[Pass] = [own]
        try:
            batch = self._gather(own)
            self._sweep(batch)
        finally:  # an interrupt of this thread is not the others'
            with self._change:
                self._together = len(batch) + len(self._waiting)  # those that will come back, and those that came
                self._waiting = [*(item for item in batch if item is not own and not item.done), *self._waiting]
                self._busy = False
                self._change.notify_all()

    def _gather(self, own: Pass) -> list[Pass]:
        """Take the waiting passes that fit ``own``, after giving those of the last sweep a moment to come back.

        They are taken in the order in which they came, as many as half of the free memory holds the rows of.
        """
        with self._change:
            try:
                self._change.wait_for(lambda: len(self._waiting) >= self._together, self._patience)
            finally:
                self._waiting.remove(own)
            others: list[Pass] = []
            left = free_bytes(self.base.device) // 2 - own.rows * row_bytes(self.base)
            for item in self._waiting:
                left -= item.rows * row_bytes(self.base)
                if left < 0:
                    break
                others += [item] if item.positions == own.positions else []
            self._waiting = [item for item in self._waiting if item not in others]
            return [own, *others]

    def _sweep(self, batch: list[Pass]) -> None:
        """Run a batch; if that fails and it is more than one, run each alone."""
        if self._succeeds(batch) or len(batch) == 1:
            return
        for item in batch:  # the error is gone, and with it what the failed sweep held
            self._sweep([item])

    def _succeeds(self, batch: list[Pass]) -> bool:
        try:
            started = time.monotonic()
            logits = self._common_sweep(batch)
            self._patience = max(_PATIENCE, _SHARE * (time.monotonic() - started))
        except Exception as error:
            if len(batch) == 1:
                batch[0].error, batch[0].done = error, True
            return False
        for item, own in zip(batch, logits, strict=True):
            item.logits, item.done = own, True
        return True

    def _common_sweep(self, batch: list[Pass]) -> Tensor:
        calls = [call for item in batch if not item.small for call in item.calls]
        joined = [group for item in batch if item.small for call in item.calls for group in call]
        calls = [*calls, joined] if joined else calls
        with torch.no_grad():
            hidden = sweep(
                self.base,
                self.adapter,
                calls,
                [item.local for item in batch],
                batch[0].positions,
                lambda: _check_all(batch),
            )
            return self.base.logits(torch.cat([rows[:, -1:] for rows in hidden], dim=1))[0].float()


def _check_all(batch: Sequence[Pass]) -> None:
    """Raise if every one of the passes is cancelled; one that is not keeps the sweep going."""
    for number, item in enumerate(batch):
        try:
            item.check()
        except CancelledError:
            if number == len(batch) - 1:
                raise
        else:
            return


def row_bytes(base: BaseDecoder) -> int:
    """Return the bytes that a row of a sweep takes at most while it passes a layer, reckoned in float32."""
    config = base.config
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * config.hidden_size)
    return int(4 * (8 * config.hidden_size + 4 * inner + 6 * base.num_heads * base.head_dim))
