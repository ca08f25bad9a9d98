"""Run the task that docs/evaluation.md adds, word for word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from focus_core.evaluation.tasks.haystack import Haystack
from focus_core.text.tokenization import TextTokenizer
from tests.conftest import byte_level_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_pages_task_makes_trials():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/evaluation.md", "exec"), names)
    trials = list(names["colours"](Haystack(TextTokenizer(byte_level_tokenizer()), 200, 64), 6))
    assert len({trial.fingerprint for trial in trials}) > 1
    for trial in trials:
        assert f"The door is {trial.answers[0]}." in trial.documents[0].text
