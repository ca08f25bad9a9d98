"""Make questions over documents as people have them: tables, CSV, JSON, code, metadata headers and long numbers.

A question's document stands among others of the same form, whose values are of the right kind and wrong. Everything is
invented, with other names and words than training's; trials are functions of a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_STREETS = (
    *("Alder Row", "Birch Lane", "Canal Walk", "Dock Street", "Elm Court", "Forge Hill", "Gull Terrace", "Hazel Mews"),
    *("Iron Yard", "Jasmine Way", "Kiln Road", "Larch Close", "Moor View", "Nettle Path", "Oak Rise", "Pier Place"),
)
_STAFF = (
    *("Abena Kessler", "Bruno Tait", "Chiara Voss", "Dmitri Hale", "Elif Sorrel", "Farid Lunt", "Gwen Okoro"),
    *("Hugo Brandt", "Ilse Maddox", "Jorge Pell", "Kaya Strand", "Liam Quist", "Mirela Dunn", "Noam Vickery"),
)
_PARTS = (
    *("valve", "gasket", "rotor", "spindle", "flange", "piston", "bearing", "washer", "clutch", "nozzle", "damper"),
    *("coupler", "bracket", "impeller"),
)
_SERVICES = (
    *("billing", "search", "mail", "login", "export", "backup", "render", "audit", "queue", "cache", "metrics"),
    *("gateway", "sync", "archive"),
)
_SUBJECTS = (
    *(("plum trees", "orchard at Sill"), ("beehives", "meadow at Thorne"), ("benches", "park at Wick")),
    *(("kayaks", "boathouse at Lyme"), ("looms", "mill at Harden"), ("pianos", "school at Crewe")),
    *(("goats", "farm at Ashby"), ("telescopes", "observatory at Rook"), ("ovens", "bakery at Stell")),
    *(("tents", "camp at Birk"), ("violins", "shop at Penn"), ("statues", "garden at Cole")),
)
_THINGS = (
    *("loan agreement", "boiler", "membership card", "water meter", "library pass", "shipping crate", "tax return"),
    *("parking permit", "donor card", "safe deposit box", "gas contract", "tool locker", "repair order", "visa form"),
)


def forms(documents: int, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield questions over one document among ``documents`` of its form; the label is the form.

    Args:
        documents: in memory, at most fourteen: as many names are invented for each form.
        trials: how many; the six forms take turns.
        seed: of everything.
    """
    kinds = list(FORMS)
    for index in range(trials):
        kind = kinds[index % len(kinds)]
        rng = random.Random(f"forms/{seed}/{documents}/{index}")
        made = FORMS[kind](rng, documents)
        gold = rng.randrange(len(made))
        held = tuple(Document(f"doc-{place}", text) for place, (text, _, _) in enumerate(made))
        yield Trial(held, made[gold][1], (made[gold][2],), f"doc-{gold}", False, kind)


Made = tuple[str, str, str]
"""A document, a question about it, and the answer."""


def _rows(rng: random.Random, streets: list[str]) -> list[tuple[str, str, str]]:
    rents = rng.sample(range(310, 2900), len(streets))
    tenants = rng.sample(_STAFF, len(streets))
    return [(street, tenant, str(rent)) for street, tenant, rent in zip(streets, tenants, rents, strict=True)]


def _tables(rng: random.Random, documents: int, head: str, line: str) -> list[Made]:
    """One table a document; every address is in one of them, with its neighbours' rents around it."""
    made = []
    for number in range(documents):
        streets = [f"{rng.randrange(1, 99)} {street}" for street in rng.sample(_STREETS, rng.randint(4, 8))]
        rows = _rows(rng, streets)
        wanted = rng.choice(rows)
        year = 1990 + number  # so that one table can be told from another
        text = f"Tenancies {year}\n" + "\n".join([head, *(line.format(*row) for row in rows)])
        made.append((text, f"In {year}, what was the rent of {wanted[0]}?", wanted[2]))
    return made


def _markdown(rng: random.Random, documents: int) -> list[Made]:
    return _tables(rng, documents, "| address | tenant | rent |\n| --- | --- | --- |", "| {} | {} | {} |")


def _csv(rng: random.Random, documents: int) -> list[Made]:
    return _tables(rng, documents, "address,tenant,rent", "{},{},{}")


def _json(rng: random.Random, documents: int) -> list[Made]:
    made = []
    for name in rng.sample(_SERVICES, min(documents, len(_SERVICES))):
        ports, owners = rng.sample(range(1024, 49000), 3), rng.sample(_STAFF, 2)
        fields = {
            "service": name,
            "listen": {"port": ports[0], "admin_port": ports[1]},
            "owner": owners[0],
            "deputy": owners[1],
            "limit_mb": ports[2] // 64,
        }
        field, answer = rng.choice([("admin port", str(ports[1])), ("deputy", owners[1]), ("owner", owners[0])])
        made.append((json.dumps(fields, indent=rng.choice([None, 2])), f"What is the {field} of {name}?", answer))
    return made


def _code(rng: random.Random, documents: int) -> list[Made]:
    made = []
    for name in rng.sample(_PARTS, min(documents, len(_PARTS))):
        low, high = sorted(rng.sample(range(11, 9800), 2))
        constant = rng.choice([("MIN", low), ("MAX", high)])
        least, most = f"{name.upper()}_MIN_TORQUE", f"{name.upper()}_MAX_TORQUE"
        text = (
            f'"""Limits of the {name}."""\n\n{least} = {low}\n{most} = {high}\n\n\n'
            f"def check_{name}(torque):\n    return {least} <= torque <= {most}\n"
        )
        made.append((text, f"What is {name.upper()}_{constant[0]}_TORQUE?", str(constant[1])))
    return made


def _metadata(rng: random.Random, documents: int) -> list[Made]:
    made = []
    for what, where in rng.sample(_SUBJECTS, min(documents, len(_SUBJECTS))):
        count, year, page = rng.sample(range(12, 890), 3)
        text = (
            f"---\ntitle: Notes on the {where}\nauthor: {rng.choice(_STAFF)}\nyear: {1900 + year % 120}\n"
            f"page: {page}\n---\n\nThere are {count} {what} in the {where}. Volunteers look after most of them."
        )
        made.append((text, f"How many {what} are there in the {where}?", str(count)))
    return made


def _numbers(rng: random.Random, documents: int) -> list[Made]:
    made = []
    for thing in rng.sample(_THINGS, min(documents, len(_THINGS))):
        digits = rng.randint(4, 10)
        value = str(rng.randrange(10 ** (digits - 1), 10**digits))
        text = f"The {thing} of {rng.choice(_STAFF)} is filed under {value}. It was checked twice and is complete."
        made.append((text, f"Under which number is the {thing} filed?", value))
    return made


FORMS: dict[str, Callable[[random.Random, int], list[Made]]] = {
    "table row": _markdown,
    "CSV row": _csv,
    "JSON field": _json,
    "code constant": _code,
    "metadata header": _metadata,
    "number of 4 to 10 digits": _numbers,
}
