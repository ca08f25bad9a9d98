"""Shape the pieces of a streamed answer alike for every framework. Pure functions of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Yield pieces without the white space at both ends of the whole, so that streams add up to ``answer.text``."""
    held, begun = "", False
    for piece in pieces:
        held += piece if begun else piece.lstrip()
        ready = held.rstrip()
        if ready:
            begun = True
            held = held[len(ready) :]
            yield ready
