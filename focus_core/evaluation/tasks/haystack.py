"""Hide sentences in filler at given depths, so that only the chunks that hold them differ between trials.

Repeated filler is one document. Natural filler is cut into passages of at most one chunk, each a document; a needle
goes between two sentences of one passage, so all other passages, and their chunk KV, are the same in every trial.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from focus_core.errors import EmptyCorpusError
from focus_core.text.chunking import cut
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_MARGIN = 4  # tokens that joining a needle to its neighbours can cost


@dataclass(frozen=True)
class Haystack:
    """Filler to hide needles in.

    Args:
        tokenizer: counts tokens.
        tokens: about how many the documents hold together, needles included.
        chunk_size: most tokens of a passage with its needle (natural filler).
        text: natural filler; ``None`` repeats the passkey prompt's sentences.
        room: tokens left free for a needle in every passage; more, by steps of it, where one is longer.
        place: where natural filler begins, 0 to 1 of the places that a text of up to twice the tokens leaves; so
            contexts differ while their passages, and chunk KV, are of one set.
    """

    tokenizer: TextTokenizer
    tokens: int
    chunk_size: int
    text: str | None = None
    room: int = 48
    place: float = 0.0

    def hide(self, needles: Sequence[str], depths: Sequence[float], head: str = "") -> tuple[Document, ...]:
        """Return documents with each needle at its depth.

        Args:
            needles: sentences.
            depths: of each, 0 is the beginning and 1 the end.
            head: stands before everything; a document of its own in natural filler.

        Raises:
            EmptyCorpusError: the natural filler is too short.
        """
        if self.text is None:
            return (Document("haystack", self._repeated(needles, depths, head)),)
        return self._natural(needles, depths, head)

    def gold(self, documents: Sequence[Document], needle: str) -> str | None:
        """Return the id of the passage that holds ``needle``; ``None`` where there is one document only."""
        return next(item.id for item in documents if needle in item.text) if len(documents) > 1 else None

    def _repeated(self, needles: Sequence[str], depths: Sequence[float], head: str) -> str:
        used = sum(len(self.tokenizer.encode(line + "\n")) for line in (head, *needles))
        lines = max(2, (self.tokens - used) // len(self.tokenizer.encode(FILLER + "\n")))
        placed: list[str] = [FILLER] * lines
        for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            placed.insert(round(lines * depth), needle)
        return "\n".join([head, *placed] if head else placed)

    def _natural(self, needles: Sequence[str], depths: Sequence[float], head: str) -> tuple[Document, ...]:
        longest = max(len(self.tokenizer.encode(needle)) for needle in needles)
        room = self.room * -(-longest // self.room)  # in steps: passages must not change with a needle's digits
        size = max(8, self.chunk_size - room - _MARGIN)
        count = len(_passages(self.tokenizer, str(self.text), self.tokens, size))
        pool = _passages(self.tokenizer, str(self.text), 2 * self.tokens, size, self.tokens)
        start = min(int(self.place * (len(pool) - count + 1)), len(pool) - count)
        passages = list(pool[start : start + count])
        order = sorted(range(len(needles)), key=lambda index: depths[index])
        for index, place in zip(reversed(order), reversed(_places(sorted(depths), len(passages))), strict=True):
            within = depths[index] * len(passages) % 1
            passages[place] = _insert(passages[place], needles[index], within)
        first = (Document("head", head),) if head else ()
        return (*first, *(Document(f"passage-{index:04}", text) for index, text in enumerate(passages)))


@lru_cache(maxsize=8)
def _passages(tokenizer: TextTokenizer, text: str, tokens: int, size: int, least: int | None = None) -> tuple[str, ...]:
    """Cut the beginning of ``text`` into passages of at most ``size`` tokens, ``tokens`` in all, or what there is."""
    encoded = tokenizer.encode_with_offsets(text)
    if len(encoded.ids) < (tokens if least is None else least):
        raise EmptyCorpusError(
            f"the filler holds {len(encoded.ids)} tokens, but {tokens} are asked for; give a longer --filler"
        )
    beginning = text[: int(encoded.starts[tokens])] if tokens < len(encoded.ids) else text
    chunks = cut("filler", beginning, tokenizer.encode_with_offsets(beginning), size)
    texts = (beginning[chunk.start : chunk.end].strip() for chunk in chunks)
    return tuple(passage for passage in texts if passage)


def _places(depths: Sequence[float], total: int) -> list[int]:
    """Return a passage for each of the rising ``depths``: in the same order, one needle each while there are enough."""
    places = [min(total - 1, int(depth * total)) for depth in depths]
    if len(depths) > total:
        return places
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + 1)
    return [min(place, total - len(places) + index) for index, place in enumerate(places)]


def _insert(passage: str, needle: str, within: float) -> str:
    """Put ``needle`` between two sentences, at about ``within`` of the passage."""
    gaps = [0, *[match.end() for match in _SENTENCE_END.finditer(passage)], len(passage)]
    gap = min(gaps, key=lambda at: abs(at - within * len(passage)))
    return " ".join(part for part in (passage[:gap].rstrip(), needle, passage[gap:].lstrip()) if part)
