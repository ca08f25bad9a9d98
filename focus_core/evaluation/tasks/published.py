"""Load trials from the files of published suites: LongEval, LongBench, InfiniteBench, and multi-hop questions.

A file is given by path; rows keep their order. What a suite's own prompt says in front of the context stays out: the
context goes to memory and the question is asked as every other question is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.suite_metrics import Measure
from focus_core.evaluation.tasks.splits import Split, of_split
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_LINES = re.compile(r"(?P<text>.*)\nNow the record is over\. (?P<question>.*)", re.S)
_TOPICS = re.compile(r"(?P<text>.*?)Now the record ends\. (?P<question>.*)", re.S)
_LONGBENCH_ASK = {
    "narrativeqa": "{input}",
    "gov_report": "Write a one-page summary of the report.",
    "multi_news": "Write a one-page summary of all the news.",
    "qmsum": "{input}",
    "passage_count": "How many different paragraphs are there after removing repeated ones?",
    "passage_retrieval_en": "Which paragraph is this abstract of? Give its number, such as Paragraph 1.\n{input}",
    "lcc": "Next line of code:",
    "repobench-p": "{input}Next line of code:",
}
_LONGBENCH_RAW = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
_LONGBENCH_TOKENS = {"gov_report": 512, "multi_news": 512, "qmsum": 512, "qasper": 128, "narrativeqa": 128}
_LONGBENCH_TOKENS |= {"samsum": 128, "multifieldqa_en": 64, "trec": 64, "lcc": 64, "repobench-p": 64}
_LONGBENCH_MEASURES = {
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), Measure("rouge-l")),
    "samsum": Measure("rouge-l", first_line=True),
    "triviaqa": Measure("f1", first_line=True),
    "passage_retrieval_en": Measure("paragraph"),
    "passage_count": Measure("count"),
    **dict.fromkeys(("lcc", "repobench-p"), Measure("edit")),
}
_INFINITE_RAW = {
    "passkey": "{input} The pass key is",
    "number_string": "{input} The sequence of digits is",
    "kv_retrieval": "{input}",
}
_OPTIONS = "ABCD"


def longeval_lines(path: Path) -> Iterator[Trial]:
    """Yield LongEval line retrieval; raises :class:`EmptyCorpusError` if the file is of another kind."""
    for row in _rows(path, "expected_number"):
        found = _split(_LINES, row, path)
        label = f"{row['num_lines']} lines"
        yield Trial((Document("record", found[0]),), found[1], (str(row["expected_number"]),), None, False, label)


def longeval_topics(path: Path) -> Iterator[Trial]:
    """Yield LongEval topic retrieval; raises :class:`EmptyCorpusError` if the file is of another kind."""
    for row in _rows(path, "topics"):
        found = _split(_TOPICS, row, path)
        label = f"{len(row['topics'])} topics"
        yield Trial((Document("record", found[0]),), found[1], (str(row["topics"][0]),), None, False, label)


def multihop(path: Path, split: Split | None = None) -> Iterator[Trial]:
    """Yield HotpotQA or MuSiQue rows, each with all its own paragraphs as documents; ``split`` chooses questions.

    Raises:
        EmptyCorpusError: the file is of another kind.
    """
    rows = read_rows(path)
    for row in rows if split is None else of_split(rows, lambda row: str(row.get("question")), split):
        if "paragraphs" in row:
            texts = [f"{item['title']}\n{item['paragraph_text']}" for item in row["paragraphs"]]
            hops = sum(bool(item["is_supporting"]) for item in row["paragraphs"])
        elif isinstance(row.get("context"), list):
            texts = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
            hops = len({title for title, _ in row["supporting_facts"]})
        else:
            raise EmptyCorpusError(f"{path} has no paragraphs; give a HotpotQA or MuSiQue file")
        documents = tuple(Document(f"doc-{index}", text) for index, text in enumerate(texts))
        answers = (str(row["answer"]), *map(str, row.get("answer_aliases") or ()))
        yield Trial(documents, str(row["question"]), answers, None, False, f"{hops} hops")


def longbench(path: Path) -> Iterator[Trial]:
    """Yield the rows of a LongBench file; its data set is named in each row, or by the file.

    The suite's score is LongBench's: F1 for questions, ROUGE-L for summaries, class accuracy, edit similarity for code.

    Raises:
        EmptyCorpusError: the file is of another kind.
    """
    for row in _rows(path, "context"):
        name = str(row.get("dataset") or _stem(path)).removesuffix("_e")
        ask = _LONGBENCH_ASK.get(name, "{input}").replace("{input}", str(row["input"]))
        answers = tuple(map(str, row["answers"]))
        measure = _LONGBENCH_MEASURES.get(name, Measure("f1"))
        if row.get("all_classes"):
            measure = Measure("class", tuple(map(str, row["all_classes"])), first_line=True)
        document, raw, most = (
            Document(name, str(row["context"])),
            name in _LONGBENCH_RAW,
            _LONGBENCH_TOKENS.get(name, 32),
        )
        yield Trial((document,), ask, answers, None, raw, name, "any", most, measure)


def infinitebench(path: Path) -> Iterator[Trial]:
    """Yield the rows of an InfiniteBench file; choices are listed in the question, and their text is the answer.

    Raises:
        EmptyCorpusError: the file is of another kind.
    """
    name = _stem(path)
    for row in _rows(path, "context"):
        ask = _INFINITE_RAW.get(name, "{input}").replace("{input}", str(row["input"]))
        options = [str(option) for option in row.get("options") or ()]
        if options:
            ask += "".join(f"\n{letter}. {option}" for letter, option in zip(_OPTIONS, options, strict=False))
        given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        answers = tuple(options[_OPTIONS.index(x)] if options and x in tuple(_OPTIONS) else str(x) for x in given)
        documents = (Document(name, str(row["context"])),)
        yield Trial(documents, ask, answers, None, name in _INFINITE_RAW, name, "any", 48)


def _rows(path: Path, field: str) -> list[dict[str, Any]]:
    rows = read_rows(path)
    if field not in rows[0]:
        raise EmptyCorpusError(f"rows of {path} have no field {field!r}; give a file of this task")
    return rows


def _split(pattern: re.Pattern[str], row: dict[str, Any], path: Path) -> tuple[str, str]:
    found = pattern.fullmatch(str(row["prompt"]))
    if found is None:
        raise EmptyCorpusError(f"a prompt of {path} is not of this task; give the suite's own file")
    return found["text"].strip(), found["question"].strip()


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
