"""Invent facts to hide in filler: about different subjects, alike in attribute, with values of many shapes.

Values are numbers of up to twelve digits, codes, dates, full names, phrases and single words, so that candidates learn
to hand over more than one token of a value. The module knows no tokenizer; facts depend on the random generator alone.
They never use the passkey prompt's words, which stay for evaluation.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """An invented fact.

    Args:
        statement: the sentences to hide.
        question: asks for the value.
        lead: words after which the value follows.
        value: the answer.
    """

    statement: str
    question: str
    lead: str
    value: str


_SUBJECTS = [
    *("the north gate", "the blue cabinet", "the archive room", "Mr. Alder", "Dr. Okafor", "Ms. Lindqvist"),
    *("the harbour office", "the greenhouse", "flight deck two", "the old mill", "Professor Tanaka", "the night shift"),
    *("parcel nine", "the reading club", "the pump house", "the Orion project", "Captain Reyes", "the lighthouse"),
    *("the east tunnel", "the museum shop", "the vineyard", "Nurse Petrova", "the tea house", "the clock tower"),
    *("the Falcon team", "the print room", "the ferry", "Aunt Miriam", "the sawmill", "the observatory"),
]
_ATTRIBUTES = {
    "number": [
        *("access number", "locker number", "serial number", "door code", "extension", "ticket number"),
        *("combination", "meter reading", "account number", "phone number", "inventory number"),
    ],
    "code": ["booking reference", "part number", "licence plate", "model name", "shelf mark", "activation key"],
    "date": ["opening date", "deadline", "birthday", "date of the inspection", "departure", "day of the audit"],
    "name": ["owner", "architect", "winner of the award", "contact person", "founder", "best friend", "translator"],
    "phrase": ["motto", "hiding place", "favourite meal", "first rule", "last message", "secret ingredient"],
    "word": ["code word", "favourite colour", "home town", "animal", "password", "nickname"],
}
_WORDS = [
    *("amber", "violet", "Lisbon", "otter", "juniper", "Oslo", "crimson", "falcon", "Nairobi", "walnut", "marble"),
    *("silver", "Kyoto", "badger", "saffron", "Quito", "heron", "cobalt", "thistle", "Geneva", "ivory", "panther"),
    *("Dublin", "maple", "turquoise", "sparrow"),
]
_FIRST = [
    *("Billie", "Jean", "Aurelia", "Tomasz", "Ingrid", "Kwame", "Mei", "Rosalind", "Hamid", "Oksana", "Desmond"),
    *("Yuki", "Carlos", "Philippa", "Anselm", "Noor", "Beatrix", "Emeka", "Sofia", "Walter", "Priya", "Lars"),
    *("Eleanor", "Mary", "John", "William", "Anna", "George", "Ruth", "Samuel"),
]
_LAST = [
    *("King", "Whitcombe", "Kowalczyk", "Adeyemi", "Lindgren", "Castillo", "Nakamura", "Fairweather", "Petrov"),
    *("van Houten", "O'Rourke", "Delacroix", "Mbeki", "Hartley-Jones", "Santorini", "Blackwood", "Iyer", "Novak"),
    *("Smith", "Brown", "Thompson", "Fletcher", "McAllister", "Ferreira da Silva"),
]
_PLACES = [
    *("Ashford", "Port Ellery", "San Tomaso", "Lower Wexham", "Kirkby", "New Halvern", "Saint-Aubin", "Rio Claro"),
]
_MONTHS = [
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
]
_ADJECTIVES = ["small", "rusty", "third", "green", "broken", "oldest", "left-hand", "hollow", "painted", "quiet"]
_THINGS = ["key", "lantern", "drawer", "stair", "barrel", "fence post", "teapot", "map", "bell", "garden wall"]
_PHRASES = [
    "under the {a} {t} behind the {b} {u}",
    "{a} {t} with a {b} {u}",
    "never leave the {a} {t} near the {u}",
    "a {a} {t} and two {u}s",
    "look twice at every {a} {t}",
    "the {t} is in the {b} {u}",
    "{w} and {x}",
    "bring the {a} {t} to {p}",
]
SHAPES = {"number": 8, "code": 3, "date": 2, "name": 5, "phrase": 3, "word": 3}


def invent_facts(rng: random.Random, count: int, shapes: Mapping[str, float] | None = None) -> list[Fact]:
    """Invent ``count`` facts about different subjects; they may share their attribute, so they look alike.

    Args:
        rng: draws everything.
        count: how many.
        shapes: weight of each shape of value; :data:`SHAPES` if not given.
    """
    weights = shapes or SHAPES
    shape = rng.choices(list(weights), weights=list(weights.values()))[0]
    attribute = rng.choice(_ATTRIBUTES[shape])
    facts = []
    for subject in _subjects(rng, count):
        if rng.random() < 0.3:
            attribute = rng.choice(_ATTRIBUTES[shape])
        named = f"{attribute}" if count == 1 and rng.random() < 0.5 else f"{attribute} of {subject}"
        value = invent_value(rng, shape)
        facts.append(Fact(_statement(rng, named, value), f"What is the {named}?", f"The {named} is", value))
    return facts


def invent_value(rng: random.Random, shape: str) -> str:
    """Return a value of a shape: ``number``, ``code``, ``date``, ``name``, ``phrase`` or ``word``."""
    if shape == "number":
        digits = rng.choice([3, 4, 5, 5, 6, 7, 8, 10, 12])
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        return f"{int(number):,}" if digits > 4 and rng.random() < 0.1 else number
    if shape == "code":
        parts = [_letters(rng), str(rng.randrange(10, 100000)), rng.choice([_letters(rng), str(rng.randrange(100))])]
        return rng.choice("--/ ").join(rng.sample(parts, rng.choice([2, 3, 3])))
    if shape == "date":
        day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1750, 2060)
        forms = [f"{day} {_MONTHS[month]} {year}", f"{_MONTHS[month]} {day}, {year}", f"{year}-{month + 1:02}-{day:02}"]
        return rng.choice(forms)
    if shape == "name":
        first = rng.sample(_FIRST, rng.choice([1, 1, 2]))
        if len(first) == 2 and rng.random() < 0.3:
            first[1] = f"{first[1][0]}."
        return " ".join([*first, rng.choice(_LAST)])
    if shape == "phrase":
        (a, b), (t, u), (w, x) = rng.sample(_ADJECTIVES, 2), rng.sample(_THINGS, 2), rng.sample(_WORDS, 2)
        return rng.choice(_PHRASES).format(a=a, b=b, t=t, u=u, w=w, x=x, p=rng.choice(_PLACES))
    return rng.choice(_WORDS + _PLACES)


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))


def _subjects(rng: random.Random, count: int) -> list[str]:
    """Return ``count`` different subjects: fixed ones, people and numbered places."""
    made: dict[str, None] = {}
    while len(made) < count:
        kind = rng.random()
        if kind < 0.6:
            made[rng.choice(_SUBJECTS)] = None
        elif kind < 0.85:
            made[invent_value(rng, "name")] = None
        else:
            made[f"{rng.choice(['room', 'building', 'team', 'order', 'train'])} {rng.randrange(2, 999)}"] = None
    return list(made)


def _statement(rng: random.Random, named: str, value: str) -> str:
    forms = [
        f" The {named} is {value}. ",
        f" The {named} is {value}. ",
        f" The {named} is {value}. Keep it in mind: {value}. ",
        f" Please note: the {named} is {value}, that is {value}. ",
        f" {value[0].upper()}{value[1:]} is the {named}. ",
    ]
    return rng.choice(forms)
