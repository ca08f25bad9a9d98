"""Check candidates of low rank: the function they compute, their files, what training touches, quantised bases."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from focus_core.config import FocusConfig
from focus_core.engine import FocusEngine
from focus_core.errors import AdapterMismatchError, ConfigError
from focus_core.model.candidate import CandidateAdapter, CandidateLinear, low_rank
from focus_core.model.families import FAMILIES, BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint, load_adapter, read_info, save_adapter
from focus_core.training.export import export_adapter
from tests.conftest import perturb, tiny_model
from tests.core.test_invariants import _memory_of
from tests.oracle import Oracle

CHUNKS = [[10, 11, 12, 13, 14, 15, 16], [30, 31, 32], [50, 51, 52, 53, 54]]
LOCAL = [20, 21, 22, 23, 24, 25, 26]


def _info(loaded, positions="shared"):
    focus = FocusConfig(window=256, chunk_size=32, prompt_length=64, positions=positions)
    return AdapterInfo(loaded.name, loaded.fingerprint, focus)


def _loaded(tokenizer, family="llama", **changes):
    model = tiny_model(family, **changes)
    return LoadedBase(model, tokenizer, f"tiny-{family}", fingerprint(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_without_candidates_it_is_the_base_and_the_fingerprint_is_the_bases(family):
    """Logits of the base alone == with a perturbed low-rank adapter; the weights' hash does not count the adapter."""
    model = tiny_model(family)
    ids = torch.randint(6, 300, (2, 19))
    plain, name = model(ids).logits, fingerprint(model)
    with CandidateAdapter(BaseDecoder(model), rank=3) as adapter:
        assert torch.equal(model(ids).logits, plain)
        perturb(adapter)
        assert torch.equal(model(ids).logits, plain)
        assert fingerprint(model) == name
    assert not any(isinstance(module, CandidateLinear) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_whole_matrix_that_it_stands_for(family, tokenizer):
    """Oracle with W + up @ down in the place of W, float64 == the engine's logits, step by step."""
    model = tiny_model(family).double()
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base, torch.float64, rank=5)
    perturb(adapter, scale=0.3)
    weights = {
        name: module.matrix().clone() for name, module in model.named_modules() if isinstance(module, CandidateLinear)
    }
    positions = "shared" if FAMILIES[family].rotary == "half" else "ordered"
    engine = FocusEngine(loaded, _info(loaded, positions), adapter, base=base)
    state = _memory_of(engine, CHUNKS).state
    reading = engine.reading(state, max_tokens=4)
    ours = [reading.begin(LOCAL[:5]), *(reading.step(token) for token in LOCAL[5:])]
    engine.close()
    for key, value in weights.items():
        assert not torch.equal(value, model.get_submodule(key).weight)
    oracle = Oracle(model, weights, positions, engine.sink).logits(CHUNKS, LOCAL, 5, "incremental")
    torch.testing.assert_close(
        torch.stack([logits.double().reshape(-1) for logits in ours]), oracle, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_svd_at_full_rank_is_exact_and_files_round_trip(family, tokenizer, tmp_path):
    """Cut to 99: the same matrices; written and read: the same bits in bfloat16; a lower rank is the nearest."""
    loaded = _loaded(tokenizer, family)
    base = BaseDecoder(loaded.model)
    with CandidateAdapter(base) as whole:
        perturb(whole)
        wanted = {key: value.clone() for key, value in whole.matrices().items()}
        save_adapter(tmp_path / "whole", whole, _info(loaded))
        save_adapter(tmp_path / "99", whole, _info(loaded), rank=99)
        save_adapter(tmp_path / "4", whole, _info(loaded), rank=4)
    assert read_info(tmp_path / "4").rank == 4
    assert (tmp_path / "4/adapter.safetensors").stat().st_size < (tmp_path / "99/adapter.safetensors").stat().st_size
    with CandidateAdapter(base, rank=99) as thin:
        load_adapter(tmp_path / "whole", thin, loaded)
        for key, value in thin.matrices().items():
            torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-5)
        load_adapter(tmp_path / "99", thin, loaded)
        written = {key: value.clone() for key, value in thin.state_dict().items()}
        save_adapter(tmp_path / "again", thin, read_info(tmp_path / "99"), compact=True)
        load_adapter(tmp_path / "again", thin, loaded)
        assert all(torch.equal(value, written[key]) for key, value in thin.state_dict().items())
    with CandidateAdapter(base) as whole:
        load_adapter(tmp_path / "99", whole, loaded)  # put together again
        for key, value in whole.matrices().items():
            torch.testing.assert_close(value, wanted[key], atol=5e-3, rtol=1e-2)
    change = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(change, 4)
    values = torch.linalg.svdvals(change)
    torch.testing.assert_close(torch.dist(up @ down, change), values[4:].norm())


