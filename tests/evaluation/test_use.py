"""Check the tasks of daily use: hard distractors, splits, declining, forms, conversations, two documents, support."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from focus_core.errors import ConfigError, EmptyCorpusError
from focus_core.evaluation import metrics
from focus_core.evaluation.report.tables import HEADER, Grid, make_plans, row_cells
from focus_core.evaluation.runner import Row
from focus_core.evaluation.runner import run as run_trials
from focus_core.evaluation.tasks import splits
from focus_core.evaluation.tasks.absent import WITH, WITHOUT, with_and_without
from focus_core.evaluation.tasks.conversation import conversation
from focus_core.evaluation.tasks.forms import FORMS, forms
from focus_core.evaluation.tasks.multi_document import multi_document
from focus_core.evaluation.tasks.own_questions import advice, own_questions, sign_test
from focus_core.evaluation.tasks.passkey import passkey
from focus_core.evaluation.tasks.perplexity import ratio_interval
from focus_core.evaluation.tasks.registry import TASKS, TaskOptions
from focus_core.evaluation.tasks.support import calibrate, fit_all
from focus_core.evaluation.tasks.two_documents import two_documents
from focus_core.evaluation.trial import Trial
from focus_core.method.support import FEATURES, fit, support_features, supported
from focus_core.text.corpus import Document

ROW = Row("mine", "m", 1, 1, 0, 0.0, 0.0, 0.0, {}, {}, 1.0, 1.0, 1.0)


@pytest.fixture
def rows(tmp_path):
    """Two articles of four passages each, every passage asked about twice; all of them about one of two subjects."""
    lines = []
    for title, subject in (("Cats", "cat"), ("Ships", "ship")):
        for place in ("north", "south", "east", "west"):
            for asked in ("colour", "age"):
                answer = f"{subject}{place}{asked}"
                text = (
                    f"The {subject} of the {place} has the colour {subject}{place}colour and age {subject}{place}age."
                )
                question = f"what {asked} has the {subject} of the {place}"
                lines.append({"question": question, "answers": [answer], "title": title, "context": text})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


# -- distractors and splits -------------------------------------------------------------------------------------


def test_near_and_same_article_passages_stand_around(rows):
    """nearest: the passages that share most words; article: the same title first; neither holds the answer."""
    for trial in multi_document(rows, 4, 16, source="nearest"):
        subject, place = trial.question.split()[4], trial.question.split()[-1]
        others = [document.text for document in trial.documents if document.id != trial.gold]
        assert len(set(others)) == 3
        assert all(subject in text or place in text for text in others), trial.question
        assert not any(metrics.contains_answer(text, trial.answers) for text in others)
    trials = list(multi_document(rows, 6, 16, source="article"))
    for trial in trials:
        title = next(document.text for document in trial.documents if document.id == trial.gold).split("\n")[0]
        assert sum(document.text.startswith(title) for document in trial.documents) == 4
        assert len({document.text for document in trial.documents}) == 6
    golds = [next(document.text for document in trial.documents if document.id == trial.gold) for trial in trials]
    assert len(set(golds[:8])) == 8  # no passage twice before each was there once
    with pytest.raises(EmptyCorpusError, match="9 documents are asked for, but the file holds only 7 others"):
        list(multi_document(rows, 9, 1, source="nearest"))


def test_rows_of_a_file_are_read_as_they_are(tmp_path, rows):
    """Documents, their order and the marked gold one come from the row; the number asked for does not matter."""
    ctxs = [
        {"title": "A", "text": "one"},
        {"title": "", "text": "two", "isgold": True},
        {"title": "C", "text": "three"},
    ]
    path = tmp_path / "genuine.jsonl"
    path.write_text(json.dumps({"question": "which?", "answers": ["two"], "ctxs": ctxs}))
    (trial,) = multi_document(path, 99, 5, source="file")
    assert [document.text for document in trial.documents] == ["A\none", "two", "C\nthree"]
    assert (trial.gold, trial.answers) == ("doc-1", ("two",))
    with pytest.raises(EmptyCorpusError, match="no several ctxs"):
        list(multi_document(rows, 3, 5, source="file"))


def test_test_questions_are_asked_on_release_alone(rows, monkeypatch, make_engine):
    """Each question is in one split; distractors may be of both; other titles and seeds name a release's tables."""
    questions = [trial.question for trial in multi_document(rows, 2, 99)]
    listed = frozenset(map(splits.question_id, questions[:5]))
    monkeypatch.setattr(splits, "test_ids", lambda: listed)
    test, rest = ({t.question for t in multi_document(rows, 2, 99, split=split)} for split in ("test", "development"))
    assert test == set(questions[:5])
    assert rest == set(questions[5:])
    engine = make_engine()
    options = TaskOptions(engine.tokenizer, 4, split="test", distractors_from="nearest", file=rows)
    (plan,) = make_plans(engine, "questions", "documents", options, Grid([1], [3]))
    assert plan.title == "questions-nearest-test-3"
    assert options.facts()["split"] == "test"
    assert len(list(TASKS["questions"].make(replace(options, documents=3)))) == 4
    monkeypatch.setattr(splits, "test_ids", frozenset)
    with pytest.raises(ConfigError, match="no question of the test split"):
        list(multi_document(rows, 2, 9, split="test"))
    with pytest.raises(ConfigError, match="--distractors-from must be one of others, nearest, article, file"):
        TaskOptions(engine.tokenizer, 4, distractors_from="far")


