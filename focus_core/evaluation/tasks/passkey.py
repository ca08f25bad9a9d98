"""Make passkey trials: one number in a long text (Mohtashami and Jaggi, 2023; arXiv 2408.11745, Fig. 1).

Without distractors the prompt is the official one, word for word. With distractors every key has an owner's name, and
the question names one; as a ``story`` a fact of everyday life is hidden, in words that no training uses. Trials are
functions of a seed; depths walk through ten ranges, each trial has a place of its own, and natural filler begins
elsewhere in each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from focus_core.errors import ConfigError
from focus_core.evaluation.tasks.haystack import FILLER, Haystack
from focus_core.evaluation.trial import Trial
from focus_core.text.tokenization import TextTokenizer

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
ASK = "What is the pass key? The pass key is"
DEPTHS = 10
_GOLDEN = 0.6180339887
Needle = Literal["key", "story"]
_STORIES = (
    (
        "The tram to the quarry leaves at {v} sharp.",
        "When does the tram to the quarry leave?",
        ("6:40", "9:15", "17:05"),
    ),
    (
        "Old Pritchard keeps his savings in a {v}.",
        "Where does Old Pritchard keep his savings?",
        ("churn", "drum", "clock"),
    ),
    (
        "Only {v} knew how to tune the organ.",
        "Who knew how to tune the organ?",
        ("Ewan Sturt", "Lise Amsel"),
    ),
    ("The well behind the chapel is {v} feet deep.", "How deep is the well behind the chapel?", ("213", "87", "146")),
    ("They painted the ferry {v} last spring.", "What colour was the ferry painted?", ("ochre", "teal", "maroon")),
    ("The parcel weighed {v} grams on the post scale.", "How much did the parcel weigh?", ("4172", "938", "20655")),
    ("The recipe calls for {v}, of all things.", "What does the recipe call for?", ("fennel", "treacle", "mace")),
)
_OWNERS = (
    *("Alice", "Boris", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis"),
    *("Maria", "Nadia", "Oscar", "Paula", "Quinn", "Roger", "Sarah", "Tobias", "Ursula", "Victor", "Wendy", "Zelda"),
)

__all__ = ["ASK", "DEPTHS", "FILLER", "HEAD", "Needle", "depth_of", "passkey"]


def passkey(
    tokenizer: TextTokenizer,
    tokens: int,
    trials: int,
    seed: int = 0,
    *,
    distractors: int = 0,
    needle: Needle = "key",
    filler: str | None = None,
    chunk_size: int = 512,
) -> Iterator[Trial]:
    """Yield passkey trials of about ``tokens`` memory tokens.

    Args:
        tokenizer: counts tokens.
        tokens: of the text.
        trials: how many.
        seed: of keys and owners.
        distractors: keys of other owners hidden beside the wanted one, at most 23.
        needle: ``key`` for the official sentences, ``story`` for others.
        filler: natural text; ``None`` repeats the official sentences.
        chunk_size: most tokens of a passage of natural text.

    Raises:
        ConfigError: there are not that many owners.
    """
    if not 0 <= distractors < len(_OWNERS):
        raise ConfigError(f"distractors must be between 0 and {len(_OWNERS) - 1}; got {distractors}")
    if needle == "story":
        if distractors:
            raise ConfigError(f"stories have no other owners' keys; leave --distractors out, got {distractors}")
        yield from _stories(Haystack(tokenizer, tokens, chunk_size, filler), trials, seed)
        return
    room = max(len(tokenizer.encode(_needle("50000", owner if distractors else None))) for owner in _OWNERS)
    for index in range(trials):
        rng = random.Random(f"passkey/{seed}/{tokens}/{distractors}/{index}")
        keys = [str(key) for key in rng.sample(range(1, 50001), distractors + 1)]
        owners: list[str | None] = [*rng.sample(_OWNERS, distractors + 1)] if distractors else [None]
        needles = [_needle(key, owner) for key, owner in zip(keys, owners, strict=True)]
        haystack = Haystack(tokenizer, tokens, chunk_size, filler, room, rng.random())
        depth = _own_depth(index, seed)
        depths = [depth, *[rng.random() for _ in range(distractors)]]
        documents = haystack.hide(needles, depths, HEAD)
        gold = haystack.gold(documents, needles[0])
        yield Trial(documents, _ask(owners[0]), (keys[0],), gold, True, f"depth {depth_of(index):.2f}")


def _stories(haystack: Haystack, trials: int, seed: int) -> Iterator[Trial]:
    """Yield an everyday fact hidden in filler, and a question about it as a chat turn."""
    for index in range(trials):
        rng = random.Random(f"story/{seed}/{haystack.tokens}/{index}")
        said, question, values = _STORIES[index // DEPTHS % len(_STORIES)]
        value = rng.choice(values)
        depth = _own_depth(index, seed)
        documents = replace(haystack, place=rng.random()).hide([said.format(v=value)], [depth])
        gold = haystack.gold(documents, said.format(v=value))
        yield Trial(documents, question, (value,), gold, False, f"depth {depth_of(index):.2f}")


def _own_depth(index: int, seed: int) -> float:
    """Return a depth within the range of :func:`depth_of`; trials of a range are spread over it evenly."""
    first = random.Random(f"depth/{seed}/{index % DEPTHS}").random()
    return (index % DEPTHS + (first + index // DEPTHS * _GOLDEN) % 1) / DEPTHS


def depth_of(index: int) -> float:
    """Return the middle of a trial's range of depths: 0.05, 0.15 .. 0.95, again and again."""
    return (index % DEPTHS + 0.5) / DEPTHS


def _needle(key: str, owner: str | None) -> str:
    whose = f" of {owner}" if owner else ""
    return f"The pass key{whose} is {key}. Remember it. {key} is the pass key{whose}."


def _ask(owner: str | None) -> str:
    return f"What is the pass key of {owner}? The pass key of {owner} is" if owner else ASK
