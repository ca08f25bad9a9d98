"""Check training: it learns, resumes exactly, touches nothing but candidates, and works for every family."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import torch

from focus_core.config import FocusConfig, TrainConfig
from focus_core.errors import AdapterError, AdapterMismatchError, ConfigError, DocumentNotFoundError, EmptyCorpusError
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import FAMILIES, BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint, load_adapter, save_adapter
from focus_core.text.tokenization import TextTokenizer
from focus_core.training.data import ExampleStream, read_training_texts
from focus_core.training.export import export_adapter, interpolate_adapters
from focus_core.training.heldout import Loss, measure_loss
from focus_core.training.loop import CandidateLoss, learning_rate, train
from focus_core.training.objectives import Example, Query
from tests.conftest import perturb, tiny_model

SMALL = {
    "chunk_sizes": (8, 16),
    "max_chunks": 4,
    "max_memory_tokens": 64,
    "local_tokens": (12, 16),
    "max_candidate_rows": 48,
    "warmup_steps": 1,
}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "book.txt").write_text("the cat sat on the mat and the dog ate the hat. " * 80)
    rows = [
        {
            "question": f"who ate hat {index}?",
            "answers": ["the dog"],
            "title": "t",
            "context": f"cat {index}: the dog ate.",
        }
        for index in range(6)
    ]
    with gzip.open(folder / "qa.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in [*rows, {"text": "mat " * 700}, {"other": 1}]))
    return folder


def _run(family, data, output, tokenizer, steps=3, stop_after=None, finish=None, **changes):
    model = tiny_model(family, window=512)
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base, torch.float32)
    positions = "shared" if base.rotary else "ordered"
    config = TrainConfig(**{**SMALL, "steps": steps, "positions": positions, **changes})
    stream = ExampleStream(read_training_texts([data]), TextTokenizer(tokenizer), config)
    losses = []
    train(
        base,
        adapter,
        stream,
        config,
        output,
        sink=0,
        report=lambda done: losses.append(done.loss),
        stop=lambda: stop_after is not None and len(losses) >= stop_after,
        finish=finish,
    )
    return model, adapter, losses


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_its_base_stays(family, data, tmp_path, tokenizer):
    """After three steps every candidate matrix but the last layer's q and o has moved; no base weight has."""
    model, adapter, losses = _run(family, data, tmp_path / "run", tokenizer, learning_rate=1e-2)
    assert len(losses) == 3
    own, base = adapter.state_dict(), adapter.base_state_dict()
    adapter.detach()
    untouched = tiny_model(family, window=512).state_dict()
    assert set(model.state_dict()) == set(untouched)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, untouched[name]), name
    assert set(own) == {f"layers.{i}.{n}_proj.weight" for i in range(3) for n in "qkvo"}
    moved = {key for key in own if not torch.equal(own[key], base[key])}
    assert moved == set(own) - {"layers.2.q_proj.weight", "layers.2.o_proj.weight"}


@pytest.mark.slow
def test_it_learns(data, tmp_path, tokenizer):
    """The loss of the last ten of 60 steps is clearly below that of the first ten."""
    mix = {"reconstruction": 1.0}
    _, _, losses = _run("llama", data, tmp_path / "run", tokenizer, steps=60, learning_rate=1e-2, mix=mix)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly(data, tmp_path, tokenizer):
    """Losses and weights of stop-and-resume == those of the unbroken run; other settings are refused."""
    _, whole, losses = _run("llama", data, tmp_path / "a", tokenizer, steps=6)
    _, _, first = _run("llama", data, tmp_path / "b", tokenizer, steps=6, stop_after=2)
    _, resumed, rest = _run("llama", data, tmp_path / "b", tokenizer, steps=6)
    assert first + rest == losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    rows = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["tokens"] > rows[0]["tokens"] > 0
    with pytest.raises(AdapterError, match="other settings"):
        _run("llama", data, tmp_path / "b", tokenizer, steps=7)


