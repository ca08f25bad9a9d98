"""Check questions packed side by side against each of them alone, on ragged examples of several families."""

from __future__ import annotations

import pytest
import torch

from focus_core.method.encoding import encode_chunks
from focus_core.method.layout import Scoring, local_start
from focus_core.method.local import Local, LocalRows
from focus_core.method.packed import commit, sweep
from focus_core.method.rows import Behind, ChunkRows
from focus_core.method.suffix import Suffix
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.training.objectives import Query, Task, dense_logits
from tests.conftest import perturb, tiny_model

MEMORIES = [[[0, 10, 11, 12, 13, 14], [0, 30, 31], [0, 50, 51, 52]], [[0, 60, 61, 62, 63]]]
QUERIES = [
    (0, Query((20, 21, 22, 23, 24, 25, 26, 27, 28), 6)),
    (1, Query((40, 41), 1)),  # nothing runs behind the chunk as an ordinary token
    (0, Query((33, 34, 35, 36), 2, prompt=1)),
    (0, Query((0, 44, 45, 46, 47, 48), 4)),  # begins with the sink
    (1, Query((70, 71, 72, 73, 74, 75, 76), 3, prompt=2)),
]


def _one_by_one(base, adapter, chunks, query, positions, scoring):
    """The same logits in sweeps of this one local context: ordinary rows first, then all candidates."""
    ids = query.ids
    group = ChunkRows(chunks, Suffix(chunks, len(ids)), range(chunks.size), chunks.size)
    ordinary = ids[query.injected_from : -2]
    if ordinary:
        with torch.no_grad():
            group.asked = [Behind(ordinary)]
            sweep(base, adapter, [[group]], (), positions)
            commit([[group]], ())
    group.asked = [Behind((), ids[query.split - 1 : -1], query.split - 1 - query.injected_from)]
    head = [] if ids[0] == 0 else [0]
    asked = Local([*head, *ids[:-1]], local_start(chunks.size, positions), len(head) + query.split)
    hidden = sweep(base, adapter, [[group]], [LocalRows([asked], [group], scoring=scoring)], positions)[0]
    return base.logits(hidden[:, -query.targets :])[0]


@pytest.mark.slow
@pytest.mark.parametrize("scoring", [Scoring(), Scoring("log_k", 2), Scoring(first_layer=1)])
@pytest.mark.parametrize(
    ("family", "positions"),
    [("llama", "shared"), ("llama", "ordered"), ("qwen3", "shared"), ("gemma2", "shared"), ("phi3", "shared"),
     ("gpt_neox", "ordered"), ("opt", "ordered")],
)  # fmt: skip
def test_packed_equals_one_by_one_with_its_gradients(family, positions, scoring):
    """Five local contexts over two memories packed together == each through the sweep alone, logits and gradients."""
    base = BaseDecoder(tiny_model(family))
    memories = [encode_chunks(base, rows) for rows in MEMORIES]
    tasks = [Task(memories[number], query) for number, query in QUERIES]
    with CandidateAdapter(base, torch.float32) as adapter:
        perturb(adapter)
        weights = adapter.trainable_parameters()
        for weight in weights:
            weight.requires_grad_(True)
        packed = dense_logits(base, adapter, tasks, 0, positions, scoring)
        alone = [_one_by_one(base, adapter, task.chunks, task.query, positions, scoring) for task in tasks]
        for one, other in zip(packed, alone, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        given, wanted = (
            torch.autograd.grad(sum(item.square().mean() for item in some), weights, allow_unused=True)
            for some in (packed, alone)
        )
        assert any(gradient is not None and gradient.abs().max() > 1e-6 for gradient in given)
        for one, other in zip(given, wanted, strict=True):
            zero = torch.zeros(1)
            torch.testing.assert_close(
                zero if one is None else one, zero if other is None else other, atol=1e-5, rtol=1e-3, check_stride=False
            )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox", "opt"])
def test_gradient_checkpointing_changes_nothing(family):
    """The same logits and the same gradients, and far fewer tensors kept for the backward pass."""
    base = BaseDecoder(tiny_model(family))
    memories = [encode_chunks(base, rows) for rows in MEMORIES]
    tasks = [Task(memories[number], query) for number, query in QUERIES]
    kept = {False: 0, True: 0}
    found = {}
    with CandidateAdapter(base, torch.float32) as adapter:
        perturb(adapter)
        weights = adapter.trainable_parameters()
        for weight in weights:
            weight.requires_grad_(True)
        for asked in kept:

            def note(tensor, asked=asked):
                kept[asked] += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                logits = dense_logits(base, adapter, tasks, 0, "shared", gradient_checkpointing=asked)
            total = sum(item.square().mean() for item in logits)
            found[asked] = [total, *torch.autograd.grad(total, weights, allow_unused=True)]
    assert kept[True] < 0.3 * kept[False]
    for one, other in zip(found[True], found[False], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
