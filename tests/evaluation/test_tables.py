"""Check what a command lays out and leaves behind: plans, table, Markdown, plots, and the commands themselves."""

from __future__ import annotations

import json

import pytest

from focus_core import bench
from focus_core.cli._shared import numbers
from focus_core.errors import ConfigError
from focus_core.evaluation.metrics import wilson
from focus_core.evaluation.report.plots import draw_folder, read_points
from focus_core.evaluation.report.tables import HEADER, Grid, filled_columns, make_plans, row_cells, write_markdown
from focus_core.evaluation.runner import Row
from focus_core.evaluation.tasks.registry import TASKS, TaskOptions

FACTS = "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"


@pytest.fixture
def focusllm(run):
    """``run``, for commands that succeed or refuse."""

    def invoke(*arguments):
        code, out, err = run(*arguments)
        assert code in (0, 2), err
        return code, out, err

    return invoke


def row(**changes):
    values = {"name": "passkey-4000", "method": "focusllm", "right": 9, "trials": 10, "skipped": 0, "exact": 0.5}
    values |= {"f1": 0.5, "recall": 0.9, "gold_within": {1: 0.5, 3: 1.0, 5: 1.0}, "by_label": {}, "chunks": 8.0}
    return Row(**{**values, "local": 9.0, "seconds": 1.0, **changes})


def test_plans_cover_every_setting(make_engine):
    """Chunk sizes times lengths, titles unique and telling; the adapter's own size stays out of them."""
    engine = make_engine(chunk_size=32)
    options = TaskOptions(engine.tokenizer, 2, distractors=4)
    plans = list(make_plans(engine, "passkey", "lengths", options, Grid([100, 200], [3], chunk_sizes=[16, 32])))
    assert [plan.title for plan in plans] == [
        "passkey-keys5-100-c16",
        "passkey-keys5-200-c16",
        "passkey-keys5-100-c32",
        "passkey-keys5-200-c32",
    ]
    assert [(plan.options.tokens, plan.options.chunk_size) for plan in plans] == [
        (100, 16),
        (200, 16),
        (100, 32),
        (200, 32),
    ]
    assert [plan.engine.config.chunk_size for plan in plans] == [16, 16, 32, 32]
    (plan,) = make_plans(engine, "multihop", "nothing", TaskOptions(engine.tokenizer, 2), Grid([1], [1]))
    assert (plan.title, plan.engine, plan.options.chunk_size) == ("multihop", engine, 32)
    grid = Grid([100], [1], prompt_lengths=[8, 16], given=[4, 64])
    plans = list(make_plans(engine, "perplexity", "lengths", options, grid))
    assert [plan.title.removeprefix("perplexity-keys5-100-") for plan in plans] == [
        "p8-g4",
        "p8-g64",
        "p16-g4",
        "p16-g64",
    ]
    assert next(make_plans(engine, "perplexity", "lengths", options, Grid([100], [1], given=[0]))).given == 0
    assert [(plan.engine.config.prompt_length, plan.given) for plan in plans] == [(8, 4), (8, 64), (16, 4), (16, 64)]


def test_lengths_are_read_as_people_write_them():
    """Thousands, millions, fractions, capitals and spaces; anything else is one clear error."""
    assert numbers("1k, 1.5K,2m,300") == [1000, 1500, 2_000_000, 300]
    for text in ("", "4k,", "many", "k"):
        with pytest.raises(ConfigError, match="write them like 1k,4000 or 1m"):
            numbers(text)


def test_the_table_states_counts_and_intervals(tmp_path):
    """Right of trials, Wilson's interval, attribution recall; Markdown has the same cells and the trained k."""
    cells = row_cells(row(skipped=1, method="bm25|x"))
    assert cells[:4] == ["passkey-4000", "bm25|x", "9/10 (1 do not fit)", "60%-98%"]
    assert cells[HEADER.index("gold @1 @3 @5")] == "50% 100% 100%"
    assert (cells[4], row_cells(row(suite_score=0.251))[4]) == ("", "25.1")
    write_markdown(tmp_path / "t.md", HEADER, [cells], {"max_chunks": 96})
    assert filled_columns(["a", "b"], [["x", ""], ["", ""]]) == (["a"], [["x"], [""]])
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines[:3]} == {len(HEADER) + 1}
    assert lines[-1] == "k seen in training: up to 96"


