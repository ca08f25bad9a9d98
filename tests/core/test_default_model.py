"""Check behaviour on the default base with the shipped adapter: few tests, one shared engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from focus_core import Document
from focus_core.evaluation.metrics import contains_answer
from focus_core.evaluation.tasks.registry import passkey
from focus_core.model.hub import SHIPPED

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


def test_without_memory_it_is_the_base(real_engine):
    """Greedy tokens without chunks == transformers' generate on the same ids, in the served dtype."""
    ids = real_engine.local_ids("What is the capital of France?", "chat")
    answer = real_engine.answer("What is the capital of France?", template="chat", max_tokens=16)
    expected = real_engine.loaded.model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert [token.id for token in answer.tokens] == expected[0, len(ids) :].tolist()


def test_it_finds_passkeys(real_engine):
    """Two official passkey trials in each of three settings, k to 32: all six; the card has the table."""
    right = 0
    for tokens, chunk in ((1000, 256), (4000, 128), (4000, 512)):
        engine = real_engine.with_config(chunk_size=chunk)
        for trial in passkey(engine.tokenizer, tokens, 2, seed=11):
            answer = engine.answer(trial.question, engine.remember(trial.documents), template="raw", max_tokens=8)
            right += contains_answer(answer.text, trial.answers)
    assert right == 6


def test_it_answers_from_documents_and_names_the_right_one(real_engine):
    """Facts that no model has seen, among look-alikes: the value and the document that holds it."""
    people = {"Ada Wren": "84213", "Tom Ashby": "19570", "Mia Cole": "66042", "Noor Haddad": "30981"}
    documents = [
        Document(name, f"{name} works on the third floor. The locker number of {name} is {number}. Lunch is at noon.")
        for name, number in people.items()
    ]
    memory = real_engine.remember(documents)
    right = first = 0
    for name, number in people.items():
        answer = real_engine.answer(f"What is the locker number of {name}?", memory, max_tokens=12)
        right += number in answer.text
        first += answer.evidence[0].document_id == name
    assert right >= 3
    assert first >= 3


def test_the_readmes_first_program_runs(real_engine, capsys, monkeypatch):
    """The README's Python block, word for word, prints an answer and its source."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    assert block.group(0).count("\n") <= 14
    monkeypatch.setattr("focus_core.FocusEngine.from_pretrained", lambda: real_engine)
    exec(compile(block.group(1), "README.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert "break" in out[0]
    assert out[1].split()[0] == "break"


def test_the_shipped_adapter_is_small_and_described():
    """At most 32 MB in the repository, with a card that names data, command, steps, tokens and loss."""
    folder = SHIPPED / "smollm2-135m-instruct"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 32e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("focusllm train", "steps", "tokens", "loss", "cannot"):
        assert word in card
