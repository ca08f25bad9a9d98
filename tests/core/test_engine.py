"""Check what users of the engine see: sampling, stop strings, streaming, evidence, errors, settings."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch

from focus_core import DecodeConfig, Document, FocusConfig, FocusEngine, TrainConfig, load_documents
from focus_core.errors import (
    AdapterError,
    AdapterMismatchError,
    BaseModelError,
    ConfigError,
    ContextTooLongError,
    DocumentNotFoundError,
    EmptyCorpusError,
    NotTextError,
)
from focus_core.generation import _TextStream
from focus_core.method.attribution import AttentionRecord, leading_chunks, save_heatmap
from focus_core.method.looking import Looking
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.chat import Message
from focus_core.model.families import FAMILIES, BaseDecoder
from focus_core.model.hub import (
    AdapterInfo,
    LoadedBase,
    find_adapter,
    fingerprint,
    load_adapter,
    load_base,
    save_adapter,
)
from focus_core.text.tokenization import TextTokenizer
from tests.conftest import byte_fallback_tokenizer, perturb, tiny_model

DOCUMENTS = ["the cat sat on the mat. " * 12, "a dog ate the hat? yes! " * 3, "漢字🙂 " * 12]


@pytest.mark.slow
def test_sampling_options_and_seeds(make_engine):
    """Equal seeds give equal tokens, others differ; top_k=1 is greedy; logprobs name the greedy token first."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)

    def ids(**options):
        return [token.id for token in engine.answer("who?", memory, max_tokens=8, **options).tokens]

    assert ids(temperature=1.0, seed=3) == ids(temperature=1.0, seed=3) != ids(temperature=1.0, seed=4)
    assert ids(temperature=5.0, top_k=1) == ids() == ids(temperature=5.0, top_p=1e-6) == ids(temperature=5.0, min_p=1.0)
    assert ids(repetition_penalty=50.0) != ids()
    tokens = engine.answer("who?", memory, max_tokens=3, logprobs=4).tokens
    assert all(len(token.top) == 4 and token.top[0] == (token.id, pytest.approx(token.logprob)) for token in tokens)
    assert all(token.logprob < 0 for token in tokens)


