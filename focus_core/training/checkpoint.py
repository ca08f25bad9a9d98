"""Write and read what a run needs to go on exactly: weights, optimizer moments, counters, settings and origin.

Files are written whole to disk and replaced by rename, so a crash leaves the last good one; one that is damaged all the
same is put aside. Under DeepSpeed each process keeps its part of the
moments in a folder of DeepSpeed's own; the weights and counters lie where they always do. The module decides nothing
about when.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from focus_core.config import TrainConfig
from focus_core.errors import AdapterError
from focus_core.files import replacing, write_atomically
from focus_core.model.candidate import CandidateAdapter

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
_LOCK = ".training.lock"


@dataclass
class Totals:
    """What a run and those it resumed did together.

    Args:
        step: optimizer steps.
        tokens: input tokens (memory, prompt and local rows).
        targets: supervised tokens.
        seconds: wall time.
        best: lowest held-out loss, ``None`` before the first.
        best_step: the step it was measured after.
        finish_from: step at which the run began to finish.
        finish_steps: steps from there on in which the rate falls to zero; 0 while it follows its schedule.
    """

    step: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    finish_from: int = 0
    finish_steps: int = 0

    def last_step(self, scheduled: int) -> int:
        """Return the step at which the run ends, of a schedule of so many."""
        return self.finish_from + self.finish_steps if self.finish_steps else scheduled


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Args:
        totals: the counters.
        tensors: weights and moments by name.
    """

    totals: Totals
    tensors: dict[str, Tensor]

    def load(self, adapter: CandidateAdapter, optimizer: torch.optim.Optimizer | None) -> None:
        """Put weights and moments back."""
        adapter.load_state_dict({key[7:]: value for key, value in self.tensors.items() if key.startswith("weight/")})
        if optimizer is not None:
            moments: dict[int, dict[str, Any]] = {}
            for key, value in self.tensors.items():
                if key.startswith("optimizer/"):
                    _, index, name = key.split("/")
                    moments.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


class DamagedError(AdapterError):
    """A checkpoint cannot be read."""


def save_checkpoint(
    output: Path,
    adapter: CandidateAdapter,
    optimizer: torch.optim.Optimizer | None,
    totals: Totals,
    config: TrainConfig,
    origin: Mapping[str, str],
) -> None:
    """Write ``checkpoint.safetensors``; without an optimizer its moments are kept elsewhere.

    ``origin`` names what the run is made from beside its settings, such as ``base``, each with a hash.
    """
    tensors = {f"weight/{key}": value.float().contiguous() for key, value in adapter.state_dict().items()}
    for index, moments in (optimizer.state_dict()["state"] if optimizer is not None else {}).items():
        for name, value in moments.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value).contiguous()
    metadata = {"state": dataclasses.asdict(totals), "config": config.to_dict(), "origin": dict(origin)}
    with replacing(output / CHECKPOINT) as partial, _system_errors(partial):
        save_file(tensors, partial, metadata={name: json.dumps(value) for name, value in metadata.items()})


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors says of a failed write, such as a full disk, into the system's own error."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"code: (\d+)", str(error))
        number = int(found.group(1)) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def read_checkpoint(output: Path, config: TrainConfig, origin: Mapping[str, str]) -> Checkpoint | None:
    """Read the checkpoint of a run, ``None`` where there is none; nothing is changed.

    Raises:
        DamagedError: it cannot be read.
        AdapterError: it belongs to other settings or another origin.
    """
    path = output / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        totals, settings = Totals(**metadata["state"]), dict(metadata["config"])
        known = dict(metadata.get("origin", {}))
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    # how gradients are computed may change, so that a run that needed too much memory can go on
    own = config.to_dict() | {"gradient_checkpointing": settings.get("gradient_checkpointing")}
    there, here = json.loads(json.dumps(TrainConfig().to_dict() | settings)), json.loads(json.dumps(own))
    differ = [
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    differ += [f"another {name}" for name, value in origin.items() if known.get(name, value) != value]
    if differ:
        raise AdapterError(
            f"{path} belongs to a run with other settings ({'; '.join(differ)}); resume with the same settings, base, "
            "--data and --init, or choose another --output"
        )
    return Checkpoint(totals, tensors)


def lock_run(output: Path) -> BaseFileLock:
    """Make the folder of a run and keep others from training into it; the system lets go of the lock of a killed run.

    Raises:
        AdapterError: another run is training into it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise AdapterError(
            f"another run is training into {output}; wait until it ends, or choose another --output"
        ) from error
    return lock


def set_aside(output: Path) -> Path:
    """Move a damaged checkpoint, with the log and the best adapter of its run, to a new folder; return that."""
    number = 1
    while (place := output / f"damaged-{number}").exists():
        number += 1
    place.mkdir()
    for name in (CHECKPOINT, LOG, "best"):
        if (output / name).exists():
            (output / name).replace(place / name)
    return place


def cut_log(output: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint; those steps will be run again."""
    path = output / LOG
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            write_atomically(path, "".join(kept).encode())
