"""Check every generator against an independent recomputation: answers in documents, unique keys, depths, seeds."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from focus_core.errors import ConfigError, CorpusError, DocumentNotFoundError, EmptyCorpusError
from focus_core.evaluation.files import local_file
from focus_core.evaluation.suite_metrics import Measure
from focus_core.evaluation.tasks.babilong import read_stories
from focus_core.evaluation.tasks.haystack import FILLER
from focus_core.evaluation.tasks.passkey import ASK, HEAD
from focus_core.evaluation.tasks.registry import TASKS, TaskOptions
from focus_core.text.tokenization import TextTokenizer

NOVEL = "\n\n".join(
    " ".join(f"In chapter {chapter} the {word} of house {house} was {word}." for house, word in enumerate("abcdefg"))
    for chapter in range(40)
)
FROM_FILES = ("ruler-qa", "babilong", "few-shot")
GENERATED = [name for name, task in TASKS.items() if task.varies == "lengths" and name not in FROM_FILES]
HIDING = ["passkey", "number", "niah-single", "niah-multikey", "niah-multivalue", "niah-multiquery", "variables"]
QUESTION = {"question": "who?", "answers": ["Ann"], "ctxs": [{"title": "T", "text": "It was Ann."}]}


@pytest.fixture(scope="module")
def text_tokenizer():
    from tests.conftest import byte_level_tokenizer

    return TextTokenizer(byte_level_tokenizer())


@pytest.fixture
def options(text_tokenizer):
    return TaskOptions(text_tokenizer, trials=10, seed=3, tokens=2500, chunk_size=256)


@pytest.fixture
def natural(options, tmp_path):
    (tmp_path / "novel.txt").write_text(NOVEL)
    return replace(options, filler=tmp_path / "novel.txt")


def make(name, options):
    return list(TASKS[name].make(options))


def text_of(trial):
    return "\n\n".join(document.text for document in trial.documents)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- all generated tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_trials_depend_on_the_seed_alone(options, name):
    """Equal seeds give equal trials, however many are made; another seed and another trial give others."""
    trials = make(name, options)
    assert len(trials) == 10
    assert [trial.fingerprint for trial in make(name, replace(options, trials=3))] == [
        trial.fingerprint for trial in trials[:3]
    ]
    others = make(name, replace(options, seed=4))
    assert not {trial.fingerprint for trial in trials} & {trial.fingerprint for trial in others}
    assert len({trial.answers for trial in trials}) == 10


@pytest.mark.parametrize("name", GENERATED)
def test_every_answer_is_in_the_text_and_about_as_long_as_asked(options, name):
    """All accepted strings stand in the documents; the length is within a fifth of what was asked."""
    for trial in make(name, options):
        for answer in trial.answers:
            assert name == "code-run" or answer in text_of(trial)
        held = len(options.tokenizer.encode(text_of(trial)))
        assert 0.8 * options.tokens <= held <= 1.2 * options.tokens, held


@pytest.mark.parametrize("name", HIDING)
def test_natural_filler_differs_in_the_hiding_passages_only(natural, name):
    """Passages are the novel's own text; no more of them change than needles were hidden; each fits a chunk."""
    plain = " ".join(NOVEL.split())
    for trial in make(name, natural):
        passages = [document for document in trial.documents if document.id != "head"]
        foreign = [document for document in passages if " ".join(document.text.split()) not in plain]
        assert 1 <= len(foreign) <= max(len(trial.answers), 4)
        assert len({document.id for document in passages}) == len(passages)
        assert sum(len(natural.tokenizer.encode(document.text)) <= 256 for document in passages) == len(passages)
        if trial.gold is not None:
            assert [document.id for document in passages if trial.answers[0] in document.text] == [trial.gold]


# -- puzzles ----------------------------------------------------------------------------------------------------


