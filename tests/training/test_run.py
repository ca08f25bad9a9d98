"""Check a run as a whole: many processes, held-out loss, signals, killed runs, plot, every objective setting, speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from focus_core.config import TrainConfig
from focus_core.errors import (
    AdapterError,
    ConfigError,
    CorpusError,
    EmptyCorpusError,
    UnsupportedModelError,
)
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import FAMILIES, BaseDecoder
from focus_core.model.hub import LoadedBase, fingerprint, load_adapter, read_info
from focus_core.training.adapter import train_adapter
from focus_core.training.checkpoint import cut_log
from focus_core.training.loop import StepReport
from focus_core.training.processes import Processes
from focus_core.training.speed import Speed
from focus_core.training.stopping import StopOnSignal
from focus_core.training.texts import read_training_texts
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "chunk_sizes": [8, 16],
    "max_chunks": 4,
    "max_memory_tokens": 64,
    "local_tokens": [12, 16],
    "max_candidate_rows": 48,
    "warmup_steps": 1,
    "learning_rate": 1e-2,
    "examples_per_step": 4,
    "mix": {"reconstruction": 1, "needle": 1},
    "distillation": {"reconstruction": 0.5},
}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat and the dog ate the hat. " * 300)
    return path


def _train(tokenizer, book, output, *, family="llama", steps=3, stop_after=None, compact=False, **changes):
    """Train a tiny base; return (model, loaded base, losses)."""
    model = tiny_model(family)
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    config = TrainConfig.from_dict(SETTINGS | {"steps": steps} | changes)
    losses = []
    train_adapter(
        loaded,
        [book],
        output,
        config,
        chunk_size=64,
        compact=compact,
        report=lambda done: losses.append(done.loss),
        stop=lambda: stop_after is not None and len(losses) >= stop_after,
    )
    return loaded, losses


def _log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "workers"])
def test_two_processes_take_the_steps_of_one(launcher, tokenizer, book, tmp_path):
    """Two gloo processes, four passes (`accelerate launch`, `--workers 2`): losses, moments, weights == one's."""
    base, settings = tmp_path / "base", tmp_path / "settings.json"
    tiny_model("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings.write_text(
        json.dumps(SETTINGS | {"steps": 2, "examples_per_pass": 1, "eval_every": 2, "eval_examples": 3})
    )
    command = [sys.executable]
    if launcher == "accelerate":
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "docs/recipes/accelerate-cpu.yaml")]
    command += ["-m", "focus_core.cli", "train", *(["--workers", "2"] if launcher == "workers" else [])]
    command += ["--base", base, "--data", book, "--config", settings, "--output", tmp_path / "two"]
    command += ["--chunk-size", "64", "--dtype", "float32", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    _train(tokenizer, book, tmp_path / "one", steps=2, eval_every=2, eval_examples=3)
    one, two = _log(tmp_path / "one"), _log(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2]
    for left, right in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "divergence"):
            assert right[name] == pytest.approx(left[name], rel=1e-5), name
        assert {name: left[name] for name in ("tokens", "targets", "chunks")} == {
            name: right[name] for name in ("tokens", "targets", "chunks")
        }
    assert two[1]["held_out"]["loss"] == pytest.approx(one[1]["held_out"]["loss"], rel=1e-5)
    first, second = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=1e-6, rtol=1e-4, msg=key)


def test_shipped_recipes_and_launch_files_load():
    """Every recipe is valid TrainConfig; accelerate's own reader takes the launch files; ZeRO-2 clips as we do."""
    from accelerate.commands.config import load_config_from_file

    recipes = sorted((ROOT / "docs/recipes").glob("[!d]*.json"))
    assert {"1-copy", "qwen2.5-coder-0.5b"} <= {path.stem for path in recipes}
    for path in recipes:
        assert TrainConfig.from_dict(json.loads(path.read_text())).steps > 0
    kinds = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "docs/recipes").glob("accelerate-*.yaml")}
    assert kinds["accelerate-zero2"].distributed_type == "DEEPSPEED"
    zero = json.loads((ROOT / kinds["accelerate-zero2"].deepspeed_config["deepspeed_config_file"]).read_text())
    assert zero["zero_optimization"]["stage"] == 2
    assert zero["gradient_clipping"] == TrainConfig().max_grad_norm
    assert kinds["accelerate-cpu"].num_processes == 2


