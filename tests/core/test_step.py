"""Count what a decoding step asks of the device: few operations, however many chunks there are and of what lengths."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from focus_core.method.encoding import encode_chunks
from focus_core.method.slabs import Slab
from focus_core.method.state import MemoryState
from focus_core.text.chunking import Chunk, Span
from tests.conftest import tiny_model

LAYERS = 30  # of the default base; the number of operations knows no widths
MOST = 2600
VIEWS = {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "reshape", "select"}
VIEWS |= {"slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}


class Count(TorchDispatchMode):
    """Counts the operations that are not views, and notes those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        self.operations += name not in VIEWS
        self.waits += name in ("_local_scalar_dense", "nonzero", "item")
        return operator(*args, **(kwargs or {}))


def state_of(engine, lengths):
    """A memory of chunks of these lengths."""
    rng = random.Random(0)
    chunks = [Chunk(tuple(rng.randrange(10, 300) for _ in range(size)), (Span("a", 0, 1),)) for size in lengths]
    kv = encode_chunks(engine.base, [engine.encoder.row(chunk) for chunk in chunks])
    return MemoryState({}, tuple(chunks), (Slab.of([(chunk,) for chunk in chunks], kv),))


def ragged(count):
    rng = random.Random(1)
    return sorted((min(60, max(1, int(rng.lognormvariate(3.0, 0.8)))) for _ in range(count)), reverse=True)


@pytest.fixture
def engine(make_engine):
    model = tiny_model("llama", layers=LAYERS)
    return make_engine("llama", model=model, dtype=torch.bfloat16, chunk_size=60, top_candidates=8)


def counted(engine, lengths):
    reading = engine.reading(state_of(engine, lengths), max_tokens=8)
    reading.begin([20, 21, 22, 23])
    reading.step(30)
    with Count() as count:
        reading.step(31)
    return count


@pytest.mark.slow
def test_a_step_is_few_operations_whatever_lies_in_memory(engine):
    """At most 2,600 at 8, 24 and 275 chunks; the same for equal and for ragged ones, and nothing waits inside."""
    several = {name: counted(engine, lengths) for name, lengths in {
        "8 equal": [60] * 8, "24 equal": [60] * 24, "24 ragged": ragged(24), "275 ragged": ragged(275),
    }.items()}  # fmt: skip
    assert all(count.operations <= MOST for count in several.values()), several
    found = [several[name].operations for name in ("24 equal", "24 ragged", "275 ragged")]
    assert max(found) - min(found) < 10  # a mask for chunks of fewer tokens than those that lie apart
    assert all(count.waits == 0 for count in several.values())
