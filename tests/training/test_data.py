"""Check what training examples are drawn from: rows, instruction prompts, facts, hard negatives, the order of draws."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re

import pytest

from focus_core.config import TrainConfig
from focus_core.errors import CorpusError
from focus_core.model.chat import Message, render_messages
from focus_core.text.tokenization import TextTokenizer
from focus_core.training.conversations import invent_conversation
from focus_core.training.data import NOT_THERE, ExampleStream
from focus_core.training.facts import invent_facts, invent_value
from focus_core.training.forms import invent_forms
from focus_core.training.nearby import PassageIndex
from focus_core.training.pairs import Pairs
from focus_core.training.texts import Passage, QuestionRow, TrainingTexts, hold_out, read_training_texts

PASSAGE = "The mill burned in 1702.\nIts owner, Ada Wren, left for Oslo."
PROMPTS = [
    f'Given the following passage\n\n"{PASSAGE}",\n\nanswer the following question. Note that the answer is present '
    "within the text.\n\nQuestion: Who owned the mill?\n",
    f"Extract the answer from the following context.\nQuestion: Who owned the mill?\nContext: {PASSAGE}\n",
    f'Question: "Who owned the mill?"\n\nContext: "{PASSAGE}"\n\nAnswer:\n',
    f'I know that the answer to the question "Who owned the mill?" is in "{PASSAGE}". Can you tell me what it is?\n',
    f"Question: Who owned the mill?\nIf there is no answer, say so.\nMovie title: Mills\nContext: {PASSAGE}\n",
    f"Could you help me?\n\nPlot title: Mills\nMovie plot: {PASSAGE}\nMy question: Who owned the mill?\n",
    f"Use the text.\nParagraph :\n\n{PASSAGE}\n\nQuestion:\n\n\nWho owned the mill?\n",
]


def _rows(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_training_texts([tmp_path / "rows.jsonl"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_instruction_prompts_become_questions(prompt, tmp_path):
    """Question, passage and title stand where the prompt's layout has them."""
    (row,) = _rows(tmp_path, {"prompt": prompt, "completion": "Ada Wren\n"}).questions
    assert (row.question, row.answers, row.context) == ("Who owned the mill?", ("Ada Wren",), PASSAGE)
    assert row.title == ("Mills" if "Mills" in prompt else "")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPTS[1], "completion": "Bert Wren"},  # not in the passage
        {"prompt": PROMPTS[1], "completion": "Oslo" * 60},  # retold
        {"prompt": PROMPTS[1], "completion": "mill"},  # in the question
        {"prompt": PROMPTS[1], "completion": "e"},  # a letter of a word
        {"prompt": "Is Oslo in Norway?", "completion": "Oslo"},  # no passage
        {"question": "Who?", "answers": ["Bert"], "context": PASSAGE},
    ],
)
def test_rows_without_a_findable_answer_are_left_out(row, tmp_path):
    """Only the other row is read."""
    read = _rows(tmp_path, row, {"question": "Who?", "answers": {"text": ["Ada Wren"]}, "context": PASSAGE})
    assert [item.question for item in read.questions] == ["Who?"]


def test_a_row_given_twice_is_read_once(tmp_path):
    """Seven layouts of one question make one row a title."""
    read = _rows(tmp_path, *({"prompt": prompt, "completion": "Ada Wren"} for prompt in PROMPTS * 2))
    assert len(read.questions) == 2


@pytest.mark.slow
def test_instruction_files_hold_question_rows(shared_data):
    """The T0 training files give several hundred rows whose passage holds the answer."""
    rows = read_training_texts([shared_data / "train" / "t0_instruct"]).questions
    assert len(rows) > 500
    assert all(row.answers[0].lower() in row.context.lower() and len(row.question) > 5 for row in rows)