@pytest.mark.slow
def test_streams_join_to_the_answer_and_close(make_engine):
    """Streamed pieces == the answer's text; leaving the stream early stops the work and keeps what was made."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    stream = engine.stream("who?", memory, max_tokens=12)
    assert "".join(stream).strip() == stream.answer.text == engine.answer("who?", memory, max_tokens=12).text
    with engine.stream("who?", memory, max_tokens=100) as stream:
        for _ in zip(range(3), stream.tokens(), strict=False):
            pass
    assert stream.answer.finish_reason == "cancelled"
    assert len(stream.answer.tokens) == 3


def test_stop_strings_end_and_are_cut(tokenizer):
    """Across token borders, in pieces: nothing of a stop string is ever handed out."""
    own = TextTokenizer(tokenizer)
    for stop, expected in (("the hat", "cat ate "), ("zebra", "cat ate the hat. 🙂 dog"), ("🙂", "cat ate the hat. ")):
        stream = _TextStream(own, (stop,))
        out = []
        for token in own.encode("cat ate the hat. 🙂 dog"):
            out.append(stream.push(token))
            if stream.stopped:
                break
        out.append(stream.flush())
        assert "".join(out) == expected
        assert all("\ufffd" not in piece for piece in out)


@pytest.mark.parametrize(
    "text", ["€€€ abc", "ありがとう", "naïve 🙂🙂🙂 ok", "hello 龘龘龘龘 there", "ཀཁགངཅ", "a🙂", "abc  def"]
)
def test_byte_fallback_streams_end_at_characters(text):
    """A vocabulary that spells unknown characters in bytes (Mistral, Phi-3): whole characters, the same text."""
    own = TextTokenizer(byte_fallback_tokenizer())
    for stop in ((), ("龘龘龘龘t", "🙂!")):
        stream = _TextStream(own, stop)
        pieces = [stream.push(token) for token in own.encode(text)]
        pieces.append(stream.flush())
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)
        assert len([piece for piece in pieces if piece]) > 1 or len(text) < 3


def test_bytes_that_are_no_character_hold_up_nothing():
    """A byte token that begins no character is U+FFFD at once, one cut short when the next token or the end comes."""
    own = TextTokenizer(byte_fallback_tokenizer())
    byte = {value: token for token, value in own.byte_tokens.items()}
    a = own.encode("a")[-1]
    stream = _TextStream(own, ())
    assert [stream.push(token) for token in (byte[0xFF], a, byte[0xE2], a)] == ["\ufffd", "a", "", "\ufffda"]
    assert [stream.push(byte[0xE2]), stream.flush()] == ["", "\ufffd"]


def test_evidence_points_at_exact_spans(make_engine):
    """Scores add up to 1 and fall; text[start:end] of the named document is the passage, emoji and CJK included."""
    engine = make_engine(heads=((0, 1), (2, 3)))
    documents = [Document(str(index), text) for index, text in enumerate(DOCUMENTS)]
    memory = engine.remember(documents)
    answer = engine.answer("who?", memory, max_tokens=5)
    for found in (answer.evidence, answer.passages):
        assert sum(item.score for item in found) == pytest.approx(1.0, abs=1e-5)
        assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
        for item in found:
            assert documents[int(item.document_id)].text[item.start : item.end] == item.text != ""
    assert len(answer.evidence) == 3 < len(answer.passages) == len(memory)
    assert answer.attention.shape == (5, len(memory))
    assert answer.usage.memory == memory.tokens


def test_recorded_attention_is_the_softmax(make_engine):
    """Mass on candidates plus mass on local rows == 1, computed from the same step's keys by hand."""
    engine = make_engine()
    record = AttentionRecord(2, ((0, 0),))
    record.add([torch.tensor([[0.2, 0.3], [0.9, 0.1]])])
    record.add([torch.tensor([[0.0, 0.5], [0.9, 0.1]])])
    assert record.steps().tolist() == [[pytest.approx(0.2), pytest.approx(0.3)], [0.0, 0.5]]
    assert record.scores().tolist() == [pytest.approx(0.2), pytest.approx(0.8)]
    memory = engine.remember(DOCUMENTS)
    attention = engine.answer("who?", memory, max_tokens=2).attention
    assert (attention >= 0).all()
    assert (attention.sum(1) < 1).all()
    by_head = engine.answer("who?", memory, max_tokens=2).attention_by_head
    assert by_head.shape == (3, 4, len(memory))
    torch.testing.assert_close(by_head.mean((0, 1)), attention.sum(0))


def test_rereading_takes_the_chunk_with_most_attention(make_engine):
    """The first token's logprob == that of a reading that puts the best-scored chunk in front by hand."""
    engine = make_engine("llama", heads=((1, 2),))
    memory = engine.remember(["the cat sat on the mat. " * 3, "a dog ate the hat? " * 2, "hat mat cat dog"])
    plain = engine.answer("who ate the hat?", memory, max_tokens=1)
    closer = engine.answer("who ate the hat?", memory, max_tokens=1, reread=1)
    best = int(plain.attention[0].argmax())
    separator = engine.tokenizer.encode("\n\n")
    reading = engine.reading(memory.state, max_tokens=1)
    ids = engine.local_ids("who ate the hat?")
    reading.begin(ids, engine.prompts.opening(ids, "question"))
    logits = reading.read_whole([best], separator)
    assert closer.tokens[0].id == int(logits.argmax())
    assert closer.tokens[0].logprob == pytest.approx(float(logits.log_softmax(-1).max()))
    assert closer.tokens[0].logprob != plain.tokens[0].logprob
    assert closer.usage.reread == len(memory.chunks[best].ids) + len(separator)
    assert closer.passages == plain.passages  # what was attended to before rereading
    assert (closer.usage.kept, plain.usage.kept) == (3, 3)


