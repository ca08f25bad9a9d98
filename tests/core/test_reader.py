"""Check the reader: differences of low rank of local rows while chunks are read whole, and of no other rows."""

from __future__ import annotations

import pytest
import torch

from focus_core.config import FocusConfig, TrainConfig
from focus_core.errors import AdapterMismatchError, ConfigError
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint, load_adapter, read_info, save_adapter
from focus_core.text.corpus import Document
from focus_core.training.export import export_adapter, interpolate_adapters
from focus_core.training.loop import CandidateLoss
from focus_core.training.objectives import Example, Query, Task, dense_logits, encode_example
from tests.conftest import perturb, tiny_model
from tests.core.test_invariants import _memory_of

CHUNKS = ((10, 11, 12, 13, 14, 15, 16), (30, 31, 32), (50, 51, 52, 53, 54))
LOCAL = (20, 21, 22, 23, 24, 25, 26, 27, 28)
DOCUMENTS = [Document(str(number), f"the cat {number} sat on mat {number % 4}. " * 3) for number in range(5)]


def test_where_nothing_is_read_whole_it_does_nothing(make_engine):
    """Logits of a question and its steps are bit-identical to those of an adapter without a reader."""
    logits = []
    for rank in (0, 3):
        engine = make_engine(reader_rank=rank)
        reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=8)
        logits.append(torch.stack([reading.begin(list(LOCAL[:6])), *(reading.step(token) for token in LOCAL[6:])]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("mode", ["incremental", "exact"])
def test_an_untrained_one_reads_as_the_base_does_in_its_own_window(mode, make_engine):
    """Logits after chunks 0 and 2 behind an opening, step by step == transformers' own over that text."""
    engine = make_engine(reader_rank=3, local_mode=mode)
    for parameter in engine.adapter.reader_parameters()[::2]:
        parameter.data.zero_()  # the upper matrices
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=8)
    reading.begin(list(LOCAL[:6]), 2)
    found = [reading.read_whole([2, 0], (3,)), *(reading.step(token) for token in LOCAL[6:])]
    assert (reading.candidates, reading.whole) == (0, [0, 2])
    assert [bool(mass.sum(0)[1]) for mass in reading.mass] == [False] * engine.base.num_layers
    text = [engine.sink, *LOCAL[:2], *CHUNKS[0], 3, *CHUNKS[2], 3, *LOCAL[2:]]
    expected = engine.base.model(torch.tensor([text])).logits[0, -len(found) :]
    torch.testing.assert_close(torch.stack(found), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 5])
def test_questions_that_read_and_that_do_not_share_a_sweep(rank, make_engine):
    """Targets of queries with and without passages in front, all in one pass == each as decoded alone."""
    engine = make_engine(rank=rank, reader_rank=3)
    gap, shown = (3, 4), {0: (), 1: (1,), 2: (0, 2), 3: ()}
    queries = [
        Query(LOCAL[number:], 6 - number, before=tuple(token for at in whole for token in (*CHUNKS[at], *gap)))
        for number, whole in shown.items()
    ]
    chunks = encode_example(engine.base, Example(CHUNKS, tuple(queries), "test"), engine.sink)
    tasks = [Task(chunks, query) for query in queries]
    dense = dense_logits(engine.base, engine.adapter, tasks, engine.sink, engine.config.positions)
    for number, whole in shown.items():
        reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=8)
        first = reading.begin(list(LOCAL[number:6]))
        first = reading.read_whole(whole, gap) if whole else first
        found = torch.stack([first, *(reading.step(token) for token in LOCAL[6:-1])])
        torch.testing.assert_close(found, dense[number].detach(), atol=2e-5, rtol=1e-4)