@pytest.mark.slow
def test_passes_give_the_gradient_of_one_pass(tokenizer, book, tmp_path):
    """Losses and gradient norms with one example a pass == with all four together; five do not divide."""
    runs = {}
    for together in (None, 2, 1):
        _train(tokenizer, book, tmp_path / str(together), examples_per_pass=together)
        runs[together] = [(row["loss"], row["grad_norm"]) for row in _log(tmp_path / str(together))]
    for together in (2, 1):
        for left, right in zip(runs[None], runs[together], strict=True):
            assert right == pytest.approx(left, rel=1e-5)
    with pytest.raises(ConfigError, match="examples_per_step must be a multiple"):
        _train(tokenizer, book, tmp_path / "three", examples_per_pass=3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_to_an_adapter_that_loads(family, tokenizer, book, tmp_path):
    """Two steps with a teacher, held-out loss and short prompts: finite losses, last and best adapters load."""
    positions = "shared" if FAMILIES[family].rotary == "half" else "ordered"
    changes = {"positions": positions, "eval_every": 1, "eval_examples": 2, "prompt_lengths": [3]}
    loaded, losses = _train(tokenizer, book, tmp_path / "run", family=family, steps=2, **changes)
    assert len(losses) == 2
    assert all(loss == loss and loss < 20 for loss in losses)
    with CandidateAdapter(BaseDecoder(loaded.model), torch.float32) as adapter:
        untrained = {key: value.clone() for key, value in adapter.state_dict().items()}
        for name in ("adapter", "best"):
            info = load_adapter(tmp_path / "run" / name, adapter, loaded)
            assert any(not torch.equal(value, untrained[key]) for key, value in adapter.state_dict().items())
    assert info.focus.prompt_length == 3
    assert info.focus.positions == positions


@pytest.mark.slow
def test_the_best_adapter_stays_beside_the_last(tokenizer, book, tmp_path):
    """best/ is the adapter of the step with the lowest held-out loss; stopping in between changes nothing."""
    changes = {"eval_every": 2, "eval_examples": 3, "learning_rate": 0.3}  # so high that the loss rises again
    _train(tokenizer, book, tmp_path / "a", steps=8, **changes)
    _train(tokenizer, book, tmp_path / "b", steps=8, stop_after=5, **changes)
    _train(tokenizer, book, tmp_path / "b", steps=8, **changes)
    measured = {row["step"]: row["held_out"]["loss"] for row in _log(tmp_path / "a") if row["held_out"]}
    assert list(measured) == [2, 4, 6, 8]
    assert measured == {row["step"]: row["held_out"]["loss"] for row in _log(tmp_path / "b") if row["held_out"]}
    best = min(measured, key=measured.get)
    assert best < 8
    trained = read_info(tmp_path / "b" / "best").trained
    assert (trained["held_out_step"], trained["held_out_loss"], trained["steps"]) == (best, measured[best], best)
    for name in ("best", "adapter"):
        files = [load_file(tmp_path / run / name / "adapter.safetensors") for run in "ab"]
        assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    (tmp_path / "short.txt").write_text("the cat sat. " * 200)
    with pytest.raises(EmptyCorpusError, match="too little data to hold some out"):
        _train(tokenizer, tmp_path / "short.txt", tmp_path / "c", eval_every=1)


@pytest.mark.slow
def test_arms_are_measured_on_the_same_examples(tokenizer, book, tmp_path):
    """One-target training on one objective == dense training on another, in the held-out loss before both."""
    measured = []
    for name, changes in {"one": {"objective": "one_target", "mix": {"needle": 1}}, "dense": {}}.items():
        settings = {"eval_every": 1, "eval_examples": 3, "eval_mix": {"continuation": 1}, "learning_rate": 1e-9}
        _train(tokenizer, book, tmp_path / name, steps=1, **(settings | changes))
        (row,) = _log(tmp_path / name)
        measured.append(row["held_out"])
        assert list(row["held_out"]["by_kind"]) == ["continuation"]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], abs=1e-5)
    assert measured[0]["queries"] == measured[1]["queries"] == 3


