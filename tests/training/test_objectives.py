"""Check the objectives: the dynamic prompt, one target an example, the teacher, stages of a schedule."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from focus_core.config import TrainConfig
from focus_core.errors import ConfigError
from focus_core.method.encoding import encode_chunks
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.text.tokenization import TextTokenizer
from focus_core.training.data import ExampleStream
from focus_core.training.kept import KeptChunks
from focus_core.training.loop import CandidateLoss
from focus_core.training.objectives import (
    Example,
    Query,
    Task,
    dense_logits,
    distillation_loss,
    encode_example,
    teacher_logits,
)
from focus_core.training.texts import QuestionRow, TrainingTexts, hold_out
from tests.conftest import perturb, tiny_model
from tests.core.test_invariants import _memory_of

CHUNKS = ((10, 11, 12, 13, 14, 15, 16), (30, 31, 32), (50, 51, 52, 53, 54))
LOCAL = (20, 21, 22, 23, 24, 25, 26, 27, 28)
SETTINGS = {"chunk_sizes": (8, 16), "max_memory_tokens": 64, "local_tokens": (12, 20), "max_candidate_rows": 48}


@pytest.fixture
def texts():
    rows = tuple(
        QuestionRow(f"where is cat {i}?", (f"mat {i}",), f"t{i}", f"cat {i} is on mat {i}.") for i in range(40)
    )
    return TrainingTexts(tuple(f"book {i}. " + "the cat sat on the mat. " * 120 for i in range(30)), rows)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "positions"), [("llama", "shared"), ("gemma2", "ordered"), ("opt", "ordered")])
@pytest.mark.parametrize("prompt", [1, 3, 100])
def test_a_short_dynamic_prompt_is_scored_as_decoded(family, positions, prompt, make_engine):
    """Targets' logits with P injected tokens == incremental decoding with prompt_length P; P changes them."""
    engine = make_engine(family, positions=positions, prompt_length=prompt, window=256, chunk_size=32)
    query = Query(LOCAL, 6, prompt=prompt)
    chunks = encode_example(engine.base, Example(CHUNKS, (query,), "test"), engine.sink)
    dense, whole = dense_logits(
        engine.base, engine.adapter, [Task(chunks, query), Task(chunks, Query(LOCAL, 6))], engine.sink, positions
    )
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=8)
    found = [reading.begin(list(LOCAL[:6]))]
    found += [reading.step(token) for token in LOCAL[6:-1]]
    torch.testing.assert_close(torch.stack(found), dense.detach(), atol=2e-5, rtol=1e-4)
    assert torch.allclose(dense, whole, atol=1e-5) == (prompt >= 5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "positions"), [("llama", "shared"), ("gemma2", "ordered"), ("opt", "ordered")])
@pytest.mark.parametrize("prompt", [2, None])
@pytest.mark.parametrize(("whole", "opening"), [((1,), 0), ((2, 0), 3), ((0, 1, 2), 0), ((1,), 2)])
def test_passages_read_whole_are_scored_as_decoded(family, positions, prompt, whole, opening, make_engine):
    """Targets' logits behind chunks read whole == decoding after read_whole."""
    engine = make_engine(family, positions=positions, prompt_length=prompt or 100, window=256, chunk_size=32)
    gap = (3, 4)
    before = tuple(token for number in sorted(whole) for token in (*CHUNKS[number], *gap))
    query = Query(LOCAL, 6, prompt=prompt, before=before, opening=opening)
    plain = Query(LOCAL, 6, prompt=prompt)
    chunks = encode_example(engine.base, Example(CHUNKS, (query,), "test"), engine.sink)
    tasks = [Task(chunks, query), Task(chunks, plain)]
    dense, without = dense_logits(engine.base, engine.adapter, tasks, engine.sink, positions)
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=8)
    reading.begin(list(LOCAL[:6]), opening)
    found = [reading.read_whole(whole, gap)]
    found += [reading.step(token) for token in LOCAL[6:-1]]
    torch.testing.assert_close(torch.stack(found), dense.detach(), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(dense, without, atol=1e-3)


def test_a_prompt_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="prompt must be at least 1; got 0"):
        Query((1, 2, 3), 1, prompt=0)


def test_one_target_is_the_dense_loss_of_that_token(texts, tokenizer):
    """An example of the one-target objective is a dense one cut behind one target; that target's logits are equal."""
    streams = [
        ExampleStream(texts, TextTokenizer(tokenizer), TrainConfig(**SETTINGS, objective=objective))
        for objective in ("dense", "one_target")
    ]
    base = BaseDecoder(tiny_model("llama"))
    with CandidateAdapter(base, torch.float32) as adapter:
        perturb(adapter)
        for step in range(6):
            dense, one = (stream.example(step, 0) for stream in streams)
            assert one.targets == 1
            assert one.chunks == dense.chunks
            (query,) = one.queries
            whole = next(item for item in dense.queries if item.ids[: len(query.ids)] == query.ids)
            assert whole.split <= query.split
            chunks = encode_example(base, one, 0)
            last, every = dense_logits(base, adapter, [Task(chunks, query), Task(chunks, whole)], 0, "shared")
            if query.split == whole.split:  # later targets' local rows saw candidates of their own steps
                torch.testing.assert_close(last[0], every[0], atol=1e-5, rtol=1e-4)


