"""Choose documents by their metadata, in SQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from focus_core.errors import ConfigError

_NUMBERS = "('integer', 'real', 'true', 'false')"
_COMPARE = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
OPERATORS = ("$eq", "$ne", "$in", "$nin", *_COMPARE)


def select_documents(index: sqlite3.Connection, collection: int, where: Mapping[str, Any]) -> list[bytes]:
    """Return the names of a collection's documents whose metadata fit, in order.

    Args:
        index: a connection of the catalogue.
        collection: its row number.
        where: for each key of the metadata a value that must be equal, or operators: ``{"year": {"$gte": 2020}}``. A
            key that is not there is as ``None``. Numbers and texts compare among themselves alone.

    Raises:
        ConfigError: an operator is unknown, or a value is no text, number, truth value or ``None``.
    """
    terms, values = ["d.collection = ?"], [collection]
    for key, wanted in where.items():
        conditions = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
        for operator, value in conditions.items():
            if operator not in OPERATORS:
                raise ConfigError(f"filter operator {operator!r} is not known; use one of {', '.join(OPERATORS)}")
            text, given = _term(key, operator, value)
            terms.append(text)
            values += given
    try:
        query = f"SELECT d.name FROM documents d WHERE {' AND '.join(terms)} ORDER BY d.position"
        return [row[0] for row in index.execute(query, values)]
    except OverflowError as error:
        raise ConfigError(f"a filter's number is too large ({error})") from error


def _term(key: str, operator: str, value: Any) -> tuple[str, list[Any]]:
    if operator == "$ne":
        text, given = _term(key, "$eq", value)
        return f"NOT {text}", given
    if operator == "$nin":
        text, given = _term(key, "$in", value)
        return f"NOT {text}", given
    if operator == "$in":
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise ConfigError(f"$in and $nin take a list; got {value!r}")
        terms = [_term(key, "$eq", one) for one in value]
        return f"({' OR '.join(text for text, _ in terms) or '0'})", [one for _, given in terms for one in given]
    if value is None and operator == "$eq":
        return (
            "NOT EXISTS (SELECT 1 FROM json_each(d.metadata) j WHERE j.key = ? AND j.type <> 'null')",
            [key],
        )
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"a filter compares texts, numbers, truth values and None; got {value!r} for {key!r}")
    kind = "j.type = 'text'" if isinstance(value, str) else f"j.type IN {_NUMBERS}"
    sign = _COMPARE.get(operator, "=")
    text = f"EXISTS (SELECT 1 FROM json_each(d.metadata) j WHERE j.key = ? AND {kind} AND j.value {sign} ?)"
    return text, [key, value]
