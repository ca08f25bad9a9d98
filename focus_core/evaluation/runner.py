"""Answer trials with a method and summarise: one predictions file and one metrics file a table row.

Every prediction is on disk before the next trial begins, so a run that is started again goes on behind the last one.
How answers are made is the method's business, how they are kept that of :mod:`focus_core.evaluation.report.records`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from focus_core.engine import FocusEngine
from focus_core.errors import ContextTooLongError
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.methods.registry import Method, parse_method
from focus_core.evaluation.metrics import auroc, clustered, contains_answer, declines, score, wilson
from focus_core.evaluation.report.records import Record, RecordFile, engine_facts, machine_facts, write_metrics
from focus_core.evaluation.trial import Prediction, Trial

RANKS = (1, 3, 5)
_SIDE_BY_SIDE = 10  # prompts that a baseline decodes together


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: task and its settings.
        method: as it was written.
        right: answers that hold what was wanted.
        trials: how many were answered.
        skipped: trials that the method could not read, such as texts beyond its window.
        exact: share of exact matches.
        f1: mean F1 of words.
        recall: mean answer recall.
        gold_within: share of trials whose gold document is among the best 1, 3 and 5; empty where it does not apply.
        by_label: right answers and trials of each label, such as a depth.
        chunks: mean k.
        local: mean tokens of the local context.
        seconds: mean time a trial took.
        suite_score: mean of the suite's own score, 0 to 1, where trials have one.
        tokens: memory tokens that were asked for, where the task varies them.
        settings: what made the trials.
        contexts: right answers and trials of each context, where several trials share one.
        declined: share of the answers that decline, by label, where that was asked.
        auroc: of the method's ``supported``, trials that can be answered against those that cannot.
        cut: right answers, exact matches and mean F1 where answers are cut at fewer tokens, by that limit.
    """

    name: str
    method: str
    right: int
    trials: int
    skipped: int
    exact: float
    f1: float
    recall: float
    gold_within: dict[int, float]
    by_label: dict[str, tuple[int, int]]
    chunks: float
    local: float
    seconds: float
    suite_score: float | None = None
    tokens: int | None = None
    settings: Record = field(default_factory=dict)
    cut: dict[int, dict[str, float]] = field(default_factory=dict)
    contexts: list[tuple[int, int]] = field(default_factory=list)
    declined: dict[str, float] = field(default_factory=dict)
    auroc: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the share of right answers: Wilson's, over contexts where trials share them."""
        return clustered(self.contexts) if self.contexts else wilson(self.right, self.trials)


def run(
    engine: FocusEngine,
    name: str,
    trials: Iterable[Trial],
    method: Method | str,
    max_tokens: int,
    output: Path,
    report: Callable[[Record], None] = lambda record: None,
    *,
    settings: Record | None = None,
    tokens: int | None = None,
    cache: ChunkCache | None = None,
    limits: Sequence[int] = (),
) -> Row:
    """Answer every trial with ``method``, write ``{name}.{method}.jsonl`` and ``.json`` under ``output``.

    Args:
        engine: model under test; baselines use its base.
        name: of the files.
        trials: from :mod:`focus_core.evaluation.tasks.registry`.
        method: or its text, such as ``focusllm:reread=2``.
        max_tokens: most tokens of an answer, where a trial does not say.
        output: folder.
        report: called with each prediction.
        settings: what made the trials, for the metrics file and to tell runs apart.
        tokens: memory tokens of each trial, for plots.
        cache: of chunk KV; share it between methods on the same trials.
        limits: fewer tokens at which answers are scored too, as if they had been cut there.

    Raises:
        ConfigError: the predictions file was made by another model, configuration or trial.
    """
    method = parse_method(method) if isinstance(method, str) else method
    cache = ChunkCache() if cache is None else cache
    settings = settings or {}
    identity = {
        "task": name,
        "method": method.text,
        "max_tokens": max_tokens,
        "settings": settings,
        **engine_facts(engine, with_adapter=method.reads_with_candidates),
    }
    file = RecordFile(output / f"{name}.{method.file_name}.jsonl", identity)
    records = []
    asking = _Asking(engine, trials, method, max_tokens, cache, limits)
    for record in file.extend(asking.trials, lambda trial: trial.fingerprint, asking):
        records.append(record)
        report(record)
    row = replace(summarise(name, method.text, records), tokens=tokens, settings=settings)
    facts = {"run": file.identity, "trained": engine.info.trained, **machine_facts(engine)}
    write_metrics(output / f"{name}.{method.file_name}.json", {**asdict(row), "interval": row.interval, **facts})
    return row


def summarise(name: str, method: str, records: list[Record]) -> Row:
    """Turn predictions into a table line."""
    answered = [record for record in records if "skipped" not in record]
    ranks = [record["gold_rank"] for record in answered if record["gold_rank"] is not None]
    scores = [record["suite_score"] for record in answered if record.get("suite_score") is not None]
    by_label: dict[str, tuple[int, int]] = {}
    for record in answered:
        right, trials = by_label.get(record["label"], (0, 0))
        by_label[record["label"]] = (right + int(record["right"]), trials + 1)

    def mean(key: str) -> float:
        return float(sum(record[key] for record in answered)) / max(len(answered), 1)

    return Row(
        name=name,
        method=method,
        right=sum(record["right"] for record in answered),
        trials=len(answered),
        skipped=len(records) - len(answered),
        exact=mean("exact"),
        f1=mean("f1"),
        recall=mean("recall"),
        gold_within={most: sum(rank <= most for rank in ranks) / len(ranks) for most in RANKS} if ranks else {},
        by_label=by_label,
        chunks=mean("chunks"),
        local=mean("local"),
        seconds=mean("seconds"),
        suite_score=sum(scores) / len(scores) if scores else None,
        cut=_cut_means(answered),
        contexts=_contexts(answered),
        declined=_declined(answered),
        auroc=auroc(*(_supported(answered, absent) for absent in (False, True))),
    )