# -- the teacher ------------------------------------------------------------------------------------------------


@pytest.fixture
def taught():
    """A base with moved candidates, and an example whose second chunk is the gold one."""
    base = BaseDecoder(tiny_model("llama"))
    with CandidateAdapter(base, torch.float32) as adapter:
        perturb(adapter)
        yield base, adapter, Example(CHUNKS, (Query(LOCAL, 6, gold=(1,)),), "question")


@pytest.mark.parametrize("memory", ["all", "gold"])
def test_the_teacher_is_the_base_alone(taught, memory):
    """Its logits == transformers' forward of a base without candidates over sink, memory and local context."""
    base, _, example = taught
    chunks = CHUNKS if memory == "all" else CHUNKS[1:2]
    text = [0, *(token for chunk in chunks for token in chunk), *LOCAL]
    expected = tiny_model("llama")(torch.tensor([text])).logits[0, -4:-1]
    found = teacher_logits(base, example, example.queries[0], 0, memory)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    longer = Example(((7,) * 600,), (Query(LOCAL, 6),), "question")
    assert teacher_logits(base, longer, longer.queries[0], 0, memory) is None


def test_a_teacher_of_the_end_reads_the_last_chunks_that_fit(taught):
    """Three chunks that fit: what a teacher of all says; 200 chunks: transformers' forward of the last that fit."""
    base, _, example = taught
    query = example.queries[0]
    whole = teacher_logits(base, example, query, 0, "all")
    torch.testing.assert_close(teacher_logits(base, example, query, 0, "end"), whole)
    chunks = tuple((3 + n % 40,) * 6 for n in range(200))
    kept = (base.window - len(LOCAL)) // 6
    text = [0, *(token for chunk in chunks[-kept:] for token in chunk), *LOCAL[:-1]]
    expected = tiny_model("llama")(torch.tensor([text])).logits[0, -3:]
    found = teacher_logits(base, Example(chunks, (query,), "continuation"), query, 0, "end")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for chunk, local in (((7,) * 600, LOCAL), ((7,) * 6, LOCAL * 80)):  # not one chunk fits
        long = Query(local, len(local) - 3)
        assert teacher_logits(base, Example((chunk, chunk), (long,), "continuation"), long, 0, "end") is None


def test_divergence_is_zero_for_equal_logits_and_else_the_sum_by_hand():
    """KL(p || q) == sum of p log(p / q), mean over targets; 0 where p == q."""
    teacher, student = torch.randn(3, 11), torch.randn(3, 11)
    assert distillation_loss(teacher, teacher).abs() < 1e-7
    expected = 0.0
    for row in range(3):
        p, q = teacher[row].softmax(-1).tolist(), student[row].softmax(-1).tolist()
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    assert float(distillation_loss(student, teacher)) == pytest.approx(expected, rel=1e-4)


def test_distillation_adds_to_the_loss_and_trains_candidates_only(taught):
    """Loss with weight w == likelihood + w * divergence; gradients reach candidates and nothing of the base."""
    base, adapter, example = taught
    for parameter in adapter.trainable_parameters():
        parameter.requires_grad_(True)
    plain, _ = CandidateLoss(base, adapter, TrainConfig(), 0)([example], 1.0)
    config = TrainConfig(distillation={"question": 0.7})
    total, (record,) = CandidateLoss(base, adapter, config, 0)([example], 1.0)
    assert total.item() == pytest.approx(plain.item() + 0.7 * record["divergences"][0], rel=1e-5)
    assert record["divergences"][0] > 0
    other = CandidateLoss(base, adapter, TrainConfig(distillation={"needle": 0.7}), 0)([example], 1.0)
    assert other[0].item() == plain.item()
    with_teacher = torch.autograd.grad(total, adapter.trainable_parameters(), allow_unused=True)
    without = torch.autograd.grad(plain, adapter.trainable_parameters(), allow_unused=True)
    assert any(not torch.allclose(a, b) for a, b in zip(with_teacher, without, strict=True) if a is not None)
    own = {id(parameter) for parameter in adapter.trainable_parameters()}
    assert all(parameter.grad is None for parameter in base.model.parameters() if id(parameter) not in own)
    assert not any(parameter.requires_grad for parameter in base.model.parameters() if id(parameter) not in own)


# -- schedules --------------------------------------------------------------------------------------------------


