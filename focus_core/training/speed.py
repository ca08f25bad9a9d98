"""Tell how fast a run is and how long it will take, from the reports of its steps.

Steps of a resumed run's earlier life do not count: another machine may have made them. Nothing is printed here.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta

from focus_core.training.loop import StepReport

_RECENT = 20  # steps that speed and loss are averaged over


class Speed:
    """Averages the last steps.

    Args:
        steps: of the whole schedule.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._seen: deque[StepReport] = deque(maxlen=_RECENT + 1)

    def line(self, step: StepReport) -> str:
        """Return loss, tokens per second and time left, after ``step``."""
        self._seen.append(step)
        losses = [report.loss for report in list(self._seen)[-_RECENT:]]
        text = f"loss {sum(losses) / len(losses):.3f}"
        first = self._seen[0]
        seconds, steps = step.seconds - first.seconds, step.step - first.step
        if steps == 0 or seconds <= 0:
            return text
        left = timedelta(seconds=round((self.steps - step.step) * seconds / steps))
        return f"{text}  {(step.tokens - first.tokens) / seconds:,.0f} tokens/s  {left} left"