@pytest.mark.slow
def test_the_markdown_gathers_all_runs_of_a_folder(focusllm, tmp_path):
    """A second command with another length, then another method: three rows, by length, own method first."""
    arguments = ["eval", "passkey", "--chunk-sizes", "64", "--trials", 1, "--output", tmp_path]
    short = "focusllm:max_tokens=2"
    for length, method in (("1000", short), ("200", short), ("200", "bm25")):
        focusllm(*arguments, "--lengths", length, "--methods", method)
    (tmp_path / "questions-3.focusllm.json").write_text("another task's")
    _, out, _ = focusllm(*arguments, "--lengths", "1000", "--methods", short)
    rows = [line.split(" | ")[:2] for line in (tmp_path / "passkey.md").read_text().splitlines()[2:5]]
    assert rows == [
        ["| passkey-200-c64", short],
        ["| passkey-200-c64", "bm25"],
        ["| passkey-1000-c64", short],
    ]
    assert "passkey-200" not in out
    (tmp_path / "passkey-9.focusllm.json").write_text('{"cut')
    code, _, err = focusllm(*arguments, "--lengths", "1000", "--methods", short)
    assert code == 2
    assert "is no metrics file" in " ".join(err.split())


@pytest.mark.slow
def test_plots_gather_all_runs_of_a_folder(tmp_path):
    """Points of two lengths, two methods and two chunk sizes are told apart; an image appears for each axis."""
    for tokens in (1000, 4000):
        for size in (64, 128):
            for method, right in (("focusllm", 9), ("truncated", 1)):
                facts = {"name": f"passkey-natural-{tokens}-c{size}", "method": method, "right": right, "trials": 10}
                facts |= {"tokens": tokens, "run": {"focus": {"chunk_size": size}}}
                (tmp_path / f"passkey-{tokens}-{size}.{method}.json").write_text(json.dumps(facts))
    points = read_points(tmp_path, "passkey")
    assert {point.series for point in points} == {"focusllm natural", "truncated natural"}
    assert {(point.tokens, point.chunk_size) for point in points} == {(1000, 64), (1000, 128), (4000, 64), (4000, 128)}
    assert [round(point.low) for point in points if point.value == 90.0] == [60] * 4
    images = draw_folder(tmp_path, "passkey")
    assert [image.name for image in images] == ["passkey-length.png", "passkey-chunk-size.png"]
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)
    assert draw_folder(tmp_path, "kv") == []


