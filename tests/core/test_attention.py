"""Check attention in parts against the library's operator, in every dtype that weights come in."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from focus_core.method import attention
from focus_core.method.attention import HIDDEN, Part, attend, attend_causal, attend_front, attend_self, merge

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(params=[True, False], ids=["flash", "reference"])
def flash(request, monkeypatch):
    """Run a test with the CPU's own kernel and with the differentiable one that other devices use."""
    if not request.param:
        monkeypatch.setattr(attention, "_flash_applies", lambda *arguments: False)


def _large(dtype, dim=64):
    """Queries and keys whose plain products pass float16's largest number; keys are far apart or equal."""
    query = torch.full((1, 4, 3, dim), 40.0)
    key = torch.tensor([30.0, 15.0, 30.0])[:, None].expand(1, 2, 3, dim)
    value = torch.randn(1, 2, 3, dim, generator=torch.Generator().manual_seed(0))
    return [tensor.to(dtype).contiguous() for tensor in (query, key, value)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.125, 1 / 96**0.5])
def test_large_keys_give_what_the_library_gives(flash, dtype, scale):
    """Queries of 40 and keys of 30 (76,800 in all before the scale) == scaled_dot_product_attention in float64."""
    query, key, value = _large(dtype)
    wide = [tensor.double() for tensor in (query, key, value)]
    tolerance = {"atol": 2e-2, "rtol": 2e-2}
    expected = F.scaled_dot_product_attention(*wide, scale=scale, enable_gqa=True)
    torch.testing.assert_close(attend(query, key, value, scale).out.double(), expected, **tolerance)
    nothing = Part(torch.zeros_like(query), torch.full(query.shape[:3], HIDDEN))
    best = attend_front(nothing, query, key, value, scale=scale, top=2).out.double()
    torch.testing.assert_close(best, expected, **tolerance)
    causal = F.scaled_dot_product_attention(*wide, scale=scale, enable_gqa=True, is_causal=True)
    torch.testing.assert_close(attend_causal(query, key, value, scale).out.double(), causal, **tolerance)
    assert attend_self(query, key, value, scale).lse.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_visible_keys_merges_away(flash, dtype):
    """Attention over hidden keys merged with attention over others == the others' alone: no NaN in any dtype."""
    query, key, value = (tensor / 40 for tensor in _large(dtype))
    hidden = attend(query, key, value, 0.125, bias=torch.full((1, 1, 1, 3), HIDDEN))
    seen = attend(query, key, value, 0.125)
    torch.testing.assert_close(merge([hidden, seen]).out, seen.out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_large_keys_are_finite(dtype):
    """Training in half precision: no NaN reaches the query, key or value."""
    tensors = [tensor.requires_grad_() for tensor in _large(dtype)]
    attend(*tensors, 0.125).out.float().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