def _contexts(records: list[Record]) -> list[tuple[int, int]]:
    """Return right answers and trials by context; empty where every trial has its own."""
    groups: dict[str, tuple[int, int]] = {}
    for number, record in enumerate(records):
        context = str(record.get("context", number))
        right, trials = groups.get(context, (0, 0))
        groups[context] = (right + int(record["right"]), trials + 1)
    return list(groups.values()) if len(groups) < len(records) else []


def _declined(records: list[Record]) -> dict[str, float]:
    asked = [record for record in records if "declined" in record]
    shares: dict[str, list[bool]] = {}
    for record in asked:
        shares.setdefault(record["label"], []).append(record["declined"])
    return {label: sum(said) / len(said) for label, said in shares.items()}


def _supported(records: list[Record], absent: bool) -> list[float]:
    return [record["supported"] for record in records if record.get("absent") is absent and "supported" in record]


def _cut_means(records: list[Record]) -> dict[int, dict[str, float]]:
    limits = sorted({limit for record in records for limit in record.get("cut", {})}, key=int)
    means: dict[int, dict[str, float]] = {}
    for limit in limits:
        scores = [record["cut"][limit] for record in records]
        means[int(limit)] = {"right": sum(score["right"] for score in scores)}
        means[int(limit)] |= {key: sum(score[key] for score in scores) / len(scores) for key in ("exact", "f1")}
    return means


class _Asking:
    """Turns trials into records, several at once where the method reads prompts side by side."""

    def __init__(
        self,
        engine: FocusEngine,
        trials: Iterable[Trial],
        method: Method,
        max_tokens: int,
        cache: ChunkCache,
        limits: Sequence[int],
    ) -> None:
        self.engine, self.method, self.max_tokens, self.cache = engine, method, max_tokens, cache
        self.limits = limits
        self.trials: Iterable[Trial] = list(trials) if method.side_by_side else trials
        self._ahead: dict[int, Record] = {}

    def __call__(self, trial: Trial) -> Record:
        """Answer one trial."""
        if not self.method.side_by_side:
            started = time.monotonic()
            try:
                found: Prediction | ContextTooLongError = self.method.answer(
                    self.engine, trial, trial.max_tokens or self.max_tokens, self.cache
                )
            except ContextTooLongError as error:
                found = error
            return self._record(trial, found, time.monotonic() - started)
        if id(trial) not in self._ahead:
            self._answer_from(trial)
        return self._ahead.pop(id(trial))

    def _answer_from(self, trial: Trial) -> None:
        """Answer a trial and those behind it that want as many tokens."""
        started, trials = time.monotonic(), list(self.trials)
        first = next(index for index, other in enumerate(trials) if other is trial)
        batch = trials[first : first + _SIDE_BY_SIDE]
        batch = list(itertools.takewhile(lambda other: other.max_tokens == trial.max_tokens, batch))
        found = self.method.answer_many(self.engine, batch, trial.max_tokens or self.max_tokens)
        seconds = (time.monotonic() - started) / len(batch)
        self._ahead = {id(other): self._record(other, item, seconds) for other, item in zip(batch, found, strict=True)}

    def _record(self, trial: Trial, prediction: Prediction | ContextTooLongError, seconds: float) -> Record:
        asked = {"label": trial.label, "answers": list(trial.answers), "context": trial.context}
        if isinstance(prediction, ContextTooLongError):
            return {**asked, "skipped": str(prediction)}
        cut = {str(limit): _cut(self.engine, trial, prediction, limit) for limit in self.limits}
        return {
            **asked,
            "text": prediction.text,
            **_scored(trial, prediction.text),
            **_absence(trial, prediction),
            **({"suite_score": trial.measure(prediction.text, trial.answers)} if trial.measure else {}),
            **({"cut": cut} if cut else {}),
            "tokens": len(prediction.ids),
            "gold_rank": _gold_rank(trial, prediction),
            "chunks": prediction.chunks,
            "local": prediction.local,
            "seconds": round(seconds, 3),
        }


def _scored(trial: Trial, text: str) -> Record:
    scores = score(text, trial.answers, trial.wanted)
    return {**scores, "right": scores["right"] and not contains_answer(text, trial.wrong)}


def _absence(trial: Trial, prediction: Prediction) -> Record:
    """Return what is recorded where a trial asks whether there is an answer at all."""
    supported = {} if prediction.supported is None else {"supported": round(prediction.supported, 4)}
    if trial.absent is None:
        return supported
    declined = declines(prediction.text)
    right = declined if trial.absent else contains_answer(prediction.text, trial.answers) and not declined
    return {**supported, "absent": trial.absent, "declined": declined, "right": right}


def _cut(engine: FocusEngine, trial: Trial, prediction: Prediction, limit: int) -> Record:
    """Score an answer as if it had been cut at ``limit`` tokens; greedy decoding would have made the same ones."""
    whole = len(prediction.ids) <= limit
    text = prediction.text if whole else engine.tokenizer.decode(list(prediction.ids[:limit]))
    return {"text": text, **_scored(trial, text)}


def _gold_rank(trial: Trial, prediction: Prediction) -> int | None:
    """Return the place of the gold document, from 1; ``None`` where nothing was ranked or there is no choice."""
    if trial.gold is None or prediction.ranking is None or len(trial.documents) < 2:
        return None
    return prediction.ranking.index(trial.gold) + 1
