"""Train candidate projections: draw, add gradients, step, measure, log, checkpoint, resume.

The stream is a function of the step number and a checkpoint holds weights, optimizer and step, so a resumed run goes on
with the losses the unbroken run would have had. Many processes share the examples of a step and average gradients, so
the run is the one that a single process would make; only the first of them writes. The base is never changed. Nothing
is printed here; what happened goes to a callback and to ``log.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from torch import Tensor, nn

from focus_core.config import TrainConfig
from focus_core.errors import AdapterError
from focus_core.method.layout import Scoring
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.training.checkpoint import (
    LOG,
    DamagedError,
    Totals,
    cut_log,
    lock_run,
    read_checkpoint,
    save_checkpoint,
    set_aside,
)
from focus_core.training.data import ExampleStream
from focus_core.training.heldout import Loss, example_losses
from focus_core.training.kept import KeptChunks
from focus_core.training.objectives import (
    Example,
    Task,
    dense_logits,
    distillation_loss,
    encode_example,
    likelihood_loss,
    reads_alone,
    teacher_logits,
)
from focus_core.training.processes import Processes


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Args:
        step: number of the step just finished, from 1.
        loss: mean over examples of the mean over their local contexts, nats per target, as in the gradient.
        by_kind: mean over local contexts per objective, those whose answer is nowhere in memory apart.
        divergence: mean KL divergence from the teacher, where there was one.
        tokens: input tokens so far (memory, prompt and local rows), all steps together.
        targets: supervised tokens so far.
        seconds: wall time so far, earlier runs included.
        learning_rate: of this step.
        grad_norm: before clipping.
        chunks: k of each example.
        kept: share of this process's chunks so far whose KV was kept from an earlier step.
        held_out: the held-out loss, on steps that measured it.
        metrics: what the run's own metric said then.
    """

    step: int
    loss: float
    by_kind: dict[str, float]
    divergence: float | None
    tokens: int
    targets: int
    seconds: float
    learning_rate: float
    grad_norm: float
    chunks: list[int]
    kept: float = 0.0
    held_out: Loss | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    stream: ExampleStream,
    config: TrainConfig,
    output: Path,
    *,
    sink: int | None,
    held_out: Sequence[Example] = (),
    keep_best: Callable[[Totals], None] = lambda _: None,
    metric: Callable[[Totals], Mapping[str, float]] = lambda _: {},
    processes: Processes | None = None,
    report: Callable[[StepReport], None] = lambda _: None,
    checkpoint_seconds: float = 240.0,
    stop: Callable[[], bool] = lambda: False,
    finish: int | None = None,
    origin: Mapping[str, str] | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Totals:
    """Run the schedule from the last checkpoint in ``output`` (or the start) to its end, or until ``stop()``.

    Args:
        base: the frozen decoder.
        adapter: float32 candidate projections, attached to ``base``.
        stream: where examples come from.
        config: the schedule.
        output: folder of log and checkpoints.
        sink: token that starts every row, or ``None``.
        held_out: what is measured every ``config.eval_every`` steps and after the last one.
        keep_best: called in the first process when the held-out loss was never as low.
        metric: called in the first process where the held-out loss is measured; what it returns is logged.
        processes: those that run this together; one alone if not given.
        report: called in the first process after every step.
        checkpoint_seconds: time between checkpoints; one is also written at the end and when stopped.
        stop: asked after every step; one process that says yes stops all.
        finish: leave the schedule: so many more steps in which the rate falls linearly to zero from what it is. A run
            that is finishing goes on so when it is resumed.
        origin: hashes of what else the run is made from (base, data, ...); a checkpoint of another origin is refused.
        notice: told in the first process about a checkpoint that is damaged: it is kept aside, and the run begins anew.

    Returns:
        What all runs together did.

    Raises:
        ConfigError: the examples of a step cannot be shared out over the processes.
        AdapterError: the checkpoint belongs to other settings or another origin, or another run is training into
            ``output``; nothing has been written.
    """
    processes = processes or Processes(base.device)
    run = _Run(base, adapter, stream, config, output, sink, processes, origin or {})
    try:
        run.resume(notice)
    except BaseException:
        run.release()
        raise
    try:
        run.begin_to_finish(finish)
        started, saved = time.monotonic() - run.totals.seconds, time.monotonic()
        while not run.finished and not processes.agree(stop()):
            done = run.step()
            if config.eval_every and held_out and (run.totals.step % config.eval_every == 0 or run.finished):
                done["held_out"] = run.measure(held_out, keep_best)
                done["metrics"] = dict(metric(run.totals)) if processes.is_main else {}
            run.totals.seconds = time.monotonic() - started
            run.log(StepReport(**done, **run.counters()), report)
            if processes.agree(processes.is_main and time.monotonic() - saved > checkpoint_seconds):
                run.save()
                saved = time.monotonic()
        run.save()
    except BaseException:
        if processes.count == 1 and not run.updating:  # many processes could wait for each other for ever
            run.save()
        raise
    finally:
        run.release()
    return run.totals


