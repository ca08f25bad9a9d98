"""Sort the keyword arguments of an index's methods by who takes them, and refuse those that nobody takes.

LlamaIndex passes all of them to everybody, so a misspelt one is ignored; here it is named when the engine is made.
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


def refuse_unknown(values: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``ConfigError`` for a name that is not known."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; it may be one of {', '.join(sorted(known))}")