def test_facts_look_alike_but_differ():
    """Each invented fact has a subject of its own and states its value; values have every shape."""
    rng = random.Random(3)
    for count in (1, 2, 8, 16):
        facts = invent_facts(rng, count)
        assert len({fact.question for fact in facts}) == count
        for fact in facts:
            assert fact.value.lower() in fact.statement.lower()
            assert fact.lead.removeprefix("The ").removesuffix(" is") in fact.question
    values = {shape: [invent_value(rng, shape) for _ in range(80)] for shape in ("number", "code", "date", "name")}
    assert max(len(value.replace(",", "")) for value in values["number"]) == 12
    assert max(value.count(" ") for value in values["name"]) >= 2
    assert any("-" in value for value in values["code"])
    assert all(any(character.isdigit() for character in value) for value in values["date"])


def test_the_index_ranks_as_bm25():
    """The ranking == that of BM25 computed from its formula, word by word; frequent words do not count."""
    texts = [f"common word{index} rare{index % 25}{' and more' * (index % 7)}" for index in range(100)]
    words = [text.split() for text in texts]
    average = sum(map(len, words)) / 100

    def score(query, document):
        total = 0.0
        for word in query.split():
            having = sum(word in other for other in words)
            times, norm = document.count(word), 1.2 * (0.25 + 0.75 * len(document) / average)
            total += math.log(1 + (100 - having + 0.5) / (having + 0.5)) * times * 2.2 / (times + norm)
        return total

    query = "rare3 word13 word28"
    expected = sorted(range(100), key=lambda index: (-score(query, words[index]), index))[:5]
    index = PassageIndex(texts)
    assert index.nearest(query, 5) == expected == index.nearest(f"common {query} and more", 5)
    assert expected[0] == 28
    assert index.nearest("common and unknown", 5) == []


@pytest.fixture
def stream(tokenizer):
    """A stream over 60 question rows, three to a title; gold passages hold a number of their own."""

    def make(**changes):
        rows = [
            QuestionRow(f"what is the sum of bin{i}?", (f"{1000 + i}",), f"title {i // 3}", f"bin{i} holds {1000 + i}.")
            for i in range(60)
        ]
        rows.append(QuestionRow("what did bin0 lack?", ("nothing",), "other", "it lacked nothing, said bin0"))
        settings = {"max_chunks": 8, "max_memory_tokens": 512, "mix": {"question": 1.0}, "questions_per_example": 1}
        return ExampleStream(
            TrainingTexts((), tuple(rows)), TextTokenizer(tokenizer), TrainConfig(**(settings | changes))
        )

    return make


def test_hard_negatives_are_near_and_hold_no_answer(stream):
    """With a share of 1 the other passages are of the kinds that are wanted, the nearest first; with 0 any."""
    hard = stream(hard_negatives=1.0)
    asked = [hard.questions[0]]
    both, near, alike = {"nearest": 0.5, "article": 0.5}, {"nearest": 1.0}, {"article": 1.0}
    drawn = hard.others.draw(random.Random(0), asked, 3, 1.0, both)
    assert {row.title for row in drawn} == {"title 0", "other"}
    assert hard.others.draw(random.Random(0), asked, 1, 1.0, near)[0].title == "other"  # holds "bin0", as the question
    assert {row.title for row in hard.others.draw(random.Random(0), asked, 2, 1.0, alike)} == {"title 0"}
    titles = [row.title for seed in range(30) for row in hard.others.draw(random.Random(seed), asked, 3, 0.0, both)]
    assert len(set(titles)) > 10
    for seed in range(20):
        drawn = hard.others.draw(random.Random(seed), asked, 8, 0.5, both)
        assert len({row.context for row in drawn}) == len(drawn) == 8
        assert all("1000" not in row.context for row in drawn)