@pytest.mark.slow
def test_what_is_read_whole_is_bounded(make_engine):
    """Nothing within the budget == the paper's method; a share of attention, a number, and the adapter bound it too."""
    engine = make_engine("llama", heads=((1, 2),), scale=0.5)
    texts = ["the cat sat on the mat. " * 3, "a dog ate the hat? " * 2, "hat mat cat dog", "mat. " * 5, "dog? yes!"]
    memory = engine.remember(texts)
    sizes = [len(chunk.ids) for chunk in memory.chunks]
    joint = len(engine.tokenizer.encode("\n\n"))

    def ask(**options):
        return engine.answer("who ate the hat?", memory, max_tokens=3, **options)

    plain = ask(reread=0)
    none = ask(reread=2, reread_tokens=1)
    assert [token.logprob for token in none.tokens] == [token.logprob for token in plain.tokens]
    assert none.usage.reread == 0
    order = plain.attention[0].argsort(descending=True).tolist()
    assert ask(reread=2).usage.reread >= sum(sizes[index] + joint for index in order[:2]) - 8
    assert ask(reread=5, chunk_top_p=0.0).usage.reread == sizes[order[0]] + joint
    engine.info = replace(engine.info, reread=1)
    assert ask().usage.reread == ask(reread=1).usage.reread > 0
    assert ask(reread=0).usage.reread == 0
    with pytest.raises(ConfigError, match="reread_way must be one of run, moved; got 'sideways'"):
        ask(reread=1, reread_way="sideways")


def test_the_choice_follows_attention_that_moves(make_engine, monkeypatch):
    """Another chunk ahead for two steps is read in the last one's place, within the budget and four times at most."""
    looking = Looking(2, 10, 1.0, (4, 5, 6, 3))
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert looking.choose(scores) == [1, 3]
    ahead = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert looking.change(ahead, [1, 3]) is None
    assert looking.change(scores, [1, 3]) is None  # one step behind again: counted anew
    assert looking.change(ahead, [1, 3]) is None
    assert looking.change(ahead, [1, 3]) is None  # 5 + 6 tokens are over the budget
    roomy = Looking(2, 12, 1.0, (4, 5, 6, 3))
    assert [roomy.change(ahead, [1, 3]) for _ in range(2)] == [None, [1, 2]]
    roomy.changes = 4
    assert [roomy.change(ahead, [1, 3]) for _ in range(3)] == [None] * 3

    engine = make_engine("llama", heads=((1, 2),), scale=0.5)
    memory = engine.remember(["the cat sat on the mat. " * 3, "a dog ate the hat? " * 2, "hat mat cat dog"])
    monkeypatch.setattr(Looking, "change", lambda self, scores, whole: [(whole[0] + 1) % 3] if len(whole) else None)
    answer = engine.answer("who ate the hat?", memory, max_tokens=4, reread=1)
    monkeypatch.undo()
    still = engine.answer("who ate the hat?", memory, max_tokens=4, reread=1)
    assert answer.tokens[0].logprob == still.tokens[0].logprob
    assert answer.tokens[1].logprob != still.tokens[1].logprob
    assert len(answer.tokens) == 4


