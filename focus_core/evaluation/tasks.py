"""Name every task that makes trials: what `focusllm eval TASK` can be asked for.

A task turns :class:`TaskOptions` into trials; adding one is adding a row to :data:`TASKS`. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from focus_core.errors import ConfigError
from focus_core.evaluation.files import file_facts, read_long_text
from focus_core.evaluation.needles import passkey
from focus_core.evaluation.questions import multi_document
from focus_core.evaluation.trial import Trial
from focus_core.tokenization import TextTokenizer

__all__ = ["TASKS", "Task", "TaskOptions", "Trial", "find_task", "multi_document", "passkey"]

Varies = Literal["lengths", "documents", "nothing"]


@dataclass(frozen=True)
class TaskOptions:
    """What a task is made from.

    Args:
        tokenizer: of the base.
        trials: how many.
        seed: of the examples.
        tokens: of memory, for tasks that vary ``lengths``.
        documents: in memory, for tasks that vary ``documents``.
        chunk_size: most tokens of a chunk.
        distractors: look-alikes of the wanted needle.
        file: what the task reads.
        filler: natural text to hide things in; ``None`` for the repeated sentences.
    """

    tokenizer: TextTokenizer
    trials: int
    seed: int = 0
    tokens: int = 4000
    documents: int = 10
    chunk_size: int = 512
    distractors: int = 0
    file: Path | None = None
    filler: Path | None = None

    @property
    def needed_file(self) -> Path:
        """``file``; raises :class:`ConfigError` where there is none."""
        if self.file is None:
            raise ConfigError("this task needs --file; see `focusllm eval --help`")
        return self.file

    def filler_text(self) -> str | None:
        """Return the natural filler."""
        return None if self.filler is None else read_long_text(self.filler)

    def facts(self) -> dict[str, Any]:
        """Return what differs from the defaults as JSON, files by content.

        The number of trials is left out, so that it may grow, and defaults are, so that a new option leaves earlier
        predictions valid.
        """
        facts: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("tokenizer", "trials") and value != item.default:
                facts[item.name] = file_facts(value) if isinstance(value, Path) else value
        return facts


@dataclass(frozen=True)
class Task:
    """A kind of trial.

    Args:
        name: as a user types it.
        summary: one line for the help text.
        make: yields trials.
        max_tokens: of an answer.
        varies: which option makes the rows of its table.
    """

    name: str
    summary: str
    make: Callable[[TaskOptions], Iterator[Trial]]
    max_tokens: int
    varies: Varies


def _passkey(options: TaskOptions) -> Iterator[Trial]:
    return passkey(
        options.tokenizer,
        options.tokens,
        options.trials,
        options.seed,
        distractors=options.distractors,
        filler=options.filler_text(),
        chunk_size=options.chunk_size,
    )


def _questions(options: TaskOptions) -> Iterator[Trial]:
    return multi_document(options.needed_file, options.documents, options.trials, options.seed)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("passkey", "one number in a long text", _passkey, 8, "lengths"),
        Task("questions", "a question among documents (--file: question, answers, ctxs)", _questions, 24, "documents"),
    )
}


def find_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; choose {', '.join(TASKS)}")
    return TASKS[name]
