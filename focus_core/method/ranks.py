"""Share a memory's chunks among processes: each runs the rows behind its own, all run the same local rows.

Chunks know nothing of each other (arXiv 2408.11745, section 2.2), so of a layer only the candidates' keys and values
travel, 2 x k x kv_heads x head_dim numbers whatever a chunk's length. Every process chooses the best candidates among
all of them, and takes the first one's logits, so that all go on alike. They ask one question at a time, the same one. A
process that fails leaves the group, and the others end with one clear error. It knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from focus_core.errors import CancelledError, RankError
from focus_core.method.encoding import Check
from focus_core.method.rows import Candidates
from focus_core.method.state import MemoryState

_SECONDS = 300.0  # that a process waits for the others in a layer


class Ranks:
    """The processes of torch's default group, as ``torchrun`` or ``accelerate launch`` started them.

    It is joined here, unless it was before. They talk through gloo, from the processor's memory.

    Args:
        init_method: where they find each other; torch's environment variables if not given.
        rank: number of this process; from the environment if not given.
        count: of processes; from the environment if not given.
        seconds: that a process waits for the others.
    """

    def __init__(
        self,
        init_method: str | None = None,
        rank: int = -1,
        count: int = -1,
        seconds: float = _SECONDS,
    ) -> None:
        if not dist.is_initialized():
            wait = timedelta(seconds=seconds)
            dist.init_process_group("gloo", init_method, timeout=wait, rank=rank, world_size=count)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.sent = 0
        """Bytes of keys and values that this process has sent."""
        self._counts: list[int] = []
        self._owned: tuple[MemoryState, MemoryState] | None = None

    @property
    def candidates(self) -> int:
        """Candidates of all processes together, after :meth:`indices`."""
        return sum(self._counts)

    def own(self, state: MemoryState) -> MemoryState:
        """Return a memory whose chunks are all there, but the KV of this process's share alone.

        Equal chunks share a row and stay together; rows are dealt out one by one, so that long and short ones are too.
        """
        if self._owned is None or self._owned[0] is not state:
            slabs = []
            for slab in state.slabs:
                others = [alike for row, alike in enumerate(slab.groups()) if row % self.count != self.rank]
                kept = slab.without({id(chunk) for alike in others for chunk in alike})
                slabs += [kept] if kept is not None else []
            self._owned = state, MemoryState(state.documents, state.chunks, tuple(slabs))
        return self._owned[1]

    # -- what travels -------------------------------------------------------------------------------------------

    def indices(self, own: Sequence[int]) -> list[int]:
        """Return the numbers of all processes' chunks, in the order in which :meth:`gather` puts their candidates."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        self._together(lambda: dist.all_gather_object(found, list(own)))
        self._counts = [len(indices) for indices in found]
        return [index for indices in found for index in indices]

    def gather(self, keys: Tensor, values: Tensor) -> Candidates:
        """Return the candidates of all processes, given this one's: (sets, kv_heads, chunks, head_dim) each."""
        sets, kv_heads, count, dim = keys.shape
        both = keys.new_zeros(2, sets, kv_heads, max(self._counts), dim)
        both[0, :, :, :count], both[1, :, :, :count] = keys, values
        raw = both.cpu().view(torch.uint8)  # gloo knows not every dtype
        found = [torch.empty_like(raw) for _ in range(self.count)]
        self._together(lambda: dist.all_gather(found, raw))
        self.sent += raw.nbytes
        parts = [part.view(keys.dtype)[..., :own, :] for part, own in zip(found, self._counts, strict=True)]
        keys, values = torch.cat(parts, dim=3).to(keys.device)
        return keys, values

    def most(self, number: int) -> int:
        """Return the largest of all processes' numbers."""
        held = torch.tensor([number])
        self._together(lambda: dist.all_reduce(held, dist.ReduceOp.MAX))
        return int(held)

    def first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor: other hardware may round otherwise, and then draw another token."""
        held = tensor.contiguous().cpu()
        self._together(lambda: dist.broadcast(held, 0))
        return held.to(tensor.device)

    # -- agreeing -----------------------------------------------------------------------------------------------

    def check(self, own: Check) -> None:
        """Let all go on, or none: called between sweeps.

        Raises:
            CancelledError: one of them was cancelled.
        """
        cancelled: CancelledError | None = None
        try:
            own()
        except CancelledError as error:
            cancelled = error
        if self.most(int(cancelled is not None)):
            raise cancelled or CancelledError("the request was cancelled in another process")

    def leave(self) -> None:
        """Leave the group, which ends the others' waiting for this process."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _together(self, work: Callable[[], object]) -> None:
        try:
            work()
        except RuntimeError as error:
            raise RankError(
                f"process {self.rank} of {self.count} lost another one ({str(error).splitlines()[0]}); see what that "
                "one said, and start all of them again"
            ) from error
