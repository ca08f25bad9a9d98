"""Check the suites' scores against their definitions, worked out by hand or by another implementation."""

from __future__ import annotations

import sys
from itertools import product

import pytest

from focus_core.errors import ConfigError
from focus_core.evaluation import suite_metrics as scores
from focus_core.evaluation.suite_metrics import Measure


def longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by trying every one: for a few words only."""
    best = 0
    for kept in product((False, True), repeat=len(first)):
        words = [word for word, keep in zip(first, kept, strict=True) if keep]
        rest = iter(second)
        if all(word in rest for word in words):
            best = max(best, len(words))
    return best


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("police killed the gunman", "police kill the gunman"), ("one two three four", "four one two nine"), ("a", "b")],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(said, wanted):
    """F of precision and recall of a subsequence that brute force finds."""
    common = longest_common(said.split(), wanted.split())
    expected = 2 * common / (len(said.split()) + len(wanted.split()))
    assert Measure("rouge-l")(said, (wanted,)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_rouge_l_takes_the_best_answer_and_any_length():
    """Several references; no words at all is 0; a sentence of thousands of words raises nothing."""
    rouge = Measure("rouge-l")
    assert rouge("the cat sat", ("a dog", "the cat sat")) == pytest.approx(1.0)
    assert [rouge(said, ("the cat",)) for said in ("", "...", " ")] == [0.0, 0.0, 0.0]
    assert rouge("the cat", ()) == 0.0
    limit = sys.getrecursionlimit()
    assert 0 < rouge("word and " * 700, ("and word " * 700,)) < 1
    assert sys.getrecursionlimit() == limit


def test_classes_named_beside_the_right_one_cost():
    """1 / n of the classes that are named; one that is a part of the right name does not count; first line only."""
    measure = Measure("class", ("Location", "City", "City in Europe"), first_line=True)
    assert measure("\nCity in Europe\nLocation", ("City in Europe",)) == 1.0
    assert measure("Location or City", ("City",)) == 0.5
    assert measure("Location", ("City",)) == 0.0
    assert measure("City", ("City in Europe",)) == 0.0


def test_numbers_and_code():
    """Shares of said numbers, and the indel ratio of the first line that holds no comment."""
    assert Measure("paragraph")("Paragraph 3, not 4", ("Paragraph 3",)) == 0.5
    assert Measure("paragraph")("none", ("Paragraph 3",)) == 0.0
    assert Measure("count")("There are 7.", ("7",)) == 1.0
    # "abcd" to "abxd": two of eight characters are taken out or put in
    assert Measure("edit")("# a comment\nabcd\nmore", ("abxd",)) == pytest.approx(0.75)
    assert Measure("edit")("// nothing else", ("x",)) == 0.0
    assert Measure("f1", first_line=True)("Ann Lee\nBob", ("Ann",)) == pytest.approx(2 / 3)


def test_a_missing_package_is_named(monkeypatch):
    """What to install stands in the message."""
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ConfigError, match="pip install rouge"):
        scores.rouge_l("a", "b")
