"""Write and read what a run needs to go on exactly: weights, optimizer moments, counters and settings.

Files are replaced by rename, so a crash leaves the last good one. Under DeepSpeed each process keeps its part of the
moments in a folder of DeepSpeed's own; the weights and counters lie where they always do. The module decides nothing
about when.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from focus_core.config import TrainConfig
from focus_core.errors import AdapterError
from focus_core.files import write_atomically
from focus_core.model.candidate import CandidateAdapter

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


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


def save_checkpoint(
    output: Path,
    adapter: CandidateAdapter,
    optimizer: torch.optim.Optimizer | None,
    totals: Totals,
    config: TrainConfig,
) -> None:
    """Write ``checkpoint.safetensors``; without an optimizer its moments are kept elsewhere."""
    tensors = {f"weight/{key}": value.float().contiguous() for key, value in adapter.state_dict().items()}
    for index, moments in (optimizer.state_dict()["state"] if optimizer is not None else {}).items():
        for name, value in moments.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value).contiguous()
    partial = output / f"{CHECKPOINT}.partial"
    metadata = {"state": json.dumps(dataclasses.asdict(totals)), "config": json.dumps(config.to_dict())}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(output / CHECKPOINT)


def load_checkpoint(
    output: Path, adapter: CandidateAdapter, optimizer: torch.optim.Optimizer | None, config: TrainConfig
) -> Totals:
    """Put weights and moments back and return the counters; fresh ones where there is no checkpoint.

    Raises:
        AdapterError: the checkpoint belongs to other settings.
    """
    path = output / CHECKPOINT
    if not path.exists():
        return Totals()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    made_by = TrainConfig.from_dict(json.loads(metadata["config"]))
    # how gradients are computed may change, so that a run that needed too much memory can go on
    if dataclasses.replace(made_by, gradient_checkpointing=config.gradient_checkpointing) != config:
        raise AdapterError(
            f"{path} belongs to a run with other settings ({metadata['config']}); resume with the same settings or "
            "choose another --output"
        )
    tensors = load_file(path)
    adapter.load_state_dict({key[7:]: value for key, value in tensors.items() if key.startswith("weight/")})
    if optimizer is not None:
        moments: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return Totals(**json.loads(metadata["state"]))


def cut_log(output: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint; those steps will be run again."""
    path = output / LOG
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            write_atomically(path, "".join(kept).encode())
