"""Make long conversations: a fact said in one of the first turns is asked for in the last.

Turns between are prose of a text, or invented small talk, so that the fact lies outside the window. Trials are
functions of a seed, with other words than training's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from focus_core.evaluation.trial import Trial, Turn
from focus_core.text.corpus import Document

_FACTS = (
    ("My tortoise is called {v}.", "What is my tortoise called?", ("Pepper", "Olive", "Bramble", "Moss", "Quill")),
    ("I keep the spare keys in the {v}.", "Where do I keep the spare keys?", ("teapot", "piano stool", "toolbox")),
    ("My aunt's name is {v}.", "What is my aunt's name?", ("Philomena", "Gudrun", "Rosalba", "Ottilie")),
    ("I was born in {v}.", "Where was I born?", ("Tromso", "Cork", "Ghent", "Aarhus", "Perpignan")),
    ("I play the {v} in an orchestra.", "What do I play in an orchestra?", ("oboe", "viola", "bassoon", "harp")),
    ("My train leaves from platform {v}.", "From which platform does my train leave?", ("14", "9", "22", "31")),
    ("My favourite dessert is {v}.", "What is my favourite dessert?", ("lemon tart", "rice pudding", "baked apple")),
    ("My policy number is {v}.", "What is my policy number?", ("480213", "771946", "305582", "962017")),
)
_ASKS = (
    "What do you make of this? {text}",
    "I read this today. {text}",
    "Here is something else. {text}",
    "Could you comment on the following? {text}",
)
_SAYS = ("That is a vivid passage. {text}", "I see. It made me think of this. {text}", "Interesting. {text}")
_SMALL = (
    "The weather has turned and the river is high, so nobody goes out after supper.",
    "They painted the station green, which half of the town likes and half does not.",
    "The baker has begun to sell a darker loaf that keeps for a week.",
    "There was a concert in the square and the last piece had to be played twice.",
    "The new road is finished at last, but the old one is still the shorter.",
)


def conversation(
    trials: int, seed: int = 0, *, turns: int = 60, words: int = 90, filler: str | None = None
) -> Iterator[Trial]:
    """Yield conversations of ``turns`` turns of about ``words`` words, the fact in one of the first five of the user.

    Each earlier exchange is a document too, for methods that read documents; the label is the fact's place.

    Args:
        trials: how many.
        seed: of everything.
        turns: before the question, the user's and the assistant's.
        words: of a turn.
        filler: prose to talk about; invented sentences if not given.
    """
    sentences = re.split(r"(?<=[.!?])\s+", filler) if filler else list(_SMALL)
    for index in range(trials):
        rng = random.Random(f"conversation/{seed}/{turns}/{index}")
        said, question, values = _FACTS[index % len(_FACTS)]
        value = rng.choice(values)
        place = rng.randrange(min(5, turns // 2))
        pairs = []
        for number in range(turns // 2):
            if number == place:
                pairs.append((said.format(v=value), "Thank you for telling me."))
                continue
            user = rng.choice(_ASKS).format(text=_prose(rng, sentences, words))
            pairs.append((user, rng.choice(_SAYS).format(text=_prose(rng, sentences, words // 2))))
        held = tuple(Document(f"turn-{at}", f"user: {one}\nassistant: {two}") for at, (one, two) in enumerate(pairs))
        earlier: tuple[Turn, ...] = tuple(turn for one, two in pairs for turn in (("user", one), ("assistant", two)))
        yield Trial(held, question, (value,), f"turn-{place}", False, f"fact at {place}", earlier=earlier)


def _prose(rng: random.Random, sentences: list[str], words: int) -> str:
    """Return sentences that follow one another, about ``words`` words."""
    start, said = rng.randrange(len(sentences)), list[str]()
    while sum(len(part.split()) for part in said) < words:
        said.append(" ".join(sentences[start % len(sentences)].split()))
        start += 1
    return " ".join(said)
