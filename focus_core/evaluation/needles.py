"""Make passkey trials: one number in a long text (Mohtashami and Jaggi, 2023; arXiv 2408.11745, Fig. 1).

Without distractors the prompt is the official one, word for word. With distractors every key has an owner's name, and
the question names one. Trials are functions of a seed; depths walk through ten places.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from focus_core.evaluation.haystack import FILLER, Haystack
from focus_core.evaluation.trial import Trial
from focus_core.tokenization import TextTokenizer

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
    """
    haystack = Haystack(tokenizer, tokens, chunk_size, filler)
    for index in range(trials):
        rng = random.Random(f"passkey/{seed}/{tokens}/{distractors}/{index}")
        keys = [str(key) for key in rng.sample(range(1, 50001), distractors + 1)]
        owners = rng.sample(_OWNERS, distractors + 1)
        depth = depth_of(index)
        depths = [depth, *[rng.random() for _ in range(distractors)]]
        if distractors:
            needles = [f"The pass key of {who} is {key}. Remember it. {key} is the pass key of {who}."
                       for who, key in zip(owners, keys, strict=True)]  # fmt: skip
            ask = f"What is the pass key of {owners[0]}? The pass key of {owners[0]} is"
        else:
            needles = [f"The pass key is {keys[0]}. Remember it. {keys[0]} is the pass key."]
            ask = ASK
        documents = haystack.hide(needles, depths, HEAD)
        gold = haystack.gold(documents, needles[0])
        yield Trial(documents, ask, (keys[0],), gold, True, f"depth {depth:.2f}")


def depth_of(index: int) -> float:
    """Return the depth of a trial: 0.05, 0.15 .. 0.95, again and again."""
    return (index % DEPTHS + 0.5) / DEPTHS
