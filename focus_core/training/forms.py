"""Invent documents as people have them: tables, JSON, code, metadata headers, long numbers, German and French.

Every document has neighbours of the same form, whose answers are of the right kind and wrong. What is invented depends
on the random generator alone; the module knows no tokenizer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from focus_core.training.facts import invent_value
from focus_core.training.scenes import Asked, Scene

_TOWNS = [
    *("Bergen", "Cadiz", "Dover", "Esbjerg", "Freiburg", "Ghent", "Havre", "Izmir", "Jena", "Krakow", "Leeds", "Malmo"),
    *(
        "Nantes",
        "Oxford",
        "Porto",
        "Rennes",
        "Split",
        "Turin",
        "Utrecht",
        "Verona",
        "Wismar",
        "York",
        "Zagreb",
        "Aarhus",
    ),
]
_GOODS = [
    *("desk lamp", "steel bolt", "garden hose", "paint brush", "notebook", "coffee mug", "tent", "bicycle pump"),
    *("water filter", "rope", "battery", "camera strap", "wool blanket", "saw blade", "flower pot", "door handle"),
]
_PEOPLE = [
    *("Ines", "Jonas", "Karim", "Leila", "Marta", "Nils", "Olga", "Pavel", "Quentin", "Rosa", "Stefan", "Tove"),
    *("Ursula", "Viktor", "Wanda", "Xenia", "Yusuf", "Zora", "Amir", "Bella", "Cedric", "Dalia", "Edgar", "Fiona"),
]
_FLATS = [f"flat {number}{letter}" for number in range(1, 13) for letter in "abc"]
_DEPARTMENTS = ["sales", "finance", "research", "legal", "logistics", "design", "support", "marketing"]
_ADJECTIVES = ["quiet", "early", "northern", "second", "annual", "revised", "hidden", "short", "public", "final"]
_NOUNS = ["report", "harvest", "bridge", "garden", "voyage", "survey", "letter", "orchard", "station", "market"]
_COUNTED = [
    *(("apple trees", "garden"), ("chairs", "hall"), ("boats", "harbour"), ("windows", "house"), ("sheep", "meadow")),
    *(("lamps", "corridor"), ("books", "study"), ("lockers", "gym"), ("rooms", "hotel"), ("bridges", "valley")),
]
_NUMBERED = [
    *("invoice", "order", "customer", "meter", "policy", "case", "parcel", "account", "ticket", "contract", "permit"),
]
_CONSTANTS = [
    *("MAX_RETRIES", "TIMEOUT_SECONDS", "BUFFER_SIZE", "PORT", "POOL_SIZE", "CACHE_LIMIT", "BATCH_SIZE", "MAX_DEPTH"),
    *("HEARTBEAT_INTERVAL", "CHUNK_BYTES", "MIN_LENGTH", "RETRY_DELAY", "WORKERS", "QUEUE_LENGTH", "GRACE_PERIOD"),
]


def number(rng: random.Random, low: int = 2, high: int = 10) -> str:
    """Return a number of ``low`` to ``high`` digits."""
    digits = rng.randint(low, high)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def invent_forms(rng: random.Random, documents: int, questions: int) -> Scene:
    """Invent so many documents of one or a few forms, and questions about some of them, each about another document.

    Args:
        rng: draws everything.
        documents: at least one.
        questions: at most so many.
    """
    kinds = rng.sample(list(_FORMS), rng.choice([1, 1, 2, 3]))
    texts: list[str] = []
    asked: list[Asked] = []
    used: set[str] = set()
    for _ in range(documents):
        text, question = _FORMS[rng.choice(kinds)](rng)
        if question.question in used:
            continue
        used.add(question.question)
        texts.append(text)
        asked.append(question)
    clear = [item for item in asked if sum(all(word in text for word in item.about) for text in texts) == 1]
    return Scene(tuple(texts), tuple(rng.sample(clear, min(questions, len(clear)))))


def _sample(rng: random.Random, pool: list[str], count: int) -> list[str]:
    return rng.sample(pool, min(count, len(pool)))


# -- tables, JSON -----------------------------------------------------------------------------------------------


def _records(rng: random.Random) -> tuple[str, list[str], list[dict[str, str]]]:
    """Return what rows are named by, the columns, and some rows with different names."""
    count = rng.randint(3, 9)
    price = lambda: f"{rng.randrange(3, 900)}{rng.choice(['', '', f'.{rng.randrange(10, 99)}'])}"  # noqa: E731
    makers: list[tuple[str, list[str], dict[str, Callable[[], str]]]] = [
        ("city", _TOWNS, {"rent": lambda: str(rng.randrange(300, 2400)), "population": lambda: number(rng, 5, 7),
                          "mayor": lambda: invent_value(rng, "name"), "rooms": lambda: str(rng.randrange(1, 9))}),
        ("item", _GOODS, {"price": price, "stock": lambda: number(rng, 1, 4), "sku": lambda: invent_value(rng, "code"),
                          "supplier": lambda: rng.choice(_TOWNS)}),
        ("name", _PEOPLE, {"phone": lambda: number(rng, 6, 10), "department": lambda: rng.choice(_DEPARTMENTS),
                           "salary": lambda: number(rng, 4, 6), "start": lambda: invent_value(rng, "date"),
                           "age": lambda: str(rng.randrange(18, 80))}),
        ("flat", _FLATS, {"tenant": lambda: invent_value(rng, "name"), "rent": lambda: str(rng.randrange(300, 2400)),
                          "meter": lambda: number(rng, 5, 8), "floor": lambda: str(rng.randrange(0, 12))}),
    ]  # fmt: skip
    key, pool, fields = rng.choice(makers)
    columns = rng.sample(list(fields), rng.randint(2, len(fields)))
    return (
        key,
        columns,
        [{key: name} | {field: fields[field]() for field in columns} for name in _sample(rng, pool, count)],
    )


def _cell_question(rng: random.Random, key: str, column: str, row: dict[str, str], clue: str) -> Asked:
    name = row[key]
    forms = [f"What is the {column} of {name}?", f"What {column} does {name} have?", f"{column} of {name}?"]
    if key == "city":
        forms.append(f"What is the {column} in {name}?")
    return Asked(rng.choice(forms), row[column], f"The {column} of {name} is {row[column]}.", (clue,), (name, column))


def _table(rng: random.Random, write: Callable[[list[str]], str], rule: bool) -> tuple[str, Asked]:
    key, columns, rows = _records(rng)
    head = [key, *columns]
    lines = [write(head), *([write(["---"] * len(head))] if rule else [])]
    lines += [write([row[field] for field in head]) for row in rows]
    title = f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}\n\n" if rng.random() < 0.3 else ""
    row = rng.choice(rows)
    question = _cell_question(rng, key, rng.choice(columns), row, write([row[field] for field in head]))
    return title + "\n".join(lines), question


def _markdown(rng: random.Random) -> tuple[str, Asked]:
    return _table(rng, lambda cells: f"| {' | '.join(cells)} |", True)


def _csv(rng: random.Random) -> tuple[str, Asked]:
    mark = rng.choice([",", ",", ";", "\t"])
    return _table(rng, mark.join, False)


def _json(rng: random.Random) -> tuple[str, Asked]:
    key, columns, rows = _records(rng)
    rows = rows[:4]
    values = [
        {field: int(cell) if cell.isdigit() and rng.random() < 0.7 else cell for field, cell in row.items()}
        for row in rows
    ]
    row, column = rng.randrange(len(rows)), rng.choice(columns)
    shape = rng.random()
    if shape < 0.4:
        value: object = {f"{key}s": values, "id": int(number(rng, 2, 5))}
    elif shape < 0.7:
        value = values
    else:
        value = {str(item[key]): {field: item[field] for field in columns} for item in values}
    text = json.dumps(value, indent=rng.choice([None, None, 2]))
    return text, _cell_question(rng, key, column, rows[row], rows[row][key])


# -- code, settings ---------------------------------------------------------------------------------------------


def _code(rng: random.Random) -> tuple[str, Asked]:
    names = rng.sample(_CONSTANTS, rng.randint(2, 5))
    values = {name: number(rng, 1, 6) for name in names}
    prefix = rng.choice(["", "", f"{rng.choice(_NOUNS).upper()}_"])
    values = {prefix + name: value for name, value in values.items()}
    style = rng.choice(
        ["{n} = {v}", "const {n} = {v};", "#define {n} {v}", "{n}={v}", "static final int {n} = {v};", "{n}: {v}"]
    )
    lines = [style.format(n=name, v=value) for name, value in values.items()]
    name, value = rng.choice(list(values.items()))
    clue = style.format(n=name, v=value)
    if rng.random() < 0.4:
        noun = rng.choice(_NOUNS)
        lines += ["", f"def {noun}(items):", f"    return items[:{name}]"]
    asked = [f"What is the value of {name}?", f"What is {name} set to?", f"Which value has {name}?", f"{name}?"]
    return "\n".join(lines), Asked(rng.choice(asked), value, f"{name} is {value}.", (clue,), (name,))


# -- metadata, numbers ------------------------------------------------------------------------------------------


def _header(rng: random.Random) -> tuple[str, Asked]:
    """Fields in front of a text; the question is about a field or about the text, never answered by the other."""
    title = f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} {rng.choice(['', f'of {rng.choice(_TOWNS)}'])}".strip()
    fields = {
        "title": title,
        "author": invent_value(rng, "name"),
        "year": str(rng.randrange(1900, 2030)),
        "pages": number(rng, 2, 3),
        "version": f"{rng.randrange(1, 9)}.{rng.randrange(20)}",
        "language": rng.choice(["English", "Danish", "Polish", "Spanish"]),
    }
    kept = ["title", *rng.sample(list(fields)[1:], rng.randint(2, 4))]
    rng.shuffle(kept)
    fence = rng.choice(["", "", "---\n"])
    lines = "\n".join(f"{field}: {fields[field]}" for field in kept)
    thing, place = rng.choice(_COUNTED)
    town, count = rng.choice(_TOWNS), str(rng.randrange(2, 400))
    body = rng.choice(
        [
            f"There are {count} {thing} in the {place} of {town}.",
            f"The {place} of {town} has {count} {thing}.",
            f"In {town} the {place} holds {count} {thing}, more than in any year before.",
        ]
    )
    more = rng.choice(["", f" They belong to {invent_value(rng, 'name')}.", " Nobody had counted them before."])
    text = f"{fence}{lines}\n{fence}\n{body}{more}"
    if rng.random() < 0.5:
        question = rng.choice(
            [f"How many {thing} are in the {place} of {town}?", f"How many {thing} are there in {town}?"]
        )
        return text, Asked(question, count, body, (body,), (thing, town))
    field = rng.choice([name for name in kept if name != "title"])
    forms = {
        "author": [f"Who wrote {title}?", f"Who is the author of {title}?"],
        "year": [f"In which year was {title} written?", f"What is the year of {title}?"],
        "pages": [f"How many pages has {title}?"],
        "version": [f"What is the version of {title}?"],
        "language": [f"In which language is {title}?"],
    }
    sentence = f"The {field} of {title} is {fields[field]}."
    return text, Asked(rng.choice(forms[field]), fields[field], sentence, (lines,), (title,))


def _numbers(rng: random.Random) -> tuple[str, Asked]:
    """A sentence or two with several long numbers, of which one is asked for."""
    owner = rng.choice(
        [invent_value(rng, "name"), f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}", rng.choice(_TOWNS)]
    )
    first, second = rng.sample(_NUMBERED, 2)
    one, other = number(rng, 4, 10), number(rng, 4, 10)
    text = rng.choice(
        [
            f"For {owner} we hold {first} number {one} and {second} number {other}.",
            f"The {first} number of {owner} is {one}. The {second} number is {other}.",
            f"{owner}: {first} no. {one}, {second} no. {other}.",
            f"Please quote {first} number {one} ({owner}); the {second} number {other} is no longer valid.",
        ]
    )
    wanted, value = rng.choice([(first, one), (second, other)])
    question = rng.choice([f"What is the {wanted} number of {owner}?", f"Which {wanted} number does {owner} have?"])
    return text, Asked(question, value, f"The {wanted} number of {owner} is {value}.", (text,), (wanted, owner))


# -- German and French ------------------------------------------------------------------------------------------

_GERMAN = [
    ("Der Mietvertrag von {p} beginnt am {d}. Die Miete beträgt {n} Euro.", "Wie hoch ist die Miete von {p}?",
     "{n} Euro",
     "Die Miete von {p} beträgt {n} Euro."),
    ("Das Büro in {t} wird von {p} geleitet und hat {n} Mitarbeiter.", "Wer leitet das Büro in {t}?", "{p}",
     "Das Büro in {t} wird von {p} geleitet."),
    ("Die Rechnung {n} wurde von {p} am {d} bezahlt.", "Wer hat die Rechnung {n} bezahlt?", "{p}",
     "Die Rechnung {n} wurde von {p} bezahlt."),
    ("{p} wohnt seit {d} in {t} und hat die Kundennummer {n}.", "Welche Kundennummer hat {p}?", "{n}",
     "{p} hat die Kundennummer {n}."),
    ("Der Schlüssel für {t} liegt im Schrank {n}; {p} weiß Bescheid.",
     "In welchem Schrank liegt der Schlüssel für {t}?",
     "im Schrank {n}",
     "Der Schlüssel für {t} liegt im Schrank {n}."),
    ("Die Lieferung nach {t} kommt am {d} an. Ansprechpartner ist {p}.", "Wann kommt die Lieferung nach {t} an?",
     "am {d}",
     "Die Lieferung nach {t} kommt am {d} an."),
]  # fmt: skip
_FRENCH = [
    ("Le bail de {p} commence le {d}. Le loyer est de {n} euros.", "Quel est le loyer de {p} ?", "{n} euros",
     "Le loyer de {p} est de {n} euros."),
    ("Le bureau de {t} est dirigé par {p} et compte {n} employés.", "Qui dirige le bureau de {t} ?", "{p}",
     "Le bureau de {t} est dirigé par {p}."),
    ("La facture {n} a été payée par {p} le {d}.", "Qui a payé la facture {n} ?", "{p}",
     "La facture {n} a été payée par {p}."),
    ("{p} habite à {t} depuis le {d} et porte le numéro de client {n}.", "Quel est le numéro de client de {p} ?",
     "{n}",
     "Le numéro de client de {p} est {n}."),
    ("La clé de {t} se trouve dans l'armoire {n} ; {p} est au courant.",
     "Dans quelle armoire se trouve la clé de {t} ?",
     "dans l'armoire {n}",
     "La clé de {t} se trouve dans l'armoire {n}."),
    ("La livraison pour {t} arrive le {d}. Le contact est {p}.", "Quand arrive la livraison pour {t} ?", "le {d}",
     "La livraison pour {t} arrive le {d}."),
]  # fmt: skip
_MONTHS_DE = ["Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober"]
_MONTHS_FR = ["janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre", "octobre"]


def _foreign(
    rng: random.Random, forms: list[tuple[str, str, str, str]], months: list[str], dot: str
) -> tuple[str, Asked]:
    text, question, answer, sentence = rng.choice(forms)
    filled = {
        "p": invent_value(rng, "name"),
        "t": rng.choice(_TOWNS),
        "n": number(rng, 2, 6),
        "d": f"{rng.randint(2, 28)}{dot} {rng.choice(months)} {rng.randrange(1990, 2030)}",
    }
    made = [part.format(**filled) for part in (text, question, answer, sentence)]
    about = tuple(filled[mark] for mark in filled if f"{{{mark}}}" in question)
    return made[0], Asked(made[1], made[2], made[3], (made[0],), about)


def _german(rng: random.Random) -> tuple[str, Asked]:
    return _foreign(rng, _GERMAN, _MONTHS_DE, ".")


def _french(rng: random.Random) -> tuple[str, Asked]:
    return _foreign(rng, _FRENCH, _MONTHS_FR, "")


_FORMS: dict[str, Callable[[random.Random], tuple[str, Asked]]] = {
    "markdown": _markdown,
    "csv": _csv,
    "json": _json,
    "code": _code,
    "header": _header,
    "numbers": _numbers,
    "german": _german,
    "french": _french,
}