@pytest.mark.slow
def test_a_stopped_run_finishes_with_its_rate_falling_to_zero(data, tmp_path, tokenizer):
    """After 3 of 50 steps, finish=4: four more whose rate falls evenly to zero; stopped within, it goes on so."""
    _run("llama", data, tmp_path / "a", tokenizer, steps=50, stop_after=3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _, _, rest = _run("llama", data, tmp_path / "a", tokenizer, steps=50, finish=4)
    assert len(rest) == 4
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    peak = learning_rate(TrainConfig(**SMALL, steps=50), 3)
    assert rates[3:] == pytest.approx([peak * share for share in (0.8, 0.6, 0.4, 0.2)])
    assert rates[2] > rates[3]
    _, _, first = _run("llama", data, tmp_path / "b", tokenizer, steps=50, finish=4, stop_after=2)
    _, _, second = _run("llama", data, tmp_path / "b", tokenizer, steps=50)
    assert first + second == rest
    assert _run("llama", data, tmp_path / "b", tokenizer, steps=50, finish=9)[2] == []  # it has ended


@pytest.mark.slow
def test_a_run_may_go_on_with_gradient_checkpointing(data, tmp_path, tokenizer):
    """Stopped for want of memory, resumed with less: the losses of the unbroken run."""
    _, _, losses = _run("llama", data, tmp_path / "a", tokenizer, steps=6)
    _, _, first = _run("llama", data, tmp_path / "b", tokenizer, steps=6, stop_after=3)
    _, _, rest = _run("llama", data, tmp_path / "b", tokenizer, steps=6, gradient_checkpointing=True)
    assert first + rest == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(data, tmp_path, tokenizer):
    """The folder as a kill in step 3 would leave it: steps 3 to 5 come out as in the unbroken run, each logged once."""
    base = BaseDecoder(tiny_model("llama", window=512))
    config = TrainConfig(**SMALL, steps=5)
    whole, left = tmp_path / "whole", tmp_path / "left"

    def copy(done):
        if done.step == 3:  # logged, its checkpoint not written yet
            shutil.copytree(whole, left)

    for output, report in ((whole, copy), (left, lambda done: None)):
        with CandidateAdapter(base, torch.float32) as adapter:
            stream = ExampleStream(read_training_texts([data]), TextTokenizer(tokenizer), config)
            train(base, adapter, stream, config, output, sink=0, report=report, checkpoint_seconds=0.0)
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, left)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_export_writes_the_compact_form_and_its_loss(data, tmp_path, tokenizer):
    """The compact adapter is smaller and loads; both losses are those of the weights measured by hand."""
    model, adapter, _ = _run("llama", data, tmp_path / "run", tokenizer, learning_rate=1e-2)
    state = adapter.state_dict()
    adapter.detach()
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    config = TrainConfig(**SMALL)
    stream = ExampleStream(read_training_texts([data]), TextTokenizer(tokenizer), config)
    examples = [stream.fixed(index) for index in range(4)]
    with CandidateAdapter(BaseDecoder(model), torch.float32) as attached:
        attached.load_state_dict(state)
        save_adapter(tmp_path / "whole", attached, AdapterInfo("tiny", loaded.fingerprint, FocusConfig()))
        expected = measure_loss(attached.base, attached, examples, 0, config)
    done = export_adapter(loaded, tmp_path / "whole", tmp_path / "compact", examples)
    assert done.nbytes < 0.5 * (tmp_path / "whole" / "adapter.safetensors").stat().st_size
    assert done.before == expected
    with CandidateAdapter(BaseDecoder(model), torch.float32) as attached:
        load_adapter(tmp_path / "compact", attached, loaded)
        assert measure_loss(attached.base, attached, examples, 0, config) == done.after
        assert not torch.equal(attached.state_dict()["layers.0.k_proj.weight"], state["layers.0.k_proj.weight"])
    assert abs(done.after.loss - done.before.loss) < 0.05
    assert json.loads((tmp_path / "compact" / "export.json").read_text())["after"]["loss"] == done.after.loss
    assert done.after.queries == sum(len(example.queries) for example in examples)