def test_questions_answered_together_are_answered_as_alone(make_engine):
    """Several questions that each read other chunks whole, in shared sweeps == one by one."""
    engine = make_engine(reader_rank=3)
    memory = engine.remember(DOCUMENTS)
    questions, options = ["who sat?", "where is cat 3?", "mat 2?"], {"max_tokens": 6, "reread": 2}
    alone = [engine.answer(question, memory, **options).text for question in questions]
    plain = [engine.answer(question, memory, max_tokens=6, reread=0).text for question in questions]
    assert alone != plain
    assert [answer.text for answer in engine.answer_many(questions, memory, **options)] == alone


def test_it_is_trained_alone_with_the_gradients_of_training_all():
    """fixed_candidates: the same loss, no gradient of candidates, the reader's equal to those of training all."""
    base = BaseDecoder(tiny_model("llama"))
    example = Example(CHUNKS, (Query(LOCAL, 6, before=CHUNKS[1]), Query(LOCAL[1:], 4)), "question")
    found = []
    with CandidateAdapter(base, torch.float32, reader_rank=3) as adapter:
        perturb(adapter)
        for parameter in adapter.trainable_parameters():
            parameter.requires_grad_(True)
        for fixed in (False, True):
            config = TrainConfig(reader_rank=3, fixed_candidates=fixed)
            loss, _ = CandidateLoss(base, adapter, config, 0)([example], 1.0)
            candidates = torch.autograd.grad(loss, adapter.candidate_parameters(), allow_unused=True, retain_graph=True)
            found.append((loss, candidates, torch.autograd.grad(loss, adapter.reader_parameters(), allow_unused=True)))
        unread, _ = CandidateLoss(base, adapter, config, 0)([Example(CHUNKS, (Query(LOCAL, 6),), "text")], 1.0)
        unread.backward()  # nothing in it is trained, and a step is taken all the same
    (every, candidates, readers), (fixed_loss, none, alone) = found
    torch.testing.assert_close(fixed_loss, every)
    assert any(gradient is not None for gradient in candidates)
    assert all(gradient is None for gradient in none)
    assert sum(gradient is not None for gradient in alone) > 10
    for one, other in zip(readers, alone, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    with pytest.raises(ConfigError, match="nothing to train without a reader; set reader_rank"):
        TrainConfig(fixed_candidates=True)


def test_files_hold_it(tokenizer, tmp_path):
    """Saved, compact, cut to low rank and between two: loaded it is what it was; of another shape it is refused."""
    model = tiny_model("llama")
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    base, info = BaseDecoder(model), AdapterInfo("tiny", loaded.fingerprint, FocusConfig())
    with CandidateAdapter(base, torch.float32) as adapter:
        save_adapter(tmp_path / "before", adapter, info)
    with CandidateAdapter(base, torch.float32, reader_rank=3) as adapter:
        assert fingerprint(model) == loaded.fingerprint
        perturb(adapter)
        load_adapter(tmp_path / "before", adapter, loaded)
        reader = {key: value.clone() for key, value in adapter.reader_state().items()}
        save_adapter(tmp_path / "whole", adapter, info)
    export_adapter(loaded, tmp_path / "whole", tmp_path / "int8")
    export_adapter(loaded, tmp_path / "whole", tmp_path / "thin", rank=2)
    interpolate_adapters(loaded, tmp_path / "before", tmp_path / "whole", tmp_path / "between", 0.5)
    for name, atol in (("whole", 0.0), ("between", 0.0), ("int8", 1e-2), ("thin", 1e-2)):
        saved = read_info(tmp_path / name)
        assert saved.reader_rank == 3
        with CandidateAdapter(base, torch.float32, rank=saved.rank, reader_rank=saved.reader_rank) as adapter:
            load_adapter(tmp_path / name, adapter, loaded)
            for key, value in adapter.reader_state().items():
                torch.testing.assert_close(value, reader[key], atol=atol, rtol=atol)
    with (
        CandidateAdapter(base, torch.float32, reader_rank=4) as adapter,
        pytest.raises(AdapterMismatchError, match=r"reader.layers.0.k_proj.down is \(3, .* needs \(4, "),
    ):
        load_adapter(tmp_path / "whole", adapter, loaded)
