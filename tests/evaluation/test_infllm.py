"""Check block memory against transformers' generate where all fits, and against plain attention where all is seen."""

from __future__ import annotations

import math

import pytest
import torch

from focus_core.errors import ConfigError
from focus_core.evaluation.methods.baselines import prompt_of, whole_text
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.methods.infllm import _Reader
from focus_core.evaluation.methods.registry import parse_method
from focus_core.evaluation.trial import Trial
from focus_core.method.kv import move_keys, rotation
from focus_core.model.families import BaseDecoder
from focus_core.text.corpus import Document
from tests.conftest import tiny_model

SMALL = "blocks:block=8:window=40:first=4:representatives=2"


def _trial(words):
    text = " ".join(f"the {word} {index}" for index, word in enumerate(["cat", "dog", "mat", "hat"] * words))
    return Trial((Document("d", text),), "what then?", ("x",), None, True, "")


def _answer(method, engine, trial):
    return parse_method(method).answer(engine, trial, 6, ChunkCache(0)).text


@pytest.mark.parametrize("method", ["blocks:block=16:window=200", f"{SMALL}:blocks=2"])
def test_what_fits_the_window_is_answered_as_by_the_base(make_engine, method):
    """While nothing has left the window: transformers' own generate on the same prompt."""
    engine, trial = make_engine(), _trial(1)
    ids = [engine.sink, *prompt_of(engine, trial, whole_text(trial))]
    assert len(ids) + 6 <= 44 + 8
    made = engine.loaded.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert _answer(method, engine, trial) == engine.tokenizer.decode(made[0, len(ids) :].tolist())


def test_with_every_block_it_is_attention_with_far_keys_at_one_distance(make_engine):
    """One layer, all blocks looked up: each head's output == softmax over all keys, those outside at its end."""
    base = BaseDecoder(tiny_model("llama", layers=1))
    ids, window, block, first = list(range(20, 84)), 24, 8, 4
    seen = {}

    def keep(layer, query, key, value, scale, softcap):
        seen.update(query=query[0].double(), key=key[0].double(), value=value[0].double(), scale=scale)
        return torch.zeros(1, query.shape[2], query.shape[1], query.shape[3])

    hidden = base.embed(torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long))
    with base.own_attention():
        base.run_layer(0, hidden, base.rope(hidden, torch.zeros(1, len(ids), dtype=torch.long)), keep)
    reader = _Reader(base, 100, window, 99, block, 2, first)
    found = []
    original = reader._attend
    reader._attend = lambda *given: found.append(original(*given)) or found[-1]
    for start in range(0, len(ids), 16):
        reader.read(ids[start : start + 16])

    last, used = len(ids) - 1, len(ids) - 16
    past = (used - window - first) // block
    local = first + past * block
    assert past > 1
    groups = seen["query"].shape[0] // seen["key"].shape[0]
    for head in range(seen["query"].shape[0]):
        scores = []
        for place in range(len(ids)):
            distance = last - place if place >= local else window
            turn = rotation(base.frequencies[0].double(), torch.tensor([distance]))
            turned = move_keys(seen["query"][head, last : last + 1], turn)[0]
            scores.append(float(turned @ seen["key"][head // groups, place]) * seen["scale"])
        weights = torch.tensor([math.exp(score) for score in scores], dtype=torch.float64)
        expected = (weights / weights.sum()) @ seen["value"][head // groups]
        torch.testing.assert_close(found[-1][0, -1, head].double(), expected, atol=1e-5, rtol=1e-4)


def test_the_block_that_matches_is_looked_up(make_engine):
    """Of three blocks the one whose representatives point the query's way is read, besides the first tokens."""
    base = BaseDecoder(tiny_model("llama", layers=1))
    reader = _Reader(base, 64, 16, 1, 8, 2, 4)
    heads, dim = base.num_kv_heads, base.head_dim
    way = torch.randn(heads, dim, generator=torch.Generator().manual_seed(0))
    reader.known[0] = [-way[:, None].repeat(1, 2, 1), way[:, None].repeat(1, 2, 1), 0 * way[:, None].repeat(1, 2, 1)]
    query = way.repeat_interleave(base.num_heads // heads, dim=0)[None, :, None]
    assert reader._look_up(0, query).tolist() == [0, 1, 2, 3, *range(12, 20)]


def test_long_texts_are_answered_and_bad_settings_refused(make_engine):
    engine = make_engine()
    assert _answer(f"{SMALL}:blocks=2", engine, _trial(40))
    with pytest.raises(ConfigError, match="a window of at least 32 tokens and at most 8 representatives; got 31"):
        _answer("blocks:block=8:window=31", engine, _trial(4))
    with pytest.raises(ConfigError, match="opt has none"):
        _answer("blocks", make_engine("opt"), _trial(4))
