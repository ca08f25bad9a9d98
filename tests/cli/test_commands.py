"""Check the command line as a user types it: output, JSON, memories, exit codes, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat. " * 30)
    (folder / "b.md").write_text("the dog ate the hat. " * 5)
    (folder / "c.bin").write_bytes(b"\0\1\2")
    return folder


def test_ask_prints_answer_and_sources(run, files):
    """The answer alone goes to stdout; sources, skipped files and counts to stderr."""
    code, out, err = run("ask", "who?", files, "--max-tokens", 5)
    assert code == 0
    assert "source" not in out
    assert "a.txt:" in err
    assert "c.bin" in err
    assert "chunks," in err


@pytest.mark.slow
def test_ask_json_heatmap_and_stdin(run, files, tmp_path):
    """--json prints one object with exact spans; --heatmap writes an image; - reads standard input."""
    code, out, _ = run("ask", "who?", files, "--json", "--max-tokens", 4, "--heatmap", tmp_path / "map.png")
    result = json.loads(out)
    assert code == 0
    assert result["usage"]["chunks"] >= 2
    source = result["sources"][0]
    text = Path(source["document_id"]).read_text()
    assert text[source["start"] : source["end"]] == source["text"]
    assert (tmp_path / "map.png").exists()
    code, out, _ = run("ask", "who?", "-", "--json", "--max-tokens", 2, stdin="the cat ate the hat")
    assert json.loads(out)["sources"][0]["document_id"] == "stdin"
    assert json.loads(out)["finish_reason"] in ("length", "stop")


@pytest.mark.slow
def test_a_question_longer_than_the_window_is_read_from_memory(run, files):
    """Its head becomes memory beside the files; a text to be continued stays whole as long as it fits."""
    long = "the dog ate the hat. " * 100 + "who sat?"
    code, out, _ = run("ask", long, files, "--json", "--max-tokens", 3)
    assert code == 0
    short = json.loads(run("ask", "who sat?", files, "--json", "--max-tokens", 3)[1])
    assert json.loads(out)["usage"]["chunks"] > short["usage"]["chunks"]
    fits = json.loads(run("ask", "the dog ate the hat. " * 25, files, "--raw", "--json", "--max-tokens", 3)[1])
    assert fits["usage"]["chunks"] == short["usage"]["chunks"]


def test_a_memory_is_kept_extended_and_pruned(run, files, tmp_path):
    """index writes a memory; ask reads it without files; a changed file is read again; --sync forgets vanished ones."""
    memory = tmp_path / "memory"
    assert run("index", files, "--memory", memory)[0] == 0
    code, out, _ = run("ask", "who?", "--memory", memory, "--json", "--max-tokens", 2)
    before = json.loads(out)
    assert code == 0
    (files / "b.md").write_text("the mat. " * 40)
    _, _, err = run("index", files, "--memory", memory)
    assert "1 changed, 1 unchanged" in err
    _, out, _ = run("ask", "who?", "--memory", memory, "--json", "--max-tokens", 2)
    assert json.loads(out)["usage"]["memory"] > before["usage"]["memory"]
    (files / "a.txt").unlink()
    _, _, err = run("index", files, "--memory", memory)
    assert "1 documents are no longer there" in err
    code, _, err = run("index", files, "--memory", memory, "--sync")
    assert code == 0
    assert "1 removed, 1 unchanged" in err
    _, out, _ = run("ask", "who?", "--memory", memory, "--json", "--max-tokens", 2)
    assert {item["document_id"] for item in json.loads(out)["sources"]} == {str(files / "b.md")}


def test_chat_answers_until_an_empty_line(run, files, monkeypatch):
    """Two turns, then the end; each has its sources."""
    lines = iter(["who?", "and then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, err = run("chat", files, "--max-tokens", 3)
    assert code == 0
    assert err.count("passage") == 2


@pytest.mark.slow
def test_a_long_chat_reads_its_oldest_turns_from_memory(run, files, monkeypatch):
    """When the turns outgrow the window, the first ones are sources like the files, not forgotten."""
    lines = iter([f"question {n}: " + "the cat sat on the mat. " * 20 for n in range(6)] + [""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, err = run("chat", files, "--max-tokens", 3)
    assert code == 0
    assert "turn-1" in err


def test_info_estimates_before_reading(run, files):
    """Tokens, chunks, bytes and seconds are there, and the numbers agree with what reading gives."""
    code, out, _ = run("info", files, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["documents"] == 2
    _, out, _ = run("ask", "who?", files, "--json", "--max-tokens", 1)
    assert json.loads(out)["usage"]["memory"] == facts["tokens"]
    assert json.loads(out)["usage"]["chunks"] == facts["chunks"]
    rows = facts["tokens"] + facts["chunks"] * 5  # a sink each, and the first four tokens once more
    assert facts["chunk KV bytes"] == rows * 2 * 2 * 2 * 8 * torch.finfo(getattr(torch, facts["dtype"])).bits // 8
    code, out, _ = run("info")
    assert code == 0
    assert "untrained" in out


@pytest.mark.slow
def test_train_makes_an_adapter_that_ask_uses(run, base_folder, files, tmp_path):
    """train writes adapter and log and resumes; the adapter answers with --adapter."""
    (files / "a.txt").write_text("the cat sat on the mat. " * 120)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"chunk_sizes": [8], "max_memory_tokens": 32, "local_tokens": [12, 16], "mix": {"reconstruction": 1}}
        )
    )
    arguments = ["train", "--base", base_folder, "--data", files, "--output", tmp_path / "out", "--steps", 2]
    arguments += ["--config", tmp_path / "config.json", "--chunk-size", 64]
    for _ in range(2):
        code, _, err = run(*arguments, model=False)
        assert code == 0, err
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    adapter = tmp_path / "out" / "adapter"
    code, out, _ = run(
        "ask", "who?", files, "--base", base_folder, "--adapter", adapter, "--json", "--max-tokens", 2, model=False
    )
    assert code == 0
    assert json.loads(out)["usage"]["generated"] >= 1


@pytest.mark.slow
def test_eval_makes_a_table_and_resumes(run, tmp_path):
    """Two passkey trials by two methods give predictions and metrics; a second run asks nothing again."""
    arguments = ["eval", "passkey", "--lengths", "200", "--chunk-sizes", "48", "--trials", 2, "--output", tmp_path]
    arguments += ["--methods", "focusllm,truncated,parallel-windows"]
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "parallel-windows" in out
    rows = (tmp_path / "passkey-200-c48.focusllm.jsonl").read_text()
    metrics = json.loads((tmp_path / "passkey-200-c48.focusllm.json").read_text())
    assert metrics["trials"] == 2
    assert metrics["chunks"] > 3
    assert run(*arguments)[0] == 0
    assert (tmp_path / "passkey-200-c48.focusllm.jsonl").read_text() == rows


@pytest.mark.slow
def test_eval_questions_and_heads(run, tmp_path):
    """Questions over three documents by every baseline; heads names at least one (layer, head)."""
    rows = [
        {"question": f"who ate {word}?", "answers": [word], "ctxs": [{"title": word, "text": f"the {word} ate."}]}
        for word in ("cat", "dog", "hat", "mat")
    ]
    file = tmp_path / "qa.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = ["--file", file, "--documents", 3, "--trials", 2, "--output", tmp_path]
    code, out, err = run("eval", "questions", *arguments, "--methods", "focusllm,gold,closed-book")
    assert code == 0, err
    assert "questions-3" in out
    code, out, err = run("eval", "heads", *arguments)
    assert code == 0, err
    assert json.loads(out)["trials"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ask", "who?", "nowhere.txt"], 2, "no file or folder at 'nowhere.txt'"),
        (["ask", "who?", "FILES", "--max-tokens", "9000"], 2, "lower max_tokens"),
        (["ask", "who?", "FILES", "--temperature", "-1"], 2, "temperature must be at least"),
        (["ask", "who?", "FILES", "--memory", "FILES"], 3, "no saved memory in"),
        (["index", "FILES"], 2, "--name contracts"),
        (["ask", "who?", "FILES", "--chunk-size", "4000"], 2, "chunk_size must be at most"),
        (["eval", "riddles"], 2, "unknown task 'riddles'; choose passkey one number in a long text"),
        (["ask"], 2, "Missing argument"),
    ],
)
def test_bad_input_exits_with_its_code(run, files, arguments, code, message):
    """Each wrong call gives its exit code and one message, no traceback."""
    found, _, err = run(*[files if item == "FILES" else item for item in arguments])
    assert found == code, err
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_a_base_without_an_adapter_names_the_command(run, base_folder, files):
    """Exit code 3 and the command that trains one."""
    code, _, err = run("ask", "who?", files, "--base", base_folder, model=False)
    assert code == 3
    assert "focusllm train --base" in err


def test_ctrl_c_in_prefill_is_clean_and_resumes(run, files, tmp_path, monkeypatch):
    """Stopped while reading: exit code 130, one line, what was computed is kept, and the next run finishes."""
    from focus_core.store import indexing as module

    monkeypatch.setitem(module._BATCH_TOKENS, "cpu", 1)
    original, calls = module.encode_chunks, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "encode_chunks", interrupted)
    (files / "a.txt").write_text(" ".join(map(str, range(600))))
    arguments = ["index", files, "--memory", tmp_path / "m"]
    code, out, err = run(*arguments)
    assert code == 130
    assert out == ""
    assert "stopped; nothing was lost" in err
    assert len(list((tmp_path / "m" / "kv").rglob("*.safetensors"))) == 1
    assert run(*arguments)[0] == 0
