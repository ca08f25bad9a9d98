"""Make passkey trials: one number in a long text (Mohtashami and Jaggi, 2023; arXiv 2408.11745, Fig. 1).

Without distractors the prompt is the official one, word for word. With distractors every key has an owner's name, and
the question names one. Trials are functions of a seed; depths walk through ten places.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

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
_OWNERS = (
    *("Alice", "Boris", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis"),
    *("Maria", "Nadia", "Oscar", "Paula", "Quinn", "Roger", "Sarah", "Tobias", "Ursula", "Victor", "Wendy", "Zelda"),
)

__all__ = ["ASK", "DEPTHS", "FILLER", "HEAD", "depth_of", "passkey"]


def passkey(
    tokenizer: TextTokenizer,
    tokens: int,
    trials: int,
    seed: int = 0,
    *,
    distractors: int = 0,
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
        filler: natural text; ``None`` repeats the official sentences.
        chunk_size: most tokens of a passage of natural text.

    Raises:
        ConfigError: there are not that many owners.
    """
    if not 0 <= distractors < len(_OWNERS):
        raise ConfigError(f"distractors must be between 0 and {len(_OWNERS) - 1}; got {distractors}")
    room = max(len(tokenizer.encode(_needle("50000", owner if distractors else None))) for owner in _OWNERS)
    haystack = Haystack(tokenizer, tokens, chunk_size, filler, room)
    for index in range(trials):
        rng = random.Random(f"passkey/{seed}/{tokens}/{distractors}/{index}")
        keys = [str(key) for key in rng.sample(range(1, 50001), distractors + 1)]
        owners: list[str | None] = [*rng.sample(_OWNERS, distractors + 1)] if distractors else [None]
        needles = [_needle(key, owner) for key, owner in zip(keys, owners, strict=True)]
        depth = depth_of(index)
        depths = [depth, *[rng.random() for _ in range(distractors)]]
        documents = haystack.hide(needles, depths, HEAD)
        gold = haystack.gold(documents, needles[0])
        yield Trial(documents, _ask(owners[0]), (keys[0],), gold, True, f"depth {depth:.2f}")


def depth_of(index: int) -> float:
    """Return the depth of a trial: 0.05, 0.15 .. 0.95, again and again."""
    return (index % DEPTHS + 0.5) / DEPTHS


def _needle(key: str, owner: str | None) -> str:
    whose = f" of {owner}" if owner else ""
    return f"The pass key{whose} is {key}. Remember it. {key} is the pass key{whose}."


def _ask(owner: str | None) -> str:
    return f"What is the pass key of {owner}? The pass key of {owner} is" if owner else ASK