def test_answers_come_from_the_chunks_with_the_wanted_share_of_attention(make_engine):
    """chunk_top_p == a memory of the leading chunks; sources keep what all chunks received at the prompt's end."""
    engine = make_engine("llama", heads=((1, 2),), scale=0.5)
    texts = ["the cat sat on the mat. " * 3, "a dog ate the hat? " * 2, "hat mat cat dog", "mat. " * 5, "dog? yes!"]
    memory = engine.remember(texts)
    plain = engine.answer("who ate the hat?", memory, max_tokens=4)
    first = plain.attention[0]
    order = first.argsort(descending=True).tolist()
    best = sorted(order[:2])
    share = float((first[best].sum() - first[order[1]] / 2) / first.sum())
    answer = engine.answer("who ate the hat?", memory, max_tokens=4, chunk_top_p=share)
    alone = engine.answer("who ate the hat?", engine.remember([texts[index] for index in best]), max_tokens=4)
    assert [token.id for token in answer.tokens] == [token.id for token in alone.tokens]
    for one, other, before in zip(answer.tokens, alone.tokens, plain.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.logprob != pytest.approx(before.logprob, abs=1e-5)
    torch.testing.assert_close(answer.attention[0], first)
    torch.testing.assert_close(answer.attention[1:, best], alone.attention[1:], atol=1e-6, rtol=1e-4)
    assert [bool(column.any()) for column in answer.attention[1:].T] == [index in best for index in range(5)]
    assert (answer.usage.kept, answer.usage.chunks, plain.usage.kept) == (2, 5, 5)
    assert {item.document_id for item in answer.evidence} == {item.document_id for item in plain.evidence}


def test_the_adapter_says_how_much_attention_is_followed(make_engine):
    """A request without chunk_top_p takes the adapter's; 0 keeps the best chunk; shares outside 0..1 are refused."""
    engine = make_engine("llama", scale=0.5)
    memory = engine.remember(DOCUMENTS)
    engine.info = replace(engine.info, chunk_top_p=0.0)
    assert engine.answer("who?", memory, max_tokens=1).usage.kept == 1
    assert engine.answer("who?", memory, max_tokens=1, chunk_top_p=1.0).usage.kept == len(memory)
    assert engine.answer("who?", max_tokens=1).usage.kept == 0
    with pytest.raises(ConfigError, match=r"chunk_top_p must be between 0\.0 and 1\.0; got 1\.5"):
        engine.answer("who?", memory, chunk_top_p=1.5)


@pytest.mark.parametrize(
    ("scores", "share", "expected"),
    [
        ([0.1, 0.6, 0.3], 0.6, [1]),
        ([0.1, 0.6, 0.3], 0.61, [1, 2]),
        ([0.1, 0.6, 0.3], 0.0, [1]),
        ([0.1, 0.6, 0.3], 1.0, [1, 2, 0]),
        ([0.0, 0.0], 0.5, [0]),
    ],
)
def test_leading_chunks_are_the_fewest_with_the_share(scores, share, expected):
    """Best first, at least one; where nothing was attended to, the first."""
    assert leading_chunks(torch.tensor(scores), share) == expected


def test_packing_shares_chunks_and_removal_reads_the_rest_again(make_engine):
    """Packed documents need fewer chunks; removing one of a shared chunk keeps the others answerable."""
    engine = make_engine()
    documents = [Document(name, f"the {name} sat.") for name in ("cat", "dog", "hat")]
    loose, packed = engine.remember(documents), engine.remember(documents, packed=True)
    assert len(loose) == 3 > len(packed) == 1
    assert len(engine.answer("who?", packed, max_tokens=2).passages) == 3
    packed.remove(["dog"])
    assert [document.id for document in packed.documents] == ["cat", "hat"]
    assert {item.document_id for item in engine.answer("who?", packed, max_tokens=2).evidence} == {"cat", "hat"}
    with pytest.raises(ConfigError, match="no document 'dog' in memory; it holds 2"):
        packed.remove(["cat", "dog"])
    assert "cat" in packed


def test_bad_input_has_a_clear_message(make_engine, tmp_path):
    """Missing, binary, empty; too long; unknown option; empty question; a memory of another engine."""
    engine = make_engine()
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0\0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentNotFoundError, match="no file or folder at"):
        load_documents([tmp_path / "nothing.txt"])
    with pytest.raises(NotTextError, match=r"binary\.bin holds binary data; convert"):
        load_documents([tmp_path / "binary.bin"])
    with pytest.raises(EmptyCorpusError, match="no text found in"):
        load_documents([tmp_path / "empty"])
    left_out = []
    with pytest.raises(EmptyCorpusError):
        load_documents([tmp_path], skipped=lambda path, why: left_out.append(path.name))
    assert left_out == ["binary.bin"]
    with pytest.raises(EmptyCorpusError, match="document 'a' is empty"):
        engine.remember([Document("a", " \n")])
    memory = engine.remember(DOCUMENTS)
    with pytest.raises(ContextTooLongError, match=r"the window has 256; shorten the question"):
        engine.answer("who ate the hat? " * 60, memory)
    with pytest.raises(ConfigError, match="unknown setting tempreature"):
        engine.answer("who?", memory, tempreature=1)
    with pytest.raises(ConfigError, match=r"top_p must be above 0\.0 and at most 1\.0; got 2"):
        engine.answer("who?", memory, top_p=2)
    with pytest.raises(ConfigError, match="the question is empty"):
        engine.answer("", memory, template="raw")
    with pytest.raises(ConfigError, match="another engine"):
        make_engine("qwen2").answer("who?", memory)
    with pytest.raises(ConfigError, match="Document, a text or a Path; got int"):
        engine.remember([3])


