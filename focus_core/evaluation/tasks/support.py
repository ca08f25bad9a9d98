"""Calibrate ``Answer.supported``: fit the first token, attention, and both, on questions with and without a document.

Each is judged on questions that it was not fitted on (five folds, a question's two forms in one); what is returned to
be stored with the adapter is fitted on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from focus_core.engine import FocusEngine
from focus_core.evaluation.metrics import auroc
from focus_core.evaluation.trial import Trial
from focus_core.method.support import ATTENTION, FEATURES, FIRST_TOKEN, fit, supported

FOLDS = 5
MEASURES = {"first token": FIRST_TOKEN, "attention": ATTENTION, "both": (*FIRST_TOKEN, *ATTENTION)}


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Args:
        auroc: of each measure, on questions it was not fitted on.
        brier: mean squared error of each measure's probability there.
        constants: bias and weights of each measure, fitted on all.
        trials: how many, with and without together.
    """

    auroc: dict[str, float]
    brier: dict[str, float]
    constants: dict[str, tuple[float, ...]]
    trials: int

    @property
    def best(self) -> str:
        """The measure of the highest AUROC."""
        return max(self.auroc, key=lambda name: self.auroc[name])


def calibrate(
    engine: FocusEngine, trials: Iterable[Trial], report: Callable[[int], None] = lambda done: None
) -> Calibration:
    """Measure all trials and fit.

    Args:
        engine: model under test.
        trials: from :func:`~focus_core.evaluation.tasks.absent.with_and_without`, a question's two forms in turn.
        report: called with the number of trials done.
    """
    rows, present = [], []
    for trial in trials:
        answer = engine.answer(trial.question, engine.remember(trial.documents), max_tokens=1)
        rows.append(answer.support_features)
        present.append(not trial.absent)
        report(len(rows))
    return fit_all(rows, present)


def fit_all(rows: list[tuple[float, ...]], present: list[bool]) -> Calibration:
    """Fit every measure, and judge it fold by fold."""
    areas, errors, constants = {}, {}, {}
    for name, used in MEASURES.items():
        said = [0.0] * len(rows)
        for fold in range(FOLDS):
            inside = [index // 2 % FOLDS == fold for index in range(len(rows))]
            kept = [index for index, out in enumerate(inside) if not out]
            made = fit([rows[index] for index in kept], [present[index] for index in kept], used)
            for index in (index for index, out in enumerate(inside) if out):
                said[index] = supported(rows[index], made) or 0.0
        there = [value for value, held in zip(said, present, strict=True) if held]
        area = auroc(there, [value for value, held in zip(said, present, strict=True) if not held])
        areas[name] = 0.5 if area is None else area
        errors[name] = sum((value - held) ** 2 for value, held in zip(said, present, strict=True)) / len(said)
        constants[name] = fit(rows, present, used)
    assert all(len(values) == len(FEATURES) + 1 for values in constants.values())
    return Calibration(areas, errors, constants, len(rows))
