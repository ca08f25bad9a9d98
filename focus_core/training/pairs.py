"""Make questions over two documents without an annotator: comparisons, bridges and lists.

Comparisons and bridges come from what encyclopaedia passages state in fixed words (years of birth, who directed a
film) where another passage is about that person; lists and further bridges are invented. What is made depends on the
passages and the random generator alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from focus_core.training.facts import invent_value
from focus_core.training.scenes import Asked, Scene
from focus_core.training.texts import Passage

_YEAR = r"(?P<year>1[0-9]{3}|20[0-2][0-9])"
_RELEASED = re.compile(rf"\bis an? {_YEAR} [^.]*?\b(?:film|movie|album|song|novel)\b")
_NAME = r"(?P<name>[A-Z][\w.'’-]+(?: [A-Z][\w.'’-]+){1,3})"
_LINKS = [
    ("director", re.compile(rf"\bdirected by {_NAME}")),
    ("writer", re.compile(rf"\bwritten by {_NAME}")),
    ("producer", re.compile(rf"\bproduced by {_NAME}")),
    ("father", re.compile(rf"\bson of {_NAME}")),
    ("spouse", re.compile(rf"\bmarried (?:to )?{_NAME}")),
]
_TEAMS = ["harbour", "garden", "night", "archive", "bridge", "map", "choir", "kitchen", "survey", "radio"]
_TOWNS = ["Bergen", "Cadiz", "Dover", "Ghent", "Leeds", "Nantes", "Porto", "Turin", "Utrecht", "York"]


class Pairs:
    """Draws questions over two documents from passages with titles.

    Args:
        passages: what may be asked about; those without a title only stand beside others.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        titled = {re.sub(r"\s*\([^)]*\)$", "", item.title): item for item in passages if item.title}
        self.passages = list(passages)
        self._born = [(name, item, found) for name, item in titled.items() if (found := _born(item))]
        self._made = [(name, item, found) for name, item in titled.items() if (found := _RELEASED.search(item.text))]
        self._bridges = []
        born = {name: found for name, _, found in self._born}
        for name, item in titled.items():
            for link, pattern in _LINKS:
                found = pattern.search(item.text)
                person = found["name"] if found else ""
                if found and person in born and person != name and _lived(item, born[person]["year"]):
                    self._bridges.append((name, item, link, found, titled[person], born[person]))

    def draw(self, rng: random.Random, documents: int, questions: int) -> Scene:
        """Return so many documents and questions over two of them each (lists: over two to four).

        Args:
            rng: draws everything.
            documents: at least two.
            questions: at most so many.
        """
        texts: list[str] = []
        asked: list[Asked] = []
        for _ in range(min(questions, max(1, documents // 2))):
            made, question = self._one(rng)
            if question.question not in {item.question for item in asked}:
                texts += made
                asked.append(question)
        rest = [f"{item.title}\n{item.text}" for item in rng.sample(self.passages, min(len(self.passages), documents))]
        texts += rest[: max(0, documents - len(texts))]
        rng.shuffle(texts)
        return Scene(tuple(dict.fromkeys(texts)), tuple(asked))

    def _one(self, rng: random.Random) -> tuple[list[str], Asked]:
        kinds = [("list", 1.0), ("place", 1.0)]
        if len(self._born) > 1:
            kinds.append(("born", 1.5))
        if len(self._made) > 1:
            kinds.append(("made", 1.0))
        if self._bridges:
            kinds.append(("bridge", 1.5))
        kind = rng.choices([name for name, _ in kinds], weights=[weight for _, weight in kinds])[0]
        if kind in ("born", "made"):
            return self._comparison(rng, kind)
        if kind == "bridge":
            return self._bridge(rng)
        return _list(rng) if kind == "list" else _place(rng)

    def _comparison(self, rng: random.Random, kind: str) -> tuple[list[str], Asked]:
        """Who was born first, which came out first: the answer is one of two names that the question says."""
        pool = self._born if kind == "born" else self._made
        for _ in range(20):
            one, other = rng.sample(pool, 2)
            if one[2]["year"] != other[2]["year"]:
                break
        early, late = sorted((one, other), key=lambda item: int(item[2]["year"]))
        first = rng.random() < 0.5
        winner = early if first else late
        forms = {
            ("born", True): [
                "Who was born earlier, {a} or {b}?",
                "Who is older, {a} or {b}?",
                "Who was born first, {a} or {b}?",
            ],
            ("born", False): ["Who was born later, {a} or {b}?", "Who is younger, {a} or {b}?"],
            ("made", True): ["Which came out first, {a} or {b}?", "Which one is older, {a} or {b}?"],
            ("made", False): ["Which came out later, {a} or {b}?", "Which one is newer, {a} or {b}?"],
        }[kind, first]
        question = rng.choice(forms).format(a=one[0], b=other[0])
        verb = "was born" if kind == "born" else "came out"
        sentence = f"{winner[0]} {verb} in {winner[2]['year']}, {'before' if first else 'after'} the other."
        made = [f"{item.title}\n{item.text}" for _, item, _ in (one, other)]
        return made, Asked(question, winner[0], sentence, (one[2][0], other[2][0]))

    def _bridge(self, rng: random.Random) -> tuple[list[str], Asked]:
        name, item, link, found, about, born = rng.choice(self._bridges)
        made = [f"{passage.title}\n{passage.text}" for passage in (item, about)]
        question = rng.choice([f"When was the {link} of {name} born?", f"In which year was the {link} of {name} born?"])
        sentence = f"The {link} of {name} is {found['name']}, born in {born['year']}."
        return made, Asked(question, born["year"], sentence, (found[0], born[0]))


def _lived(item: Passage, born: str) -> bool:
    """Return whether someone born in that year can be meant: not where the film came out before."""
    released = _RELEASED.search(item.text)
    return released is None or 15 < int(released["year"]) - int(born) < 90


def _born(item: Passage) -> re.Match[str] | None:
    """Return a match whose ``year`` is that of a person's birth."""
    head = item.text[:200]
    return _BORN_IN.search(head) if _PERSON.search(head) else None


_PERSON = re.compile(
    r"\b(?:was|is) an? [^.]*?\b(?:actor|actress|director|writer|politician|player|singer|painter|king|queen|duke|"
    r"bishop|composer|producer|author|poet|nobleman|footballer|journalist|filmmaker)"
)
_BORN_IN = re.compile(
    rf"\((?:[^()]*\bborn |b\. )?[^()\d]*(?:\d{{1,2}} )?(?:[A-Z][a-z]+ )?(?:\d{{1,2}}, )?{_YEAR}[^()]*\)"
)


def _list(rng: random.Random) -> tuple[list[str], Asked]:
    """Who is in a team, said in one document a person."""
    people = list(dict.fromkeys(invent_value(rng, "name") for _ in range(rng.randint(3, 6))))
    teams = rng.sample(_TEAMS, 2)
    members = {person: rng.choice(teams) for person in people}
    members[people[0]] = members[people[1]] = teams[0]
    form = rng.choice(["{p} is in the {t} team.", "{p} belongs to the {t} team.", "{p} works for the {t} team."])
    made = [form.format(p=person, t=team) + rng.choice(["", f" {person} lives in {rng.choice(_TOWNS)}."])
            for person, team in members.items()]  # fmt: skip
    named = [person for person, team in members.items() if team == teams[0]]
    answer = f"{', '.join(named[:-1])} and {named[-1]}"
    clues = tuple(form.format(p=person, t=teams[0]) for person in named)
    question = rng.choice([f"Who is in the {teams[0]} team?", f"Name the people of the {teams[0]} team."])
    return made, Asked(question, answer, f"{answer} are in the {teams[0]} team.", clues)


def _place(rng: random.Random) -> tuple[list[str], Asked]:
    """Where the head of a team lives: who it is stands in one document, where she lives in another."""
    head, other = (invent_value(rng, "name") for _ in range(2))
    teams, towns = rng.sample(_TEAMS, 2), rng.sample(_TOWNS, 2)
    made = [f"The {teams[0]} team is led by {head}.", f"The {teams[1]} team is led by {other}.",
            f"{head} lives in {towns[0]}.", f"{other} lives in {towns[1]}."]  # fmt: skip
    question = rng.choice(
        [f"Where does the leader of the {teams[0]} team live?", f"In which town lives the {teams[0]} team's head?"]
    )
    return made, Asked(
        question, towns[0], f"{head}, who leads the {teams[0]} team, lives in {towns[0]}.", (made[0], made[2])
    )
