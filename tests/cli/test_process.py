"""Check what a command's process is like: quick help, no torch before first use, threads, no bars in a pipe."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from focus_core.cli import _process
from focus_core.cli._shared import note, printable, progress, transfer, waiting

ROOT = Path(__file__).parents[2]


def _python(code, **environment):
    """Run code in a process of its own, whose last line is JSON."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "HF_HUB_DIS"))}
    done = subprocess.run(
        [sys.executable, "-c", f"import json, os, sys\n{code}"],
        env=known | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["focus_core", "focus_integrations.langchain", "focus_integrations.llama_index"])
def test_importing_a_package_loads_no_torch(module):
    """Torch and the frameworks come with the first name that is used; every public name is there, and no other."""
    if "." in module:
        pytest.importorskip(module.split(".")[1] + "_core" if "lang" in module else "llama_index.core")
    code = (
        f"import {module} as it\n"
        "heavy = [name for name in ('torch', 'transformers', 'langchain_core', 'llama_index') if name in sys.modules]\n"
        "public = sorted(set(it.__all__) - set(dir(it)))\n"
        "found = [name for name in it.__all__ if not hasattr(it, name)]\n"
        "print(json.dumps([heavy, public, found, hasattr(it, 'nothing'), 'torch' in sys.modules]))"
    )
    assert _python(code) == [[], [], [], False, True]


def test_modules_are_attributes_as_ever():
    """``import focus_core`` then ``focus_core.errors.FocusError``."""
    assert _python("import focus_core\nprint(json.dumps(focus_core.errors.FocusError.__name__))") == "FocusError"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["train", "--help"], ["ask", "--nonsense"]])
def test_help_and_usage_errors_load_no_torch(arguments):
    """What is asked of the command line alone is answered by it alone."""
    code = (
        f"sys.argv = ['focusllm', *{arguments!r}]\n"
        "from focus_core.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(json.dumps([end.code, 'torch' in sys.modules, 'transformers' in sys.modules]))"
    )
    assert _python(code) == [2 if "--nonsense" in arguments else 0, False, False]


_PREPARED = (
    "from focus_core.cli._process import prepare\nprepare()\nimport torch\n"
    "print(json.dumps([os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'], torch.get_num_threads()]))"
)


@pytest.mark.slow
def test_a_command_chooses_threads_before_torch_loads():
    """Passive waiting and as many threads as this process has cores; what the user has set stays."""
    cores = _process.cores()
    assert _python(_PREPARED) == ["passive", str(cores), cores]
    assert _python(_PREPARED, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="1") == ["active", "1", 1]


@pytest.mark.slow
def test_the_library_leaves_its_host_program_alone():
    """Importing and using the package changes no variable of the environment and no thread count."""
    code = (
        "import torch\ndef state(): return {**os.environ, 'threads': torch.get_num_threads()}\n"
        "before = state()\n"
        "import focus_core\nfocus_core.FocusEngine, focus_core.load_documents\n"
        "print(json.dumps(state() == before))"
    )
    assert _python(code) is True


def test_cores_are_those_of_the_container(tmp_path, monkeypatch):
    """A quota of half a core gives one thread, "max" all that the process may run on."""
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(_process, "_QUOTA", quota)
    free = _process.cores()
    for text, expected in (("50000 100000", 1), ("6400000 100000", free), ("max 100000", free)):
        quota.write_text(text)
        assert _process.cores() == expected


def test_nothing_moves_where_there_is_no_terminal(capsys):
    """Progress in a pipe or a log: no bar, no spinner, nothing."""
    with waiting("loading"), progress("reading", 5) as bar:
        bar(3, "half")
    with transfer("weights"):
        pass
    assert capsys.readouterr() == ("", "")


NASTY = "see [/etc/hosts] and [bold]x[/bold] \x1b]0;title\x07\x1b[2J"