@pytest.mark.slow
def test_the_split_is_what_was_drawn(shared_data):
    """220 questions of lost-in-the-middle are listed, none of the 200 that tables have scored, and whole articles."""
    path = shared_data / "eval/litm_nq/nq-open-oracle.eval.jsonl.gz"
    published = [trial.question for trial in multi_document(path, 1, 200)]
    test = [trial.question for trial in multi_document(path, 1, 999, split="test")]
    assert len(test) == 220
    assert not set(published) & set(test)
    assert [trial.question for trial in multi_document(path, 1, 200, split="development")] == published
    squad = shared_data / "eval/squad/squad_v2_dev_half.eval.jsonl.gz"
    titles = [
        {trial.documents[0].text.split("\n")[0] for trial in multi_document(squad, 1, 9999, split=split)}
        for split in ("test", "development")
    ]
    assert (len(titles[0]), titles[0] & titles[1]) == (4, set())


# -- declining --------------------------------------------------------------------------------------------------


def test_an_answer_without_its_document_is_right_if_it_declines(make_engine, rows, tmp_path, monkeypatch):
    """Right with the document: the answer and no declining; without: declining. Shares and AUROC are in the table."""
    from focus_core.evaluation.methods import registry
    from focus_core.evaluation.trial import Prediction

    trials = list(with_and_without(multi_document(rows, 3, 3, source="nearest")))
    assert [(trial.label, trial.absent, len(trial.documents)) for trial in trials[:2]] == [
        (WITH, False, 3),
        (WITHOUT, True, 2),
    ]
    said = iter(
        [
            (trials[0].answers[0], 0.9),
            ("Not found.", 0.2),
            ("It is not mentioned in the text.", 0.4),
            ("the cat", 0.6),
            (f"Not found, but {trials[4].answers[0]}", 0.8),
            ("I do not know", 0.1),
        ]
    )

    def answer(engine, trial, max_tokens, cache, **options):
        text, probability = next(said)
        return Prediction(text, supported=probability)

    monkeypatch.setitem(registry.METHODS, "focusllm", answer)
    row = run_trials(make_engine(), "not-there", trials, "focusllm", 8, tmp_path)
    assert row.right == 3
    assert row.declined == {WITH: pytest.approx(2 / 3), WITHOUT: pytest.approx(2 / 3)}
    assert row.auroc == pytest.approx(8 / 9)
    cells = dict(zip(HEADER, row_cells(row), strict=True))
    assert (cells["declined"], cells["AUROC"]) == ("67% with the document, 67% without it", "0.89")


