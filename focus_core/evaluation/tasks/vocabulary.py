"""Draw words and numbers for generated tasks: from a word list, or invented from syllables. Functions of a seed."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from focus_core.evaluation.files import read_text

_ONSETS = ["b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "r", "s"]
_ONSETS += ["sh", "sl", "st", "t", "th", "tr", "v", "w", "z"]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
_ENDS = ["", "b", "ck", "d", "g", "l", "ll", "m", "n", "nd", "nt", "p", "r", "rn", "s", "sk", "st", "t", "x"]


def draw_words(rng: random.Random, count: int, source: Path | None = None) -> list[str]:
    """Return ``count`` different words, from a list of one a line or invented."""
    known = _listed(source) if source is not None else ()
    if len(known) >= count:
        return rng.sample(known, count)
    words: dict[str, None] = dict.fromkeys(rng.sample(known, len(known)))
    while len(words) < count:
        words[_invented(rng)] = None
    return list(words)


def draw_numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """Return ``count`` different numbers of ``digits`` digits."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def draw_uuid(rng: random.Random) -> str:
    """Return a random version-4 UUID."""
    value = f"{rng.getrandbits(128):032x}"
    return f"{value[:8]}-{value[8:12]}-4{value[13:16]}-{rng.choice('89ab')}{value[17:20]}-{value[20:]}"


def _invented(rng: random.Random) -> str:
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ENDS) for _ in range(rng.choice([2, 2, 3]))]
    return "".join(parts)


@lru_cache(maxsize=4)
def _listed(source: Path) -> tuple[str, ...]:
    words = (line.strip() for line in read_text(source).splitlines())
    return tuple(dict.fromkeys(word for word in words if len(word) > 2 and word.isalpha() and word.islower()))
