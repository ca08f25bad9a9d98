"""Check RULER's generators against an independent recomputation."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from focus_core.evaluation.tasks.haystack import Haystack
from tests.evaluation.test_tasks import NOVEL, make, options, text_of, text_tokenizer  # noqa: F401


def test_needles_keep_their_order(text_tokenizer):
    """Rising depths come out in order in both fillers, also when they crowd; repeated hiding gives equal passages."""
    needles = [f"Needle number {index}." for index in range(6)]
    for text in (None, NOVEL):
        haystack = Haystack(text_tokenizer, 2000, 256, text)
        for depths in ([0.1, 0.3, 0.5, 0.7, 0.8, 0.9], [0.97, 0.98, 0.981, 0.982, 0.99, 0.999], [0.0] * 5 + [0.001]):
            whole = " ".join(document.text for document in haystack.hide(needles, depths))
            assert [int(number) for number in re.findall(r"Needle number (\d)\.", whole)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "keys", "values", "asked"),
    [("niah-single", 1, 1, 1), ("niah-multikey", 4, 1, 1), ("niah-multivalue", 1, 4, 1), ("niah-multiquery", 4, 1, 4)],
)
def test_needles_are_what_ruler_asks(options, name, keys, values, asked):
    """Parsed back from the text: so many keys and values, and the answers are those of the named keys."""
    for trial in make(name, options):
        owned = {}
        for key, value in re.findall(r"One of the special magic numbers for ([a-z-]+) is: (\d{7})\.", text_of(trial)):
            owned.setdefault(key, []).append(value)
        assert len(owned) == keys
        assert {len(found) for found in owned.values()} == {values}
        named = [key for key in owned if key in trial.question]
        assert len(named) == asked
        assert sorted(trial.answers) == sorted(value for key in named for value in owned[key])
        assert trial.wanted == "all"


def test_variables_resolve_to_the_asked_value(options):
    """Executing the assignments in the order of the text gives the asked value to exactly the wanted names."""
    for trial in make("variables", options):
        state = {}
        for name, value in re.findall(r"VAR ([A-Z]{5}) = (VAR [A-Z]{5}|\d{5})", text_of(trial)):
            state[name] = state[value.removeprefix("VAR ")] if value.startswith("VAR") else value
        asked = re.search(r"assigned the value (\d{5})", trial.question).group(1)
        assert {name for name, value in state.items() if value == asked} == set(trial.answers)
        assert len(trial.answers) == 5


def test_common_words_are_the_most_common(options):
    """Counted in the numbered list: ten words thirty (short: six) times, all others three times (one), in order."""
    short = [(trial, 6, 1) for trial in make("common-words", options)]
    for trial, often, seldom in [
        *short,
        *((trial, 30, 3) for trial in make("common-words", replace(options, tokens=9000))),
    ]:
        listed = re.findall(r"^(\d+)\. ([a-z]+)$", trial.documents[0].text, re.M)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, count in counts.items() if count == often} == set(trial.answers)
        assert {count for word, count in counts.items() if word not in trial.answers} == {seldom}
        assert len(trial.answers) == 10


def test_frequent_words_are_the_most_frequent(options):
    """Counted in the coded text: dots first, then the three wanted words, alone in front of the rest."""
    for trial in make("frequent-words", options):
        counts = Counter(trial.documents[0].text.split("coded words. ", 1)[1].split())
        ranked = [word for word, _ in counts.most_common(4)]
        assert ranked[0] == "..."
        assert ranked[1:] == list(trial.answers)
        assert counts[ranked[3]] > counts.most_common(5)[4][1]
