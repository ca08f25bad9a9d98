"""Name every task that makes trials: what `focusllm eval TASK` can be asked for.

A task turns :class:`TaskOptions` into trials; adding one is adding a row to :data:`TASKS`. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from focus_core.errors import ConfigError
from focus_core.evaluation.files import file_facts, read_long_text
from focus_core.evaluation.tasks.absent import with_and_without
from focus_core.evaluation.tasks.babilong import babilong
from focus_core.evaluation.tasks.conversation import conversation
from focus_core.evaluation.tasks.few_shot import few_shot
from focus_core.evaluation.tasks.forms import forms
from focus_core.evaluation.tasks.haystack import Haystack
from focus_core.evaluation.tasks.infinitebench import code_run, math_find
from focus_core.evaluation.tasks.key_value import key_values, number, read_key_values
from focus_core.evaluation.tasks.long_documents import bamboo, leval
from focus_core.evaluation.tasks.multi_document import Source, multi_document, read_questions, ruler_questions
from focus_core.evaluation.tasks.passkey import Needle, passkey
from focus_core.evaluation.tasks.published import infinitebench, longbench, longeval_lines, longeval_topics, multihop
from focus_core.evaluation.tasks.ruler import common_words, frequent_words, needles, variables
from focus_core.evaluation.tasks.splits import Split
from focus_core.evaluation.tasks.summarization import qmsum, squality
from focus_core.evaluation.tasks.two_documents import two_documents
from focus_core.evaluation.trial import Trial
from focus_core.text.tokenization import TextTokenizer

__all__ = ["TASKS", "Task", "TaskOptions", "Trial", "multi_document", "passkey"]

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
        distractors_from: where a question's other documents come from, see :func:`multi_document`.
        needle: what a passkey trial hides, ``key`` or ``story``.
        split: of the questions, for files that have one; generated trials of the test split have seeds of their own.
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
    distractors_from: Source = "others"
    split: Split = "development"
    needle: Needle = "key"

    def __post_init__(self) -> None:
        if self.distractors_from not in get_args(Source):
            known = ", ".join(get_args(Source))
            raise ConfigError(f"--distractors-from must be one of {known}; got {self.distractors_from!r}")

        if self.needle not in get_args(Needle):
            raise ConfigError(f"--needle must be one of {', '.join(get_args(Needle))}; got {self.needle!r}")

    @property
    def needed_file(self) -> Path:
        """``file``; raises :class:`ConfigError` where there is none."""
        if self.file is None:
            raise ConfigError("this task needs --file; see `focusllm eval --help`")
        return self.file

    def filler_text(self) -> str | None:
        """Return the natural filler."""
        return None if self.filler is None else read_long_text(self.filler)

    def haystack(self) -> Haystack:
        """Return what to hide needles in."""
        return Haystack(self.tokenizer, self.tokens, self.chunk_size, self.filler_text())

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


Make = Callable[[TaskOptions], Iterator[Trial]]


@dataclass(frozen=True)
class Task:
    """A kind of trial.

    Args:
        name: as a user types it.
        summary: one line for the list that an unknown name brings.
        make: yields trials.
        max_tokens: of an answer.
        varies: which option makes the rows of its table.
        sized_by_file: a file leaves nothing to vary.
        limits: fewer tokens at which answers are scored too.
    """

    name: str
    summary: str
    make: Make
    max_tokens: int
    varies: Varies
    sized_by_file: bool = False
    limits: tuple[int, ...] = ()

    def varies_for(self, options: TaskOptions) -> Varies:
        """Return which option makes rows, given the others."""
        by_file = self.sized_by_file and options.file is not None
        as_they_are = self.varies == "documents" and options.distractors_from == "file"
        return "nothing" if by_file or as_they_are else self.varies


def _passkey(options: TaskOptions) -> Iterator[Trial]:
    return passkey(
        options.tokenizer,
        options.tokens,
        options.trials,
        options.seed,
        distractors=options.distractors,
        needle=options.needle,
        filler=options.filler_text(),
        chunk_size=options.chunk_size,
    )


def _questions(options: TaskOptions) -> Iterator[Trial]:
    return multi_document(
        options.needed_file,
        options.documents,
        options.trials,
        options.seed,
        source=options.distractors_from,
        split=options.split,
    )


def _not_there(options: TaskOptions) -> Iterator[Trial]:
    """Half of the trials without the gold document; near misses beside it unless another source is asked for."""
    source: Source = "nearest" if options.distractors_from == "others" else options.distractors_from
    count = (options.trials + 1) // 2
    asked = multi_document(
        options.needed_file, options.documents, count, options.seed, source=source, split=options.split
    )
    return islice(with_and_without(asked), options.trials)


def _forms(options: TaskOptions) -> Iterator[Trial]:
    return forms(options.documents, options.trials, options.seed)


def _two_documents(options: TaskOptions) -> Iterator[Trial]:
    others = [] if options.file is None else [row.passage for row in read_questions(options.file)]
    return two_documents(options.documents, options.trials, options.seed, others=others)


def _conversation(options: TaskOptions) -> Iterator[Trial]:
    return conversation(options.trials, options.seed, filler=options.filler_text())


def _multihop(options: TaskOptions) -> Iterator[Trial]:
    return islice(multihop(options.needed_file, options.split), options.trials)


def _ruler_questions(options: TaskOptions) -> Iterator[Trial]:
    return ruler_questions(options.needed_file, options.tokenizer, options.tokens, options.trials, options.seed)


def _key_values(options: TaskOptions) -> Iterator[Trial]:
    if options.file is not None:
        return read_key_values(options.file, options.trials)
    return key_values(options.tokenizer, options.tokens, options.trials, options.seed)


def _needles(**counts: int) -> Make:
    def make(options: TaskOptions) -> Iterator[Trial]:
        return needles(options.haystack(), options.trials, options.seed, words=options.file, **counts)

    return make


def _hidden(generator: Callable[[Haystack, int, int], Iterator[Trial]]) -> Make:
    return lambda options: generator(options.haystack(), options.trials, options.seed)


def _common_words(options: TaskOptions) -> Iterator[Trial]:
    return common_words(options.haystack(), options.trials, options.seed, words=options.file)


def _babilong(options: TaskOptions) -> Iterator[Trial]:
    return babilong(options.haystack(), options.needed_file, options.trials, options.seed)


def _few_shot(options: TaskOptions) -> Iterator[Trial]:
    return few_shot(options.haystack(), options.needed_file, options.trials, options.seed)


def _from_file(loader: Callable[[Path], Iterator[Trial]]) -> Make:
    return lambda options: islice(loader(options.needed_file), options.trials)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("passkey", "one number in a long text", _passkey, 8, "lengths"),
        Task(
            "questions", "a question among others' documents; needs --file", _questions, 128, "documents", limits=(24,)
        ),
        Task("multihop", "HotpotQA or MuSiQue rows; needs --file", _multihop, 128, "nothing", limits=(24,)),
        Task("not-there", "a question with and without its document; needs --file", _not_there, 64, "documents"),
        Task("forms", "a table's row, a JSON field, a header, a long number", _forms, 32, "documents"),
        Task("two-documents", "comparisons, bridges and lists over two documents", _two_documents, 64, "documents"),
        Task("conversation", "what was said sixty turns ago", _conversation, 64, "nothing"),
        Task("kv", "a UUID's value among records, generated or from --file", _key_values, 48, "lengths", True),
        Task("number", "ten repeated digits in a long text", _hidden(number), 12, "lengths"),
        Task("math-find", "InfiniteBench: a rank in a list of numbers", _hidden(math_find), 8, "lengths"),
        Task("code-run", "InfiniteBench: the value of nested calls", _hidden(code_run), 8, "lengths"),
        Task("niah-single", "RULER: one needle", _needles(), 32, "lengths"),
        Task("niah-multikey", "RULER: one of four keys", _needles(keys=4), 32, "lengths"),
        Task("niah-multivalue", "RULER: four values of one key", _needles(values=4), 80, "lengths"),
        Task("niah-multiquery", "RULER: four of four keys", _needles(keys=4, asked=4), 80, "lengths"),
        Task("variables", "RULER: variable tracking", _hidden(variables), 60, "lengths"),
        Task("common-words", "RULER: the ten most common words", _common_words, 120, "lengths"),
        Task("frequent-words", "RULER: the three most frequent words", _hidden(frequent_words), 50, "lengths"),
        Task("ruler-qa", "RULER: a SQuAD question by length; needs --file", _ruler_questions, 32, "lengths"),
        Task("babilong", "bAbI facts in other text; needs --file", _babilong, 8, "lengths"),
        Task("few-shot", "a text's class after labelled texts; needs --file, a folder", _few_shot, 16, "lengths"),
        Task("qmsum", "QMSum: summaries of meetings; needs --file", _from_file(qmsum), 256, "nothing"),
        Task("squality", "SQuALITY: summaries of stories; needs --file", _from_file(squality), 256, "nothing"),
        Task("longeval-lines", "LongEval line retrieval; needs --file", _from_file(longeval_lines), 16, "nothing"),
        Task("longeval-topics", "LongEval first topic; needs --file", _from_file(longeval_topics), 32, "nothing"),
        Task("leval", "questions of an L-Eval file; needs --file", _from_file(leval), 48, "nothing"),
        Task("bamboo", "BAMBOO's altqa, meetingqa, paperqa; needs --file", _from_file(bamboo), 48, "nothing"),
        Task("longbench", "a LongBench file; needs --file", _from_file(longbench), 32, "nothing"),
        Task("infinitebench", "an InfiniteBench file; needs --file", _from_file(infinitebench), 48, "nothing"),
    )
}