@pytest.mark.slow
def test_compact_training_measures_both_forms(tokenizer, book, tmp_path):
    """The adapter is saved in int8 and export.json holds both losses on the held-out examples."""
    _train(tokenizer, book, tmp_path / "run", compact=True, eval_every=3, eval_examples=2)
    export = json.loads((tmp_path / "run" / "adapter" / "export.json").read_text())
    assert export["before"]["loss"] == _log(tmp_path / "run")[-1]["held_out"]["loss"]
    assert 0 < abs(export["after"]["loss"] - export["before"]["loss"]) < 0.1


def test_a_killed_run_does_not_log_twice(tmp_path):
    """Lines behind the checkpoint, and a line cut short, are dropped; a whole log is left alone."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_log(tmp_path, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_log(tmp_path, 2)
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_failing_step_keeps_what_was_done(tokenizer, book, tmp_path):
    """An error in step 3 leaves a checkpoint after step 2, and the run goes on with the unbroken run's losses."""
    _, losses = _train(tokenizer, book, tmp_path / "a", steps=4)
    model = tiny_model("llama")
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    config = TrainConfig.from_dict(SETTINGS | {"steps": 4})

    def fail(done):
        if done.step == 2:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        train_adapter(loaded, [book], tmp_path / "b", config, chunk_size=64, report=fail)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    _, rest = _train(tokenizer, book, tmp_path / "b", steps=4)
    assert rest == losses[2:]


def test_a_base_that_cannot_see_a_training_row_is_refused(tokenizer, book, tmp_path):
    """A sliding window of 16 tokens and chunks of 16 and more: refused before anything is written."""
    model = tiny_model("mistral", sliding_window=16)
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    with pytest.raises(UnsupportedModelError, match="attends to 16 tokens only"):
        train_adapter(loaded, [book], tmp_path / "run", TrainConfig.from_dict(SETTINGS), chunk_size=8)
    assert not (tmp_path / "run").exists()


def _files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_run_that_is_another_one_is_refused_before_anything_is_written(tokenizer, book, tmp_path):
    """Another rate, base of equal shape, data or --init in the same folder: refused; every file stays as it was."""
    output = tmp_path / "run"
    _, losses = _train(tokenizer, book, tmp_path / "whole", steps=4)
    _train(tokenizer, book, output, steps=4, stop_after=2)
    before = _files_of(output)

    def again(*, seed=0, text=None, init=None, **changes):
        data = book
        if text is not None:
            data = tmp_path / "other.txt"
            data.write_text(text)
        model = tiny_model("llama", seed=seed)
        config = TrainConfig.from_dict(SETTINGS | {"steps": 4} | changes)
        train_adapter(
            LoadedBase(model, tokenizer, "tiny", fingerprint(model)), [data], output, config, chunk_size=64, init=init
        )

    for changes, message in (
        ({"learning_rate": 1e-3}, "learning_rate: 0.01 there, 0.001 here"),
        ({"seed": 1}, "another base"),
        ({"text": "a dog ran in the park all day. " * 300}, "another data"),
        ({"init": output / "adapter"}, "another init"),
    ):
        with pytest.raises(AdapterError, match=f"other settings .*{message}.*choose another --output"):
            again(**changes)
        assert _files_of(output) == before
    with pytest.raises(AdapterError, match="other settings"):
        again(steps=5)
    (tmp_path / "moved.txt").write_bytes(book.read_bytes())
    _, rest = _train(tokenizer, tmp_path / "moved.txt", output, steps=4)  # the same data by another name
    assert rest == losses[2:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:8] + b"!"]
)
def test_a_damaged_checkpoint_is_kept_aside(damage, tokenizer, book, tmp_path):
    """Cut short, empty, no header: it lies in a folder of its own with its log, and the run begins anew."""
    output, notices = tmp_path / "run", []
    loaded, losses = _train(tokenizer, book, output, steps=2)
    path = output / "checkpoint.safetensors"
    broken = damage(path.read_bytes())
    for number in (1, 2):
        path.write_bytes(broken)
        config = TrainConfig.from_dict(SETTINGS | {"steps": 2})
        train_adapter(loaded, [book], output, config, chunk_size=64, notice=notices.append)
        assert (output / f"damaged-{number}" / "checkpoint.safetensors").read_bytes() == broken
        assert (output / f"damaged-{number}" / "log.jsonl").read_text().count("\n") == 2
        assert [row["loss"] for row in _log(output)] == losses
    assert "is damaged" in notices[0]
    assert "kept in" in notices[0]


