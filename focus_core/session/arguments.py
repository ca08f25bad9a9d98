"""Sort keyword arguments by who takes them, and refuse those that nobody takes.

Frameworks pass all of them to everybody, so a misspelt one is ignored; here it is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from focus_core.errors import ConfigError


def keywords(function: Callable[..., Any], *without: str) -> frozenset[str]:
    """Return the names of a function's keyword arguments."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return frozenset(item.name for item in parameters if item.kind in kinds and item.name not in ("self", *without))


def taken(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the values of these names."""
    return {name: value for name, value in values.items() if name in names}


def left(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the values of other names."""
    return {name: value for name, value in values.items() if name not in names}


def refuse_unknown(values: Iterable[str], known: Iterable[str], what: str = "argument") -> None:
    """Raise ``ConfigError`` for a name that is not known.

    Args:
        values: names that were given.
        known: names that may be given.
        what: the word for them.
    """
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown {what} {unknown[0]!r}; it may be one of {', '.join(sorted(known))}")
