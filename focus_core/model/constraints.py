"""Hold an answer to a grammar while it is generated: a JSON schema, tool calls, or a regular expression.

llguidance computes which tokens may come next; what is added here is an end in time: a token is refused when the
output could not be completed any more within the tokens that are left, so constrained output that ``max_tokens`` has
room for is always whole. A grammar is a value and can be shared; :meth:`Grammar.begin` makes one request's state. The
module knows no model.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_core.errors import ConfigError
from focus_core.model.chat import Tool
from focus_core.model.tool_calls import CALL_CLOSE, CALL_OPEN
from focus_core.text.tokenization import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_STRING = 64
"""Most characters of a string whose schema sets no bound."""
MAX_ITEMS = 8
"""Most items of an array whose schema sets no bound."""

_LONGEST_ENDING = 1024  # tokens; an output that needs more to end is not steered


class Constraint(Protocol):
    """What one request may still write."""

    def allowed(self, size: int) -> Tensor:
        """Return (size,) whether each token may come next."""

    def accept(self, token: int, left: int) -> bool:
        """Take a token, unless the output could not be completed with ``left`` more tokens; return whether taken."""

    def ending(self, size: int) -> Tensor:
        """Return (size,) the one token that leads to the end; always accepted."""

    @property
    def finished(self) -> bool:
        """Whether nothing more may be written."""


# -- grammars ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grammar:
    """A set of texts that an answer must be one of.

    Args:
        source: in llguidance's own notation.
    """

    source: str

    def begin(self, tokenizer: TextTokenizer, end_tokens: Collection[int], max_tokens: int) -> Constraint:
        """Return the state of one request.

        Args:
            tokenizer: the model's.
            end_tokens: ids that end an answer; allowed wherever the output is complete.
            max_tokens: of the request.

        Raises:
            ConfigError: even the shortest output has more than ``max_tokens`` tokens.
        """
        constraint = _Matching(_vocabulary(tokenizer, end_tokens), self.source)
        shortest = constraint.shortest()
        if shortest is not None and shortest > max_tokens:
            raise ConfigError(
                f"the shortest output that this schema allows has {shortest} tokens, but max_tokens is {max_tokens}; "
                "raise max_tokens"
            )
        return constraint


def json_schema(
    schema: Mapping[str, Any] | bool, *, max_string: int = MAX_STRING, max_items: int = MAX_ITEMS
) -> Grammar:
    """Return the grammar of JSON values that a schema allows.

    Strings and arrays without a bound of their own get one, and objects that name their properties get no others, so
    that a small model comes to an end.

    Args:
        schema: JSON schema; ``True`` allows any value. Keywords that cannot be enforced are left to validation.
        max_string: most characters of a string without a bound.
        max_items: most items of an array without a bound.

    Raises:
        ConfigError: this is no JSON schema, or llguidance is not installed.
    """
    from_schema = _llguidance().LLMatcher.grammar_from_json_schema
    return _checked(
        lambda lenient: from_schema(json.dumps(_prepared(schema, max_string, max_items, lenient))), f"schema {schema!r}"
    )


def regex(pattern: str) -> Grammar:
    """Return the grammar of texts that a whole regular expression matches (Rust's syntax).

    Raises:
        ConfigError: the pattern is not valid, or llguidance is not installed.
    """
    from_regex = _llguidance().LLMatcher.grammar_from_regex
    return _checked(lambda lenient: from_regex(pattern), f"pattern {pattern!r}")


def tool_calls(
    tools: Sequence[Tool],
    choice: str = "auto",
    parallel: bool = True,
    *,
    schema: Mapping[str, Any] | bool | None = None,
    max_string: int = MAX_STRING,
    max_items: int = MAX_ITEMS,
) -> Grammar | None:
    """Return the grammar of answers with tool calls.

    Args:
        tools: what may be called.
        choice: ``auto`` lets the model answer in text, or text and then calls; ``required`` asks for a call; a tool's
            name for a call of that tool; ``none`` allows none, which needs no grammar.
        parallel: whether several calls may follow each other.
        schema: JSON schema that an answer without calls must be a value of; ``None`` leaves its text free.
        max_string: most characters of a string without a bound.
        max_items: most items of an array without a bound.

    Returns:
        The grammar, or ``None`` where there is nothing to hold to.

    Raises:
        ConfigError: a tool is unknown, named twice, or has a bad schema; or llguidance is not installed.
    """
    if choice == "none" or (choice == "auto" and not tools):
        return None if schema is None else json_schema(schema, max_string=max_string, max_items=max_items)
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ConfigError(f"two tools have the same name; got {', '.join(names)}")
    chosen = [tool for tool in tools if choice in ("auto", "required", tool.name)]
    if not chosen:
        raise ConfigError(f"tool_choice {choice!r} is none of auto, none, required or {', '.join(names) or 'a tool'}")
    for tool in chosen:
        json_schema(tool.parameters, max_string=max_string, max_items=max_items)  # names the tool's own error

    if schema is not None:
        json_schema(schema, max_string=max_string, max_items=max_items)

    def source(lenient: bool) -> str:
        wanted = [_closed(tool.parameters) for tool in chosen]
        schemas = [_prepared(one, max_string, max_items, lenient) for one in wanted]
        answer = None if schema is None else _prepared(schema, max_string, max_items, lenient)
        return _calls_source([tool.name for tool in chosen], schemas, choice == "auto", parallel, answer)

    return _checked(source, f"tools {', '.join(names)}")


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Let a function without parameters be called with none: JSON schema alone would allow any."""
    none = {"additionalProperties": False} if parameters.get("properties") == {} else {}
    return {"type": "object", **none, **parameters}


def _calls_source(names: Sequence[str], schemas: Sequence[Any], optional: bool, parallel: bool, answer: Any) -> str:
    """Return the grammar in Lark: calls, or where they are ``optional`` text and then calls, or an ``answer``."""
    opened = json.dumps(CALL_OPEN)
    heads = [json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ') for name in names]
    bodies = " | ".join(f"{head} arguments_{index}" for index, head in enumerate(heads))
    again = f'("\\n" {opened} call)?' if parallel else ""
    rules = ["%llguidance {}"]
    if not optional:
        rules += [f"start: {opened} call"]
    elif answer is not None:
        rules += [f"start: answer | {opened} call", f"answer: %json {json.dumps(answer)}"]
    else:
        rules += ["start: TEXT | opened call", f"opened[lazy]: TEXT {opened}", "TEXT: /(.|\\n)*/"]
    rules += [f'call: "\\n" ({bodies}) "}}\\n" {json.dumps(CALL_CLOSE)} {again}']
    rules += [f"arguments_{index}: %json {json.dumps(schema)}" for index, schema in enumerate(schemas)]
    return "\n".join(rules)


_GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


def _prepared(schema: Any, max_string: int, max_items: int, lenient: bool) -> Any:
    """Return a schema with bounds, written without free white space."""
    options = {**_GUIDANCE, "lenient": lenient}
    if schema is True:
        return {"x-guidance": options}
    bounded = _bounded(schema, max_string, max_items)
    return {**bounded, "x-guidance": options} if isinstance(bounded, dict) else bounded


_NESTED = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def _bounded(schema: Any, max_string: int, max_items: int, closed: bool = True) -> Any:
    """Bound strings and arrays; ``closed`` objects that name their properties get no others."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _NESTED:
        if key in found:
            found[key] = _bounded(found[key], max_string, max_items)
    for key in _LISTED:
        if isinstance(found.get(key), list):
            found[key] = [_bounded(item, max_string, max_items, key != "allOf") for item in found[key]]
    for key in _NAMED:
        if isinstance(found.get(key), dict):
            found[key] = {name: _bounded(item, max_string, max_items) for name, item in found[key].items()}
    kinds = found.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds and not {"enum", "const", "pattern", "format", "maxLength"} & set(found):
        found["maxLength"] = max(max_string, found.get("minLength", 0))
    if "array" in kinds and "maxItems" not in found:
        found["maxItems"] = max(max_items, found.get("minItems", 0))
    if closed and found.get("properties") and "allOf" not in found:
        found.setdefault("additionalProperties", False)
    return found


def _checked(source: Callable[[bool], str], what: str) -> Grammar:
    """Return the grammar of ``source(lenient)``, keeping to every keyword if that can be done."""
    validate = _llguidance().LLMatcher.validate_grammar
    problem = ""
    for lenient in (False, True):
        try:
            text = source(lenient)
            problem = validate(text)
        except (TypeError, ValueError) as error:
            problem = str(error)
        if not problem or problem.startswith("WARNING"):
            return Grammar(text)
    raise ConfigError(f"{what} cannot be used to hold an answer to: {problem.strip().splitlines()[0]}; correct it")


# -- one request ------------------------------------------------------------------------------------------------


class _Matching:
    """A :class:`Constraint` that llguidance computes."""

    def __init__(self, vocabulary: _Vocabulary, source: str) -> None:
        self.vocabulary = vocabulary
        self.matcher = _llguidance().LLMatcher(vocabulary.tokenizer, source, log_level=0)
        self._way: list[int] | None = None
        self._raise_error()

    @property
    def finished(self) -> bool:
        """Whether nothing more may be written."""
        return bool(self.matcher.is_stopped())

    def allowed(self, size: int) -> Tensor:
        """Return (size,) whether each token may come next."""
        mask = torch.zeros(size, dtype=torch.bool)
        bits = torch.from_numpy(_bits(self.matcher))[:size]
        mask[: len(bits)] = bits
        self._raise_error()
        return mask

    def accept(self, token: int, left: int) -> bool:
        """Take a token, unless the output could not be completed with ``left`` more tokens; return whether taken."""
        ahead = self.matcher.deep_copy()
        if not ahead.consume_token(token):
            return False
        way = self.vocabulary.way_out(ahead)
        if way is not None and len(way) > left and self._ending() is not None:
            return False
        self.matcher, self._way = ahead, way
        return True

    def ending(self, size: int) -> Tensor:
        """Return (size,) the one token that leads to the end; always accepted."""
        way = self._ending()
        mask = torch.zeros(size, dtype=torch.bool)
        mask[way[0] if way else min(self.vocabulary.end_tokens)] = True
        return mask

    def shortest(self) -> int | None:
        """Return how many tokens the shortest way to the end has; ``None`` if it was not found."""
        way = self._ending()
        return None if way is None else len(way)

    def _ending(self) -> list[int] | None:
        if self._way is None:
            self._way = self.vocabulary.way_out(self.matcher)
        return self._way

    def _raise_error(self) -> None:
        if self.matcher.is_error():
            problem = (self.matcher.get_error() or "unknown error").strip().splitlines()[0]
            raise ConfigError(f"the answer cannot be held to its grammar ({problem}); simplify the schema")


class _Vocabulary:
    """A model's tokens as llguidance knows them, and which of them close what is open."""

    def __init__(self, tokenizer: TextTokenizer, end_tokens: Collection[int]) -> None:
        import llguidance.hf

        self.end_tokens = frozenset(end_tokens)
        fast: Any = tokenizer.tokenizer
        self.tokenizer: LLTokenizer = llguidance.hf.from_tokenizer(fast, eos_token=sorted(end_tokens))

    @cached_property
    def closers(self) -> list[int]:
        """Tokens of closing marks alone, brackets before quotes, those that close most first."""
        found = []
        for token in range(self.tokenizer.vocab_size):
            text = self.tokenizer.decode_bytes([token])
            if re.fullmatch(rb'[\]}"]+', text) and not self.tokenizer.is_special_token(token):
                found.append((b'}]"'.index(text[:1]), -len(text), token))
        return [token for _, _, token in sorted(found)]

    @cached_property
    def quotes(self) -> list[int]:
        """Those of :attr:`closers` that end a string."""
        return [token for token in self.closers if self.tokenizer.decode_bytes([token]).startswith(b'"')]

    @cached_property
    def letter(self) -> int:
        """A token that JSON allows inside strings only."""
        return self.tokenizer.tokenize_str("~")[0]

    def way_out(self, matcher: LLMatcher) -> list[int] | None:
        """Return tokens that complete the output soon; ``None`` if that takes too many."""
        ahead = matcher.deep_copy()
        way: list[int] = []
        while not ahead.is_accepting():
            step = ahead.compute_ff_tokens() or self._step(ahead)
            if not step or len(way) + len(step) > _LONGEST_ENDING or not ahead.consume_tokens(step):
                return None
            way += step
        return way

    def _step(self, matcher: LLMatcher) -> list[int]:
        allowed = _bits(matcher)
        closers = self.quotes if allowed[self.letter] else self.closers
        best = next((token for token in closers if allowed[token]), None)
        return [int(allowed.argmax()) if best is None else best] if allowed.any() else []


def _bits(matcher: LLMatcher) -> NDArray[np.bool_]:
    """Return (tokens,) which may come next."""
    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little").astype(np.bool_)


_vocabularies: weakref.WeakKeyDictionary[TextTokenizer, dict[frozenset[int], _Vocabulary]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _vocabulary(tokenizer: TextTokenizer, end_tokens: Collection[int]) -> _Vocabulary:
    with _lock:
        known = _vocabularies.setdefault(tokenizer, {})
        key = frozenset(end_tokens)
        if key not in known:
            known[key] = _Vocabulary(tokenizer, key)
        return known[key]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            "tool calls and structured output need llguidance; install it with `pip install llguidance`"
        ) from error
    return llguidance
