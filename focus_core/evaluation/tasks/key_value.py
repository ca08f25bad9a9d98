"""Make look-up trials: key-value records (Liu et al., 2023) and repeated numbers (InfiniteBench).

Records are generated, or read from lost-in-the-middle's files. Trials are functions of a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.tasks.haystack import Haystack
from focus_core.evaluation.tasks.passkey import HEAD, depth_of
from focus_core.evaluation.tasks.vocabulary import draw_uuid
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer

_KV_HEAD = "Extract the value corresponding to the specified key in the JSON object below."
Record = tuple[str, str]


def key_values(tokenizer: TextTokenizer, tokens: int, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield generated records of about ``tokens`` tokens; the asked one's depth walks through ten places."""
    for index in range(trials):
        rng = random.Random(f"kv/{seed}/{tokens}/{index}")
        one = [(draw_uuid(rng), draw_uuid(rng)) for _ in range(8)]
        count = max(1, tokens * len(one) // len(tokenizer.encode(_json(one))))
        records = one[:count] + [(draw_uuid(rng), draw_uuid(rng)) for _ in range(count - len(one))]
        place = min(count - 1, int(depth_of(index) * count))
        yield _record_trial(records, records[place], f"depth {depth_of(index):.2f}")


def read_key_values(path: Path, trials: int) -> Iterator[Trial]:
    """Yield the trials of a lost-in-the-middle file, rows in order.

    Raises:
        EmptyCorpusError: the rows are of another kind.
    """
    rows = read_rows(path)
    if "ordered_kv_records" not in rows[0]:
        raise EmptyCorpusError(f"{path} has no ordered_kv_records; give a kv-retrieval file or leave --file out")
    for row in rows[:trials]:
        records = [(str(key), str(value)) for key, value in row["ordered_kv_records"]]
        asked = (str(row["key"]), str(row["value"]))
        depth = (records.index(asked) + 0.5) / len(records)
        yield _record_trial(records, asked, f"depth {int(depth * 10) / 10 + 0.05:.2f}")


def number(haystack: Haystack, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield InfiniteBench's number retrieval: ten digits, some repeated, hidden like a pass key."""
    for index in range(trials):
        rng = random.Random(f"number/{seed}/{haystack.tokens}/{index}")
        digits = ""
        while len(digits) < 10:
            digits += rng.choice("0123456789") * rng.randint(1, 4)
        digits = digits[:10]
        needle = f"The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits."
        documents = haystack.hide([needle], [depth_of(index)], HEAD)
        ask = "What is the sequence of digits? The sequence of digits is"
        gold = haystack.gold(documents, needle)
        yield Trial(documents, ask, (digits,), gold, True, f"depth {depth_of(index):.2f}")


def _record_trial(records: list[Record], asked: Record, label: str) -> Trial:
    ask = f'Key: "{asked[0]}"\nCorresponding value:'
    return Trial((Document("records", f"{_KV_HEAD}\n\n{_json(records)}"),), ask, (asked[1],), None, True, label)


def _json(records: list[Record]) -> str:
    return "{" + ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records) + "}"