def test_math_find_asks_every_rank(options):
    """The answer is the asked rank of the list as Python reads it; six ranks are asked."""
    trials = make("math-find", options)
    for trial in trials:
        numbers = json.loads(text_of(trial))
        assert len(set(numbers)) == len(numbers)
        rank = ["third", "second"].index(trial.label.split()[0]) if " " in trial.label else 2
        ordered = sorted(numbers, reverse="largest" in trial.label)
        assert trial.answers == (str(ordered[2 - rank]),)
        assert trial.question.count(trial.label) == 2
    assert len({trial.label for trial in trials}) == 6


def test_code_run_asks_what_the_module_computes(options):
    """Running the module gives the answer; the chain is as deep as the label says."""
    for trial in make("code-run", options):
        module, calls = {}, []
        exec(compile(text_of(trial), "module", "exec"), module)
        asked, value = re.match(r"print\((func_\d+)\((\d+)\)\)\n", trial.question).groups()
        assert trial.answers == (str(module[asked](int(value))),)
        name = asked
        while name:
            calls.append(name)
            found = re.search(rf"def {name}\(x\):\n    return (func_\d+)?", text_of(trial))
            name = found.group(1)
        assert trial.label == f"{len(calls)} calls"


# -- passkey ----------------------------------------------------------------------------------------------------


def test_passkey_is_the_official_prompt(options):
    """Head, filler, one line with the key, question: nothing else; the depth is the label's, ten of them."""
    trials = make("passkey", options)
    for trial in trials:
        key = trial.answers[0]
        lines = trial.documents[0].text.split("\n")
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert lines[0] == HEAD
        assert Counter(lines[1:]) == {FILLER: len(lines) - 2, needle: 1}
        place = lines.index(needle) - 1
        assert place / (len(lines) - 2) == pytest.approx(float(trial.label.split()[1]), abs=0.05 + 1 / len(lines))
        assert trial.question == ASK
        assert trial.raw
    assert len({trial.label for trial in trials}) == 10


@pytest.mark.parametrize("filler", [False, True])
def test_distractor_keys_have_other_owners(options, natural, filler):
    """Five different keys of five owners; the asked owner's key is the answer."""
    for trial in make("passkey", replace(natural if filler else options, distractors=4)):
        found = dict(re.findall(r"The pass key of (\w+) is (\d+)\. Remember it", text_of(trial)))
        assert len(found) == len(set(found.values())) == 5
        owner = re.fullmatch(r"What is the pass key of (\w+)\? The pass key of \1 is", trial.question).group(1)
        assert found[owner] == trial.answers[0]
    with pytest.raises(ConfigError, match="distractors must be between 0 and 23; got 24"):
        make("passkey", replace(options, distractors=24))


def test_natural_depths_are_the_labels(natural):
    """Counted in characters of the whole text, the key stands where the label says."""
    for trial in make("passkey", natural):
        text = "".join(document.text for document in trial.documents if document.id != "head")
        at = text.index(f"The pass key is {trial.answers[0]}.") / len(text)
        assert at == pytest.approx(float(trial.label.split()[1]), abs=0.08)


def test_too_short_filler_is_named(natural):
    """The error says how much there is and what to do."""
    with pytest.raises(EmptyCorpusError, match=r"the filler holds \d+ tokens, but 90000 are asked for"):
        make("passkey", replace(natural, tokens=90_000))


# -- RULER ------------------------------------------------------------------------------------------------------


def test_word_lists_are_used(options, tmp_path):
    """--file gives the words of keys and lists."""
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"]
    (tmp_path / "words.txt").write_text("\n".join(words))
    chosen = replace(options, file=tmp_path / "words.txt")
    for trial in make("niah-multikey", chosen):
        assert set(re.findall(r"numbers for ([a-z]+)-([a-z]+) is", text_of(trial))[0]) <= set(words)


# -- look-ups ---------------------------------------------------------------------------------------------------