def test_a_file_of_another_base_changes_nothing(tokenizer, tmp_path):
    """A thin matrix of the wrong shape, or a missing one: refused, nothing is copied."""
    loaded = _loaded(tokenizer)
    with CandidateAdapter(BaseDecoder(loaded.model), rank=3) as adapter:
        perturb(adapter)
        state = {key: value.clone() for key, value in adapter.state_dict().items()}
        broken = {key: value + 1 for key, value in state.items()}
        broken["layers.1.k_proj.up"] = torch.zeros(5, 3)
        with pytest.raises(AdapterMismatchError, match=r"layers.1.k_proj.up is \(5, 3\) where .* needs \(16, 3\)"):
            adapter.load_state_dict(broken)
        del broken["layers.1.k_proj.up"]
        with pytest.raises(AdapterMismatchError, match="is nothing where"):
            adapter.load_state_dict(broken)
        assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())


def test_unused_ranks_can_still_be_trained():
    """From a whole matrix that differs by rank 2, rank 6 begins at it, and its other four ranks get gradients."""
    model = tiny_model("llama")
    base = BaseDecoder(model)
    with CandidateAdapter(base) as whole:
        for parameter in whole.trainable_parameters():
            parameter.data += torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1]) * 0.1
        state = {key: value.clone() for key, value in whole.state_dict().items()}
    with CandidateAdapter(base, rank=6) as thin:
        thin.load_state_dict(state)
        for key, value in thin.matrices().items():
            torch.testing.assert_close(value, state[key], atol=1e-4, rtol=1e-4)
        for _, up in (item for item in thin.state_dict().items() if item[0].endswith(".up")):
            assert (up.norm(dim=0) > 1e-4).sum() == 2
        for down in (value for key, value in thin.state_dict().items() if key.endswith(".down")):
            assert (down.norm(dim=1) > 1e-2).all()


class _Quantised(nn.Module):
    """A linear layer whose matrix exists as int8 alone; asking for it whole is an error."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", torch.round(layer.weight / self.scale).to(torch.int8))

    @property
    def weight(self):
        return _OnlyItsDevice()

    def forward(self, hidden):
        return F.linear(hidden, self.codes.float() * self.scale, self.bias)


class _OnlyItsDevice:
    device = torch.device("cpu")


def test_a_quantised_base_needs_no_whole_matrix(tokenizer, make_engine):
    """Attach, load, answer on a base whose matrices are int8 alone: nothing asks for a whole one."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, _Quantised(getattr(layer.self_attn, name)))
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base, rank=3)
    perturb(adapter)
    adapter.load_state_dict({key: value.clone() for key, value in adapter.state_dict().items()})
    loaded = LoadedBase(model, tokenizer, "tiny", "none")
    engine = FocusEngine(loaded, _info(loaded), adapter, base=base)
    memory = engine.remember(["the cat sat on the mat. " * 10])
    assert engine.answer("who?", memory, max_tokens=3).tokens
    engine.close()


def test_export_cuts_and_measures(tokenizer, tmp_path):
    """export-adapter --rank: the file says its rank, both losses stand in export.json, the engine takes its form."""
    from focus_core.training.objectives import Example, Query

    loaded = _loaded(tokenizer)
    with CandidateAdapter(BaseDecoder(loaded.model)) as adapter:
        perturb(adapter)
        save_adapter(tmp_path / "whole", adapter, _info(loaded))
    example = Example(tuple(map(tuple, CHUNKS)), (Query(tuple(LOCAL), 4),), "question")
    done = export_adapter(loaded, tmp_path / "whole", tmp_path / "thin", [example], rank=2)
    values = json.loads((tmp_path / "thin/export.json").read_text())
    assert values["before"]["loss"] == done.before.loss != done.after.loss
    assert read_info(tmp_path / "thin").rank == 2
    exact = export_adapter(loaded, tmp_path / "whole", tmp_path / "exact", [example], rank=32)
    assert exact.after.loss == pytest.approx(exact.before.loss, rel=1e-3)
    again = export_adapter(loaded, tmp_path / "thin", tmp_path / "again", [example])
    assert again.after.loss == pytest.approx(done.after.loss, rel=1e-6)
    with pytest.raises(ConfigError, match="rank must be at least 1; got 0"):
        export_adapter(loaded, tmp_path / "whole", tmp_path / "none", rank=0)
