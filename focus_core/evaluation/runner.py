"""Run trials, resume after a stop, and summarise: one predictions file and one metrics file a table row.

Every prediction is written as it is made, so a run that is started again goes on behind the last one. The first line of
a predictions file says what made it; a file of another adapter, configuration or trial is refused, never continued.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError, ContextTooLongError
from focus_core.evaluation.cache import ChunkCache
from focus_core.evaluation.methods import Method, parse_method
from focus_core.evaluation.metrics import score, wilson
from focus_core.evaluation.trial import Prediction, Trial
from focus_core.store import dtype_name

_RANKS = (1, 3, 5)


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
        chunks: mean k.
        local: mean tokens of the local context.
        seconds: mean time a trial took.
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
    chunks: float
    local: float
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the share of right answers."""
        return wilson(self.right, self.trials)


def run(
    engine: FocusEngine,
    name: str,
    trials: Iterable[Trial],
    method: Method | str,
    max_tokens: int,
    output: Path,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    *,
    settings: dict[str, Any] | None = None,
    cache: ChunkCache | None = None,
) -> Row:
    """Answer every trial with ``method``, write ``{name}.{method}.jsonl`` and ``.json`` under ``output``.

    Args:
        engine: model under test; baselines use its base.
        name: of the files.
        trials: from :mod:`focus_core.evaluation.tasks`.
        method: or its text, such as ``focusllm:reread=2``.
        max_tokens: most tokens of an answer.
        output: folder.
        report: called with each prediction.
        settings: what made the trials, for the metrics file and to tell runs apart.
        cache: of chunk KV; share it between methods on the same trials.

    Raises:
        ConfigError: the predictions file was made by another model, configuration or trial.
    """
    method = parse_method(method) if isinstance(method, str) else method
    cache = ChunkCache() if cache is None else cache
    identity = _identity(engine, name, method, max_tokens, settings or {})
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.{method.file_name}.jsonl"
    done = _resume(path, identity)
    kept: list[dict[str, Any]] = []
    with path.open("a", encoding="utf-8") as file:
        for index, trial in enumerate(trials):
            if index < len(done):
                prediction = done[index]
                if prediction["fingerprint"] != trial.fingerprint:
                    raise _mixed(path, f"trial {index} is another question now")
            else:
                prediction = {"trial": index, **_ask(engine, trial, method, max_tokens, cache)}
                file.write(json.dumps(prediction) + "\n")
                file.flush()
            kept.append(prediction)
            report(prediction)
    row = summarise(name, method.text, kept)
    metrics = {
        **asdict(row),
        "interval": row.interval,
        "run": identity,
        "trained": engine.info.trained,
        **machine_facts(engine),
    }
    (output / f"{name}.{method.file_name}.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return row


def summarise(name: str, method: str, predictions: list[dict[str, Any]]) -> Row:
    """Turn predictions into a table line."""
    answered = [item for item in predictions if "skipped" not in item]
    ranks = [item["gold_rank"] for item in answered if item["gold_rank"] is not None]

    def mean(key: str) -> float:
        return float(sum(item[key] for item in answered)) / max(len(answered), 1)

    return Row(
        name,
        method,
        sum(item["right"] for item in answered),
        len(answered),
        len(predictions) - len(answered),
        mean("exact"),
        mean("f1"),
        mean("recall"),
        {most: sum(rank <= most for rank in ranks) / len(ranks) for most in _RANKS} if ranks else {},
        mean("chunks"),
        mean("local"),
        mean("seconds"),
    )


def machine_facts(engine: FocusEngine) -> dict[str, Any]:
    """Return versions and machine: what a reader needs to judge a number."""
    device = engine.base.device
    return {
        "focusllm": _own_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }


def engine_facts(engine: FocusEngine, *, with_adapter: bool) -> dict[str, Any]:
    """Return what tells one model from another."""
    facts: dict[str, Any] = {
        "base": engine.loaded.fingerprint,
        "dtype": dtype_name(engine.base.dtype),
        "focus": engine.config.to_dict(),
        "question_template": engine.info.question_template,
    }
    if with_adapter:
        facts |= {
            "adapter": engine.adapter_fingerprint,
            "system": engine.info.system,
            "attribution_heads": [list(pair) for pair in engine.info.attribution_heads],
        }
    return facts


def _own_version() -> str:
    try:
        return version("focusllm")
    except PackageNotFoundError:
        return "not installed"


def _gold_rank(trial: Trial, prediction: Prediction) -> int | None:
    """Return the place of the gold document, from 1; ``None`` where nothing was ranked or there is no choice."""
    if trial.gold is None or prediction.ranking is None or len(trial.documents) < 2:
        return None
    return prediction.ranking.index(trial.gold) + 1


def _identity(
    engine: FocusEngine, name: str, method: Method, max_tokens: int, settings: dict[str, Any]
) -> dict[str, Any]:
    facts = engine_facts(engine, with_adapter=method.reads_with_candidates)
    identity = {"task": name, "method": method.text, "max_tokens": max_tokens, "settings": settings, **facts}
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def _resume(path: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the predictions of an earlier run, or begin the file; a half-written last line is dropped."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    whole = [json.loads(line) for line in lines[:-1]]
    if lines[-1]:
        path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    if not whole:
        path.write_text(json.dumps({"run": identity}) + "\n", encoding="utf-8")
        return []
    made_by = whole[0].get("run", {})
    differ = [key for key in {**identity, **made_by} if made_by.get(key) != identity.get(key)]
    if differ:
        key = differ[0]
        raise _mixed(path, f"{key} was {_short(made_by.get(key))}, is {_short(identity.get(key))} now")
    return whole[1:]


def _mixed(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} holds predictions of another run ({why}); remove it or choose another --output")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _ask(engine: FocusEngine, trial: Trial, method: Method, max_tokens: int, cache: ChunkCache) -> dict[str, Any]:
    started = time.monotonic()
    asked = {"label": trial.label, "answers": list(trial.answers), "fingerprint": trial.fingerprint}
    try:
        prediction = method.answer(engine, trial, max_tokens, cache)
    except ContextTooLongError as error:
        return {**asked, "skipped": str(error)}
    return {
        **asked,
        "text": prediction.text,
        **score(prediction.text, trial.answers, trial.wanted),
        "gold_rank": _gold_rank(trial, prediction),
        "chunks": prediction.chunks,
        "local": prediction.local,
        "seconds": round(time.monotonic() - started, 3),
    }