def test_a_model_that_gives_no_numbers_is_an_error(make_engine):
    """Weights that are NaN: one clear error, not an answer of the vocabulary's first token; sampled or greedy."""
    model = tiny_model("llama")
    engine = make_engine(model=model)
    model.get_output_embeddings().weight.data[:] = float("nan")
    for options in ({}, {"temperature": 1.0, "seed": 1}):
        with pytest.raises(BaseModelError, match=r"the model gives no numbers .NaN.; its weights or adapter"):
            engine.answer("who?", max_tokens=4, **options)


def test_empty_questions_and_options_out_of_bounds(make_engine):
    """Blank questions and turns; top_p of 0, NaN, texts and truth values for numbers: one error with the bound."""
    engine = make_engine()
    for ask in (lambda: engine.answer(" \n"), lambda: engine.chat([Message("user", " ")]), lambda: engine.chat([])):
        with pytest.raises(ConfigError, match="the question is empty; ask something"):
            ask()
    assert engine.answer("\n", template="raw", max_tokens=1).tokens
    for options, message in (
        ({"top_p": 0.0}, r"top_p must be above 0\.0 and at most 1\.0; got 0\.0"),
        ({"chunk_top_p": -0.1}, "chunk_top_p must be between"),
        ({"temperature": float("nan")}, "temperature must be at least 0.0; got nan"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number at least 1; got '5'"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0.0; got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.answer("who?", **options)


def test_settings_check_themselves_and_round_trip():
    """Each bound names itself; to_dict/from_dict give the same object through JSON."""
    with pytest.raises(ConfigError, match=r"chunk_size must be at most 3582 .window 4096 - prompt 512"):
        FocusConfig(chunk_size=4000)
    with pytest.raises(ConfigError, match="positions must be one of ordered, shared; got 'left'"):
        FocusConfig(positions="left")
    with pytest.raises(ConfigError, match="max_tokens must be at least 1; got 0"):
        DecodeConfig(max_tokens=0)
    with pytest.raises(ConfigError, match="mix must hold weights"):
        TrainConfig(mix={})
    for config in (FocusConfig(chunk_size=64), DecodeConfig(stop=("a",)), TrainConfig(chunk_sizes=(4, 8))):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_chunk_row_never_passes_the_window(make_engine):
    """sink + chunk + prompt + generated + candidate stay within the window, or a message says what to change."""
    engine = make_engine(window=100, chunk_size=60, prompt_length=30)
    memory = engine.remember(DOCUMENTS)
    longest = []
    original = BaseDecoder.rope
    try:
        BaseDecoder.rope = lambda self, hidden, at: longest.append(int(at.max())) or original(self, hidden, at)
        engine.answer("who ate the hat? " * 3, memory, max_tokens=20)
    finally:
        BaseDecoder.rope = original
    assert 60 < max(longest) < 100
    with pytest.raises(ContextTooLongError, match="leave no room for the question"):
        engine.answer("who?", memory, max_tokens=60)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_round_trip(family, tmp_path, tokenizer):
    """Saved and loaded candidates are equal (int8 differences to half a step); another base's are refused."""
    model = tiny_model(family)
    loaded = LoadedBase(model, tokenizer, "tiny", fingerprint(model))
    adapter = CandidateAdapter(BaseDecoder(model))
    perturb(adapter)
    assert fingerprint(model) == loaded.fingerprint == fingerprint(tiny_model(family).to(torch.float64))
    info = AdapterInfo("tiny", loaded.fingerprint, FocusConfig(), {"steps": 1}, "{question}!", "sys", ((1, 2),))
    state = {key: value.clone() for key, value in adapter.state_dict().items()}
    for compact in (False, True):
        save_adapter(tmp_path / "a", adapter, info, compact=compact)
        perturb(adapter, seed=5)
        assert load_adapter(tmp_path / "a", adapter, loaded) == info
        for key, value in adapter.state_dict().items():
            step = (state[key] - adapter.base_state_dict()[key]).abs().amax(1, keepdim=True) / 127
            assert ((value - state[key]).abs() <= (0.51 * step if compact else 0)).all(), key
    other = tiny_model(family, seed=9)
    other_base = LoadedBase(other, tokenizer, "other", fingerprint(other))
    with pytest.raises(AdapterMismatchError, match=r"trained for 'tiny' .* but the base is 'other'"):
        load_adapter(tmp_path / "a", CandidateAdapter(BaseDecoder(other)), other_base)
    with pytest.raises(AdapterError, match="focusllm train --base other"):
        find_adapter(None, other_base)
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        load_adapter(tmp_path, adapter, loaded)
    (tmp_path / "a" / "adapter.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(tmp_path / "a", adapter, loaded)


def test_from_pretrained_reads_a_local_folder(tmp_path, tokenizer):
    """A folder with safetensors and tokenizer loads by path; without an adapter it is refused, 'untrained' works."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="no adapter is shipped"):
        FocusEngine.from_pretrained(tmp_path / "base", dtype=torch.float32)
    engine = FocusEngine.from_pretrained(tmp_path / "base", "untrained", dtype=torch.float32, chunk_size=40)
    assert engine.config.chunk_size == 40
    assert engine.config.window == 512
    assert engine.answer("who?", engine.remember("the cat sat."), max_tokens=2).evidence
    info = AdapterInfo("mine", engine.loaded.fingerprint, engine.config)
    save_adapter(tmp_path / "adapter", engine.adapter, info)
    again = FocusEngine.from_pretrained(tmp_path / "base", tmp_path / "adapter", dtype=torch.float32)
    assert again.info == info
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(tmp_path / "nothing")
    with pytest.raises(BaseModelError, match="no GGUF file at"):
        load_base(tmp_path / "nothing.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF????")
    with pytest.raises(BaseModelError, match="cannot be converted"):
        load_base(tmp_path / "bad.gguf")
    with pytest.raises(AdapterError, match="no adapter folder at"):
        find_adapter(tmp_path / "nowhere", engine.loaded)


@pytest.mark.slow
def test_heatmap_draws_and_refuses_nothing(make_engine, tmp_path):
    """An image appears; without recorded attention there is a message instead."""
    engine = make_engine()
    answer = engine.answer("who?", engine.remember(DOCUMENTS), max_tokens=3)
    save_heatmap(answer.attention, ["a", "$b", "\n"], ["c"] * answer.usage.chunks, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="no attention was recorded"):
        save_heatmap(engine.answer("who?", max_tokens=1).attention, ["a"], [], tmp_path / "map.png")


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["answer", "stream", "reread", "many", "cancelled"])
def test_an_answered_question_lets_its_memory_go(make_engine, ask):
    """Chunk KV is freed with the last name of the memory, without waiting for Python's garbage collector."""
    engine = make_engine()
    memory = engine.remember(DOCUMENTS)
    held = [weakref.ref(slab.kv.source) for slab in memory.state.slabs]
    gc.collect()
    gc.disable()
    try:
        if ask in ("answer", "reread"):
            answer = engine.answer("who?", memory, max_tokens=2, reread=int(ask == "reread"))
        elif ask == "many":
            answer = engine.answer_many(["who?", "what?"], memory, max_tokens=2)
        else:
            stream = engine.stream("who?", memory, max_tokens=4)
            next(iter(stream.tokens()))
            if ask == "cancelled":
                stream.cancel()
            answer = stream.answer
            del stream
        del memory
        assert answer
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()
