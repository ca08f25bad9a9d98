"""Say where candidates and local rows stand, what a local context begins with, and how candidates are weighed.

The published code numbers candidates 0..k-1 in front of the local rows (``ordered``); one common position for all of
them (``shared``) knows no order and no bound on k. Pure arithmetic; nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from focus_core.config import CandidateBias, FocusConfig, Positions, TrainConfig
from focus_core.errors import ContextTooLongError
from focus_core.model.families import BaseDecoder


def candidate_positions(chunks: int, positions: Positions) -> range | list[int]:
    """Return where the candidates stand in front of the local row: 0..k-1 if ``ordered``, all at 0 if ``shared``."""
    return range(chunks) if positions == "ordered" else [0] * chunks


def local_start(chunks: int, positions: Positions) -> int:
    """Return the position of the first local row: behind all candidates, or 0 when there are none."""
    return chunks if positions == "ordered" else min(chunks, 1)


def sink_before(local: Sequence[int], sink: int | None) -> list[int]:
    """Return what stands before a local context: the sink, unless there is none or the context begins with it."""
    return [] if sink is None or (len(local) > 0 and local[0] == sink) else [sink]


def check_room(base: BaseDecoder, chunks: int, positions: Positions, local_rows: int) -> None:
    """Raise :class:`ContextTooLongError` if the candidates and local rows pass the base's last position."""
    needed = local_start(chunks, positions) + local_rows
    if needed > base.window:
        raise ContextTooLongError(
            f"{chunks} candidates and {local_rows} local tokens need {needed} positions, but the base has "
            f"{base.window}; use positions='shared', larger chunks, or a shorter question"
        )


@dataclass(frozen=True)
class Scoring:
    """How local rows weigh candidates; the defaults leave the base's attention as it is.

    Args:
        bias: ``log_k`` lowers every candidate's score by log k.
        top: candidates that a head attends to; 0 is all.
        first_layer: local rows of layers before it attend to no candidates.
    """

    bias: CandidateBias = "none"
    top: int = 0
    first_layer: int = 0

    @classmethod
    def of(cls, settings: FocusConfig | TrainConfig) -> Self:
        """Return what an adapter's or a training run's settings say."""
        return cls(settings.candidate_bias, settings.top_candidates, settings.first_candidate_layer)

    def lowered(self, candidates: int) -> float:
        """Return what is taken off each of the scores of ``candidates`` candidates."""
        return math.log(max(candidates, 1)) if self.bias == "log_k" else 0.0


PLAIN = Scoring()