def test_support_is_fitted_and_judged_on_other_questions():
    """A feature that tells is found and its probability is calibrated; one that does not tell stays near chance."""
    rng = random.Random(0)
    rows, present = [], []
    for _ in range(200):
        for held in (True, False):
            rows.append((rng.gauss(-2.0 if held else 0.0, 1.0), rng.random(), rng.random(), rng.random()))
            present.append(held)
    found = fit_all(rows, present)
    assert found.best in ("first token", "both")
    assert found.auroc["first token"] == pytest.approx(0.92, abs=0.03)  # normal distributions two deviations apart
    assert found.auroc["attention"] == pytest.approx(0.5, abs=0.08)
    assert found.brier["first token"] < 0.13
    constants = found.constants["first token"]
    assert (len(constants), constants[2:]) == (len(FEATURES) + 1, (0.0, 0.0, 0.0))
    said = [supported(row, constants) for row in rows]
    high = [held for value, held in zip(said, present, strict=True) if value > 0.8]
    assert 0.8 < sum(high) / len(high) <= 1
    assert supported(rows[0], ()) is None
    exact = fit([(value, 0, 0, 0) for value in (0.0, 1.0, 0.0, 1.0)], [False, True, False, True], (0,))
    assert supported((1.0, 0, 0, 0), exact) > 0.9


def test_support_features_are_the_first_token_and_attention():
    """Log odds of the declining token, logs of all and of the largest mass, its share; all finite without mass."""
    logits = torch.tensor([0.0, 1.0, 2.0])
    odds, total, best, share = support_features(torch.tensor([0.1, 0.3]), logits, 1)
    chance = float(torch.softmax(logits, -1)[1])
    assert odds == pytest.approx(float(torch.logit(torch.tensor(chance))), abs=1e-5)
    assert (total, best, share) == pytest.approx([*torch.tensor([0.4, 0.3]).log().tolist(), 0.75], abs=1e-5)
    assert all(abs(value) < 99 for value in support_features(torch.zeros(2), logits, None))


def test_answers_say_how_surely_memory_holds_them(make_engine):
    """``supported`` is the stored constants' probability of the answer's own features, and absent without them."""
    engine = make_engine(scale=0.5)
    memory = engine.remember(["the cat sat on the mat.", "a dog ate the hat?"])
    plain = engine.answer("who?", memory, max_tokens=2)
    assert (plain.supported, len(plain.support_features)) == (None, len(FEATURES))
    engine.info = replace(engine.info, support=(0.5, 0.0, 1.0, 0.0, -1.0))
    answer = engine.answer("who?", memory, max_tokens=2)
    assert answer.support_features == plain.support_features
    assert answer.supported == supported(plain.support_features, (0.5, 0.0, 1.0, 0.0, -1.0))
    assert engine.answer("who?", max_tokens=2).supported is None
    trials = with_and_without(
        [Trial((Document("a", "the cat"), Document("b", "dog")), "who?", ("x",), "a", False, "")] * 5
    )
    assert calibrate(engine, trials).trials == 10


# -- documents as people have them ------------------------------------------------------------------------------


def test_forms_have_one_answer_among_neighbours_of_their_form():
    """The six forms take turns; the gold document alone holds question and answer; values differ between seeds."""
    trials = list(forms(10, 24))
    assert [trial.label for trial in trials[:6]] == list(FORMS)
    for trial in trials:
        gold = next(document.text for document in trial.documents if document.id == trial.gold)
        assert trial.answers[0] in gold
        assert len(trial.documents) == 10
        assert len({document.text for document in trial.documents}) == 10
    assert trials != list(forms(10, 24, seed=1))
    assert trials == list(forms(10, 24))