@pytest.mark.slow
def test_texts_of_others_are_printed_as_they_are(run, tmp_path, monkeypatch):
    """Markup and terminal codes in a passage, a file name, a folder: shown, never obeyed; no traceback."""
    folder = tmp_path / "[red] a["  # with the separator behind it, a closing tag
    folder.mkdir()
    (folder / "b] c.txt").write_text(NASTY + " the cat sat on the mat.")
    (folder / "d].bin").write_bytes(b"\0")
    assert run("index", folder, "--memory", folder / "m]")[0] == 0
    code, _, err = run("ask", "who?", folder, "--max-tokens", 2, "--memory", folder / "m]")
    assert code == 0, err
    assert f"{folder}/b] c.txt:0-" in err
    assert f"left out {folder}/d].bin" in err
    assert "see [/etc/hosts] and [bold]x[/bold]" in err
    assert "\x1b" not in err
    for arguments in (["info", folder / "b] c.txt"], ["ask", "who?", "[/nope].txt"], ["train", "--config", folder]):
        more = ["--data", folder, "--output", tmp_path / "run"] if "train" in arguments else []
        code, out, err = run(*arguments, *more, model=not more)
        assert code == (0 if "info" in arguments else 2), err
        assert "Traceback" not in out + err
    assert printable("a\tb\n漢字") == "a\tb\n漢字"
    stream = io.StringIO()
    monkeypatch.setattr(note, "_file", stream)
    note.print("[/x] \x1b[31m")
    assert stream.getvalue() == "[/x] \ufffd[31m\n"


def test_file_names_stay_whole_at_80_columns(run, tmp_path, monkeypatch):
    """A long path is one line, to be copied; its passage is cut to the width."""
    folder = tmp_path / ("deep" * 12) / ("folder" * 10)
    folder.mkdir(parents=True)
    (folder / "contract.txt").write_text("the cat sat on the mat. " * 30)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = io.StringIO()
    monkeypatch.setattr(note, "_file", narrow)
    monkeypatch.setattr(type(note), "width", property(lambda self: 80, lambda self, value: None))
    assert run("ask", "who?", folder, "--max-tokens", 2)[0] == 0
    lines = narrow.getvalue().splitlines()
    assert any(line.endswith("-0") or f"{folder / 'contract.txt'}:" in line for line in lines)
    passages = [line for line in lines if line.strip().startswith("the cat sat")]
    assert passages
    assert all(len(line) <= 80 for line in passages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/m/kv"), "No space left on device at /m/kv; free some space"),
        (PermissionError(13, "Permission denied", "/m"), "Permission denied at /m; check its permissions"),
        (IsADirectoryError(21, "Is a directory", "/m"), "Is a directory at /m; check the path"),
        (ConnectionError("the hub\ndoes not answer"), "the hub; try again"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, message, run, monkeypatch):
    """Any OSError of any command: what, where, what to do; exit status 1 and no traceback."""

    def fails(*arguments, **options):
        raise error

    for module in ("_ask", "_corpus", "_evaluation"):
        monkeypatch.setattr(f"focus_core.cli.{module}.open_engine", fails)
    for command in (["ask", "who?"], ["chat"], ["index", "--memory", "m"], ["info"], ["bench"]):
        code, _, err = run(*command)
        assert (code, err.strip().count("\n")) == (1, 0)
        assert f"error: {message}" in err


def test_an_output_that_cannot_be_written_is_one_line(run, base_folder, tmp_path):
    """Training into a file, a memory in a file: the system's reason, no traceback."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    (tmp_path / "file").write_text("")
    arguments = ["--data", tmp_path / "a.txt", "--output", tmp_path / "file", "--steps", 1, "--chunk-size", 64]
    code, _, err = run("train", "--base", base_folder, *arguments, model=False)
    assert code == 1
    assert "File exists at" in err
    code, _, err = run("ask", "who?", tmp_path / "a.txt", "--max-tokens", 1, "--memory", tmp_path / "file")
    assert code != 0
    assert "Traceback" not in err


def test_standard_input_that_is_no_text_exits_with_2(run, monkeypatch):
    """Binary data: one line that says what to do."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\x7fELF\0\0"), encoding="utf-8"))
    code, _, err = run("ask", "who?", "-")
    assert code == 2
    assert "standard input" in err
