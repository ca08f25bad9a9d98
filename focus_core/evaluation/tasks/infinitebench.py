"""Make InfiniteBench's puzzles: a rank in a list of numbers, and the value of nested function calls.

What is asked depends on the whole memory (Math.Find) or on a chain of places in it (Code.Run), and is nowhere written
down. Trials are functions of a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from focus_core.evaluation.tasks.haystack import Haystack
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_RANKS = {"largest": -1, "second largest": -2, "third largest": -3}
_RANKS |= {"smallest": 0, "second smallest": 1, "third smallest": 2}
_DEEPEST = 10


def math_find(haystack: Haystack, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield lists of different numbers of which one rank is asked; the six ranks take turns."""
    for index in range(trials):
        rng = random.Random(f"math-find/{seed}/{haystack.tokens}/{index}")
        rank = list(_RANKS)[index % len(_RANKS)]
        sample = ", ".join(str(rng.randint(0, 99_999)) for _ in range(100))
        count = max(3, 100 * haystack.tokens // len(haystack.tokenizer.encode(sample)))
        numbers = rng.sample(range(max(100_000, 2 * count)), count)
        text = f"[{', '.join(map(str, numbers))}]"
        ask = f"What is the {rank} number of the list? The {rank} number of the list is"
        answer = str(sorted(numbers)[_RANKS[rank]])
        yield Trial((Document("list", text),), ask, (answer,), None, True, rank)


def code_run(haystack: Haystack, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield modules of small functions, some of which call each other, two to ten deep; one call's value is asked."""
    for index in range(trials):
        rng = random.Random(f"code-run/{seed}/{haystack.tokens}/{index}")
        depth = 2 + index % (_DEEPEST - 1)
        count = max(depth, haystack.tokens // len(haystack.tokenizer.encode(_function("func_500", "func_501", 500))))
        numbers = rng.sample(range(max(1000, 2 * count)), count)
        names = [f"func_{number}" for number in numbers]
        added = [rng.randint(-999, 999) for _ in names]
        # the first `depth` functions are the chain that is asked; the others form chains of their own
        calls = [name if (place + 1) % depth else None for place, name in enumerate(names[1:])] + [None]
        functions = [_function(*parts) for parts in zip(names, calls, added, strict=True)]
        value = rng.randint(1, 99)
        text = "\n".join(rng.sample(functions, count))
        ask = f"print({names[0]}({value}))\n# prints"
        answer = str(value + sum(added[:depth]))
        yield Trial((Document("module", text),), ask, (answer,), None, True, f"{depth} calls")


def _function(name: str, called: str | None, added: int) -> str:
    inner = f"{called}(x)" if called else "x"
    return f"def {name}(x):\n    return {inner} {'-' if added < 0 else '+'} {abs(added)}\n"
