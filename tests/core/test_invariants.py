"""Prove the eight invariants of the engine, each against something independent of it."""

from __future__ import annotations

import threading

import pytest
import torch

from focus_core.errors import (
    AdapterError,
    CancelledError,
    ConfigError,
    ContextTooLongError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from focus_core.method.encoding import encode_chunks
from focus_core.method.kv import move_keys, rotations
from focus_core.method.suffix import Suffix
from focus_core.model.candidate import CandidateAdapter, CandidateLinear
from focus_core.model.families import CANNOT, FAMILIES, BaseDecoder, family_of
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document
from focus_core.training.objectives import Example, Query, Task, dense_logits, encode_example
from tests.conftest import perturb, tiny_model
from tests.oracle import Oracle

CHUNKS = [[10, 11, 12, 13, 14, 15, 16], [30, 31, 32], [50, 51, 52, 53, 54]]
LOCAL = [20, 21, 22, 23, 24, 25, 26]
DOCUMENTS = ["the cat sat on the mat. " * 12, "a dog ate the hat? yes! " * 3, "hat mat cat dog"]


def build(family: str, dtype: torch.dtype = torch.float64, reader_rank: int = 0):
    extra = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = tiny_model(family).to(dtype)
    if extra:
        model.set_attn_implementation("eager")
    base = BaseDecoder(model)
    adapter = CandidateAdapter(base, dtype, reader_rank=reader_rank)
    perturb(adapter)
    return model, base, adapter


def candidate_weights(model) -> dict[str, torch.Tensor]:
    """Candidate matrices by the name of the module that they stand beside, as the oracle takes them."""
    return {
        name.removesuffix(".base_layer"): module.weight.data.clone()
        for name, module in model.named_modules()
        if isinstance(module, CandidateLinear)
    }


def positions_of(family: str) -> list[str]:
    return ["shared", "ordered"] if FAMILIES[family].rotary == "half" else ["ordered"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_1_attached_without_candidates_is_bit_identical_and_detaches(family):
    """Logits of the base alone == with perturbed candidates attached; after detach the modules are the old ones."""
    model = tiny_model(family)
    before = dict(model.named_modules())
    ids = torch.randint(6, 300, (2, 19))
    plain = model(ids).logits
    implementation = model.config._attn_implementation
    adapter = CandidateAdapter(BaseDecoder(model))
    perturb(adapter)
    assert any(isinstance(module, CandidateLinear) for module in model.modules())
    assert torch.equal(model(ids).logits, plain)
    adapter.detach()
    adapter.detach()
    assert dict(model.named_modules()) == before
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_perturbed_projections_stay_on_their_gpu():
    """The tests' random numbers are drawn on the CPU, the same for every device."""
    drawn = []
    for device in ("cpu", "cuda"):
        with CandidateAdapter(BaseDecoder(tiny_model("llama").to(device))) as adapter:
            perturb(adapter)
            drawn.append([parameter.cpu() for parameter in adapter.trainable_parameters()])
    assert all(map(torch.equal, *drawn))


def test_1_a_second_adapter_is_refused():
    """Attaching twice would wrap the wrapper; it raises and leaves the first."""
    model = tiny_model("llama")
    CandidateAdapter(BaseDecoder(model))
    with pytest.raises(AdapterError, match="attached already"):
        CandidateAdapter(BaseDecoder(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_2_no_chunks_is_the_bases_own_greedy(family, make_engine):
    """Tokens of the engine without memory == transformers' generate."""
    for mode in ("incremental", "exact"):
        engine = make_engine(family, local_mode=mode)
        ids = engine.local_ids("the cat sat on a dog", "raw")
        answer = engine.answer("the cat sat on a dog", template="raw", max_tokens=12)
        expected = engine.loaded.model.generate(torch.tensor([[0, *ids]]), max_new_tokens=12, do_sample=False)
        assert [token.id for token in answer.tokens] == expected[0, 1 + len(ids) :].tolist()
        assert answer.evidence == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2"])
def test_2_local_rows_stay_within_a_sliding_window(family, make_engine):
    """A base whose layers see 24 tokens: within them == transformers' generate, beyond them refused."""
    some_layers = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = tiny_model(family, sliding_window=24, **some_layers)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    engine = make_engine(family, model=model, chunk_size=10, prompt_length=8)
    assert engine.config.window == 24
    ids = list(range(30, 49))
    answer = engine.stream_ids(ids, max_tokens=4).answer
    expected = model.generate(torch.tensor([[0, *ids]]), max_new_tokens=4, do_sample=False)
    assert [token.id for token in answer.tokens] == expected[0, 1 + len(ids) :].tolist()
    with pytest.raises(ContextTooLongError, match=r"the window has 24 .the base.s sliding window."):
        engine.stream_ids(ids, max_tokens=5)
    with pytest.raises(ContextTooLongError, match="the window has 24"):
        engine.reading(engine.remember([]).state, max_tokens=2).begin(list(range(30, 91)))
    memory = engine.remember(["the cat sat on the mat and the dog ate the hat. " * 4])
    assert engine.stream_ids(ids[:8], memory, max_tokens=4).answer.usage.chunks > 2


@pytest.mark.slow
@pytest.mark.parametrize("sink", [0, None])
@pytest.mark.parametrize("mode", ["incremental", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_3_engine_equals_the_oracle(family, mode, sink, make_engine):
    """Teacher-forced logits of a Reading == the oracle's, in float64, for every split of the chunks into batches."""
    for positions in positions_of(family):
        model, _, adapter = build(family)
        weights = candidate_weights(model)
        adapter.detach()
        given = 4
        expected = Oracle(model, weights, positions, sink).logits(CHUNKS, LOCAL, given, mode)
        engine = make_engine(
            family, model=model, dtype=torch.float64, positions=positions, local_mode=mode, sink=sink is not None
        )
        memory = _memory_of(engine, CHUNKS)
        for size in (None, 1, 2):
            reading = engine.reading(
                memory.state,
                max_tokens=len(LOCAL),
                chunks_per_batch=size,
            )
            found = [reading.begin(LOCAL[:given])]
            found += [reading.step(token) for token in LOCAL[given:]]
            # logits leave the engine in float32
            torch.testing.assert_close(torch.stack(found).double(), expected, atol=2e-6, rtol=1e-5)
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_3_equal_chunks_share_a_row_and_count_each(family, make_engine):
    """Logits over chunks that repeat == the oracle's, which reads each by itself; every copy is attended to alike."""
    chunks = [CHUNKS[0], CHUNKS[1], CHUNKS[0], CHUNKS[2], CHUNKS[0]]
    for positions in positions_of(family):
        model, _, adapter = build(family)
        weights = candidate_weights(model)
        adapter.detach()
        expected = Oracle(model, weights, positions, 0).logits(chunks, LOCAL, 4, "incremental")
        engine = make_engine(family, model=model, dtype=torch.float64, positions=positions)
        state = _memory_of(engine, chunks).state
        assert sum(slab.kv.size for slab in state.slabs) == 3
        for size in (None, 1, 2):
            reading = engine.reading(state, max_tokens=len(LOCAL), chunks_per_batch=size)
            found = [reading.begin(LOCAL[:4])] + [reading.step(token) for token in LOCAL[4:]]
            torch.testing.assert_close(torch.stack(found).double(), expected, atol=2e-6, rtol=1e-5)
            if positions == "shared":
                torch.testing.assert_close(reading.mass[-1][:, 0], reading.mass[-1][:, 2])
        engine.close()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_3_the_choice_may_change_between_steps(family, make_engine):
    """Other chunks read whole after two steps == the oracle's answer to all tokens so far with these in front."""
    positions = positions_of(family)[0]
    model, _, adapter = build(family)
    weights = candidate_weights(model)
    adapter.detach()
    front = [*CHUNKS[1], *CHUNKS[2]]
    expected = Oracle(model, weights, positions, 0).logits(CHUNKS, LOCAL, 5, "incremental", front)
    engine = make_engine(family, model=model, dtype=torch.float64, positions=positions)
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=len(LOCAL))
    reading.begin(LOCAL[:3])
    reading.read_whole([0])
    for token in LOCAL[3:5]:
        reading.step(token)
    found = [reading.read_whole([2, 1])] + [reading.step(token) for token in LOCAL[5:]]
    torch.testing.assert_close(torch.stack(found).double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gemma3_text", "smollm3"])
def test_3_moved_chunk_kv_equals_layers_run_by_hand(family, make_engine):
    """Chunk KV moved in front of the question == transformers' layers over a cache filled by hand, the last without."""
    model, _, adapter = build(family)
    weights = candidate_weights(model)
    adapter.detach()
    whole, oracle = [0, 2], Oracle(model, weights, "shared", 0)
    expected = oracle.moved_logits(CHUNKS, [CHUNKS[index] for index in whole], LOCAL[:4])
    engine = make_engine(family, model=model, dtype=torch.float64)
    reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=len(LOCAL))
    reading.begin(LOCAL[:4])
    found = reading.read_whole(whole, moved=True)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)
    assert reading.reread_tokens == sum(len(CHUNKS[index]) for index in whole)
    after = reading.step(LOCAL[4])
    assert torch.isfinite(after).all()
    assert not torch.allclose(after, found)


def test_3_chunk_kv_is_moved_in_rotary_incremental_bases_alone(make_engine):
    """Learned positions, and a local context read anew at every step, refuse it with the way that works."""
    for family, changes in (("opt", {}), ("llama", {"local_mode": "exact"})):
        engine = make_engine(family, **changes)
        reading = engine.reading(_memory_of(engine, CHUNKS).state, max_tokens=4)
        reading.begin(LOCAL)
        with pytest.raises(ConfigError, match="reread_way='run'"):
            reading.read_whole([0], moved=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["incremental", "exact"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_3_narrowing_equals_the_oracle_with_those_chunks_alone(family, mode, make_engine):
    """Few of many (copied), most (left where they are), one, equal ones: logits == those of these chunks as memory."""
    chunks = [*CHUNKS, [70, 71], CHUNKS[1], [80, 81, 82, 83], [90], CHUNKS[1]]
    positions = positions_of(family)[0]
    model, _, adapter = build(family)
    weights = candidate_weights(model)
    adapter.detach()
    oracle = Oracle(model, weights, positions, 0)
    whole = oracle.logits(chunks, LOCAL, 4, mode)
    choices = [[5], [6, 0], [0, 2, 3, 5, 6], [1, 4, 7], list(range(len(chunks)))]
    alone = [oracle.logits([chunks[index] for index in sorted(kept)], LOCAL, 4, mode) for kept in choices]
    engine = make_engine(family, model=model, dtype=torch.float64, positions=positions, local_mode=mode)
    state = _memory_of(engine, chunks).state
    for kept, expected in zip(choices, alone, strict=True):
        for size in (None, 2):
            reading = engine.reading(state, max_tokens=len(LOCAL), chunks_per_batch=size)
            torch.testing.assert_close(reading.begin(LOCAL[:4]).double(), whole[0], atol=2e-6, rtol=1e-5)
            found = [reading.narrow(kept)] + [reading.step(token) for token in LOCAL[4:]]
            torch.testing.assert_close(torch.stack(found).double(), expected, atol=2e-6, rtol=1e-5)
            assert (reading.chunks, reading.candidates) == (len(chunks), len(kept))
            for mass in reading.mass:
                assert [bool(at.any()) for at in mass.T] == [index in kept for index in range(len(chunks))]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_3_batched_equals_one_by_one_equals_ragged(family):
    """Chunk KV of one padded batch == each chunk alone, in float32 to 1e-5."""
    _, base, _ = build(family, torch.float32)
    together = encode_chunks(base, CHUNKS)
    for index, chunk in enumerate(CHUNKS):
        alone = encode_chunks(base, [chunk])
        torch.testing.assert_close(together.dense(index), alone.dense(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.rotary == "half"])
def test_4_a_moved_key_is_the_key_computed_there(family):
    """First-layer keys at positions 7.. rotated by -7 == first-layer keys computed at positions 0.. themselves."""
    _, base, _ = build(family)
    ids = torch.tensor([[40, 41, 42, 43]])
    keys = {0: [], 7: []}
    for shift in keys:
        at = torch.arange(shift, shift + 4)[None]
        hidden = base.embed(ids, at)

        def keep(layer, query, key, value, scale, softcap, shift=shift):
            keys[shift].append(key)
            return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)  # knows no place

        with base.own_attention():
            for layer in range(base.num_layers):
                hidden = base.run_layer(layer, hidden, base.rope(hidden, at), keep)
    turns = rotations([table.double() for table in base.frequencies], torch.full((4,), -7))
    for here, there, turn, table in zip(keys[0], keys[7], turns, base.frequencies, strict=True):
        torch.testing.assert_close(move_keys(there, turn), here, atol=1e-6, rtol=1e-5)
        assert bool((there - here).abs().max() > 1e-3) == bool(table.any())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_5_training_scores_what_decoding_says(family, make_engine):
    """log p of each target in the dense pass == the log-probability that incremental decoding reports."""
    for positions in positions_of(family):
        engine = make_engine(family, positions=positions)
        chunks = encode_example(engine.base, Example(tuple(map(tuple, CHUNKS)), (), "test"), engine.sink)
        query, other = Query(tuple(LOCAL), 4), Query((60, 61, 62, 63), 1)
        tasks = [Task(chunks, query), Task(chunks, other)]
        dense, dense_other = dense_logits(engine.base, engine.adapter, tasks, engine.sink, positions)
        memory = _memory_of(engine, CHUNKS)
        for item, expected in ((query, dense), (other, dense_other)):
            reading = engine.reading(memory.state, max_tokens=8)
            found = [reading.begin(list(item.ids[: item.split]))]
            found += [reading.step(token) for token in item.ids[item.split : -1]]
            torch.testing.assert_close(torch.stack(found), expected.detach(), atol=2e-5, rtol=1e-4)
        engine.close()


def test_7_adding_and_removing_leaves_logits_bit_equal(make_engine):
    """Logits before adding a document == logits after adding and removing it; with it, they differ."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    before = _first_logits(engine, memory)
    memory.add([Document("extra", "dog dog mat " * 30)])
    assert not torch.equal(_first_logits(engine, memory), before)
    memory.remove(["extra"])
    assert torch.equal(_first_logits(engine, memory), before)


def test_7_shared_positions_know_no_order(make_engine):
    """Logits over documents in one order == in another, to 1e-5; with ordered positions they differ."""
    for positions, equal in (("shared", True), ("ordered", False)):
        engine = make_engine(positions=positions, scale=0.5)
        documents = [Document(str(index), text) for index, text in enumerate(DOCUMENTS)]
        first = _first_logits(engine, engine.remember(documents))
        second = _first_logits(engine, engine.remember(documents[::-1]))
        assert torch.allclose(first, second, atol=1e-5) is equal
        engine.close()


def test_7_replacing_and_filtering(make_engine):
    """A memory after replacing a document == one read afresh; a subset == a memory of those documents alone."""
    engine = make_engine()
    memory = engine.remember([Document("a", DOCUMENTS[0]), Document("b", DOCUMENTS[1])])
    memory.add([Document("b", DOCUMENTS[2])])
    fresh = engine.remember([Document("a", DOCUMENTS[0]), Document("b", DOCUMENTS[2])])
    torch.testing.assert_close(_first_logits(engine, memory), _first_logits(engine, fresh), atol=1e-5, rtol=1e-5)
    only = engine.remember([Document("b", DOCUMENTS[2])])
    assert torch.equal(_first_logits(engine, memory.subset(["b"])), _first_logits(engine, only))
    assert memory.fingerprint == fresh.fingerprint != only.fingerprint


def test_8_cancelled_and_failed_work_changes_nothing(make_engine):
    """State and next logits after a cancelled read, a failed read and a cancelled answer == those before."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    before, state = _first_logits(engine, memory), memory.state
    calls = 0

    def cancel():
        nonlocal calls
        calls += 1
        if calls > 2:
            raise CancelledError("stop")

    with pytest.raises(CancelledError):
        memory.add([Document("x", "dog " * 200)], check=cancel)
    assert memory.state is state
    stream = engine.stream("who ate the hat?", memory, max_tokens=50)
    next(iter(stream.tokens()))
    stream.cancel()
    assert stream.answer.finish_reason == "cancelled"
    assert len(stream.answer.tokens) < 5
    with pytest.raises(RuntimeError, match="boom"):
        _failing(engine, memory)
    assert engine.adapter.rows.start is None
    assert engine.loaded.model.config._attn_implementation != "focusllm"
    assert torch.equal(_first_logits(engine, memory), before)


@pytest.mark.slow
def test_8_concurrent_answers_equal_single_ones(make_engine):
    """Eight answers in threads, with seeds, == the same answers one after the other."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)

    def ask(seed: int) -> list[int]:
        answer = engine.answer("who?", memory, max_tokens=8, temperature=1.0, seed=seed)
        return [token.id for token in answer.tokens]

    expected = [ask(seed) for seed in range(8)]
    found: dict[int, list[int]] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.__setitem__(seed, ask(seed))) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(8)] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


def test_8_out_of_memory_tries_smaller_batches_first(make_engine, monkeypatch):
    """With room for two chunks the answer == the unconstrained one; with room for none a clear error comes."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    expected = [token.id for token in engine.answer("who?", memory, max_tokens=4).tokens]
    room, original = 2, Suffix.__init__

    def limited(self, like, capacity):
        if like.size > room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        original(self, like, capacity)

    monkeypatch.setattr(Suffix, "__init__", limited)
    assert [token.id for token in engine.answer("who?", memory, max_tokens=4).tokens] == expected
    room = 0
    with pytest.raises(OutOfMemoryError, match="even one at a time"):
        engine.answer("who?", memory, max_tokens=4)


def test_no_step_copies_chunk_kv(make_engine, monkeypatch):
    """The chunk keys that attention reads in a step are views of the memory's own storage."""
    from focus_core.method import attention

    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    held = [slab.kv.source.layer(layer) for slab in memory.state.slabs for layer in range(slab.kv.shape.layers)]
    storages = {arrays["keys"].untyped_storage().data_ptr() for arrays in held}
    reading = engine.reading(memory.state, max_tokens=4)
    reading.begin([20, 21, 22])
    seen: list[int] = []
    original = attention.attend

    def spy(query, key, value, scale, **kwargs):
        seen.append(key.untyped_storage().data_ptr())
        return original(query, key, value, scale, **kwargs)

    monkeypatch.setattr(attention, "attend", spy)
    reading.step(23)
    assert storages <= set(seen)


def test_reasons_are_of_families_that_exist_and_are_not_served():
    """Every family with a reason is one that transformers knows, and none has a row."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert not CANNOT.keys() & FAMILIES.keys()
    elsewhere = {"rwkv", "minicpm3"}  # of earlier and of later versions than some that are supported
    assert [name for name in CANNOT if name not in CONFIG_MAPPING and name not in elsewhere] == []


def test_unsupported_features_say_so(make_engine):
    """Unknown family, sliding window shorter than a chunk row, learned positions with shared, length-dependent RoPE."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(
        UnsupportedModelError, match=r"'gpt2' is not supported: its projections .* supported are gemma2"
    ):
        BaseDecoder(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)))
    with pytest.raises(UnsupportedModelError, match=r"'mamba2' .* recurrent state"):
        family_of("mamba2")
    with pytest.raises(UnsupportedModelError, match=r"'new' is not supported; .* one row of focus_core/model/families"):
        family_of("new")
    with pytest.raises(UnsupportedModelError, match="reads in both directions"):
        BaseDecoder(tiny_model("gemma3_text", use_bidirectional_attention=True))
    with pytest.raises(UnsupportedModelError, match="attends to 16 tokens only"):
        make_engine("mistral", model=tiny_model("mistral", sliding_window=16))
    with pytest.raises(UnsupportedModelError, match="positions='ordered'"):
        make_engine("opt", positions="shared")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="rope type 'dynamic'"):
        BaseDecoder(tiny_model("llama", rope_parameters=rope))


def _memory_of(engine, chunks) -> Memory:
    """A memory that holds exactly these token ids, one document a chunk."""
    from focus_core.text.chunking import Chunk, Span

    made = [Chunk(tuple(ids), (Span(str(index), 0, 1),)) for index, ids in enumerate(chunks)]
    encoder = engine.encoder
    memory = Memory(encoder)
    pending = {str(index): [chunk] for index, chunk in enumerate(made)}
    object.__setattr__(encoder, "cut", lambda document: pending[document.id])
    try:
        memory.add([Document(str(index), "x") for index in range(len(made))])
    finally:
        object.__delattr__(encoder, "cut")
    return memory


def _first_logits(engine, memory):
    reading = engine.reading(memory.state, max_tokens=4)
    return reading.begin(engine.local_ids("who ate the hat?"))


def _failing(engine, memory):
    def boom():
        raise RuntimeError("boom")

    reading = engine.reading(memory.state, max_tokens=4)
    reading.check = boom
    reading.begin([20, 21])
