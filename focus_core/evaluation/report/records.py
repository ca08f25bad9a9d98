"""Keep predictions on disk as they are made: JSON lines that resume after a stop and never mix two runs.

The first line says what made the file: task, options, weights, settings. A file whose first line differs is refused. A
last line that was cut off by a crash is dropped. The module knows neither tasks nor methods.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from focus_core.config import FocusConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.files import write_atomically
from focus_core.hardware import dtype_name

Record = dict[str, Any]
Item = TypeVar("Item")


class RecordFile:
    """One predictions file.

    Args:
        path: of the file; begun if it is not there.
        identity: what makes the predictions, JSON types only.

    Raises:
        ConfigError: the file was made by something else.
    """

    def __init__(self, path: Path, identity: Record) -> None:
        self.path = path
        self.identity: Record = json.loads(json.dumps(identity, default=str))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._resume()

    def extend(
        self, items: Iterable[Item], fingerprint: Callable[[Item], str], make: Callable[[Item], Record]
    ) -> Iterable[Record]:
        """Yield one record an item, those of an earlier run first; a new one is on disk before it is yielded.

        Args:
            items: trials, in a fixed order.
            fingerprint: of an item; a record of another item in its place is refused.
            make: computes a record.

        Raises:
            ConfigError: the file holds a record of another item.
        """
        with self.path.open("a", encoding="utf-8") as file:
            for index, item in enumerate(items):
                made_of = fingerprint(item)
                if index < len(self.done):
                    if self.done[index]["fingerprint"] != made_of:
                        raise self._mixed(f"trial {index} is another one now")
                    yield self.done[index]
                    continue
                record = {"trial": index, "fingerprint": made_of, **make(item)}
                file.write(json.dumps(record) + "\n")
                file.flush()
                yield record

    def _resume(self) -> list[Record]:
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        if lines[-1]:
            self.path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
        whole = [json.loads(line) for line in lines[:-1]]
        if not whole:
            self.path.write_text(json.dumps({"run": self.identity}) + "\n", encoding="utf-8")
            return []
        made_by, now = _comparable(whole[0].get("run", {})), _comparable(self.identity)
        for key in {**now, **made_by}:
            if made_by.get(key) != now.get(key):
                raise self._mixed(f"{key} was {_short(made_by.get(key))}, is {_short(now.get(key))} now")
        return whole[1:]

    def _mixed(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self.path} holds predictions of another run ({why}); remove it or choose another --output"
        )


def engine_facts(engine: FocusEngine, *, with_adapter: bool = True) -> Record:
    """Return what tells one model from another; without the adapter for methods that do not use it."""
    facts: Record = {
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


def machine_facts(engine: FocusEngine) -> Record:
    """Return versions and machine: what a reader needs to judge a number."""
    device = engine.base.device
    return {
        "focusllm": _own_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
    }


def write_metrics(path: Path, facts: Record) -> None:
    """Write a metrics file, whole or not at all."""
    write_atomically(path, (json.dumps(facts, indent=1, default=str) + "\n").encode())


def read_metrics(folder: Path, task: str) -> list[Record]:
    """Return what the metrics files of a task hold: ``{task}.METHOD.json`` and ``{task}-....json``.

    Raises:
        ConfigError: a file is no metrics file.
    """
    found = []
    for path in sorted([*folder.glob(f"{task}.*.json"), *folder.glob(f"{task}-*.json")]):
        try:
            found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ConfigError(f"{path} is no metrics file ({error}); remove it and run the command again") from error
    return found


def _comparable(identity: Record) -> Record:
    """Drop settings at their defaults, so that a setting added later leaves earlier predictions valid."""
    defaults = FocusConfig().to_dict()
    focus = {key: value for key, value in identity.get("focus", {}).items() if defaults.get(key, ...) != value}
    return {**identity, "focus": focus}


def _own_version() -> str:
    try:
        return version("focusllm")
    except PackageNotFoundError:
        return "not installed"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
