"""Check the stretched bases: NTK and YaRN against configured models, StreamingLLM against what one layer must see."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from focus_core.errors import ConfigError
from focus_core.evaluation.methods import context_extension as longer
from focus_core.evaluation.methods.baselines import greedy, prompt_of, whole_text
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.methods.context_extension import stretched_rope
from focus_core.evaluation.methods.registry import parse_method
from focus_core.evaluation.runner import run
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document
from tests.conftest import tiny_model

CACHE = ChunkCache(0)


def trial_of(words):
    text = " ".join(f"the {word} {index}" for index, word in enumerate(["cat", "dog", "mat", "hat"] * words))
    return Trial((Document("d", text),), "what then?", ("x",), None, True, "")


def answer(method, engine, trial, tokens=6):
    return parse_method(method).answer(engine, trial, tokens, CACHE).text


@pytest.mark.parametrize("method", ["full", "ntk", "yarn", "streaming"])
def test_what_fits_is_answered_as_by_the_base(make_engine, method):
    """Within the window every stretch is transformers' own generate on the same prompt."""
    engine = make_engine()
    trial = trial_of(4)
    ids = [engine.sink, *prompt_of(engine, trial, whole_text(trial))]
    made = engine.loaded.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert answer(method, engine, trial) == engine.tokenizer.decode(made[0, len(ids) :].tolist())


@pytest.mark.parametrize("kind", ["ntk", "yarn"])
def test_rope_is_that_of_a_configured_model(make_engine, kind):
    """Logits beyond the window equal those of a model built with these rope parameters; then the base is itself."""
    model = tiny_model("llama", window=128)
    config, weights = copy.deepcopy(model.config), copy.deepcopy(model.state_dict())
    engine = make_engine(model=model, window=96, chunk_size=16, prompt_length=16)
    if kind == "ntk":
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0 * 3 ** (8 / 6)}
    else:
        config.rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 3.0,
            "original_max_position_embeddings": 128,
        }
    config.max_position_embeddings = 384
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(weights)
    row = torch.randint(5, 300, (1, 384), generator=torch.Generator().manual_seed(0))
    plain = model(row).logits
    with stretched_rope(engine, kind, 3.0):
        torch.testing.assert_close(model(row).logits, other(row).logits)
        assert not torch.allclose(model(row).logits, plain, atol=1e-3)
    with pytest.raises(IndexError), stretched_rope(engine, kind, 3.0):
        model(torch.tensor([[10**6]]))
    assert torch.equal(model(row).logits, plain)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 7, 20])
def test_streaming_sees_sinks_and_the_latest_tokens(make_engine, block):
    """In one layer KV depends on its token alone: the answer is that to the sinks and the last tokens in one row."""
    engine = make_engine(model=tiny_model("llama", layers=1))
    trial = trial_of(20)
    ids = [engine.sink, *prompt_of(engine, trial, whole_text(trial))]
    window, sinks, tokens = 64, 4, 5
    last = len(ids) % block or block
    kept = window - block - tokens - sinks
    seen = [*ids[:sinks], *ids[-last - kept :]]
    assert len(ids) > 3 * window
    expected = engine.tokenizer.decode(greedy(engine, seen, tokens))
    assert answer(f"streaming:window={window}:block={block}", engine, trial, tokens) == expected


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_kept_keys_move_to_their_new_places(make_engine, family):
    """After dropping, keys and values are those of the sinks and the last tokens read as one row."""
    engine = make_engine(family, model=tiny_model(family, layers=1))
    ids = list(range(20, 70))
    kept = DynamicCache()
    longer._read_block(engine, kept, ids)
    longer._drop_oldest(engine, kept, 4, 30)
    expected = DynamicCache()
    longer._read_block(engine, expected, [*ids[:4], *ids[-26:]])
    torch.testing.assert_close(kept.layers[0].keys, expected.layers[0].keys, atol=1e-5, rtol=1e-4)
    assert torch.equal(kept.layers[0].values, expected.layers[0].values)


def test_what_does_not_fit_is_said(make_engine, tmp_path):
    """full skips long texts and the row says so; without rotary positions a stretch is refused."""
    engine = make_engine()
    row = run(engine, "p", [trial_of(4), trial_of(200)], "full", 4, tmp_path)
    assert (row.trials, row.skipped) == (1, 1)
    for method in ("ntk", "yarn", "streaming"):
        with pytest.raises(ConfigError, match="opt has none"):
            answer(method, make_engine("opt"), trial_of(4))
    with pytest.raises(ConfigError, match=r"window must be above sinks \+ block \+ answer, 30; got 20"):
        answer("streaming:window=20:block=20", engine, trial_of(4))