@pytest.mark.slow
def test_perplexity_prints_the_ratio_first_and_draws(focusllm, tmp_path):
    """Two lengths over one text: a table, metrics, a plot, and nothing computed again."""
    (tmp_path / "book.txt").write_text(" ".join(f"The cat sat on mat {number}." for number in range(400)))
    arguments = ["eval", "perplexity", "--file", tmp_path / "book.txt", "--lengths", "320,400", "--trials", "1"]
    arguments += ["--given", "8,16", "--prompt-lengths", "4", "--chunk-sizes", "48", "--output", tmp_path / "out"]
    _, out, _ = focusllm(*arguments)
    assert {point.series for point in read_points(tmp_path / "out", "perplexity")} == {
        f"{name} p4 g{given}"
        for name in ("with memory", "local context only", "base on its window")
        for given in (8, 16)
    }
    assert out.index("memory / local") < out.index("local only")
    facts = json.loads((tmp_path / "out" / "perplexity-400-c48-p4-g8.json").read_text())
    assert facts["ratio"] == pytest.approx(facts["memory"] / facts["local"])
    assert (tmp_path / "out" / "perplexity-length.png").exists()
    before = (tmp_path / "out" / "perplexity-400-c48-p4-g8.jsonl").read_text()
    assert focusllm(*arguments)[0] == 0
    assert (tmp_path / "out" / "perplexity-400-c48-p4-g8.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.varies == "lengths"])
def test_every_generated_task_makes_a_table(focusllm, tmp_path, task):
    """One trial of each by the command: predictions, metrics and Markdown are there."""
    file = []
    if task == "babilong":
        (tmp_path / "qa1.txt").write_text(FACTS)
        file = ["--file", tmp_path / "qa1.txt"]
    if task == "ruler-qa":
        rows = [{"question": f"who {i}?", "answers": [f"x{i}"], "title": "T", "context": f"x{i}"} for i in range(40)]
        (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
        file = ["--file", tmp_path / "qa.jsonl"]
    if task == "few-shot":
        for kind in ("train", "test"):
            (tmp_path / f"{kind}.jsonl").write_text(json.dumps({"text": "a lost card", "category": "lost_card"}))
        file = ["--file", tmp_path]
    arguments = ["--lengths", "100", "--chunk-sizes", "64", "--trials", 1, "--output", tmp_path / "out", *file]
    _, out, err = focusllm("eval", task, *arguments, "--methods", "focusllm:max_tokens=2")
    assert f"{task}-100-c64" in out, err
    facts = json.loads((tmp_path / "out" / f"{task}-100-c64.focusllm+max_tokens=2.json").read_text())
    assert facts["trials"] + facts["skipped"] == 1
    assert (tmp_path / "out" / f"{task}.md").exists()


def test_unknown_names_list_what_there_is(focusllm):
    """Task, method and measure."""
    code, _, err = focusllm("eval", "riddles")
    assert code == 2
    assert all(name in " ".join(err.split()) for name in [*TASKS, "perplexity", "heads"])
    code, _, err = focusllm("eval", "passkey", "--methods", "telepathy")
    assert code == 2
    assert "streaming" in err
    code, _, err = focusllm("bench", "--only", "luck")
    assert code == 2
    assert "tokenizer, prefill, injection, step" in " ".join(err.split())


def test_timings_wait_for_the_gpu(monkeypatch):
    """What a GPU was given before the work does not count, and its own work counts until it is done."""
    happened = []
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: happened.append("clock") or 0.0)
    bench._seconds(lambda: happened.append("work"))
    assert happened == ["wait", "clock", "work", "wait", "clock"]


@pytest.mark.slow
def test_bench_prints_each_line_when_it_is_known(make_engine, monkeypatch, focusllm):
    """The first line is out before the second measure starts; --only leaves the others out; ratios are numbers."""
    engine = make_engine(chunk_size=32, window=512)
    started = []

    def noted(name, measure):
        return lambda engine, setting: started.append(name) or measure(engine, setting)

    monkeypatch.setattr(bench, "MEASURES", {name: noted(name, made) for name, made in bench.MEASURES.items()})
    lines = bench.run_bench(engine, 3, 16, 2)
    first = next(lines)
    assert started == ["tokenizer"]
    assert first.ratio > 0
    rest = list(lines)
    assert [line.measure.split(" ")[0] for line in rest] == [
        "chunk",
        "injection",
        "decoding",
        "decoding",
        "batch",
        "decoding",
        "decoding",
    ]
    assert all(line.ratio > 0 for line in rest)
    with pytest.raises(ConfigError, match="unknown measure 'luck'"):
        bench.choose_measures(["step", "luck"])
    started.clear()
    _, out, _ = focusllm("bench", "--only", "step", "--chunks", 3, "--chunk-size", 16, "--steps", 2)
    assert started == ["step"]
    assert "decoding step over 3 chunks of 16" in out


@pytest.mark.parametrize("trials", range(1, 60))
def test_the_interval_holds_its_rate(trials):
    """Whatever rounding does, low <= rate <= high: a plot's error bars are never negative."""
    for right in range(trials + 1):
        low, high = wilson(right, trials)
        assert 0 <= low <= right / trials <= high <= 1
