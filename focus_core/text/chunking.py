"""Cut token ids into chunks that fit the native window, at the best boundaries, with exact offsets.

Boundaries prefer paragraphs, then lines that end a sentence, then sentences, then tokens, and always fall on whole
characters; the chunks of a document tile it, so ``text[start:end]`` is exactly the chunk. Documents never share a chunk
unless :func:`pack` is called. Pure functions of ids and text: no model, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from focus_core.errors import ConfigError
from focus_core.text.tokenization import Encoded

PARAGRAPH = re.compile(r"(?>\r\n|\r|\n)[ \t]*[\r\n]\s*")  # lines end with LF, CRLF or CR
_LINE = re.compile(r"[.!?…。！？][\"'”’)\]]*[ \t]*[\r\n]\s*")  # not where prose is wrapped
_SENTENCE = re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？]|\r\n?|\n")


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` of a document."""

    document_id: str
    start: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """Token ids and the text they came from; more than one span only after :func:`pack`."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def document_id(self) -> str:
        """Document of the first span."""
        return self.spans[0].document_id

    @property
    def start(self) -> int:
        """First character in that document."""
        return self.spans[0].start

    @property
    def end(self) -> int:
        """Character after the last one of the first span."""
        return self.spans[0].end


def cut(document_id: str, text: str, encoded: Encoded, size: int) -> list[Chunk]:
    """Cut one document into chunks of at most ``size`` tokens.

    Args:
        document_id: goes into the spans.
        text: the document.
        encoded: its ids and offsets.
        size: most tokens a chunk may have.

    Raises:
        ConfigError: one character alone needs more than ``size`` tokens.
    """
    chunks, first, total = [], 0, len(encoded.ids)
    while first < total:
        stop = total if total - first <= size else _boundary(text, encoded, first, first + size)
        start = int(encoded.starts[first]) if first else 0
        end = int(encoded.starts[stop]) if stop < total else encoded.length
        ids = tuple(encoded.ids[first:stop].tolist())
        chunks.append(Chunk(ids, (Span(document_id, start, end),)))
        first = stop
    return chunks


def pack(chunks: Iterable[Chunk], size: int, separator: tuple[int, ...] = ()) -> list[Chunk]:
    """Join neighbouring chunks, of different documents too, while they fit ``size`` tokens.

    Args:
        chunks: in the order to keep.
        size: most tokens of a joined chunk.
        separator: ids put between joined chunks.
    """
    packed: list[Chunk] = []
    for chunk in chunks:
        if packed and len(packed[-1].ids) + len(separator) + len(chunk.ids) <= size:
            packed[-1] = Chunk(packed[-1].ids + separator + chunk.ids, packed[-1].spans + chunk.spans)
        else:
            packed.append(chunk)
    return packed


def joined(parts: Iterable[Sequence[int]], separator: Sequence[int]) -> list[int]:
    """Return ids with ``separator`` between them, as :func:`pack` joins chunks."""
    ids: list[int] = []
    for part in parts:
        ids += [*(separator if ids else ()), *part]
    return ids


def _boundary(text: str, encoded: Encoded, first: int, limit: int) -> int:
    """Return the best token to end before, in the second half of ``first`` .. ``limit``."""
    half = first + max(1, (limit - first) // 2)
    low, high = int(encoded.starts[half]), int(encoded.starts[limit])
    for pattern in (PARAGRAPH, _LINE, _SENTENCE):
        for end in reversed([match.end() for match in pattern.finditer(text, low, high)]):
            token = _token_at(encoded, end, half, limit)
            if token is not None:
                return token
    for token in range(limit, first, -1):
        if encoded.clean[token]:
            return token
    raise ConfigError(
        f"chunk_size {limit - first} is smaller than the tokens of one character at {low}; use a larger chunk size"
    )


def _token_at(encoded: Encoded, character: int, half: int, limit: int) -> int | None:
    """Return the token that begins at ``character`` or up to a space before it, within bounds."""
    token = int(np.searchsorted(encoded.starts, character, side="left"))
    if token < len(encoded.starts) and encoded.starts[token] > character:
        token -= 1  # the boundary lies inside a token such as " Next": end before it
        if character - int(encoded.starts[token]) > 1:
            return None
    if half <= token <= limit and encoded.clean[token]:
        return token
    return None
