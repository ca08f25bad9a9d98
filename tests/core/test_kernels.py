"""Check the Triton kernels against the reference, on ragged chunks in every format, through Triton's interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch

from focus_core.method.attention import Part, attend, merge
from focus_core.method.sources import FIRST
from tests.core.test_kv import FORMATS, filled

LENGTHS = [150, 70, 4, 33, 2]


@pytest.fixture(scope="module")
def kernels():
    """The module, with its kernels in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs Triton (pip install triton), whose kernels these are")
    return importlib.import_module("focus_core.method.kernels")


def expected(query, kv, layer, scale, softcap):
    """Attention of each chunk's rows over its keys but the first ones, as one tensor."""
    parts = []
    for row in range(kv.size):
        keys, values = (part[None, :, FIRST:] for part in kv.read(layer, row))
        own = query[row : row + 1]
        none = Part(own * 0, torch.full(own.shape[:3], -1e9))
        parts.append(attend(own, keys, values, scale, softcap=softcap) if keys.shape[2] else none)
    return Part(*(torch.cat(items) for items in zip(*parts, strict=True)))


@pytest.mark.parametrize(("rows", "head_dim", "softcap"), [(2, 64, None), (21, 8, 4.0)])
@pytest.mark.parametrize("written", FORMATS)
def test_the_kernel_is_the_reference(kernels, written, rows, head_dim, softcap):
    """Out and log-sum-exp over chunks of many lengths, one of them empty behind its first tokens, in another order."""
    kv, _ = filled(LENGTHS, written, head_dim=head_dim)
    kv = kv.select([3, 0, 4, 1, 2])
    query = torch.randn(kv.size, 4, rows, head_dim)
    found = kernels.attend_body(query, kv.layer(1), 0.3, softcap)
    wanted = expected(query, kv, 1, 0.3, softcap)
    torch.testing.assert_close(found.out, wanted.out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.lse, wanted.lse, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("written", ["base", "int8"])
def test_gradients_are_those_of_the_reference(kernels, written, softcap):
    """Queries' gradients, and own keys', through both results (a merge uses the log-sum-exp), on ragged rows."""
    kv, _ = filled(LENGTHS, written)
    query = torch.randn(kv.size, 4, 70, 8, requires_grad=True)
    own = torch.randn(kv.size, 4, 70, 8, requires_grad=True)
    weight = torch.randn(kv.size, 4, 70, 8)

    def gradients(body):
        other = Part(own, (query * own).sum(-1))
        return torch.autograd.grad((merge([body, other]).out * weight).sum(), [query, own])

    found = gradients(kernels.attend_body(query, kv.layer(0), 0.3, softcap))
    wanted = gradients(expected(query, kv, 0, 0.3, softcap))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-3)


def test_lengths_are_read_from_the_device(kernels):
    """The same arrays with other lengths: what lies behind the end of a chunk is not read."""
    kv, _ = filled([100, 100])
    query = torch.randn(2, 4, 2, 8)
    layer = kv.layer(0)
    short = layer.table.bodies.clone()
    layer.table.bodies.copy_(torch.tensor([96, 10]))
    found = kernels.attend_body(query, layer, 0.3)
    layer.table.bodies.copy_(short)
    whole = kernels.attend_body(query, layer, 0.3)
    torch.testing.assert_close(found.out[0], whole.out[0])
    keys, values = (part[None, :, FIRST : FIRST + 10] for part in kv.read(0, 1))
    torch.testing.assert_close(found.out[1:], attend(query[1:], keys, values, 0.3).out, atol=2e-5, rtol=1e-4)


def test_a_kernel_that_fails_is_left_for_the_reference(kernels, monkeypatch):
    """An error inside is told once and the answer is the reference's; running out of memory is not hidden."""
    from focus_core.method import attention

    kv, _ = filled(LENGTHS)
    query, layer = torch.randn(kv.size, 4, 2, 8), kv.layer(0)
    plain = attention.attend_chunks(query, layer, 0.3)
    monkeypatch.setattr(attention, "_KERNELS", ("cpu",))
    torch.testing.assert_close(attention.attend_chunks(query, layer, 0.3), plain, atol=2e-5, rtol=1e-4)

    def broken(*arguments):
        raise error

    monkeypatch.setattr(kernels, "attend_body", broken)
    error = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        attention.attend_chunks(query, layer, 0.3)
    error = RuntimeError("no such instruction")
    with pytest.warns(UserWarning, match="no such instruction"):
        assert torch.equal(attention.attend_chunks(query, layer, 0.3), plain)
    assert torch.equal(attention.attend_chunks(query, layer, 0.3), plain)
    assert attention._KERNELS == ()