def test_records_are_json_with_unique_keys(options):
    """The document parses as JSON; the asked key's value is the answer, at the label's depth."""
    for trial in make("kv", options):
        records = json.loads(trial.documents[0].text.split("\n\n", 1)[1])
        key = re.search(r'Key: "([^"]+)"', trial.question).group(1)
        assert records[key] == trial.answers[0]
        assert len(set(records) | set(records.values())) == 2 * len(records)
        depth = (list(records).index(key) + 0.5) / len(records)
        assert depth == pytest.approx(float(trial.label.split()[1]), abs=1 / len(records))


def test_numbers_have_ten_digits_some_repeated(options):
    """As InfiniteBench's: ten digits; over the trials neighbours repeat."""
    answers = [trial.answers[0] for trial in make("number", options)]
    assert all(re.fullmatch(r"\d{10}", answer) for answer in answers)
    assert all(re.search(r"(\d)\1", answer) for answer in answers)


# -- question files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["questions", "ruler-qa"])
def test_questions_have_one_gold_document(options, tmp_path, name):
    """The gold document holds an answer, no other does, places vary, documents differ; both kinds of rows are read."""
    people = ["Ann", "Bob", "Cid", "Dee", "Eve", "Fay", "Gus", "Hal"]
    rows = [
        {"question": f"who is {index}?", "answers": [who], "ctxs": [{"title": f"T_{index}", "text": f"It is {who}."}]}
        if index % 2
        else {"question": f"who is {index}?", "answers": [who], "title": f"T_{index}", "context": f"It is {who}."}
        for index, who in enumerate(people)
    ]
    telling = " and ".join(people)  # a document that holds everybody's answer can be nobody's distractor
    rows.append({"question": "who is 8?", "answers": ["Ida"], "ctxs": [{"title": "T", "text": f"{telling} and Ida."}]})
    people.append("Ida")
    rows.append({"question": "impossible?", "answers": [], "title": "T", "context": "Nothing."})
    file = tmp_path / "questions.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    trials = make(name, replace(options, file=file, documents=4, tokens=60, trials=50))
    assert len(trials) == 9
    places = set()
    for trial in trials:
        holding = [document.id for document in trial.documents if trial.answers[0] in document.text]
        assert holding == [trial.gold]
        assert len({document.text for document in trial.documents}) == len(trial.documents) >= 3
        index = people.index(trial.answers[0])
        assert trial.question == f"who is {index}?"
        gold = next(document.text for document in trial.documents if document.id == trial.gold)
        assert gold == (f"T {index}\nIt is {trial.answers[0]}." if index < 8 else f"T\n{telling} and Ida.")
        places.add(trial.gold)
    assert len(places) > 1
    assert [trial.fingerprint for trial in trials] == [
        trial.fingerprint for trial in make(name, replace(options, file=file, documents=4, tokens=60, trials=50))
    ]
    if name == "questions":
        assert {len(trial.documents) for trial in trials} == {4}
        with pytest.raises(EmptyCorpusError, match="the file holds only 7 others"):
            make(name, replace(options, file=file, documents=9))


def test_babi_facts_keep_their_order(natural, tmp_path):
    """Stories are cut at line 1; in the text the facts stand in order and the last move of the asked person wins."""
    file = tmp_path / "qa1.txt"
    file.write_text(
        "1 Mary moved to the  bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
        "4 Mary went to the garden.\n5 Where is Mary? \tgarden\t4\n"
        "1 John went to the office.\n2 Where is John? \toffice\t1\n"
    )
    stories = read_stories(file)
    assert [len(story.facts) for story in stories] == [2, 3, 1]
    for chosen in (natural, replace(natural, filler=None)):
        for trial in make("babilong", replace(chosen, file=file, trials=3)):
            moves = re.findall(r"(Mary|John) (?:moved|went) to the (\w+)\.", text_of(trial))
            person = trial.question.removeprefix("Where is ").rstrip("?")
            assert dict(moves)[person] == trial.answers[0]
            assert len(moves) == int(trial.label.split()[0])


