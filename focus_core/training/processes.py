"""Let one training loop run in one process or in many: what is shared out, gathered and agreed on.

A thin layer over accelerate, which knows the devices, wraps modules for gradient averaging and drives DeepSpeed.
Processes that share a GPU talk through gloo, as nccl wants a GPU for each. Precision is left to the base's dtype:
accelerate's autocast is off. Nothing here knows what is trained.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object  # type: ignore[import-untyped]

from focus_core.errors import ConfigError
from focus_core.hardware import choose_device

T = TypeVar("T")


class Processes:
    """The processes of a run, as ``accelerate launch`` started them; one if it did not.

    Args:
        device: ``cpu`` keeps a run off the GPU; the fastest there is, if not given.
        trackers: accelerate's names (``tensorboard``, ``wandb``, ...), or trackers of one's own.
        folder: where trackers write.

    Raises:
        ConfigError: a tracker is not known or not installed.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        trackers: Sequence[str | GeneralTracker] = (),
        folder: Path | None = None,
    ) -> None:
        on_cpu = choose_device(device).type == "cpu"
        gloo = _shares_gpus() and not on_cpu
        if on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            on_cpu, gloo = False, True  # accelerate has no name for this pair
        handlers = [InitProcessGroupKwargs(backend="gloo")] if gloo else []
        options: dict[str, Any] = {"log_with": list(trackers), "project_dir": folder} if trackers else {}
        try:
            self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers, **options)
        except ValueError as error:
            raise ConfigError(
                f"a tracker of {trackers} cannot be used ({error}); install it, or name another"
            ) from error
        if trackers and len(self.accelerator.log_with) < len(trackers):
            raise ConfigError(f"a tracker of {trackers} is not installed; install it, or leave it out")
        if trackers:
            self.accelerator.init_trackers("focusllm")

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self.accelerator.device)

    @property
    def count(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and reports."""
        return bool(self.accelerator.is_main_process)

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed owns optimizer and gradients."""
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Tell the trackers, in the first process, what a step was like."""
        self.accelerator.log(dict(values), step=step)

    def passes(self, examples: int, together: int | None) -> int:
        """Return into how many passes a process cuts its share of a step's examples.

        Raises:
            ConfigError: the examples cannot be shared out evenly.
        """
        share = examples // self.count
        if share * self.count != examples or (together is not None and share % min(together, share)):
            raise ConfigError(
                f"examples_per_step must be a multiple of the number of processes ({self.count}) and each process's "
                f"share a multiple of examples_per_pass ({together}); got {examples}"
            )
        return 1 if together is None else share // min(together, share)

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of ``items``."""
        return list(items[self.accelerator.process_index :: self.count])

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, on every process."""
        gathered: list[T] = gather_object(items) if self.count > 1 else items
        return gathered

    def agree(self, flag: bool) -> bool:
        """Return whether ``flag`` holds on any process; every process must ask."""
        return any(self.gather([flag])) if self.count > 1 else flag

    def prepare(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, passes: int) -> tuple[Any, Any]:
        """Return module and optimizer as accelerate runs them, for ``passes`` passes a step."""
        self.accelerator.gradient_accumulation_steps = passes
        module, optimizer = self.accelerator.prepare(module, optimizer)
        return module, optimizer


def _shares_gpus() -> bool:
    """Return whether this machine runs more processes of the run than it has GPUs."""
    return 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launch(workers: int, module: str, arguments: Sequence[str]) -> None:
    """Become torch's launcher of ``workers`` processes on this machine that run ``python -m module arguments``.

    It passes SIGINT and SIGTERM on, and gives the processes ten minutes to end their step and write a checkpoint.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // workers)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    os.execv(sys.executable, [*torchrun, "-m", module, *arguments])
