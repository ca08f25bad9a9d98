"""Check how local rows weigh candidates (-log k, the best m, from a layer on), against attention written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AttentionInterface

from focus_core.config import FocusConfig, TrainConfig
from focus_core.errors import ConfigError
from focus_core.method.layout import Scoring
from focus_core.model.candidate import CandidateAdapter, CandidateLinear
from focus_core.model.families import BaseDecoder
from focus_core.training.objectives import Example, Query, Task, dense_logits, encode_example
from tests.conftest import perturb, tiny_model
from tests.core.test_invariants import CHUNKS, LOCAL, _memory_of
from tests.oracle import Oracle

CHUNKS = [*CHUNKS, [70, 71], [80, 81, 82, 83, 84, 85]]


class ScoredOracle(Oracle):
    """The oracle with candidate scores changed: attention in plain matrices, candidates being the first keys."""

    def __init__(self, *arguments, bias: str, top: int, first: int) -> None:
        super().__init__(*arguments)
        self.bias, self.top, self.first, self.mass = bias, top, first, []
        AttentionInterface.register("scored", self._attend)

    def logits(self, chunks, local, given, mode):
        self.chunks = len(chunks)
        self.model.set_attn_implementation("scored")
        try:
            return super().logits(chunks, local, given, mode)
        finally:
            self.model.set_attn_implementation("eager")

    def _candidate(self, *arguments):
        self.model.set_attn_implementation("eager")
        try:
            return super()._candidate(*arguments)
        finally:
            self.model.set_attn_implementation("scored")

    def _attend(self, module, query, key, value, attention_mask, scaling=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        rows, keys = scores.shape[-2:]
        for row in range(rows):
            scores[..., row, keys - rows + row + 1 :] = -torch.inf
            for head in range(scores.shape[1]):
                ours = scores[0, head, row, : self.chunks]
                kept = sorted(range(self.chunks), key=lambda index: -float(ours[index]))[: self.top or self.chunks]
                for index in range(self.chunks):
                    lowered = ours[index] - (math.log(self.chunks) if self.bias == "log_k" else 0.0)
                    ours[index] = lowered if index in kept and module.layer_idx >= self.first else -torch.inf
        weights = scores.softmax(-1)
        self.mass.append(weights[0, :, -1, : self.chunks])
        return (weights @ value).transpose(1, 2), None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bias", "top", "first"), [("log_k", 0, 0), ("none", 2, 0), ("log_k", 1, 0), ("none", 9, 0), ("none", 0, 1)]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoding_and_training_weigh_candidates_as_the_oracle(family, bias, top, first, make_engine):
    """Engine and dense logits, and the attention mass, == those of attention written out by hand; plain ones differ."""
    model = tiny_model(family).double()
    model.set_attn_implementation("eager")
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base, torch.float64)
    perturb(adapter, scale=0.4)
    weights = {
        name: module.weight.data.clone()
        for name, module in model.named_modules()
        if isinstance(module, CandidateLinear)
    }
    adapter.detach()
    oracle = ScoredOracle(model, weights, "shared", 0, bias=bias, top=top, first=first)
    expected = oracle.logits(CHUNKS, LOCAL, 4, "incremental")
    settings = {"candidate_bias": bias, "top_candidates": top, "first_candidate_layer": first}
    engine = make_engine(family, model=model, dtype=torch.float64, scale=0.4, **settings)
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=len(LOCAL))
    found = [reading.begin(LOCAL[:4])]
    found += [reading.step(token) for token in LOCAL[4:]]
    torch.testing.assert_close(torch.stack(found).double(), expected, atol=2e-6, rtol=1e-5)
    for layer, mass in enumerate(reading.mass[1:], start=1):  # layer 0's candidates are equal: any may be the best
        torch.testing.assert_close(mass, oracle.mass[layer - len(reading.mass)], atol=1e-6, rtol=1e-4)
    query = Query((*LOCAL, 1), 4)
    chunks = encode_example(engine.base, Example(tuple(map(tuple, CHUNKS)), (query,), "test"), engine.sink)
    task = [Task(chunks, query)]
    dense = dense_logits(engine.base, engine.adapter, task, 0, "shared", Scoring(bias, top, first))[0]
    torch.testing.assert_close(dense.detach().double(), expected, atol=2e-6, rtol=1e-5)
    plain = dense_logits(engine.base, engine.adapter, task, 0, "shared")[0]
    assert torch.allclose(plain, dense, atol=1e-5) == (top >= len(CHUNKS))  # 9 of 4 changes nothing


def test_scoring_comes_from_the_settings_and_is_checked():
    """Adapter and training settings give the same scoring; bad values are refused."""
    for kind in (FocusConfig, TrainConfig):
        assert Scoring.of(kind()) == Scoring("none", 0, 0)
        settings = {"candidate_bias": "log_k", "top_candidates": 4, "first_candidate_layer": 1}
        assert Scoring.of(kind(**settings)) == Scoring("log_k", 4, 1)
        with pytest.raises(ConfigError, match="candidate_bias must be one of none, log_k; got 'k'"):
            kind(candidate_bias="k")
        with pytest.raises(ConfigError, match="top_candidates must be at least 0; got -1"):
            kind(top_candidates=-1)
        with pytest.raises(ConfigError, match="first_candidate_layer must be at least 0; got -1"):
            kind(first_candidate_layer=-1)
