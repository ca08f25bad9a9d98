"""Train candidate projections: draw, add gradients, step, log, checkpoint, resume.

The stream is a function of the step number and a checkpoint holds weights, optimizer and step, so a resumed run goes on
with the losses the unbroken run would have had. The base is never changed. The module prints nothing; it reports to a
callback and to ``log.jsonl``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from focus_core.candidate import CandidateAdapter
from focus_core.config import TrainConfig
from focus_core.errors import AdapterError
from focus_core.families import BaseDecoder
from focus_core.training.data import ExampleStream
from focus_core.training.objectives import Task, dense_losses, encode_example

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Totals:
    """What a run and those it resumed did together.

    Args:
        step: optimizer steps.
        tokens: input tokens (memory, prompt and local rows).
        targets: supervised tokens.
        seconds: wall time.
    """

    step: int
    tokens: int
    targets: int
    seconds: float


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Args:
        step: number of the step just finished, from 1.
        loss: mean loss of its examples, nats per target.
        by_kind: mean loss per objective.
        tokens: input tokens so far (memory, prompt and local rows), all steps together.
        targets: supervised tokens so far.
        seconds: wall time so far, earlier runs included.
    """

    step: int
    loss: float
    by_kind: dict[str, float]
    tokens: int
    targets: int
    seconds: float
    learning_rate: float
    grad_norm: float
    chunks: list[int]


def train(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    stream: ExampleStream,
    config: TrainConfig,
    output: Path,
    *,
    sink: int | None,
    report: Callable[[StepReport], None] = lambda _: None,
    checkpoint_seconds: float = 240.0,
    stop: Callable[[], bool] = lambda: False,
) -> Totals:
    """Run the schedule from the last checkpoint in ``output`` (or the start) to its end, or until ``stop()``.

    Args:
        base: the frozen decoder.
        adapter: float32 candidate projections, attached to ``base``.
        stream: where examples come from.
        config: the schedule.
        output: folder of log and checkpoints.
        sink: token that starts every row, or ``None``.
        report: called after every step.
        checkpoint_seconds: time between checkpoints; one is also written at the end and when stopped.
        stop: asked after every step.

    Returns:
        What all runs together did.
    """
    output.mkdir(parents=True, exist_ok=True)
    parameters = adapter.trainable_parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    state = _resume(output, adapter, optimizer, config)
    started, saved = time.monotonic() - state["seconds"], time.monotonic()
    try:
        with (output / "log.jsonl").open("a") as log:
            while state["step"] < config.steps and not stop():
                outcome = _step(base, adapter, stream, config, optimizer, state, sink)
                state["seconds"] = time.monotonic() - started
                done = StepReport(
                    step=state["step"],
                    tokens=state["tokens"],
                    targets=state["targets"],
                    seconds=state["seconds"],
                    **outcome,
                )
                log.write(json.dumps(done.__dict__) + "\n")
                log.flush()
                report(done)
                if time.monotonic() - saved > checkpoint_seconds:
                    _save(output, adapter, optimizer, state, config)
                    saved = time.monotonic()
    finally:
        _save(output, adapter, optimizer, state, config)
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    return Totals(**state)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of step ``step`` (from 0): warm-up, then linear or cosine decay to ``final_rate``."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    fall = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_rate + (1.0 - config.final_rate) * fall)


def _step(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    stream: ExampleStream,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    sink: int | None,
) -> dict[str, Any]:
    rate = learning_rate(config, state["step"])
    for group in optimizer.param_groups:
        group["lr"] = rate
    tasks, kinds, weights, chunk_counts = [], [], [], []
    for index in range(config.examples_per_step):
        example = stream.example(state["step"], index)
        chunks = encode_example(base, example, sink)
        chunk_counts.append(chunks.size)
        state["tokens"] += sum(chunks.lengths)
        for query in example.queries:
            tasks.append(Task(chunks, query))
            kinds.append(example.kind)
            weights.append(1.0 / (len(example.queries) * config.examples_per_step))
            state["tokens"] += (chunks.size + 1) * len(query.ids)
            state["targets"] += query.targets
    losses = dense_losses(base, adapter, tasks, sink, config.positions)
    sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()  # type: ignore[union-attr]
    by_kind: dict[str, list[float]] = {}
    for kind, loss in zip(kinds, losses, strict=True):
        by_kind.setdefault(kind, []).append(float(loss.detach()))
    norm = torch.nn.utils.clip_grad_norm_(adapter.trainable_parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state["step"] += 1
    every = [value for values in by_kind.values() for value in values]
    return {
        "loss": sum(every) / len(every),
        "by_kind": {kind: sum(values) / len(values) for kind, values in by_kind.items()},
        "learning_rate": rate,
        "grad_norm": float(norm),
        "chunks": chunk_counts,
    }


def _save(
    output: Path,
    adapter: CandidateAdapter,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    config: TrainConfig,
) -> None:
    """Write weights, optimizer moments and counters, each by rename so that a crash leaves the last good one."""
    tensors = {f"weight/{key}": value.float().contiguous() for key, value in adapter.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value).contiguous()
    partial = output / f"{CHECKPOINT}.partial"
    metadata = {"state": json.dumps(state), "config": json.dumps(config.to_dict())}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(output / f"{CHECKPOINT}.safetensors")


def _resume(
    output: Path, adapter: CandidateAdapter, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> dict[str, Any]:
    path = output / f"{CHECKPOINT}.safetensors"
    if not path.exists():
        return {"step": 0, "tokens": 0, "targets": 0, "seconds": 0.0}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if TrainConfig.from_dict(json.loads(metadata["config"])) != config:
        raise AdapterError(
            f"{path} belongs to a run with other settings ({metadata['config']}); resume with the same settings or "
            "choose another --output"
        )
    tensors = load_file(path)
    adapter.load_state_dict({key[7:]: value for key, value in tensors.items() if key.startswith("weight/")})
    moments: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = value
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": moments, "param_groups": current["param_groups"]})
    return dict(json.loads(metadata["state"]))
