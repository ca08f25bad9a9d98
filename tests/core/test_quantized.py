"""Check bases in int8: attached, trained at low rank, served. They need torchao, which is optional."""

from __future__ import annotations

import pytest
import torch

from focus_core.config import TrainConfig
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.model.hub import fingerprint, load_base, read_info
from focus_core.training.adapter import train_adapter
from tests.conftest import byte_level_tokenizer, tiny_model

SETTINGS = {
    "steps": 3,
    "rank": 4,
    "gradient_checkpointing": True,
    "chunk_sizes": [8, 16],
    "max_chunks": 4,
    "max_memory_tokens": 64,
    "local_tokens": [12, 16],
    "max_candidate_rows": 48,
    "learning_rate": 1e-2,
    "mix": {"reconstruction": 1},
}


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=16).save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_what_is_missing_or_unknown_is_said(folder, monkeypatch):
    """Another number of bits, and torchao not being there."""
    with pytest.raises(ConfigError, match="quantize must be one of int8, int4; got 'int3'"):
        load_base(folder, quantize="int3")
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"needs torchao; run `pip install 'focusllm\[quantized\]'`"):
        load_base(folder, quantize="int8")


def test_an_int8_base_trains_at_low_rank_and_answers(folder, tmp_path):
    """Train, save, serve: the loss falls, the base stays in int8, the adapter names the quantised weights."""
    pytest.importorskip("torchao", reason="torchao is optional: pip install 'focusllm[quantized]'")
    loaded = load_base(folder, dtype=torch.bfloat16, device="cpu", quantize="int8")
    plain = load_base(folder, dtype=torch.bfloat16, device="cpu")
    matrix = loaded.model.model.layers[0].self_attn.q_proj.weight
    assert "Int8" in type(matrix).__name__
    assert loaded.fingerprint == fingerprint(loaded.model) != plain.fingerprint
    ids = torch.randint(6, 300, (1, 19))
    away = (loaded.model(ids).logits - plain.model(ids).logits).abs().mean() / plain.model(ids).logits.abs().mean()
    assert 0 < away < 0.05
    (tmp_path / "book.txt").write_text("the cat sat on the mat and the dog ate the hat. " * 300)
    losses = []
    settings = TrainConfig.from_dict(SETTINGS)
    train_adapter(
        loaded,
        [tmp_path / "book.txt"],
        tmp_path / "run",
        settings,
        chunk_size=64,
        report=lambda it: losses.append(it.loss),
    )
    assert losses[-1] < losses[0]
    assert type(loaded.model.model.layers[0].self_attn.q_proj.weight) is type(matrix)
    info = read_info(tmp_path / "run/adapter")
    assert (info.rank, info.fingerprint) == (4, loaded.fingerprint)
    engine = FocusEngine.from_pretrained(
        folder, tmp_path / "run/adapter", dtype=torch.bfloat16, device="cpu", quantize="int8"
    )
    memory = engine.remember(["the cat sat on the mat. " * 10])
    assert engine.answer("who?", memory, max_tokens=3).tokens
    engine.close()
