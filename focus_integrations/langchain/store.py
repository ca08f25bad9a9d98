"""Keep langgraph's long-term store in a memory: items survive the process, and searches rank by attention.

An item is a document whose text is its value; a search with a query runs one decoding step over the items that its
namespace and filter leave. Needs ``langgraph-checkpoint`` (``pip install 'focusllm[langchain-agents]'``).
"""

from __future__ import annotations

import asyncio
import json
import operator
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
)

from focus_core.errors import ConfigError
from focus_core.session.long_memory import LongMemory
from focus_core.text.corpus import Document
from focus_integrations.langchain.memory import STORE_ITEM as _ITEM

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


class FocusMemoryStore(BaseStore):
    """A langgraph store over a :class:`~focus_core.session.long_memory.LongMemory`.

    Args:
        memory: holds the items; other documents in it are left alone.
    """

    def __init__(self, memory: LongMemory) -> None:
        self.memory = memory

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Run operations in order; raises ``ConfigError`` for a filter operator that is not known."""
        return [self._run(op) for op in ops]

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Run operations in order, beside the event loop."""
        return await asyncio.to_thread(self.batch, list(ops))

    def _run(self, op: Op) -> Result:
        if isinstance(op, GetOp):
            found = next((one for one in self.memory.documents if one.id == _key(op.namespace, op.key)), None)
            return _item(found) if found is not None else None
        if isinstance(op, PutOp):
            self._put(op)
            return None
        if isinstance(op, SearchOp):
            return self._search(op)
        return self._namespaces(op)

    def _put(self, op: PutOp) -> None:
        key = _key(op.namespace, op.key)
        if op.value is None:
            self.memory.forget([key])
            return
        before = next((one for one in self.memory.documents if one.id == key), None)
        now = datetime.now(UTC).isoformat()
        facts = {
            "namespace": list(op.namespace),
            "key": op.key,
            "value": dict(op.value),
            "created_at": before.metadata[_ITEM]["created_at"] if before is not None else now,
            "updated_at": now,
        }
        self.memory.put([Document(key, _text(op.value), {_ITEM: facts})])

    def _search(self, op: SearchOp) -> list[SearchItem]:
        def wanted(document: Document) -> bool:
            facts = document.metadata.get(_ITEM)
            if facts is None or tuple(facts["namespace"][: len(op.namespace_prefix)]) != op.namespace_prefix:
                return False
            return all(_matches(facts["value"].get(name), value) for name, value in (op.filter or {}).items())

        if op.query:
            found = self.memory.recall(op.query, op.offset + op.limit, wanted)
            ranked: list[tuple[Document, float | None]] = [(item.document, item.score) for item in found]
        else:
            ranked = [(document, None) for document in self.memory.documents if wanted(document)]
        return [_search_item(document, score) for document, score in ranked[op.offset : op.offset + op.limit]]

    def _namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        every = [tuple(one.metadata[_ITEM]["namespace"]) for one in self.memory.documents if _ITEM in one.metadata]
        fitting = [space for space in every if all(_fits(one, space) for one in op.match_conditions or ())]
        cut = sorted({space[: op.max_depth] for space in fitting})
        return cut[op.offset : op.offset + op.limit]


def _key(namespace: tuple[str, ...], key: str) -> str:
    name = json.dumps([*namespace, key], ensure_ascii=False)
    return name.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair as JSON escapes it: ids stay apart


def _text(value: Mapping[str, Any]) -> str:
    """Return what the model reads of a value: its texts, each with its name."""
    try:
        texts = {name: one if isinstance(one, str) else json.dumps(one, default=str) for name, one in value.items()}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"a value cannot be kept ({error}); it must be what JSON can hold") from error
    return "\n".join(f"{name}: {text}" for name, text in texts.items()) or "{}"


def _facts(document: Document) -> dict[str, Any]:
    facts = document.metadata[_ITEM]
    times = {name: datetime.fromisoformat(facts[name]) for name in ("created_at", "updated_at")}
    return {"value": dict(facts["value"]), "key": facts["key"], "namespace": tuple(facts["namespace"]), **times}


def _item(document: Document) -> Item:
    return Item(**_facts(document))


def _search_item(document: Document, score: float | None) -> SearchItem:
    return SearchItem(**_facts(document), score=score)


def _matches(own: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping) and any(str(name).startswith("$") for name in wanted):
        unknown = sorted(set(wanted) - set(_COMPARE), key=str)
        if unknown:
            raise ConfigError(f"filter operator {unknown[0]!r} is not known; use one of {', '.join(_COMPARE)}")
        return all(_compares(name, own, value) for name, value in wanted.items())
    if isinstance(wanted, Mapping):
        return isinstance(own, Mapping) and all(_matches(own.get(name), value) for name, value in wanted.items())
    return bool(own == wanted)


def _compares(name: str, own: Any, other: Any) -> bool:
    """Whether two values compare so; a text is neither above nor below a number, nor is what is not there."""
    try:
        return bool(_COMPARE[name](own, other))
    except TypeError:
        return False


def _fits(condition: MatchCondition, namespace: tuple[str, ...]) -> bool:
    path = tuple(condition.path)
    if len(namespace) < len(path):
        return False
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[len(namespace) - len(path) :]
    return all(wanted in ("*", own) for wanted, own in zip(path, part, strict=True))
