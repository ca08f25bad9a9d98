"""Check the packed pass of training against the sweep that decoding uses, on ragged examples of several families."""

from __future__ import annotations

import pytest
import torch

from focus_core.method.encoding import encode_chunks
from focus_core.method.parallel import ChunkRows, LocalRows, Scoring, commit, local_start, sweep
from focus_core.method.suffix import Suffix
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.training.objectives import Query, Task, dense_logits
from tests.conftest import perturb, tiny_model

NONE = torch.empty(0, dtype=torch.long)
MEMORIES = [[[0, 10, 11, 12, 13, 14], [0, 30, 31], [0, 50, 51, 52]], [[0, 60, 61, 62, 63]]]
QUERIES = [
    (0, Query((20, 21, 22, 23, 24, 25, 26, 27, 28), 6)),
    (1, Query((40, 41), 1)),  # nothing runs behind the chunk as an ordinary token
    (0, Query((33, 34, 35, 36), 2, prompt=1)),
    (0, Query((0, 44, 45, 46, 47, 48), 4)),  # begins with the sink
    (1, Query((70, 71, 72, 73, 74, 75, 76), 3, prompt=2)),
]


def _one_by_one(base, adapter, chunks, query, positions, scoring):
    """The same logits by the decoding sweep: ordinary rows first, then all candidates of this one local context."""
    ids = torch.tensor(query.ids)
    suffix, count = Suffix(chunks, len(ids)), chunks.size
    ordinary = ids[query.injected_from : -2]
    if len(ordinary):
        with torch.no_grad():
            before = ChunkRows(chunks, suffix, range(count), count, ordinary, NONE, NONE)
            sweep(base, adapter, [[before]], (), positions)
            commit([[before]], ())
    visible = torch.arange(query.split - 1, len(ids) - 1) - query.injected_from
    group = ChunkRows(chunks, suffix, range(count), count, NONE, ids[query.split - 1 : -1], visible)
    head = NONE if query.ids[0] == 0 else torch.tensor([0])
    local = LocalRows(
        torch.cat([head, ids[:-1]]),
        local_start(count, positions),
        None,
        [group],
        shared_rows=len(head) + query.split,
        scoring=scoring,
    )
    hidden = sweep(base, adapter, [[group]], [local], positions)[0]
    return base.logits(hidden[:, -query.targets :])[0]


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