def test_question_chunks_follow_their_sizes(stream, tokenizer):
    """Chunks stay within the drawn size, the gold one holds the answer; filled chunks hold several passages."""
    for sizes, fill in (((24,), 0.0), ((120,), 1.0)):
        drawn = stream(question_chunk_sizes=sizes, fill_chunks=fill)
        longest = 0
        for step in range(15):
            example = drawn.example(step, 0)
            texts = [tokenizer.decode(chunk) for chunk in example.chunks]
            query = tokenizer.decode(example.queries[0].ids)
            row = next(row for row in drawn.questions if row.question in query)
            assert any(row.answers[0] in text for text in texts)
            longest = max(longest, *map(len, example.chunks))
        assert longest <= sizes[0]
        assert (longest > 60) == bool(fill)


def test_long_answers_are_learned_to_their_end(stream):
    """With room for two targets a chunk, every token of an answer is a target in some example, the end token too."""
    drawn = stream(max_candidate_rows=2, max_chunks=2)
    row = drawn.questions[0]
    whole = [*drawn.tokenizer.encode(row.answers[0]), drawn.tokenizer.end_token]
    assert len(whole) > 2
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        query = drawn._chat_query(rng, row.question, row.answers[0], 2)
        assert query.targets == 2
        asked = Message("user", f"{row.question}\nAnswer with a short phrase.")
        given = len(query.ids) - len(render_messages(drawn.tokenizer, [asked], system="Use the documents."))
        seen |= set(range(given - 2, given))
    assert seen == set(range(len(whole)))


def test_texts_of_a_file_are_joined_in_their_order(tmp_path, tokenizer):
    """With ``join_texts`` windows run over a file's texts, never over two files; held-out texts are in no window."""
    for name in ("red", "blue"):
        rows = [{"text": f"{name} {number}. " * 300} for number in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "green.txt").write_text("green 0. " * 300)
    texts = read_training_texts([tmp_path])
    assert [text.split()[0] for text in texts.joined()] == ["blue", "green", "red"]
    assert texts.joined()[2] == "\n\n".join(f"red {number}. " * 300 for number in range(6))
    kept, held = hold_out(texts, 0.2, 0)
    assert len(kept.joined()) == 3
    settings = {
        "chunk_sizes": (2048,),
        "max_memory_tokens": 4096,
        "local_tokens": (8, 16),
        "mix": {"continuation": 1.0},
    }
    for share in (0.0, 1.0):
        drawn = ExampleStream(kept, TextTokenizer(tokenizer), TrainConfig(join_texts=share, **settings))
        starts = set()
        for step in range(20):
            words = tokenizer.decode([token for chunk in drawn.example(step, 0).chunks for token in chunk]).split()[1:]
            parts = {f"{color} {number[0]}" for color, number in itertools.pairwise(words) if number[0].isdigit()}
            assert len({part.split()[0] for part in parts}) == 1
            assert not any(text.startswith(part) for part in parts for text in held.texts)
            starts.add(len(parts))
        assert (max(starts) > 1) == bool(share)


# -- not there, read whole, scenes ------------------------------------------------------------------------------


def test_what_is_not_there_is_declined(stream, tokenizer):
    """A question whose answer no chunk holds has the fixed sentence as target and no gold; the others keep theirs."""
    drawn = stream(not_there=0.4, questions_per_example=3)
    declined = told = 0
    for step in range(60):
        example = drawn.example(step, 0)
        memory = " ".join(tokenizer.decode(chunk) for chunk in example.chunks)
        for query in example.queries:
            text, target = tokenizer.decode(query.ids), tokenizer.decode(query.ids[query.split : -1])
            row = next(row for row in drawn.questions if row.question in text)
            assert (target == NOT_THERE) == (not query.gold) == (row.answers[0] not in memory)
            declined, told = declined + (target == NOT_THERE), told + (target != NOT_THERE)
    assert 0.2 < declined / (declined + told) < 0.6