def test_suites_are_read(options, tmp_path):
    """One row of each suite's own format gives the documents, question and answers it should."""
    lines = {
        "expected_number": 42,
        "num_lines": 1,
        "prompt": "Remember.\n\nline a-b: REGISTER_CONTENT is <42>\n\nNow the record is over. Tell me a-b? ",
    }
    (trial,) = make("longeval-lines", replace(options, file=write(tmp_path / "l.jsonl", [lines])))
    assert trial.answers == ("42",)
    assert trial.question == "Tell me a-b?"
    assert trial.documents[0].text.endswith("is <42>")

    topics = {"topics": ["The cat", "The dog"], "prompt": "USER: cat. Now the record ends. What is the first topic?"}
    (trial,) = make("longeval-topics", replace(options, file=write(tmp_path / "t.jsonl", [topics])))
    assert (trial.answers, trial.question) == (("The cat",), "What is the first topic?")

    bench = {"input": "who?", "context": "It was Ann.", "answers": ["Ann", "A."], "dataset": "hotpotqa"}
    (trial,) = make("longbench", replace(options, file=write(tmp_path / "b.jsonl", [bench])))
    assert (trial.question, trial.answers, trial.raw) == ("who?", ("Ann", "A."), False)
    code = {"input": "", "context": "x = 1\n", "answers": ["y = 2"], "dataset": "lcc"}
    (trial,) = make("longbench", replace(options, file=write(tmp_path / "lcc.jsonl", [code])))
    assert (trial.question, trial.raw, trial.max_tokens) == ("Next line of code:", True, 64)
    trec = {
        "input": "Who?",
        "context": "x",
        "answers": ["Person"],
        "all_classes": ["Person", "Place"],
        "dataset": "trec",
    }
    (trial,) = make("longbench", replace(options, file=write(tmp_path / "trec.jsonl", [trec])))
    assert trial.measure == Measure("class", ("Person", "Place"), first_line=True)

    choice = {"id": 0, "input": "Who?", "context": "It was Ann.", "options": ["Ann", "Bob"], "answer": ["A"]}
    (trial,) = make("infinitebench", replace(options, file=write(tmp_path / "longbook_choice_eng.jsonl", [choice])))
    assert trial.question == "Who?\nA. Ann\nB. Bob"
    assert trial.answers == ("Ann",)
    key = {"id": 0, "input": "What is the pass key?", "context": "The pass key is 7.", "answer": ["7"]}
    (trial,) = make("infinitebench", replace(options, file=write(tmp_path / "passkey.jsonl", [key])))
    assert (trial.question, trial.raw) == ("What is the pass key? The pass key is", True)

    musique = {
        "question": "who?",
        "answer": "Ann",
        "answer_aliases": ["A."],
        "paragraphs": [
            {"title": "T", "paragraph_text": "x", "is_supporting": True},
            {"title": "U", "paragraph_text": "y", "is_supporting": False},
        ],
    }
    (trial,) = make("multihop", replace(options, file=write(tmp_path / "m.jsonl", [musique])))
    assert [document.text for document in trial.documents] == ["T\nx", "U\ny"]
    assert (trial.answers, trial.label) == (("Ann", "A."), "1 hops")
    hotpot = {"question": "q", "answer": "yes", "context": [["T", ["a.", " b."]]], "supporting_facts": [["T", 0]]}
    (trial,) = make("multihop", replace(options, file=write(tmp_path / "h.jsonl", [hotpot])))
    assert trial.documents[0].text == "T\na. b."

    exam = {"instructions": ["1+1?", "who?"], "outputs": ["(B) two", "Ann"], "input": "Sums.", "source": "quality"}
    first, second = make("leval", replace(options, file=write(tmp_path / "e.jsonl", [exam])))
    assert (first.question, first.answers, first.documents) == ("1+1?", ("(B) two", "two"), second.documents)
    rouge = {"instructions": ["Sum it up."], "outputs": ["So."], "input": "Long.", "evaluation": "rouge"}
    (trial,) = make("leval", replace(options, file=write(tmp_path / "g.jsonl", [rouge])))
    assert (trial.measure, trial.max_tokens, trial.label) == (Measure("rouge-l"), 256, "g")

    meeting = {"meeting_transcripts": [{"speaker": "A", "content": "Hi."}, {"speaker": "B", "content": "Bye."}]}
    meeting["general_query_list"] = [{"query": "Sum it up.", "answer": "They met."}]
    meeting["specific_query_list"] = [{"query": "What did B say?", "answer": "Bye."}]
    first, second = make("qmsum", replace(options, file=write(tmp_path / "q.jsonl", [meeting])))
    assert first.documents[0].text == "A: Hi.\nB: Bye."
    assert (first.question, second.answers, second.label) == ("Sum it up.", ("Bye.",), "specific")
    story = {"document": "It was Ann.", "questions": [{"question_text": "What happens?", "question_number": 1}]}
    story["questions"][0]["responses"] = [{"response_text": "Ann did it."}, {"response_text": "Ann."}]
    (trial,) = make("squality", replace(options, file=write(tmp_path / "s.jsonl", [story])))
    assert (trial.answers, trial.measure) == (("Ann did it.", "Ann."), Measure("rouge-l"))

    choice = {"question": "who?", "options": ["A. Bob", "B. Ann "], "answer": "B", "content": "It was Ann."}
    (trial,) = make("bamboo", replace(options, file=write(tmp_path / "meetingqa_4k.jsonl", [choice])))
    assert (trial.question, trial.answers) == ("who?\nA. Bob\nB. Ann", ("B. Ann", "Ann"))
    for order in (["Question:\nwho?", "Document:\nIt was Ann."], ["Document:\nIt was Ann.", "Question:\nwho?"]):
        row = {"content": "\n\n".join(["Answer from the document.", *order]) + "\n", "answer": "Ann"}
        (trial,) = make("bamboo", replace(options, file=write(tmp_path / "altqa_4k.jsonl", [row])))
        assert trial.question == "Answer from the document.\n\nQuestion:\nwho?"
        assert trial.documents[0].text == "Document:\nIt was Ann."

    kv = {"ordered_kv_records": [["k1", "v1"], ["k2", "v2"]], "key": "k2", "value": "v2"}
    (trial,) = make("kv", replace(options, file=write(tmp_path / "kv.jsonl", [kv])))
    assert (trial.answers, trial.label) == (("v2",), "depth 0.75")