@pytest.mark.slow
def test_two_runs_do_not_train_into_one_folder(tokenizer, book, tmp_path):
    """A second run is refused while the first one trains, and leaves it as it would be alone; later it may resume."""
    _, alone = _train(tokenizer, book, tmp_path / "alone", steps=2)
    output, refused, model = tmp_path / "run", [], tiny_model("llama")
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))

    def report(done):
        with pytest.raises(AdapterError, match="wait until it ends, or choose another --output") as one:
            _train(tokenizer, book, output, steps=2)
        refused.append(one)

    train_adapter(loaded, [book], output, TrainConfig.from_dict(SETTINGS | {"steps": 2}), chunk_size=64, report=report)
    assert len(refused) == 2
    assert [row["loss"] for row in _log(output)] == alone
    _train(tokenizer, book, output, steps=2)


def test_what_an_adapter_began_with_stays_its_own(tokenizer, book, tmp_path):
    """Training on from an adapter keeps the share of attention that it is answered with."""
    loaded, _ = _train(tokenizer, book, tmp_path / "a", steps=1)
    first = tmp_path / "a" / "adapter" / "focus_config.json"
    first.write_text(json.dumps(json.loads(first.read_text()) | {"chunk_top_p": 0.8}))
    config = TrainConfig.from_dict(SETTINGS | {"steps": 1})
    train_adapter(loaded, [book], tmp_path / "b", config, chunk_size=64, init=first.parent)
    assert read_info(tmp_path / "b" / "adapter").chunk_top_p == 0.8


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(book, tmp_path, base_folder, run):
    """Run ``focusllm train`` on a tiny base; return (exit code, stderr)."""
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS | {"examples_per_step": 1, "distillation": {}}))
    always = ["--base", base_folder, "--data", book, "--config", tmp_path / "settings.json"]
    always += ["--output", tmp_path / "run", "--chunk-size", 64]

    def invoke(*arguments):
        code, _, err = run("train", *always, *arguments, model=False)
        return code, err

    return invoke


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(ignored, command, tmp_path):
    """SIGTERM, in a shell job that ignores SIGINT too: exit 143, a checkpoint, and the next run goes on from it."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else before[0])

    def send():
        while not (tmp_path / "run" / "log.jsonl").exists():
            time.sleep(0.05)
        if ignored:
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        code, err = command("--steps", 100000)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before[0])
    steps = len(_log(tmp_path / "run"))
    assert (code, signal.getsignal(signal.SIGTERM)) == (143, before[1])
    assert f"stopped after step {steps} of 100000; run the same command again to go on" in err
    assert 1 <= steps < 200
    assert command("--steps", 100000, "--max-minutes", 0)[0] == 0
    assert len(_log(tmp_path / "run")) == steps


def test_a_second_signal_interrupts_at_once():
    """The first SIGINT asks for an end, the second raises; afterwards the old handlers are back."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with StopOnSignal() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


@pytest.mark.slow
def test_any_setting_can_be_set_and_tokens_bound_the_run(command, tmp_path):
    """--set takes JSON or text; --max-tokens ends the run at the first step that reaches it."""
    code, err = command("--set", "objective=one_target", "--set", "chunk_sizes=[8]", "--max-tokens", 150)
    assert code == 0, err
    tokens = [row["tokens"] for row in _log(tmp_path / "run")]
    assert [row["targets"] for row in _log(tmp_path / "run")] == list(range(1, len(tokens) + 1))
    assert tokens[-1] >= 150 > max([0, *tokens[:-1]])
    assert read_info(tmp_path / "run" / "adapter").trained["chunk_sizes"] == [8, 48, 64, 96, 128]
    for wrong, message in (("steps", "wants NAME=VALUE"), ("stepz=3", "unknown setting stepz")):
        code, err = command("--set", wrong)
        assert code == 2
        assert message in err