def test_two_documents_are_needed():
    """No document alone holds what the question names and its answer; naming both of two is not right."""
    trials = list(two_documents(10, 12, others=[f"Passage {number} is about bread." for number in range(20)]))
    assert [trial.label for trial in trials[:3]] == ["comparison", "bridge", "list"]
    for trial in trials:
        assert len(trial.documents) == 10
        texts = [document.text for document in trial.documents]
        if trial.label == "bridge":
            boat = trial.question.removeprefix("Where was the captain of the ").removesuffix(" born?")
            assert not any(boat in text and trial.answers[0] in text for text in texts)
        if trial.label == "list":
            assert [sum(name in text for text in texts) for name in trial.answers] == [1, 1]
    comparison = trials[0]
    assert comparison.wrong
    assert comparison.answers[0] in comparison.question
    assert comparison.wrong[0] in comparison.question


def test_a_fact_is_said_far_outside_the_window(make_engine, tmp_path):
    """Sixty turns, the fact in one of the user's first five; FocusLLM reads turns, others the same as documents."""
    trials = list(conversation(4, filler="The sea was calm. The ship was old! Nobody spoke?", words=12))
    for trial in trials:
        assert len(trial.earlier) == 60
        place = int(trial.label.removeprefix("fact at "))
        assert place < 5
        assert trial.answers[0] in trial.earlier[2 * place][1]
        assert sum(trial.answers[0] in text for _, text in trial.earlier) == 1
    engine = make_engine(window=256, chunk_size=64)
    row = run_trials(engine, "conversation", trials[:1], "focusllm", 2, tmp_path)
    assert row.chunks > 3
    assert row.local < 256


def test_rates_of_alike_trials_have_wider_intervals():
    """Groups all right or all wrong: the interval of so many groups; groups of one, or alike: Wilson's own."""
    single = metrics.clustered([(1, 1)] * 6 + [(0, 1)] * 4)
    assert single == metrics.wilson(6, 10)
    low, high = metrics.clustered([(10, 10)] * 6 + [(0, 10)] * 4)
    wide = metrics.wilson(6, 10)
    assert (low, high) == pytest.approx(wide, abs=0.03)
    assert metrics.clustered([(5, 10)] * 10) == metrics.wilson(50, 100)
    assert metrics.clustered([(10, 10)] * 10) == metrics.wilson(10, 10)
    assert metrics.clustered([]) == (0.0, 1.0)
    assert metrics.auroc([0.9, 0.5], [0.5, 0.1]) == 0.875
    assert metrics.auroc([], [0.1]) is None


# -- a user's own questions -------------------------------------------------------------------------------------


def test_own_questions_name_their_documents(tmp_path):
    """answer, answers, and the document by the end of its id; bad rows say their number and what is wrong."""
    held = [Document("docs/a.txt", "one"), Document("docs/b.txt", "two")]
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question": "which?", "answer": 2, "document": "b.txt"}\n{"question": "who?", "answers": ["x", "y"]}\n'
    )
    first, second = own_questions(path, held)
    assert (first.answers, first.gold, second.answers, second.gold) == (("2",), "docs/b.txt", ("x", "y"), None)
    for line, message in (
        ('{"question": "which?"}', "row 1 of .* needs a question and an answer"),
        ('{"question": "a", "answer": "b", "document": "c.txt"}', "'c.txt', which is 0 of those read"),
    ):
        path.write_text(line)
        with pytest.raises(EmptyCorpusError, match=message):
            list(own_questions(path, held))


def test_advice_needs_more_than_chance():
    """Ten wins of ten are more than chance, three of three are not; then the quickest of the even ones is named."""
    rows = [replace(ROW, method="focusllm", seconds=2.0), replace(ROW, method="bm25:passages=1", seconds=1.0)]
    clear = advice(rows, [[True] * 10, [False] * 10])
    assert clear.startswith("Use focusllm: 10 of 10 right")
    even = advice(rows, [[True] * 3, [False] * 3])
    assert "may be chance; of these bm25:passages=1 took the least time. 3 questions" in even
    assert sign_test([True] * 10, [False] * 10) == pytest.approx(2 / 1024)
    assert sign_test([True], [True]) == 1.0


