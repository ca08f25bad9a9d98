"""Draw the loss of a run from its log: every objective's running mean, and the held-out loss.

matplotlib is optional; nothing else here needs it. The log is read, never written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from focus_core.errors import ConfigError, DocumentNotFoundError

_WINDOW = 20  # steps of the running mean


def plot_loss(run: Path, picture: Path | None = None, *, by: str = "step") -> Path:
    """Draw ``log.jsonl`` of a run.

    Args:
        run: the folder that training wrote to.
        picture: the file to write; ``loss.png`` in ``run`` if not given.
        by: ``step`` or (input) ``tokens``.

    Returns:
        The picture's path.

    Raises:
        DocumentNotFoundError: there is no log.
        ConfigError: matplotlib is not installed, or ``by`` is something else.
    """
    if by not in ("step", "tokens"):
        raise ConfigError(f"losses are drawn by step or by tokens; got {by!r}")
    log = run / "log.jsonl"
    if not log.is_file():
        raise DocumentNotFoundError(f"no training log at {log}; name the --output folder of `focusllm train`")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib; run `pip install 'focusllm[train]'`") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind in sorted({kind for row in rows for kind in row["by_kind"]}):
        axes.plot(*_running_mean(rows, kind, by), label=kind, linewidth=1.2)
    held = [(row[by], row["held_out"]["loss"]) for row in rows if row.get("held_out")]
    if held:
        axes.plot(*zip(*held, strict=True), label="held out, all", color="black", marker="o", markersize=3)
    axes.set_xlabel("step" if by == "step" else "input tokens")
    axes.set_ylabel(f"loss, nats per target (mean of {_WINDOW} steps)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()
    picture = picture or run / "loss.png"
    figure.savefig(picture, dpi=120)
    return picture


def _running_mean(rows: list[dict[str, Any]], kind: str, by: str) -> tuple[list[int], list[float]]:
    found = [(row[by], row["by_kind"][kind]) for row in rows if kind in row["by_kind"]]
    steps, losses = [step for step, _ in found], [loss for _, loss in found]
    means = []
    for index in range(len(losses)):
        recent = losses[max(0, index + 1 - _WINDOW) : index + 1]
        means.append(sum(recent) / len(recent))
    return steps, means
