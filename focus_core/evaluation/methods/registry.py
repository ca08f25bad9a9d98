"""Answer a trial by name: FocusLLM with any decoding options, or a baseline on the same base.

A method is written ``name`` or ``name:option=value:option=value``, such as ``focusllm:reread=2`` or
``bm25:passages=3``; options of ``focusllm`` are those of :class:`~focus_core.config.DecodeConfig`, and the ``template``
that a question is put in; every baseline takes ``prompt``, the words it is asked in. Methods are pure: what is kept
between trials is the chunk cache that they are given.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, get_args

from focus_core.answers import Answer
from focus_core.config import DecodeConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError, ContextTooLongError
from focus_core.evaluation.methods.baselines import ASKS, WINDOWS, Asked, read_prompts
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.methods.context_extension import LONGER
from focus_core.evaluation.methods.infllm import BLOCKS
from focus_core.evaluation.trial import Prediction, Trial
from focus_core.model.chat import Message
from focus_core.prompts import Template

FOCUS = "focusllm"


class Answerer(Protocol):
    """What stands behind a method's name."""

    def __call__(
        self, engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache, **options: Any
    ) -> Prediction:
        """Answer one trial."""


def focus(
    engine: FocusEngine,
    trial: Trial,
    max_tokens: int,
    cache: ChunkCache,
    *,
    template: Template | None = None,
    **options: Any,
) -> Prediction:
    """Read every document, then answer; documents are ranked by the attention that they received.

    Without ``template`` the question is put as its task says: official prompts as text to go on with.
    """
    template = template or ("raw" if trial.raw else "question")
    with cache.memory(engine.encoder, trial.documents) as memory:
        chunks = len(memory)
        options = {"max_tokens": max_tokens, **options}
        if trial.earlier:
            turns = [Message(role, text) for role, text in (*trial.earlier, ("user", trial.question))]
            answer = engine.chat(turns, **options).answer
            return _said(answer, answer.usage.chunks, None)
        answer = engine.answer(trial.question, memory, template=template, **options)
    ranking = tuple(item.document_id for item in answer.evidence)
    return _said(answer, chunks, ranking)


def _said(answer: Answer, chunks: int, ranking: tuple[str, ...] | None) -> Prediction:
    ids, local = tuple(token.id for token in answer.tokens), answer.usage.local + answer.usage.reread
    return Prediction(answer.text, chunks, local, ranking, ids, answer.supported)


def _asked_alone(ask: Callable[..., Asked]) -> Answerer:
    @functools.wraps(ask)
    def answer(engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache, **options: Any) -> Prediction:
        return read_prompts(engine, [trial], [ask(engine, trial, max_tokens, **options)], max_tokens)[0]

    return answer


METHODS: dict[str, Answerer] = {
    FOCUS: focus,
    **{name: _asked_alone(ask) for name, ask in ASKS.items()},
    **WINDOWS,
    **LONGER,
    **BLOCKS,
}


@dataclass(frozen=True)
class Method:
    """A named way of answering with its options.

    Args:
        text: as it was written; it names files and table rows.
        name: key of :data:`METHODS`.
        options: keyword arguments.
    """

    text: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_with_candidates(self) -> bool:
        """Whether the adapter takes part."""
        return self.name == FOCUS

    @property
    def file_name(self) -> str:
        """``text`` as a part of a file name."""
        return self.text.replace(":", "+")

    def answer(self, engine: FocusEngine, trial: Trial, max_tokens: int, cache: ChunkCache) -> Prediction:
        """Answer one trial."""
        options = {"max_tokens": max_tokens, **self.options}
        if not self.reads_with_candidates:
            trial = replace(trial, prompt=options.pop("prompt", trial.prompt))
        return METHODS[self.name](engine, trial, cache=cache, **options)

    @property
    def side_by_side(self) -> bool:
        """Whether :meth:`answer_many` reads several trials at once."""
        return self.name in ASKS

    def answer_many(
        self, engine: FocusEngine, trials: Sequence[Trial], max_tokens: int
    ) -> list[Prediction | ContextTooLongError]:
        """Answer trials side by side; an error stands in the place of one that cannot be read."""
        options = {"max_tokens": max_tokens, **self.options}
        most, prompt = options.pop("max_tokens"), options.pop("prompt", None)
        trials = [replace(trial, prompt=prompt or trial.prompt) for trial in trials]
        asked: list[Asked | ContextTooLongError] = []
        for trial in trials:
            try:
                asked.append(ASKS[self.name](engine, trial, most, **options))
            except ContextTooLongError as error:
                asked.append(error)
        pairs = [(trial, item) for trial, item in zip(trials, asked, strict=True) if isinstance(item, Asked)]
        made = read_prompts(engine, [pair[0] for pair in pairs], [pair[1] for pair in pairs], most) if pairs else []
        found = iter(made)
        return [item if isinstance(item, ContextTooLongError) else next(found) for item in asked]


def parse_method(text: str) -> Method:
    """Read ``name:option=value``.

    Raises:
        ConfigError: the name or an option is unknown, or a value is out of its bounds.
    """
    name, *parts = text.strip().split(":")
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"cannot read option {part!r} of method {text!r}; write it like {name}:option=value")
        options[key] = _value(value)
    known = _known_options(name)
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(f"method {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if name == FOCUS:
        DecodeConfig.from_dict({key: value for key, value in options.items() if key != "template"})
        if options.get("template", "raw") not in get_args(Template):
            raise ConfigError(f"template must be one of {', '.join(get_args(Template))}; got {options['template']!r}")
    return Method(text.strip(), name, options)


def parse_methods(text: str) -> list[Method]:
    """Read methods separated by commas."""
    return [parse_method(part) for part in text.split(",")]


def _known_options(name: str) -> list[str]:
    if name == FOCUS:
        return [*(item.name for item in dataclasses.fields(DecodeConfig)), "template"]
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return [*(item.name for item in parameters if item.kind is item.KEYWORD_ONLY), "prompt"]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
