"""Check the questions that are made from passages: what they ask, that the passage answers them, and their place."""

from __future__ import annotations

import json
import random

import pytest

from focus_core.config import TrainConfig
from focus_core.errors import EmptyCorpusError
from focus_core.text.tokenization import TextTokenizer
from focus_core.training.cloze import ask_about
from focus_core.training.data import ExampleStream
from focus_core.training.texts import Passage, TrainingTexts, hold_out, read_training_texts

FILM = Passage(
    "The Quiet Harbour",
    "The Quiet Harbour is a 1956 Danish drama film directed by Inge Holm and starring Peter Madsen. It was shot near "
    "Skagen during the autumn of 1955. The critic Ole Friis called it the best film of the decade.",
)


def _asked(passage: Passage, draws: int = 300):
    rows = [ask_about(random.Random(seed), passage) for seed in range(draws)]
    return [row for row in rows if row is not None]


def test_the_passage_holds_every_answer_and_no_question_tells_it():
    rows = _asked(FILM)
    assert len(rows) > 250
    for row in rows:
        assert row.answers[0] in FILM.text
        assert row.answers[0].lower() not in row.question.lower()
        assert (row.title, row.context) == (FILM.title, FILM.text)


@pytest.mark.parametrize(
    ("question", "answer"),
    [("who directed the quiet harbour", "Inge Holm"), ("who stars in the quiet harbour", "Peter Madsen")],
)
def test_stated_facts_become_plain_questions(question, answer):
    """What encyclopaedias state in fixed words is asked for by title."""
    found = {row.question.lower().rstrip("?"): row.answers[0] for row in _asked(FILM)}
    assert found[question] == answer


def test_a_pronoun_is_replaced_by_the_title():
    """A question about a sentence that begins with `It` names what it is about, so that it can be found."""
    questions = [row.question for row in _asked(FILM) if row.answers[0] in ("Skagen", "1955")]
    assert questions
    assert not any(question.startswith("It ") for question in questions)
    assert any("quiet harbour" in question.lower() for question in questions)


@pytest.mark.parametrize("text", ["", "Nothing here.", "all lower case words without any name or number at all here"])
def test_a_passage_that_says_nothing_is_not_asked_about(text):
    assert _asked(Passage("", text), 50) == []


def test_the_stream_puts_the_passage_among_others(tokenizer):
    """A cloze example's gold chunk holds the answer; equal seeds give equal examples."""
    passages = tuple(
        Passage(
            f"Film {n}", f"Film {n} was directed by Anna Berg{n}. It opened in Oslo on {n + 1} May 1950 to applause."
        )
        for n in range(40)
    )
    settings = TrainConfig(mix={"cloze": 1.0}, question_chunk_sizes=(64,), max_memory_tokens=512)
    texts, tokens = TrainingTexts((), (), passages), TextTokenizer(tokenizer)
    stream, again = ExampleStream(texts, tokens, settings), ExampleStream(texts, tokens, settings)
    for step in range(10):
        example = stream.example(step, 0)
        assert example == again.example(step, 0)
        assert example.kind == "cloze"
        for query in example.queries:
            answer = tokens.decode(query.ids[query.split : -1])
            assert answer in tokens.decode(example.chunks[query.gold[0]])


def test_cloze_needs_passages_or_long_texts(tokenizer):
    with pytest.raises(EmptyCorpusError, match="needs texts of at least 2,000 characters"):
        ExampleStream(TrainingTexts((), ()), TextTokenizer(tokenizer), TrainConfig(mix={"cloze": 1.0}))


def test_short_texts_and_listed_paragraphs_are_passages(tmp_path):
    """Rows with a short `text` and the listed paragraphs of a prompt are passages; long texts are not."""
    paragraph = "Oslo is the capital of Norway. " * 8
    rows = [
        {"title": "Oslo", "text": paragraph},
        {"text": "x" * 3000},
        {"prompt": f"Read:\n\n- {paragraph[31:]}\n\nSo?", "completion": "no"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = read_training_texts([tmp_path])
    assert texts.passages == (Passage("Oslo", paragraph.strip()), Passage("", paragraph[31:].strip()))
    kept, held = hold_out(texts, 0.5, 0)
    assert len(kept.passages) == len(held.passages) == 1