def test_stages_change_what_is_drawn(texts, tokenizer):
    """The first half of the steps draws one chunk of 8, then the settings proper hold; prompts come from their list."""
    stages = ({"until": 0.25, "max_chunks": 1, "chunk_sizes": [8]}, {"until": 0.5, "max_chunks": 2})
    mix = {"continuation": 1.0, "reconstruction": 1.0}
    config = TrainConfig(**SETTINGS, steps=40, mix=mix, stages=stages, prompt_lengths=(2, 5))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    stream = ExampleStream(texts, TextTokenizer(tokenizer), config)
    examples = [stream.example(step, 0) for step in range(40)]
    assert {(len(example.chunks), len(example.chunks[0])) for example in examples[:10]} == {(1, 8)}
    assert max(len(example.chunks) for example in examples[10:20]) == 2
    assert max(len(example.chunks) for example in examples[20:]) > 2
    assert {query.prompt for example in examples for query in example.queries} == {2, 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ({"until": 0.5, "steps": 4},)}, "a stage cannot change steps"),
        ({"stages": ({"until": 0.5}, {"until": 0.5})}, "rising `until`"),
        ({"stages": ({"until": 0.5, "max_chunks": 0},)}, "max_chunks must be at least 1; got 0"),
        ({"mix": {"riddle": 1.0}}, "mix knows .*; got 'riddle'"),
        ({"distillation": {"question": -1.0}}, r"distillation\['question'\] must be at least 0.0; got -1.0"),
        ({"mix": {}}, "mix must hold weights"),
        ({"prompt_lengths": (0,)}, "prompt_lengths must hold positive"),
        ({"objective": "two"}, "objective must be one of dense, one_target"),
        ({"examples_per_pass": 0}, "examples_per_pass must be at least 1"),
    ],
)
def test_bad_settings_say_what_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_what_is_held_out_is_never_drawn(texts):
    """Texts and passages part without overlap, by seed; of one long text the end is held out."""
    kept, held = hold_out(texts, 0.1, 0)
    assert (len(kept.texts), len(held.texts)) == (27, 3)
    assert not set(kept.texts) & set(held.texts)
    passages = [{row.context for row in part.questions} for part in (kept, held)]
    assert (len(passages[0]), len(passages[1])) == (36, 4)
    assert not passages[0] & passages[1]
    assert hold_out(texts, 0.1, 0)[1] == held != hold_out(texts, 0.1, 1)[1]
    one = TrainingTexts(("x" * 9000 + "y" * 3000,), ())
    kept, held = hold_out(one, 0.25, 0)
    assert (kept.texts, held.texts) == (("x" * 9000,), ("y" * 3000,))


def test_gold_chunks_hold_the_answer(texts, tokenizer):
    """The chunks named gold hold the span, the answer or the fact that a query asks for."""
    config = TrainConfig(**SETTINGS, mix={"reconstruction": 1.0, "question": 1.0, "needle": 1.0}, max_chunks=6)
    config = replace(config, max_candidate_rows=600)  # no sentence is cut
    stream = ExampleStream(texts, TextTokenizer(tokenizer), config)
    seen = set()
    for step in range(60):
        example = stream.example(step, 0)
        seen.add(example.kind)
        for query in example.queries:
            gold = [token for index in query.gold for token in example.chunks[index]]
            text, target = tokenizer.decode(gold), tokenizer.decode(query.ids[query.split : -1]).strip(" .")
            if example.kind == "reconstruction":
                assert any(tuple(gold[at : at + len(query.ids)]) == query.ids for at in range(len(gold)))
            else:
                assert target.split(" is ")[-1].lower() in text.lower()
    assert seen == {"reconstruction", "question", "needle"}


# -- kept chunk KV ----------------------------------------------------------------------------------------------


def test_kept_chunks_are_what_would_be_computed():
    """The same KV with and without keeping, whatever was kept; the bound holds and the oldest goes first."""
    base = BaseDecoder(tiny_model("llama"))
    one = encode_chunks(base, [[0, 5, 6, 7]]).nbytes
    kept = KeptChunks(3 * one)
    rows = [[(0, 5, 6, 7), (0, 8, 9, 10)], [(0, 8, 9, 10), (0, 11, 12, 13), (0, 8, 9, 10)], [(0, 20, 21), (0, 5, 6, 7)]]
    for some in rows * 2:
        found, expected = kept.encode(base, some), encode_chunks(base, some)
        assert found.lengths == expected.lengths
        for index in range(len(some)):  # padding is anything
            torch.testing.assert_close(found.dense(index), expected.dense(index), atol=1e-6, rtol=1e-5)
        assert kept.nbytes <= kept.most_bytes
    assert (kept.asked, kept.found) == (14, 7)  # by hand, least recently used first


def test_kept_chunks_change_no_loss(texts, tokenizer):
    """A module that keeps chunk KV gives the losses of one that does not, and finds chunks of earlier steps."""
    base = BaseDecoder(tiny_model("llama"))
    config = TrainConfig(**SETTINGS, mix={"question": 1.0}, pool=4, max_chunks=4)
    with CandidateAdapter(base, torch.float32) as adapter:
        perturb(adapter)
        stream = ExampleStream(texts, TextTokenizer(tokenizer), config)
        plain, keeping = (CandidateLoss(base, adapter, replace(config, kept_kv_mib=mib), 0) for mib in (0, 8))
        for step in range(6):
            example = stream.example(step, 0)
            assert plain([example], 1.0)[0].item() == pytest.approx(keeping([example], 1.0)[0].item(), rel=1e-5)
        assert keeping.kept.found > keeping.kept.asked / 3
        assert plain.kept.asked == 0