def learning_rate(config: TrainConfig, step: int, totals: Totals | None = None) -> float:
    """Return the rate of step ``step`` (from 0): warm-up, then linear or cosine decay to ``final_rate``.

    Of a run that finishes early, by its ``totals``: linear decay to zero from the rate it had.
    """
    if totals is not None and totals.finish_steps:
        left = totals.last_step(config.steps) - step
        return learning_rate(config, totals.finish_from) * left / (totals.finish_steps + 1)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    fall = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_rate + (1.0 - config.final_rate) * fall)


def trained_parameters(adapter: CandidateAdapter, config: TrainConfig) -> list[nn.Parameter]:
    """Return what a run changes: the candidate matrices and the reader's, or the reader's alone."""
    return adapter.reader_parameters() if config.fixed_candidates else adapter.trainable_parameters()


class CandidateLoss(nn.Module):
    """The loss as a module whose parameters are what is trained, so that accelerate can wrap it.

    Args:
        base: the frozen decoder; its weights are not this module's.
        adapter: what is trained.
        config: positions, distillation.
        sink: token that starts every row, or ``None``.
    """

    def __init__(self, base: BaseDecoder, adapter: CandidateAdapter, config: TrainConfig, sink: int | None) -> None:
        super().__init__()
        self.weights = nn.ParameterList(trained_parameters(adapter, config))
        self.base, self.adapter, self.config, self.sink = base, adapter, config, sink
        self.kept = KeptChunks(config.kept_kv_mib * 2**20)

    def forward(self, examples: Sequence[Example], scale: float) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the loss to differentiate and, for each example, what is logged of it.

        Args:
            examples: they pass the layers together.
            scale: weight of each example's mean over its local contexts.
        """
        encoded = [
            None
            if all(reads_alone(self.adapter, query) for query in example.queries)
            else encode_example(self.base, example, self.sink, self.kept)
            for example in examples
        ]
        tasks = [Task(chunks, query) for chunks, item in zip(encoded, examples, strict=True) for query in item.queries]
        config = self.config
        logits = iter(
            dense_logits(
                self.base,
                self.adapter,
                tasks,
                self.sink,
                config.positions,
                Scoring.of(config),
                gradient_checkpointing=config.gradient_checkpointing,
                fixed=config.fixed_candidates,
            )
        )
        total, records = torch.zeros((), device=self.base.device), []
        for example in examples:
            losses, divergences, absent = [], [], []
            for query in example.queries:
                scores = next(logits)
                loss = likelihood_loss(scores, query)
                losses.append(float(loss.detach()))
                absent.append(query.absent)
                divergence = self._divergence(scores, example, query)
                if divergence is not None:
                    divergences.append(float(divergence.detach()))
                    loss = loss + config.distillation[example.kind] * divergence
                total = total + scale / len(example.queries) * loss
            records.append({"kind": example.kind, "losses": losses, "divergences": divergences, "absent": absent})
        if not total.requires_grad:  # nothing in these examples is trained: text that reads nothing whole
            total = total + 0.0 * torch.stack([weight.sum() for weight in self.weights]).sum()
        return total, records

    def _divergence(self, scores: Tensor, example: Example, query: Any) -> Tensor | None:
        if not self.config.distillation.get(example.kind):
            return None
        teacher = teacher_logits(self.base, example, query, self.sink, self.config.teacher_memory)
        return None if teacher is None else distillation_loss(scores, teacher)


class _Run:
    """A run's moving parts: weights, optimizer, counters, files."""

    def __init__(
        self,
        base: BaseDecoder,
        adapter: CandidateAdapter,
        stream: ExampleStream,
        config: TrainConfig,
        output: Path,
        sink: int | None,
        processes: Processes,
        origin: Mapping[str, str],
    ) -> None:
        self.base, self.adapter, self.stream, self.config = base, adapter, stream, config
        self.origin = origin
        self.output, self.sink, self.processes = output, sink, processes
        self.totals, self.updating = Totals(), False
        self.lock: BaseFileLock | None = None
        self.passes = processes.passes(config.examples_per_step, config.examples_per_pass)
        self.parameters = trained_parameters(adapter, config)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        loss = CandidateLoss(base, adapter, config, sink)
        self.kept = loss.kept
        self.module, self.optimizer = processes.prepare(loss, self.adamw, self.passes)

    @property
    def finished(self) -> bool:
        """Whether the schedule is at its end."""
        return self.totals.step >= self.totals.last_step(self.config.steps)

    def step(self) -> dict[str, Any]:
        """Draw this process's examples, add their gradients, and take one optimizer step."""
        config, number, accelerator = self.config, self.totals.step, self.processes.accelerator
        # 1) the rate of this step
        rate = learning_rate(config, number, self.totals)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # 2) gradients, pass by pass; accelerate divides by passes and processes, which the scale makes up for
        indices = self.processes.share(range(config.examples_per_step))
        scale = self.passes * self.processes.count / config.examples_per_step
        size, norm, records = len(indices) // self.passes, 0.0, []
        for start in range(0, len(indices), size):
            drawn = {index: self.stream.example(number, index) for index in indices[start : start + size]}
            with accelerator.accumulate(self.module):
                loss, done = self.module(list(drawn.values()), scale)
                self.updating = start + size >= len(indices)  # from here a checkpoint would mix old and new weights
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm) or 0.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            records += [
                {"index": index, "chunks": len(item.chunks), "tokens": item.tokens, "targets": item.targets} | record
                for (index, item), record in zip(drawn.items(), done, strict=True)
            ]
        # 3) counters
        every = sorted(self.processes.gather(records), key=lambda record: int(record["index"]))
        self.totals.step += 1
        self.totals.tokens += sum(record["tokens"] for record in every)
        self.totals.targets += sum(record["targets"] for record in every)
        self.updating = False
        kept = self.kept.found / max(1, self.kept.asked)
        return {**_summary(every), "learning_rate": rate, "grad_norm": norm, "kept": kept}

    def measure(self, held_out: Sequence[Example], keep_best: Callable[[Totals], None]) -> Loss:
        """Measure the held-out loss, every process its share, and keep the adapter if it was never as low."""
        own = self.processes.share(held_out)
        losses = example_losses(self.base, self.adapter, own, self.sink, self.config)
        loss = Loss.mean_of(self.processes.gather(losses))
        if self.totals.best is None or loss.loss < self.totals.best:
            self.totals.best, self.totals.best_step = loss.loss, self.totals.step
            if self.processes.is_main:
                keep_best(self.totals)
        return loss

    def counters(self) -> dict[str, Any]:
        """Return the counters that a report shows."""
        totals = self.totals
        return {"step": totals.step, "tokens": totals.tokens, "targets": totals.targets, "seconds": totals.seconds}

    def log(self, done: StepReport, report: Callable[[StepReport], None]) -> None:
        """Append a line to the log and tell the caller, in the first process only."""
        if self.processes.is_main:
            with (self.output / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(dataclasses.asdict(done)) + "\n")
            report(done)
        self.processes.track(_tracked(done), done.step)

    def save(self) -> None:
        """Write a checkpoint; every process must call it."""
        if self.processes.deepspeed:
            self.module.save_checkpoint(str(self.output / "deepspeed"), tag="last")
        if self.processes.is_main:
            optimizer = None if self.processes.deepspeed else self.adamw
            save_checkpoint(self.output, self.adapter, optimizer, self.totals, self.config, self.origin)
        self.processes.accelerator.wait_for_everyone()

    def resume(self, notice: Callable[[str], None]) -> None:
        """Go on from the checkpoint, if there is a sound one, in a folder that no other run writes to."""
        saved, damage, refused = None, "", None
        if self.processes.is_main:
            try:
                self.lock = lock_run(self.output)
            except AdapterError as error:
                refused = error
        if self.processes.agree(refused is not None):
            raise refused or AdapterError(f"another run is training into {self.output}")
        try:
            saved = read_checkpoint(self.output, self.config, self.origin)
        except DamagedError as error:
            damage = str(error)
        main, optimizer = self.processes.is_main, None if self.processes.deepspeed else self.adamw
        if self.processes.agree(bool(damage)):
            saved = None
            if main:
                notice(f"{damage}; it is kept in {set_aside(self.output)}, and the run begins anew")
        if saved is not None:
            saved.load(self.adapter, optimizer)
            self.totals = saved.totals
        if self.processes.deepspeed and self.totals.step:
            self.module.load_checkpoint(str(self.output / "deepspeed"), tag="last")
        self.output.mkdir(parents=True, exist_ok=True)
        if main:
            cut_log(self.output, self.totals.step)

    def begin_to_finish(self, steps: int | None) -> None:
        """Let the rate fall to zero over the next steps, unless it does already or the schedule is at its end."""
        if steps is not None and not self.totals.finish_steps and not self.finished:
            self.totals.finish_from, self.totals.finish_steps = self.totals.step, steps

    def release(self) -> None:
        """Let the folder go, and the adapter as it came: without gradients."""
        if self.lock is not None:
            self.lock.release()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _tracked(done: StepReport) -> dict[str, float]:
    """Return the numbers of a step that trackers draw."""
    values = {
        "loss": done.loss,
        "tokens": done.tokens,
        "learning_rate": done.learning_rate,
        "grad_norm": done.grad_norm,
    }
    values |= {f"loss/{kind}": loss for kind, loss in done.by_kind.items()}
    if done.held_out is not None:
        values |= {"held_out": done.held_out.loss} | {
            f"held_out/{kind}": it for kind, it in done.held_out.by_kind.items()
        }
    return values | {f"metric/{name}": value for name, value in done.metrics.items()}


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means that a step's records give, over all processes."""
    loss = Loss.mean_of((record["kind"], record["losses"]) for record in records)
    apart: dict[str, list[float]] = {}
    for record in records:
        for value, absent in zip(record["losses"], record["absent"], strict=True):
            apart.setdefault(f"{record['kind']}, not there" if absent else record["kind"], []).append(value)
    divergences = [value for record in records for value in record["divergences"]]
    return {
        "loss": loss.loss,
        "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(apart.items())},
        "divergence": sum(divergences) / len(divergences) if divergences else None,
        "chunks": [record["chunks"] for record in records],
    }