@pytest.mark.slow
def test_the_command_asks_own_questions(run, tmp_path):
    """A table of FocusLLM and its rivals over a folder, and advice; paths for other tasks are refused."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("the cat sat on the mat")
    (docs / "b.txt").write_text("a dog ate the hat")
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "who ate?", "answer": "dog", "document": "b.txt"}')
    arguments = ["eval", "mine", docs, "--questions", questions, "--output", tmp_path / "out"]
    code, out, err = run(*arguments, "--methods", "focusllm:max_tokens=2,bm25:passages=1")
    assert code == 0, err
    assert "bm25" in out
    assert "may be chance" in out or "Use " in out
    assert (tmp_path / "out" / "mine.md").exists()
    assert run("eval", "mine", docs)[0] == 2
    code, _, err = run("eval", "passkey", docs)
    assert (code, "data are given with --file" in err) == (2, True)


# -- contexts ---------------------------------------------------------------------------------------------------


def test_pass_keys_lie_in_contexts_of_their_own(make_engine):
    """Repeated and natural filler: thirty trials, thirty contexts, three a depth; passages come from one set."""
    tokenizer = make_engine().tokenizer
    novel = " ".join(f"The {word} of house {index} is old." for index in range(900) for word in ("cat", "mat"))
    for filler in (None, novel):
        trials = list(passkey(tokenizer, 6000, 30, filler=filler, chunk_size=160))
        assert len({trial.context for trial in trials}) == 30
        assert len({trial.label for trial in trials}) == 10
        assert all(sum(trial.answers[0] in document.text for document in trial.documents) == 1 for trial in trials)
    plain = [document.text for trial in trials for document in trial.documents if trial.gold != document.id]
    assert len(set(plain)) < len(plain) / 5
    one, other = (
        Trial((Document("d", "key 12"),), "?", ("12",), None, True, ""),
        Trial((Document("d", "key 345"),), "?", ("345",), None, True, ""),
    )
    assert one.context == other.context


def test_stories_hide_facts_in_other_words(make_engine):
    """A fact of everyday life, asked for as a chat turn; it stands once, and needs no official head."""
    tokenizer = make_engine().tokenizer
    trials = list(passkey(tokenizer, 600, 20, needle="story"))
    assert len({trial.question for trial in trials}) == 2
    for trial in trials:
        assert not trial.raw
        assert trial.documents[0].text.count(trial.answers[0]) == 1
        assert "pass key" not in trial.documents[0].text
    with pytest.raises(ConfigError, match="leave --distractors out, got 2"):
        list(passkey(tokenizer, 600, 1, needle="story", distractors=2))


def test_intervals_are_over_contexts_and_texts(make_engine, tmp_path, monkeypatch):
    """Ten trials of two contexts prove as little as two; places of one text count as one text."""
    from focus_core.evaluation.methods import registry
    from focus_core.evaluation.trial import Prediction

    monkeypatch.setitem(registry.METHODS, "focusllm", lambda engine, trial, **options: Prediction(trial.answers[0]))
    trials = [
        Trial((Document("d", f"{name} {number}"),), "?", (str(number),), None, True, "")
        for name in ("a", "b")
        for number in range(5)
    ]
    row = run_trials(make_engine(), "p", trials, "focusllm", 4, tmp_path)
    assert row.interval == metrics.wilson(2, 2)
    low, high = ratio_interval({"a@1": 0.9, "a@2": 0.9, "b@1": 1.1, "b@5": 1.1})
    assert low < 0.5 < 1 < high
    assert ratio_interval({"a@1": 0.9, "a@2": 0.92, "a@3": 0.91})[1] < 1
    assert ratio_interval({"a@1": 0.9}) == (0.0, float("inf"))