def test_unanswerable_rows_are_read_and_declined(tmp_path, tokenizer):
    """A row marked as impossible is kept apart; its passage is in memory when it is asked, and the target declines."""
    rows = [{"question": f"Who is {n}?", "answers": [f"Ada {n}"], "context": f"Ada {n} lives here."} for n in range(30)]
    odd = {"question": "Who was Bert?", "answers": [], "context": "Bert is a name.", "is_impossible": True}
    texts = _rows(tmp_path, *rows, odd)
    assert [row.question for row in texts.unanswered] == ["Who was Bert?"]
    assert len(texts.questions) == 30
    settings = {"mix": {"question": 1.0}, "not_there": 0.5, "max_memory_tokens": 512, "max_chunks": 4}
    drawn = ExampleStream(texts, TextTokenizer(tokenizer), TrainConfig(**settings))
    seen = 0
    for step in range(60):
        example = drawn.example(step, 0)
        for query in example.queries:
            if "Who was Bert?" in tokenizer.decode(query.ids):
                seen += 1
                assert tokenizer.decode(query.ids[query.split : -1]) == NOT_THERE
                assert any("Bert is" in tokenizer.decode(chunk) for chunk in example.chunks)
    assert seen > 3


def test_a_sentence_is_said_where_no_short_phrase_is_asked_for(tmp_path, tokenizer):
    """A row with a sentence gives both targets, each with its own template; a row without gives the short one alone."""
    row = {"question": "Who?", "answers": ["Ada"], "context": "Ada lives here."}
    texts = _rows(tmp_path, row, {**row, "sentence": "It is Ada."}, {**row, "question": "What?"})
    assert len(texts.questions) == 2
    drawn = ExampleStream(texts, TextTokenizer(tokenizer), TrainConfig(mix={"question": 1.0}))
    seen = set()
    for step in range(40):
        for query in drawn.example(step, 0).queries:
            text = tokenizer.decode(query.ids)
            short, sentence = "short phrase" in text, "It is Ada." in text
            assert short != sentence
            seen.add(("Who?" in text, short))
    assert seen == {(True, True), (True, False), (False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["question", "needle", "form", "conversation", "pair"])
def test_passages_read_whole_are_chunks_of_the_memory(kind, tmp_path, tokenizer):
    """Whole chunks in memory order, within the budget; the gold one among them, wrong ones, or none at all."""
    rows = [{"question": f"Who is {n}?", "answers": [f"Ada {n}"], "context": f"Ada {n} lives here."} for n in range(30)]
    texts = _rows(tmp_path, *rows, {"text": "Bert Ode (1815 - 1852) was a writer. " * 70, "title": "Ode"})
    passage = [Passage(f"Film {n}", f"Film {n} is a {1900 + n} American film. " * 4) for n in range(20)]
    texts = dataclasses.replace(texts, passages=tuple(passage))
    settings = {"mix": {kind: 1.0}, "read_whole": 0.7, "read_chunks": 3, "read_tokens": 300, "chunk_sizes": (64,)}
    drawn = ExampleStream(texts, TextTokenizer(tokenizer), TrainConfig(**settings, not_there=0.2))
    gap, seen = tokenizer.encode("\n\n", add_special_tokens=False), set()
    for step in range(80):
        example = drawn.example(step, 0)
        pieces = [[*chunk, *gap] for chunk in example.chunks]
        for query in example.queries:
            assert len(query.before) <= 300
            left, kept = list(query.before), []
            for number, piece in enumerate(pieces):
                if left[: len(piece)] == piece:
                    left = left[len(piece) :]
                    kept.append(number)
            assert not left
            assert len(kept) <= 3
            seen.add("none" if not kept else "gold" if set(kept) & set(query.gold) else "wrong")
    assert seen == {"none", "gold", "wrong"}


@pytest.mark.parametrize("make", ["form", "conversation", "pair"])
def test_scenes_hold_their_answers(make):
    """Every clue stands in a document, and together the clues hold the answer or what it is compared by."""
    people = [Passage(f"Ode {n}", f"Ode {n} (born 3 May {1900 + n}) was a writer from Oslo.") for n in range(12)]
    films = [Passage(f"Film {n}", f"Film {n} is a {1930 + n} American film directed by Ode Ha{n}.") for n in range(12)]
    pairs = Pairs([*people, *films])
    for seed in range(150):
        rng = random.Random(seed)
        if make == "form":
            scene = invent_forms(rng, 6, 4)
        elif make == "conversation":
            scene = invent_conversation(rng, 20, 3, 4)
        else:
            scene = pairs.draw(rng, 8, 3)
        assert scene.asked
        for item in scene.asked:
            holding = [text for text in scene.documents if any(clue in text for clue in item.clues)]
            assert all(any(clue in text for text in holding) for clue in item.clues)
            parts = re.split(r", | and ", item.answer) if make == "pair" else [item.answer]
            assert all(part.split(" ", 1)[-1] in " ".join(holding) for part in parts), item
            assert item.question not in " ".join(scene.documents)


@pytest.mark.parametrize("kind", ["form", "conversation"])
def test_scenes_without_any_answer_still_have_documents(kind, stream):
    """Where every asked fact is missing, no example is without chunks."""
    made = stream(not_there=1.0, mix={kind: 1.0}, questions_per_example=2, max_chunks=2)
    for step in range(60):
        example = made.example(step, 0)
        assert example.chunks
        assert example.queries


def test_a_form_is_asked_for_only_where_one_document_answers():
    """No other document of the scene holds all the words that name what is asked for."""
    for seed in range(200):
        scene = invent_forms(random.Random(seed), 8, 4)
        for item in scene.asked:
            assert sum(all(word in text for word in item.about) for text in scene.documents) == 1


def test_a_pool_asks_the_same_questions_for_some_steps_with_the_same_cuts(stream, tokenizer):
    """Within a block few questions and few different chunks; another block has others; the draw depends on the step."""
    drawn = stream(pool=5, pool_steps=20, question_chunk_sizes=(12,), not_there=0.0)
    blocks = []
    for block in range(2):
        asked, chunks = set(), set()
        for step in range(20 * block, 20 * block + 20):
            example = drawn.example(step, 0)
            chunks |= set(example.chunks)
            asked |= {tokenizer.decode(query.ids).split("bin")[1].split()[0] for query in example.queries}
        assert len(asked) <= 5
        assert len(chunks) <= 15
        blocks.append(asked)
    assert blocks[0] != blocks[1]
    again = stream(pool=5, pool_steps=20, question_chunk_sizes=(12,), not_there=0.0)
    assert again.example(25, 1) == drawn.example(25, 1)


def test_long_local_contexts_with_a_short_prompt(tmp_path, tokenizer):
    """With ``prompt_lengths`` local contexts reach 2,048 tokens at any k, and no more than the prompt runs behind."""
    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 3000)
    settings = {"mix": {"continuation": 1.0}, "local_tokens": (1024, 2048), "chunk_sizes": (64,), "max_chunks": 24}
    texts = read_training_texts([tmp_path])
    for prompts in ((), (512,)):
        drawn = ExampleStream(texts, TextTokenizer(tokenizer), TrainConfig(**settings, prompt_lengths=prompts))
        examples = [drawn.example(step, 0) for step in range(40)]
        longest = max(len(example.queries[0].ids) for example in examples if len(example.chunks) > 8)
        assert (longest > 1500) == bool(prompts)
        for example in examples if prompts else ():
            (query,) = example.queries
            assert query.split - 1 - query.injected_from <= 512
            assert query.targets * len(example.chunks) <= 512 + len(example.chunks) * 2


def test_rows_with_a_byte_order_mark_are_read_and_a_bad_one_is_named(tmp_path):
    """JSON lines as Windows writes them give their rows; a line that is no JSON is one error with its number."""
    row = json.dumps({"text": "the cat sat on the mat. " * 200})
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\r\n".encode())
    assert len(read_training_texts([path]).texts) == 2
    path.write_text(f"{row}\n{{oops\n")
    with pytest.raises(CorpusError, match=r"rows.jsonl, line 2, is no JSON .*; give one row a line"):
        read_training_texts([path])
