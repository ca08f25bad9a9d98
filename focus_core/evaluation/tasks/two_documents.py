"""Make questions whose answer stands in two documents: comparisons, bridges and lists, among other passages.

The two documents are invented, so no model has read them; the others are passages of a question file, or invented too.
Trials are functions of a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from focus_core.evaluation.metrics import Wanted
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_PEOPLE = (
    *("Orla Finch", "Bastian Crewe", "Yara Molloy", "Piers Lindgren", "Tamsin Roux", "Iver Castell", "Dilys Moran"),
    *("Rufus Hartwell", "Sabine Okafor", "Leander Voigt", "Maud Ferris", "Caspar Nyland"),
)
_HOUSES = ("Tern House", "Quarry Lodge", "Vane Hall", "Mistral Court", "Beacon Manor", "Fen Cottage", "Rook Priory")
_BOATS = ("Kestrel", "Morning Glass", "Petrel", "Blue Anvil", "Solace", "Hare", "Winter Rye", "Calypso Bell")
_PORTS = ("Ostrava Quay", "Lund Harbour", "Pell Bay", "Corran Point", "Stavely", "Marrick Sound", "Dunlin Cove")
_CLUBS = ("chess circle", "rowing crew", "amateur opera", "film society", "seed bank", "cycling union", "poetry table")


def two_documents(documents: int, trials: int, seed: int = 0, *, others: Sequence[str] = ()) -> Iterator[Trial]:
    """Yield questions over two documents among ``documents``; the label is the kind.

    Args:
        documents: in memory, at least two (lists have three that count).
        trials: how many; the three kinds take turns.
        seed: of everything.
        others: passages to stand beside them; invented ones of the same kinds if there are none.
    """
    kinds = (("comparison", _comparison), ("bridge", _bridge), ("list", _list))
    for index in range(trials):
        rng = random.Random(f"two/{seed}/{documents}/{index}")
        label, make = kinds[index % len(kinds)]
        texts, question, answers, wanted = make(rng)
        named_too = tuple(name for name in _HOUSES if name in question and name not in answers)
        pool = list(others) or [text for _ in range(documents) for text in make(rng)[0]]
        named = [word for text in texts for word in text.split(" is ")[0].split(" was ")[:1]]
        rest = [text for text in pool if not any(name in text for name in named)]
        held = [*texts, *rng.sample(rest, max(0, min(len(rest), documents - len(texts))))]
        rng.shuffle(held)
        shown = tuple(Document(f"doc-{place}", text) for place, text in enumerate(held))
        yield Trial(shown, question, answers, None, False, label, wanted, wrong=named_too)


Made = tuple[list[str], str, tuple[str, ...], Wanted]


def _comparison(rng: random.Random) -> Made:
    first, second = rng.sample(_HOUSES, 2)
    early, late = sorted(rng.sample(range(1605, 1899), 2))
    built = {first: early, second: late} if rng.random() < 0.5 else {first: late, second: early}
    texts = [
        f"{name} was built in {year} by {rng.choice(_PEOPLE)}. It has {rng.randrange(9, 40)} rooms and a walled garden."
        for name, year in built.items()
    ]
    older = rng.random() < 0.5
    wanted = min(built, key=lambda name: built[name]) if older else max(built, key=lambda name: built[name])
    ask = "older" if older else "newer"
    return texts, f"Which house is {ask}, {first} or {second}?", (wanted,), "any"


def _bridge(rng: random.Random) -> Made:
    boat, person, port = rng.choice(_BOATS), rng.choice(_PEOPLE), rng.choice(_PORTS)
    texts = [
        f"The {boat} is a schooner of {rng.randrange(40, 200)} tons. Its captain is {person}.",
        f"{person} was born in {port} and went to sea at the age of {rng.randrange(12, 20)}.",
    ]
    return texts, f"Where was the captain of the {boat} born?", (port,), "any"


def _list(rng: random.Random) -> Made:
    club, members = rng.choice(_CLUBS), rng.sample(_PEOPLE, 2)
    texts = [f"{name} is a member of the {club} and lives in {rng.choice(_PORTS)}." for name in members]
    return texts, f"Who are the two members of the {club}?", tuple(members), "all"