def test_an_interpolated_adapter_lies_between_two(tmp_path, tokenizer):
    """Weights are (1 - s) a + s b; adapters of other settings and shares out of range are refused."""
    model = tiny_model("llama")
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    states = []
    with CandidateAdapter(BaseDecoder(model), torch.float32) as adapter:
        for name, seed in (("a", 1), ("b", 2)):
            perturb(adapter, seed)
            states.append({key: value.clone() for key, value in adapter.state_dict().items()})
            info = AdapterInfo("tiny", loaded.fingerprint, FocusConfig(chunk_size=seed * 16), trained={"steps": seed})
            save_adapter(tmp_path / name, adapter, info)
        save_adapter(tmp_path / "c", adapter, replace(info, focus=FocusConfig(top_candidates=3)))
    for share in (0.0, 0.3, 1.0):
        done = interpolate_adapters(loaded, tmp_path / "a", tmp_path / "b", tmp_path / "out", share)
        assert (done.trained, done.focus.chunk_size) == ({"steps": 2}, 32)
        with CandidateAdapter(BaseDecoder(model), torch.float32) as adapter:
            assert load_adapter(tmp_path / "out", adapter, loaded) == done
            for key, value in adapter.state_dict().items():
                torch.testing.assert_close(value, states[0][key].lerp(states[1][key], share))
    with pytest.raises(AdapterMismatchError, match=r"top_candidates=0, .* with 3"):
        interpolate_adapters(loaded, tmp_path / "a", tmp_path / "c", tmp_path / "none", 0.5)
    with pytest.raises(ConfigError, match=r"share must be between 0 .* got 1\.5"):
        interpolate_adapters(loaded, tmp_path / "a", tmp_path / "b", tmp_path / "none", 1.5)
    assert not (tmp_path / "none").exists()


def test_the_stream_is_a_function_of_its_seed(data, tokenizer):
    """Example (step, index) is the same whatever was drawn before; kinds follow the mix; sizes keep their bounds."""
    texts, own = read_training_texts([data]), TextTokenizer(tokenizer)
    assert len(texts.questions) == 6
    config = TrainConfig(**SMALL)
    one, two = ExampleStream(texts, own, config), ExampleStream(texts, own, config)
    for step in range(5):
        one.example(step, 0)
    assert one.example(7, 1) == two.example(7, 1) != two.example(7, 0)
    kinds = {one.example(step, 0).kind for step in range(60)}
    assert kinds == {"reconstruction", "continuation", "question", "needle"}
    for step in range(40):
        example = one.example(step, 0)
        for query in example.queries:
            assert len(example.chunks) * query.targets <= config.max_candidate_rows + 2 * len(example.chunks)
    only = ExampleStream(texts, own, TrainConfig(**SMALL, mix={"reconstruction": 1.0}))
    example = only.example(0, 0)
    memory = [token for chunk in example.chunks for token in chunk]
    span = list(example.queries[0].ids)
    assert any(memory[at : at + len(span)] == span for at in range(len(memory)))


def test_rates_warm_up_and_fall():
    """Linear and cosine schedules begin small, peak at the end of warm-up, and end at final_rate."""
    for schedule in ("linear", "cosine"):
        config = TrainConfig(steps=100, warmup_steps=10, schedule=schedule, learning_rate=1.0, final_rate=0.1)
        rates = [learning_rate(config, step) for step in range(101)]
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == rates[9] == rates[10] == 1.0
        assert rates[100] == pytest.approx(0.1)
        assert rates[10:] == sorted(rates[10:], reverse=True)


def test_bad_training_input(tmp_path, tokenizer):
    """Missing path, no text, a mix the data cannot serve, a split outside: each its own message."""
    with pytest.raises(DocumentNotFoundError, match=r"training data .* does not exist"):
        read_training_texts([tmp_path / "nowhere"])
    with pytest.raises(EmptyCorpusError, match="no training text"):
        read_training_texts([tmp_path])
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(EmptyCorpusError, match="at least 2,000 characters"):
        ExampleStream(read_training_texts([tmp_path]), TextTokenizer(tokenizer), TrainConfig())
    with pytest.raises(ConfigError, match="split must be between 1 and 2; got 3"):
        Query((1, 2, 3), 3)


def test_the_logged_loss_is_what_the_gradient_is_of():
    """Of examples with one and with four local contexts: the log's loss == the loss that is differentiated."""
    base = BaseDecoder(tiny_model("llama"))
    examples = [
        Example(((10, 11, 12, 13), (30, 31)), tuple(Query((20 + n, 21, 22, 23, 24), 2) for n in range(count)), kind)
        for count, kind in ((1, "needle"), (4, "question"))
    ]
    with CandidateAdapter(base, torch.float32) as adapter:
        perturb(adapter)
        loss, records = CandidateLoss(base, adapter, TrainConfig(), 0)(examples, 1 / len(examples))
        assert Loss.mean_of((record["kind"], record["losses"]) for record in records).loss == pytest.approx(
            loss.item(), rel=1e-5
        )
        assert measure_loss(base, adapter, examples, 0, TrainConfig()).loss == pytest.approx(loss.item(), rel=1e-5)
