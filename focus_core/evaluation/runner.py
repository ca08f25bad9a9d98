"""Run trials, resume after a stop, and summarise: one predictions file and one metrics file a table row.

Every prediction is written as it is made, so a run that is started again goes on behind the last one.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from focus_core.engine import FocusEngine
from focus_core.evaluation.baselines import BASELINES
from focus_core.evaluation.metrics import contains_answer, wilson
from focus_core.evaluation.tasks import Trial

FOCUS = "focusllm"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: task and its settings.
        method: ``focusllm`` or a baseline.
        right: answers that hold one of the accepted strings.
        trials: how many were asked.
        recall_at_1: share of trials whose best-scored document is the gold one; ``None`` where it does not apply.
        chunks: mean k.
        seconds: mean time a trial took.
    """

    name: str
    method: str
    right: int
    trials: int
    recall_at_1: float | None
    chunks: float
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the share of right answers."""
        return wilson(self.right, self.trials)


def run(
    engine: FocusEngine,
    name: str,
    trials: Iterable[Trial],
    method: str,
    max_tokens: int,
    output: Path,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Row:
    """Answer every trial with ``method``, write ``{name}.{method}.jsonl`` and ``.json`` under ``output``.

    Args:
        engine: model under test; baselines use its base.
        name: of the files.
        trials: from :mod:`focus_core.evaluation.tasks`.
        method: ``focusllm`` or a key of ``BASELINES``.
        max_tokens: most tokens of an answer.
        output: folder.
        report: called with each prediction.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.{method}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with path.open("a") as file:
        for index, trial in enumerate(trials):
            if index < len(done):
                continue
            started = time.monotonic()
            prediction = _ask(engine, trial, method, max_tokens)
            prediction |= {
                "trial": index,
                "label": trial.label,
                "answers": list(trial.answers),
                "right": contains_answer(prediction["text"], trial.answers),
                "seconds": round(time.monotonic() - started, 3),
            }
            done.append(prediction)
            file.write(json.dumps(prediction) + "\n")
            file.flush()
            report(prediction)
    row = summarise(name, method, done)
    metrics = {
        **row.__dict__,
        "interval": row.interval,
        "focus": engine.config.to_dict(),
        "trained": engine.info.trained,
        "base": engine.loaded.fingerprint,
        "adapter": engine.adapter_fingerprint,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    (output / f"{name}.{method}.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return row


def summarise(name: str, method: str, predictions: list[dict[str, Any]]) -> Row:
    """Turn predictions into a table line."""
    count = len(predictions)
    known = [row["gold_first"] for row in predictions if row.get("gold_first") is not None]
    return Row(
        name,
        method,
        sum(row["right"] for row in predictions),
        count,
        sum(known) / len(known) if known else None,
        sum(row["chunks"] for row in predictions) / max(count, 1),
        sum(row["seconds"] for row in predictions) / max(count, 1),
    )


def _ask(engine: FocusEngine, trial: Trial, method: str, max_tokens: int) -> dict[str, Any]:
    if method != FOCUS:
        return {"text": BASELINES[method](engine, trial, max_tokens), "chunks": 0}
    memory = engine.remember(trial.documents)
    template = "raw" if trial.raw else "question"
    answer = engine.answer(trial.question, memory, template=template, max_tokens=max_tokens)
    first = None if trial.gold is None or len(memory) < 2 else answer.evidence[0].document_id == trial.gold
    return {"text": answer.text, "chunks": len(memory), "gold_first": first}
