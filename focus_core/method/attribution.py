"""Turn the attention that candidates received into scores per chunk and per document.

Each generated token's local row spreads its attention over the local tokens and the k candidates, in every layer and
head. The mass that the chosen heads put on a chunk's candidate, averaged over the answer's tokens, is what that chunk
contributed. Pure arithmetic; which heads are worth listening to is measured (docs/experiments.md) and stored with the
adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from focus_core.errors import ConfigError
from focus_core.text.chunking import Chunk
from focus_core.text.corpus import Document


@dataclass(frozen=True)
class Evidence:
    """A source of an answer.

    Args:
        document_id: of the document.
        score: share of the attention on memory that it received; all of an answer's scores add up to 1.
        start: first character of the passage; the best chunk's for a document.
        end: character after the passage.
        text: the passage, ``document.text[start:end]``.
        chunk: its chunk's place in memory.
    """

    document_id: str
    score: float
    start: int
    end: int
    text: str
    chunk: int


class AttentionRecord:
    """Attention mass on candidates, gathered while an answer is generated.

    Args:
        chunks: k, the number of candidates.
        heads: (layer, head) pairs to listen to; empty means all.
    """

    def __init__(self, chunks: int, heads: Sequence[tuple[int, int]] = ()) -> None:
        self.chunks, self.heads = chunks, tuple(heads)
        self._steps: list[Tensor] = []
        self._total: Tensor | None = None

    def add(self, mass: Sequence[Tensor]) -> None:
        """Record one step: ``mass`` holds, per layer, (heads, k) attention of the last local row."""
        stacked = torch.stack(list(mass)).float().cpu()  # (layers, heads, k)
        self._total = stacked if self._total is None else self._total + stacked
        self._steps.append(self._heard(stacked))

    def scores_of(self, mass: Sequence[Tensor]) -> Tensor:
        """Return (k,) mean mass of the heads listened to, for one step that is not recorded."""
        return self._heard(torch.stack(list(mass)).float().cpu())

    def _heard(self, stacked: Tensor) -> Tensor:
        if self.heads:
            layers, heads = zip(*self.heads, strict=True)
            stacked = stacked[list(layers), list(heads)]
        return stacked.reshape(-1, self.chunks).mean(0)

    def steps(self) -> Tensor:
        """Return (tokens, k) mean mass on each candidate at each generated token."""
        return torch.stack(self._steps) if self._steps else torch.zeros(0, self.chunks)

    def by_head(self) -> Tensor:
        """Return (layers, heads, k) mass summed over tokens; empty when nothing was recorded."""
        return self._total if self._total is not None else torch.zeros(0, 0, self.chunks)

    def scores(self) -> Tensor:
        """Return (k,) scores that add up to 1 (zeros when nothing was recorded)."""
        total = self.steps().sum(0)
        return total / total.sum().clamp_min(1e-12)


def leading_chunks(scores: Tensor, share: float) -> list[int]:
    """Return the fewest chunks, best first, whose (k,) scores make up ``share`` of the sum; at least one."""
    best, order = scores.double().sort(descending=True, stable=True)
    reached = best.cumsum(0) >= share * best.sum()
    return order[: int(reached.int().argmax()) + 1].tolist() if bool(reached.any()) else order.tolist()


def chunk_evidence(scores: Tensor, chunks: Sequence[Chunk], documents: dict[str, Document]) -> list[Evidence]:
    """Return one :class:`Evidence` a passage, best first; a packed chunk's score is shared by its spans' length."""
    found = []
    for place, (score, chunk) in enumerate(zip(scores.tolist(), chunks, strict=True)):
        length = sum(span.end - span.start for span in chunk.spans)
        for span in chunk.spans:
            text = documents[span.document_id].text[span.start : span.end]
            share = score * (span.end - span.start) / max(length, 1)
            found.append(Evidence(span.document_id, share, span.start, span.end, text, place))
    return sorted(found, key=lambda item: -item.score)


def document_evidence(evidence: Sequence[Evidence]) -> list[Evidence]:
    """Return one :class:`Evidence` a document, best first: scores added up, the best chunk as the passage."""
    best: dict[str, Evidence] = {}
    total: dict[str, float] = {}
    for item in evidence:
        total[item.document_id] = total.get(item.document_id, 0.0) + item.score
        if item.document_id not in best or item.score > best[item.document_id].score:
            best[item.document_id] = item
    merged = [replace(item, score=total[key]) for key, item in best.items()]
    return sorted(merged, key=lambda item: -item.score)


def save_heatmap(steps: Tensor, tokens: Sequence[str], labels: Sequence[str], path: str | Path) -> None:
    """Draw attention on candidates (arXiv 2408.11745, Fig. 7): generated tokens down, chunks across.

    Args:
        steps: (tokens, k) from :meth:`AttentionRecord.steps`.
        tokens: text of each generated token.
        labels: a name for each chunk.
        path: of the image; the ending chooses the format.

    Raises:
        ConfigError: there is nothing to draw, or matplotlib is not installed.
    """
    if not steps.numel():
        raise ConfigError("no attention was recorded: a heat map needs a memory with chunks and at least one token")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a heat map needs matplotlib; install it with `pip install matplotlib`") from error
    count = steps.shape[1]
    figure = Figure(figsize=(min(24.0, 3.0 + 0.28 * max(count, 12)), min(18.0, 1.8 + 0.28 * len(tokens))))
    axes = figure.subplots()
    image = axes.imshow(steps.numpy(), aspect="auto", cmap="magma", interpolation="nearest", vmin=0.0)
    axes.set_yticks(
        range(len(tokens)), [token.replace("\n", "\\n").replace("$", r"\$") for token in tokens], fontsize=8
    )
    every = max(1, -(-count // 60))
    axes.set_xticks(
        range(0, count, every), [labels[index][-24:].replace("$", r"\$") for index in range(0, count, every)]
    )
    axes.tick_params(axis="x", labelrotation=90, labelsize=6)
    axes.set_xlabel("candidate of chunk")
    axes.set_ylabel("generated token")
    figure.colorbar(image, label="attention mass")
    figure.tight_layout()
    figure.savefig(str(path), dpi=150)
