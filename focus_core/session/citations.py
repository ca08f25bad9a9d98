"""Say which words of an answer stand on which passage, by the attention that the passage's candidate received there.

Every generated token's local row spread its attention over the candidates. A word is credited to the passages that
received at least half of what the best one did while the word was made; a citation names one run of such words and one
passage. The cited text is copied from the document, never written by the model. Pure arithmetic.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from focus_core.answers import Answer
from focus_core.generation import Token
from focus_core.method.attribution import Evidence
from focus_core.text.corpus import Document

STANDARD_CITATIONS = 3
"""Most citations of an answer, where nobody says."""
_CREDITED = 0.5
"""Share of the best passage's attention on a word that makes another passage a source of that word too."""


@dataclass(frozen=True)
class Citation:
    """One passage and the words of the answer that stand on it.

    Args:
        start: first character of those words in the answer's text.
        end: character after them.
        document_id: of the document.
        title: the document's, its file's name or its id where it has none.
        url: where the document came from, if it is known.
        page: of the passage, counted from 1, where the document has pages.
        source_start: first character of the passage in the document's text.
        source_end: character after it.
        cited_text: ``document.text[source_start:source_end]``.
        score: share of the whole answer's attention on memory that the passage received.
        spans: all runs of words that stand on the passage; ``start`` and ``end`` are the one with most attention.
    """

    start: int
    end: int
    document_id: str
    title: str
    url: str | None
    page: int | None
    source_start: int
    source_end: int
    cited_text: str
    score: float
    spans: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in plain JSON types."""
        return {**asdict(self), "spans": [list(span) for span in self.spans]}

    def moved(self, by: int) -> Citation:
        """Return the citation of an answer with ``by`` characters in front of it."""
        spans = tuple((start + by, end + by) for start, end in self.spans)
        return replace(self, start=self.start + by, end=self.end + by, spans=spans)


@dataclass(frozen=True)
class _Word:
    start: int
    end: int
    attention: Tensor  # (k,)


def cite(answer: Answer, documents: Mapping[str, Document], limit: int) -> list[Citation]:
    """Return at most ``limit`` citations, best passages first; none for an answer without text or memory.

    Args:
        answer: with its tokens and (tokens, k) attention.
        documents: those that may be cited, by id.
        limit: most citations.
    """
    words = words_of(answer) if limit else []
    if not words:
        return []
    by_chunk = torch.stack([word.attention for word in words])  # (words, k)
    best = by_chunk.max(dim=1, keepdim=True).values
    credited = (by_chunk >= _CREDITED * best) & (best > 0)
    found: list[Citation] = []
    for item in answer.passages:
        if len(found) >= limit:
            break
        if item.document_id not in documents:
            continue
        runs = _runs(words, credited[:, item.chunk].tolist(), by_chunk[:, item.chunk].tolist())
        if runs:
            found.append(_citation(item, documents[item.document_id], runs))
    return found


_SHOWN = 64
"""Passages of an :class:`AttentionMap`: those with most attention."""


@dataclass(frozen=True)
class AttentionMap:
    """Where the model looked while it made each word.

    Args:
        passages: with most attention, best first.
        words: (start, end) of each word in the answer's text.
        weights: for each word the attention on each passage.
    """

    passages: tuple[Citation, ...]
    words: tuple[tuple[int, int], ...]
    weights: tuple[tuple[float, ...], ...]

    def moved(self, by: int) -> AttentionMap:
        """Return the map of an answer with ``by`` characters in front of it."""
        return replace(self, words=tuple((start + by, end + by) for start, end in self.words))


def attention_map(answer: Answer, documents: Mapping[str, Document]) -> AttentionMap:
    """Return the attention of an answer's words on the passages that received most."""
    words, best = words_of(answer), answer.passages[:_SHOWN]
    return AttentionMap(
        tuple(_citation(item, documents[item.document_id], [(0.0, 0, len(answer.text))]) for item in best),
        tuple((word.start, word.end) for word in words),
        tuple(tuple(float(word.attention[item.chunk]) for item in best) for word in words),
    )


def words_of(answer: Answer) -> list[_Word]:
    """Return the words of an answer with the attention on every chunk while each was made."""
    places = token_places(answer.tokens, answer.text)
    if not places or not answer.attention.numel():
        return []
    words = []
    for match in re.finditer(r"\S+", answer.text):
        inside = [index for index, (start, end) in enumerate(places) if start < match.end() and end > match.start()]
        if inside:
            words.append(_Word(match.start(), match.end(), answer.attention[inside].sum(0)))
    return words


def token_places(tokens: Sequence[Token], text: str) -> list[tuple[int, int]]:
    """Return where each token's text stands in the answer's, which is stripped of white space at both ends."""
    written = "".join(token.text for token in tokens)
    at = -(len(written) - len(written.lstrip()))
    places = []
    for token in tokens:
        places.append((max(0, min(at, len(text))), max(0, min(at + len(token.text), len(text)))))
        at += len(token.text)
    return places


def _runs(words: Sequence[_Word], credited: Sequence[bool], mass: Sequence[float]) -> list[tuple[float, int, int]]:
    """Return (attention, start, end) of each run of neighbouring credited words, most attention first."""
    found: list[tuple[float, int, int]] = []
    open_run = False
    for word, counts, weight in zip(words, credited, mass, strict=True):
        if counts and open_run:
            before = found[-1]
            found[-1] = (before[0] + weight, before[1], word.end)
        elif counts:
            found.append((weight, word.start, word.end))
        open_run = counts
    return sorted(found, key=lambda run: (-run[0], run[1]))


def _citation(item: Evidence, document: Document, runs: Sequence[tuple[float, int, int]]) -> Citation:
    return Citation(
        start=runs[0][1],
        end=runs[0][2],
        document_id=item.document_id,
        **about(document.metadata, item.document_id, item.start),
        source_start=item.start,
        source_end=item.end,
        cited_text=item.text,
        score=item.score,
        spans=tuple(sorted((start, end) for _, start, end in runs)),
    )


def about(metadata: Mapping[str, Any], name: str, start: int) -> dict[str, Any]:
    """Return ``title``, ``url`` and ``page`` of a passage that begins at character ``start`` of a document.

    Args:
        metadata: the document's; ``page_starts`` is the first character of each page of a whole document,
            ``page_label`` the number of a document that is one page, as the frameworks' readers give it.
        name: title of a document that has none.
        start: first character of the passage.
    """
    url = metadata.get("url") or metadata.get("source")
    title = metadata.get("title") or metadata.get("file_name") or name
    return {"title": str(title), "url": str(url) if url else None, "page": page_at(metadata, start)}


def source_dict(item: Evidence, documents: Mapping[str, Document]) -> dict[str, Any]:
    """Return a passage in plain JSON types, with its page where its document has pages."""
    page = page_at(documents[item.document_id].metadata, item.start) if item.document_id in documents else None
    return asdict(item) if page is None else {**asdict(item), "page": page}


def page_at(metadata: Mapping[str, Any], start: int) -> int | None:
    """Return the page, counted from 1, that a character of a document is on; ``None`` where it has no pages."""
    starts, label = metadata.get("page_starts"), str(metadata.get("page_label") or "")
    if isinstance(starts, list) and starts:
        return max(1, bisect.bisect_right(starts, start))
    return int(label) if label.isdecimal() else None
