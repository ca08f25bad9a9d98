"""Check the script that writes sentences: what is kept, and that it goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from focus_core.training.texts import QuestionRow, read_training_texts

_PATH = Path(__file__).parents[2] / "scripts" / "data" / "sentences.py"
_SPEC = importlib.util.spec_from_file_location("sentences", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
sentences = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sentences)
ROW = QuestionRow("Who built it?", ("Ada Wren", "Wren"), "Mill", "Ada Wren built the mill in 1702.")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("The mill was built by Ada Wren. It stands still.", "The mill was built by Ada Wren."),
        ("It was built by\n Ada Wren.", "It was built by Ada Wren."),
        (
            "Ada Wren built the mill at 9 St. James St. in Oslo. More.",
            "Ada Wren built the mill at 9 St. James St. in Oslo.",
        ),
        ("Ada Wren.", ""),  # no sentence
        ("The mill was built by Bert.", ""),  # another answer
        ("The mill was built by Adam Wrench.", ""),  # a part of a word
        ("The mill was built by Ada Wren", ""),  # cut off
        ("According to the passage, Ada Wren built the mill.", ""),  # speaks of the passage
        ("The mill was built " + "and built " * 30 + "by Ada Wren.", ""),  # too long
    ],
)
def test_only_whole_sentences_with_an_accepted_answer_are_kept(said, kept):
    assert sentences.kept_sentence(said, ROW) == kept


def test_rows_that_were_asked_are_not_asked_again(tmp_path):
    """A row with an empty sentence counts as asked; what the output holds is read as training rows."""
    other = QuestionRow("When?", ("1702",), "Mill", ROW.context)
    output = tmp_path / "out.jsonl"
    rows = [{**vars(ROW), "sentence": "It was built by Ada Wren."}, {**vars(other), "sentence": ""}]
    output.write_text(json.dumps(rows[0]) + "\n")
    assert list(sentences.missing([ROW, other], output)) == [other]
    output.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert list(sentences.missing([ROW, other], output)) == []
    assert [row.sentence for row in read_training_texts([output]).questions] == ["It was built by Ada Wren.", ""]