def test_few_shot_shows_every_class_before_one_again(options, tmp_path):
    """Demonstrations fill the memory, one of each class first, the same in every trial; nothing asked is shown."""
    shown = [{"text": f"text {number}", "category": f"class_{number % 7}"} for number in range(210)]
    asked = [{"text": f"other {number}", "category": f"class_{number % 7}"} for number in range(12)]
    write(tmp_path / "train_demos.jsonl", shown)
    write(tmp_path / "test.jsonl", asked)
    trials = make("few-shot", replace(options, file=tmp_path, tokens=1000))
    assert len({text_of(trial) for trial in trials}) == 1
    rows = re.findall(r"Text: (text \d+)\nCategory: (class_\d)\n", text_of(trials[0]))
    for start in range(0, len(rows) - 6, 7):
        assert len({name for _, name in rows[start : start + 7]}) == 7
    assert 700 < len(options.tokenizer.encode(text_of(trials[0]))) <= 1000
    assert all(trial.question.startswith("Text: other") and trial.raw for trial in trials)
    labels = {row["text"]: row["category"] for row in asked}
    for trial in trials:
        assert trial.answers == (labels[trial.question.split("\n")[0].removeprefix("Text: ")],)
        assert trial.measure(f" {trial.answers[0]}\nText: x\nCategory: class_0", trial.answers) == 1.0
    with pytest.raises(ConfigError, match="a folder with train"):
        make("few-shot", replace(options, file=tmp_path / "test.jsonl"))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(EmptyCorpusError, match="no test"):
        make("few-shot", replace(options, file=tmp_path))