@pytest.mark.slow
def test_a_run_from_another_adapter_adds_to_what_that_has_seen(command, tmp_path):
    """Steps and tokens add up, the largest k stays, and so do the heads that name sources."""
    assert command("--steps", 2)[0] == 0
    first = tmp_path / "run" / "adapter"
    seen = read_info(first).trained
    values = json.loads((first / "focus_config.json").read_text())
    values["attribution_heads"], values["trained"]["max_chunks"] = [[1, 2]], 999
    (first / "focus_config.json").write_text(json.dumps(values))
    code, err = command("--output", tmp_path / "more", "--init", first, "--steps", 3)
    assert code == 0, err
    info = read_info(tmp_path / "more" / "adapter")
    assert info.attribution_heads == ((1, 2),)
    assert (info.trained["steps"], info.trained["max_chunks"]) == (5, 999)
    assert info.trained["tokens"] == seen["tokens"] + _log(tmp_path / "more")[-1]["tokens"]


def test_speed_counts_this_run_only():
    """Tokens per second and time left come from the last steps, not from an earlier life of the run."""
    speed = Speed(100)
    values = {"by_kind": {}, "divergence": None, "targets": 0, "learning_rate": 0.0, "grad_norm": 0.0, "chunks": []}
    first = StepReport(step=41, loss=2.0, tokens=5000, seconds=1000.0, **values)
    assert speed.line(first) == "loss 2.000"
    second = StepReport(step=43, loss=1.0, tokens=6000, seconds=1004.0, **values)
    assert speed.line(second) == "loss 1.500  250 tokens/s  0:01:54 left"


def test_one_process_shares_with_nobody():
    """Alone, a share is everything and agreement is one's own."""
    processes = Processes("cpu")
    assert (processes.count, processes.is_main, processes.deepspeed) == (1, True, False)
    assert processes.share(range(3)) == [0, 1, 2]
    assert processes.agree(True)
    assert not processes.agree(False)


@pytest.mark.slow
def test_a_metric_and_trackers_of_ones_own(tokenizer, book, tmp_path):
    """A metric gets an engine that answers as the adapter is served; a tracker gets its numbers and the losses."""
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False
        kept: ClassVar[list] = []

        @property
        def tracker(self):
            return None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **_):
            self.kept.append((step, values))

    def metric(engine):
        memory = engine.remember(["the cat sat on the mat. " * 8])
        return {"tokens": len(engine.answer("who?", memory, max_tokens=2).tokens)}

    model = tiny_model("llama")
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    config = TrainConfig.from_dict(SETTINGS | {"steps": 3, "eval_every": 2, "eval_examples": 2})
    processes = Processes("cpu", [Notes()], tmp_path)
    train_adapter(loaded, [book], tmp_path / "run", config, chunk_size=64, metric=metric, processes=processes)
    assert [row["metrics"] for row in _log(tmp_path / "run")] == [{}, {"tokens": 2}, {"tokens": 2}]
    assert [step for step, _ in Notes.kept] == [1, 2, 3]
    assert Notes.kept[1][1]["metric/tokens"] == 2
    assert Notes.kept[1][1]["held_out"] == _log(tmp_path / "run")[1]["held_out"]["loss"]
    with pytest.raises(ConfigError, match="tracker"):
        Processes("cpu", ["no-such-tracker"], tmp_path)


def test_parquet_rows_are_read_like_json_lines(tmp_path):
    """The same rows in both forms give the same texts; without pyarrow, or in a damaged file, the error says so."""
    rows = [{"text": "the cat sat on the mat. " * 200}, {"text": "a dog. " * 400}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(CorpusError, match=r"bad.parquet (needs pyarrow|is no Parquet file)"):
        read_training_texts([tmp_path / "bad.parquet"])
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert (
        read_training_texts([tmp_path / "rows.parquet"]).texts == read_training_texts([tmp_path / "rows.jsonl"]).texts
    )
