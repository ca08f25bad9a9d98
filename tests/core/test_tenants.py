"""Try to break the walls between tenants, and check filters by metadata against plain Python."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_core.errors import ConfigError, FocusError
from focus_core.store.collections import Change
from focus_core.store.database import Store
from focus_core.store.places import Place
from focus_core.text.corpus import Document

SECRET = "the launch code of the north gate is 4711"


def test_a_tenant_sees_nothing_of_another(make_engine, tmp_path, monkeypatch):
    """Names, documents, chunk KV, sizes and error texts of one tenant are not to be had by another."""
    from focus_core.store import memory as module

    engine = make_engine()
    one, two = Store(tmp_path, tenant="alpha"), Store(tmp_path, tenant="beta")
    engine.remember([Document("secret.txt", SECRET)], store=one).save(one, name="plans")
    keys = [engine.encoder.key(chunk) for chunk in engine.encoder.cut(Document("x", SECRET))]
    assert one.holds(keys) == set(keys)
    assert two.holds(keys) == set()
    assert Store(tmp_path).holds(keys) == set()
    assert two.collections() == []
    tries = [
        lambda: two.read("plans"),
        lambda: two.drop("plans"),
        lambda: two.remove("plans", ["secret.txt"]),
        lambda: two.select("plans", {}),
        lambda: two.listing("plans"),
        lambda: two.get(keys[0]),
        lambda: engine.load_memory(Place(tmp_path, "plans", "beta")),
        lambda: two.read_segment(keys[0]),
    ]
    for attempt in tries:
        with pytest.raises(FocusError) as caught:
            attempt()
        assert "secret" not in str(caught.value)
        assert "alpha" not in str(caught.value)
    counted = []
    original = module.encode_chunks
    monkeypatch.setattr(
        module, "encode_chunks", lambda base, rows, *more: counted.append(len(rows)) or original(base, rows, *more)
    )
    engine.remember([Document("mine", SECRET)], store=two).save(two, name="plans")
    assert sum(counted) == len(keys)  # computed as if nobody had it: its time tells nothing
    assert len(Store(tmp_path)) == 2 * len(keys)
    two.drop("plans")
    two.prune(older_than=0)
    assert [item.id for item in engine.load_memory(Place(tmp_path, "plans", "alpha")).documents] == ["secret.txt"]
    assert one.verify() == []


def test_salts_are_secrets_of_the_store(make_engine, tmp_path):
    """The same tenant has another salt in another store, and the same after opening again."""
    address = Store(tmp_path / "a", tenant="alpha").address("0" * 64)
    assert Store(tmp_path / "a", tenant="alpha").address("0" * 64) == address
    assert Store(tmp_path / "b", tenant="alpha").address("0" * 64) != address
    assert Store(tmp_path / "a").address("0" * 64) == "0" * 64


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0]), st.sampled_from("abc"))
METADATA = st.dictionaries(st.sampled_from(["k", "l", "odd \"key' $.x"]), VALUES, max_size=3)


def _alike(own, value):
    if isinstance(own, str) or isinstance(value, str):
        return isinstance(own, str) and isinstance(value, str)
    return own is not None and value is not None


_PYTHON = {
    "$eq": lambda own, value: own == value,
    "$ne": lambda own, value: own != value,
    "$in": lambda own, value: own in value,
    "$nin": lambda own, value: own not in value,
    "$gt": lambda own, value: _alike(own, value) and own > value,
    "$gte": lambda own, value: _alike(own, value) and own >= value,
    "$lt": lambda own, value: _alike(own, value) and own < value,
    "$lte": lambda own, value: _alike(own, value) and own <= value,
}
CONDITIONS = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(["$eq", "$ne"]), VALUES, min_size=1),
    st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(VALUES, max_size=3), min_size=1),
    st.dictionaries(
        st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), VALUES.filter(lambda v: v is not None), min_size=1
    ),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(METADATA, max_size=6), st.dictionaries(st.sampled_from(["k", "l", "odd \"key' $.x"]), CONDITIONS))
def test_filters_in_sql_are_those_of_python(store, rows, where):
    """Documents that SQL selects == those whose metadata fit by Python's own comparisons."""
    documents = {str(number): Document(str(number), "x", metadata) for number, metadata in enumerate(rows)}
    store.commit("x", {}, {}, Change(documents, [], set(documents), replace=True))
    expected = [
        document.id
        for document in documents.values()
        if all(
            _PYTHON[operator](document.metadata.get(key), value)
            for key, wanted in where.items()
            for operator, value in (wanted if isinstance(wanted, dict) else {"$eq": wanted}).items()
        )
    ]
    assert sorted(store.select("x", where), key=int) == expected


def test_filters_say_what_they_cannot_do(store):
    """Unknown operators, containers, numbers that no database holds."""
    store.commit("y", {}, {}, Change({"a": Document("a", "x", {"n": 1})}, [], {"a"}))
    for where in ({"n": {"$near": 1}}, {"n": [1]}, {"n": {"$in": 3}}, {"n": 10**30}, {"n": {"$gt": None}}):
        with pytest.raises(ConfigError):
            store.select("y", where)


@pytest.mark.slow
def test_a_memory_of_the_documents_that_fit(make_engine, tmp_path):
    """where= opens what a subset of the whole would be, packed neighbours too, and saving it loses nobody else."""
    engine = make_engine()
    documents = [Document(str(number), f"the cat {number}", {"year": 2000 + number}) for number in range(4)]
    for packed in (False, True):
        folder = tmp_path / str(packed)
        whole = engine.remember([])
        whole.add(documents, packed=packed)
        whole.save(folder)
        part = engine.load_memory(folder, where={"year": {"$gte": 2002}})
        assert part.documents == documents[2:]
        expected = engine.answer("who?", whole.subset(["2", "3"]), max_tokens=3)
        assert engine.answer("who?", part, max_tokens=3).text == expected.text
        if not packed:
            part.remove(["2"])
            part.save(folder)
            assert [one.id for one in engine.load_memory(folder).documents] == ["0", "1", "3"]
    assert engine.load_memory(folder, where={"year": 1}).documents == []