def test_files_are_fetched_once_from_addresses(tmp_path, monkeypatch):
    """A member of an archive is read like a file, then from the cache; two archives do not mix; failures are named."""
    monkeypatch.setenv("FOCUSLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    row = {"input": "who?", "context": "It was Ann.", "answers": ["Ann"], "dataset": "narrativeqa"}
    for name in ("one", "two"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("data/narrativeqa.jsonl", json.dumps(row | {"context": name}))
    places = [local_file(f"zip://data/narrativeqa.jsonl::{tmp_path / name}.zip") for name in ("one", "two")]
    trials = [next(TASKS["longbench"].make(TaskOptions(None, 1, file=place))) for place in places]
    assert [trial.documents[0].text for trial in trials] == ["one", "two"]
    (tmp_path / "one.zip").unlink()
    assert local_file(f"zip://data/narrativeqa.jsonl::{tmp_path}/one.zip") == places[0]
    assert local_file("a/b.jsonl") == Path("a/b.jsonl")
    for bad in (f"zip://other.jsonl::{tmp_path}/two.zip", "hf://datasets/THUDM/LongBench/data.zip", "ftpx://a/b"):
        with pytest.raises(DocumentNotFoundError, match=f"cannot fetch '{bad}'.*give a file of this machine"):
            local_file(bad)


@pytest.mark.parametrize(
    "name", [name for name in TASKS if (TASKS[name].varies == "nothing" and name != "conversation") or name == "kv"]
)
def test_files_of_another_kind_are_refused(options, tmp_path, name):
    """A question file given to another task, a missing file and no file each give one clear error."""
    other = write(tmp_path / "other.jsonl", [QUESTION])
    with pytest.raises(CorpusError):
        make(name, replace(options, file=other))
    with pytest.raises(CorpusError, match="check the path"):
        make(name, replace(options, file=tmp_path / "nowhere.jsonl"))
    if name != "kv":
        with pytest.raises(ConfigError, match="this task needs --file"):
            make(name, options)


# -- the real files ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("questions", "litm_nq/nq-open-oracle.eval.jsonl.gz"),
        ("ruler-qa", "squad/squad_v2_dev_half.eval.jsonl.gz"),
        ("multihop", "multihop/hotpotqa_train100.eval.jsonl.gz"),
        ("multihop", "multihop/musique_train100.eval.jsonl.gz"),
        ("kv", "litm_kv/kv-retrieval-75_keys.jsonl.gz"),
        ("babilong", "babi/qa1_single-supporting-fact_train.txt.gz"),
        ("longeval-lines", "longchat_lines/200_lines.jsonl.gz"),
        ("longeval-topics", "longchat_topics/5_topics.jsonl.gz"),
        ("common-words", "ruler_words/nounlist.txt.gz"),
        ("leval", "leval/natural_question.jsonl.gz"),
        ("bamboo", "bamboo/altqa_4k.jsonl.gz"),
        ("bamboo", "bamboo/paperqa_16k.jsonl.gz"),
        ("qmsum", "qmsum/qmsum_val.jsonl.gz"),
        ("squality", "squality/squality_v1-3_dev.jsonl.gz"),
        ("few-shot", "banking77"),
        ("leval", "leval/gsm100.jsonl.gz"),
    ],
)
def test_real_files_are_read(options, shared_data, name, file):
    """Every file gives its trials, with the answer in the text (yes and no aside)."""
    trials = make(name, replace(options, file=shared_data / "eval" / file, tokens=4000))
    assert len(trials) == 10
    for trial in trials:
        known = f"{text_of(trial)} {trial.question}".lower()  # choices stand in the question
        if name not in ("leval", "qmsum", "squality", "few-shot") and trial.answers[0] not in ("yes", "no"):
            assert any(answer.lower() in known for answer in trial.answers)
