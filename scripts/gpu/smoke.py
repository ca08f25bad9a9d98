"""Run a GPU script from end to end with a tiny random base on the CPU, every call as it would be made there."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
Main = Callable[[Sequence[str]], int]
RECIPE = {
    "steps": 6,
    "examples_per_step": 4,
    "learning_rate": 0.01,
    "warmup_steps": 1,
    "chunk_sizes": [16, 32],
    "question_chunk_sizes": [32],
    "max_chunks": 4,
    "max_memory_tokens": 96,
    "local_tokens": [12, 16],
    "max_candidate_rows": 48,
    "top_candidates": 2,
    "distillation": {"continuation": 1.0},
    "teacher_memory": "all",
    "mix": {"reconstruction": 0.2, "continuation": 0.2, "question": 0.4, "needle": 0.2},
    "stages": [{"until": 0.5, "max_chunks": 2}],
}


def smoke(main: Main) -> None:
    """Pack, bring piece by piece, work, stop in the middle, move to another machine, go on, and bring back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_base(folder / "base-folder")
        recipe, data, questions = _make_data(folder)
        arguments = ["--train", data, questions, "--questions", questions]
        _call(main, "pack", folder / "pieces", "--base", folder / "base-folder", *arguments, "--piece-mib", 0.05)
        first, second = folder / "first", folder / "second"
        _bring(main, folder / "pieces", first)
        options = ["--recipe", recipe, "--device", "cpu", "--chunk-size", 64, "--chunks", 2, 4, "--loss-examples", 2]
        options += ["--lengths", 200, "--trials", 2, "--documents", 2, "--asked", 2, "--seconds", 550]
        _call(main, "start", first, *options, "--workers", 1, "--tokens", 3000, "--stages", "before", "train", "after")
        _wait(main, first)
        made = _steps(first / "run/log.jsonl")
        assert 1 <= len(made) < RECIPE["steps"]
        # the machine goes back; another one takes the checkpoint and goes on, in two processes
        _give(main, first, folder / "back", "--checkpoint")
        result = folder / "back" / "joined" / f"adapter-{len(made)}"
        assert _steps(result / "log.jsonl") == made
        assert set(json.loads((result / "results/loss-before.json").read_text())["loss"]) == {"2", "4"}
        _bring(main, folder / "pieces", second)
        checkpoint = folder / "back" / "joined" / f"checkpoint-{len(made)}"
        _call(main, "pack", folder / "again", "--checkpoint", checkpoint, "--piece-mib", 0.05)
        _bring(main, folder / "again", second)
        _call(main, "start", second, *options, "--workers", 2, "--stages", "train", "after", "tables")
        _wait(main, second)
        _give(main, second, folder / "end")
        _check(folder / "end" / "joined" / f"adapter-{RECIPE['steps']}")
        print("smoke: all well")


def _call(main: Main, *arguments: object) -> int:
    print("$", *arguments, flush=True)
    return main(list(map(str, arguments)))


def _bring(main: Main, pieces: Path, state: Path) -> None:
    """Bring pieces two at a time, the last first, as calls of a fresh checkout would."""
    every = sorted(pieces.glob("*.[0-9]*"), reverse=True)
    for start in range(0, len(every), 2):
        call = state.with_name("call")
        shutil.rmtree(call, ignore_errors=True)
        call.mkdir()
        for path in (*every[start : start + 2], *pieces.glob("*.json")):
            shutil.copyfile(path, call / path.name)
        assert _call(main, "take", state, call) == 0


def _wait(main: Main, state: Path) -> None:
    if _call(main, "status", state, "--wait", 280):
        sys.exit("smoke: the work did not end")
    for line in (state / "journal.jsonl").read_text(encoding="utf-8").splitlines():
        if json.loads(line).get("code"):
            sys.exit(f"smoke: a stage failed: {line}")


def _give(main: Main, state: Path, back: Path, *options: str) -> None:
    """Give few small files a call until all are there, and join them."""
    for number in range(100):
        out = back / str(number)
        _call(main, "give", state, out, "--files", 6, "--file-mib", 0.05, *options)
        if not list(out.glob("*.[0-9]*")):
            return
        assert len(list(out.iterdir())) <= 6
        _call(main, "join", back / "joined", out)
    sys.exit("smoke: giving does not end")


def _check(result: Path) -> None:
    assert _steps(result / "log.jsonl") == list(range(1, RECIPE["steps"] + 1))  # type: ignore[operator]
    assert set(json.loads((result / "results/loss-after.json").read_text())["loss"]) == {"2", "4"}
    assert (result / "adapter/adapter.safetensors").is_file()
    assert len(list(result.glob("results/step-*/*.md"))) == 2


def _steps(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]


def _make_base(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.conftest import byte_level_tokenizer, tiny_model

    tiny_model("llama").save_pretrained(folder)  # type: ignore[operator]
    byte_level_tokenizer().save_pretrained(folder)


def _make_data(folder: Path) -> tuple[Path, Path, Path]:
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "some", "dog", "ate", "his", "hat", "while", "birds", "sang"]
    book, questions, recipe = folder / "book.txt", folder / "questions.jsonl", folder / "recipe.json"
    book.write_text(" ".join(rng.choices(words, k=3000)) + ".", encoding="utf-8")
    rows = []
    for number in range(40):
        text = f"{' '.join(rng.choices(words, k=12))}. The code of box {number} is {rng.randint(100, 999)}."
        answer = text[-4:-1]
        ctxs = [{"title": f"Box {number}", "text": text}]
        rows.append({"question": f"What is the code of box {number}?", "answers": [answer], "ctxs": ctxs})
    questions.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
    return recipe, book, questions
