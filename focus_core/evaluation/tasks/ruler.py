"""Make RULER's synthetic tasks (Hsieh et al., 2024) with its prompts: needles, variables, common and frequent words.

Words are invented unless a list is given; filler is repeated sentences unless a text is given. Each prompt ends with
RULER's answer prefix, so the model continues it. Trials are functions of a seed.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from focus_core.evaluation.tasks.haystack import Haystack
from focus_core.evaluation.tasks.passkey import depth_of
from focus_core.evaluation.tasks.vocabulary import draw_numbers, draw_words
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_NEEDLE_HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
_VARIABLE_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text."
_COMMON_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
_CODED_HEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
_COMMON = 10
_COUNTS = (30, 3)  # RULER: the common words stand thirty times, all others three times
_COUNTS_SHORT = (6, 1)  # and where that would be too long
_FREQUENT = 3
_NOISE = "..."  # the most frequent "word" of the coded text is dots


def needles(
    haystack: Haystack,
    trials: int,
    seed: int = 0,
    *,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
    words: Path | None = None,
) -> Iterator[Trial]:
    """Yield needle trials: ``keys`` different keys with ``values`` numbers each, of which ``asked`` keys are asked.

    RULER's variants are single (1, 1, 1), multi-key (4, 1, 1), multi-value (1, 4, 1) and multi-query (4, 1, 4).

    Args:
        haystack: filler.
        trials: how many.
        seed: of keys, values and places.
        keys: different keys hidden.
        values: numbers of each key.
        asked: keys that the question names; all their numbers are wanted.
        words: list of words for the keys; ``None`` invents them.
    """
    for index in range(trials):
        rng = random.Random(f"needles/{seed}/{haystack.tokens}/{keys}/{values}/{asked}/{index}")
        first, second = draw_words(rng, keys, words), draw_words(rng, keys, words)
        names = [f"{one}-{two}" for one, two in zip(first, second, strict=True)]
        numbers = draw_numbers(rng, keys * values)
        owned = {name: numbers[place * values : (place + 1) * values] for place, name in enumerate(names)}
        hidden = [_NEEDLE.format(key=name, value=value) for name in names for value in owned[name]]
        depths = [depth_of(index), *[rng.random() for _ in hidden[1:]]]
        documents = haystack.hide(hidden, depths, _NEEDLE_HEAD)
        wanted = tuple(value for name in names[:asked] for value in owned[name])
        several = len(wanted) > 1
        listed = " and ".join([", ".join(names[: asked - 1]), names[asked - 1]]) if asked > 1 else names[0]
        what, verb, prefix = ("numbers", "are all", "are") if several else ("number", "is", "is")
        question = (
            f"What {verb} the special magic {what} for {listed} mentioned in the provided text? "
            f"The special magic {what} for {listed} mentioned in the provided text {prefix}"
        )
        gold = haystack.gold(documents, hidden[0]) if len(hidden) == keys and asked == 1 else None
        yield Trial(
            documents, question, wanted, gold, True, f"depth {depth_of(index):.2f}", "all", 16 + 16 * len(wanted)
        )


def variables(haystack: Haystack, trials: int, seed: int = 0, *, hops: int = 4, chains: int = 1) -> Iterator[Trial]:
    """Yield variable-tracking trials: ``chains`` chains of ``hops`` assignments; every name of the first is wanted."""
    for index in range(trials):
        rng = random.Random(f"variables/{seed}/{haystack.tokens}/{hops}/{chains}/{index}")
        names = _codes(rng, chains * (hops + 1), string.ascii_uppercase, 5)
        numbers = draw_numbers(rng, chains, 5)
        lines, depths = [], []
        for chain, number in enumerate(numbers):
            own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
            lines += [f"VAR {own[0]} = {number}"] + [f"VAR {b} = VAR {a}" for a, b in pairwise(own)]
            depths += sorted(rng.random() for _ in own)  # an assignment stands behind what it reads
        documents = haystack.hide(lines, depths, _VARIABLE_HEAD)
        question = (
            f"Find all variables that are assigned the value {numbers[0]} in the text above. According to the chain(s) "
            f"of variable assignment in the text above, {hops + 1} variables are assigned the value {numbers[0]}, they "
            "are:"
        )
        yield Trial(documents, question, tuple(names[: hops + 1]), None, True, f"{hops} hops", "all", 12 * (hops + 1))


def common_words(haystack: Haystack, trials: int, seed: int = 0, *, words: Path | None = None) -> Iterator[Trial]:
    """Yield common-words trials: a numbered list in which ten words stand thirty times and all others three times."""
    for index in range(trials):
        rng = random.Random(f"common/{seed}/{haystack.tokens}/{index}")
        drawn = draw_words(rng, max(_COMMON + 50, haystack.tokens // 6), words)
        common, others = drawn[:_COMMON], drawn[_COMMON:]
        sample = " ".join(f"{place}. {word}" for place, word in enumerate(others[:50], 100))
        length = haystack.tokens * 50 // len(haystack.tokenizer.encode(sample))
        often, seldom = _COUNTS if length >= _COMMON * (_COUNTS[0] + _COUNTS[1]) else _COUNTS_SHORT
        rare = others[: max(1, (length - _COMMON * often) // seldom)]
        listed = common * often + rare * seldom
        rng.shuffle(listed)
        text = "\n".join(f"{place}. {word}" for place, word in enumerate(listed, 1))
        question = (
            "What are the 10 most common words in the above list? "
            "Answer: The top 10 words that appear most often in the list are:"
        )
        document = Document("list", f"{_COMMON_HEAD}\n{text}")
        yield Trial((document,), question, tuple(common), None, True, f"{len(listed)} words", "all", 120)


def frequent_words(haystack: Haystack, trials: int, seed: int = 0, *, alpha: float = 2.0) -> Iterator[Trial]:
    """Yield frequent-words trials: coded words whose counts fall as 1 / rank ** alpha; ranks 2 to 4 are wanted."""
    for index in range(trials):
        rng = random.Random(f"frequent/{seed}/{haystack.tokens}/{alpha}/{index}")
        coded = _codes(rng, 500, string.ascii_lowercase, 6)
        word = len(haystack.tokenizer.encode(" " + " ".join(coded[:50]))) / 50
        noise = len(haystack.tokenizer.encode(f" {_NOISE}" * 10)) / 10
        ranked = [_NOISE, *coded]
        weights = [rank**-alpha for rank in range(1, len(ranked) + 1)]
        share = weights[0] / sum(weights)
        total = haystack.tokens / (word * (1 - share) + noise * share)
        counts = [round(total * weight / sum(weights)) for weight in weights]
        stream = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        rng.shuffle(stream)
        question = (
            "Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
            "appeared words in the above coded text? Answer: According to the coded text above, the three most "
            "frequently appeared words are:"
        )
        document = Document("coded", f"{_CODED_HEAD} {' '.join(stream)}")
        yield Trial((document,), question, tuple(ranked[1 : 1 + _FREQUENT]), None, True, "", "all", 50)


def _codes(rng: random.Random, count: int, letters: str, length: int) -> list[str]:
    """Return ``count`` different random strings."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(letters, k=length))] = None
    return list(found)
