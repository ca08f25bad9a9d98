"""Put trainable candidate projections beside the frozen ones, and take them away again.

The candidate token passes every layer through its own query, key, value and output matrices (arXiv 2408.11745,
equations 2-5); all other rows pass through the base's. Candidate rows always stand last, so one number says where they
start. The module runs no model and reads no file; with no candidate row the base's logits are bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focus_core.errors import AdapterError, AdapterMismatchError
from focus_core.model.families import BaseDecoder


class CandidateRows:
    """Where the candidate rows of the running pass start; ``None`` when there are none."""

    def __init__(self) -> None:
        self.start: int | None = None

    @contextmanager
    def starting_at(self, start: int | None) -> Iterator[None]:
        """Treat rows from ``start`` on as candidates inside the ``with``; ``None`` means no row is one."""
        self.start = start
        try:
            yield
        finally:
            self.start = None


class CandidateLinear(nn.Module):
    """A frozen linear layer with a second matrix for candidate rows.

    Args:
        base_layer: the base's projection; its bias serves both.
        rows: tells which rows are candidates.
        dtype: of the new matrix.
    """

    def __init__(self, base_layer: nn.Linear, rows: CandidateRows, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows
        self.weight = nn.Parameter(base_layer.weight.detach().to(dtype, copy=True))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, rows, in) to (batch, rows, out); rows from ``rows.start`` on use the candidate matrix."""
        start = self.rows.start
        if start is None:
            return self.base_layer(hidden)  # type: ignore[no-any-return]
        candidate = F.linear(hidden[..., start:, :], self.weight.to(hidden.dtype), self.base_layer.bias)
        if start == 0:
            return candidate
        return torch.cat([self.base_layer(hidden[..., :start, :]), candidate], dim=-2)


class CandidateAdapter:
    """The candidate projections of one base; attached on construction, gone after :meth:`detach`.

    Args:
        base: the decoder to attach to.
        dtype: of the candidate matrices; the base's by default, float32 for training.
    """

    def __init__(self, base: BaseDecoder, dtype: torch.dtype | None = None) -> None:
        self.base = base
        self.rows = CandidateRows()
        self._wrapped: dict[tuple[int, str], CandidateLinear] = {}
        for layer, role, parent, attribute in list(base.projection_parents()):
            linear = getattr(parent, attribute)
            if isinstance(linear, CandidateLinear):
                raise AdapterError("this base has an adapter attached already; detach it first")
            wrapped = CandidateLinear(linear, self.rows, dtype or base.dtype)
            wrapped.requires_grad_(False)
            setattr(parent, attribute, wrapped)
            self._wrapped[layer, role] = wrapped

    def detach(self) -> None:
        """Put the base's own projections back; harmless when called twice."""
        for layer, role, parent, attribute in list(self.base.projection_parents()):
            wrapped = self._wrapped.pop((layer, role), None)
            if wrapped is not None:
                setattr(parent, attribute, wrapped.base_layer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the candidate matrices: exactly what is trained and exactly what is saved."""
        return [wrapped.weight for wrapped in self._wrapped.values()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``layers.{i}.{q,k,v,o}_proj.weight`` tensors; fused matrices are split."""
        return {key: value.detach() for key, value in self._named(lambda wrapped: wrapped.weight)}

    def base_state_dict(self) -> dict[str, Tensor]:
        """Return the base's own matrices under the same keys as :meth:`state_dict`."""
        return {key: value.detach() for key, value in self._named(lambda wrapped: wrapped.base_layer.weight)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy tensors into the candidate matrices.

        Raises:
            AdapterMismatchError: keys or shapes are not those of this base; nothing is copied then.
        """
        expected = self.state_dict()
        for key in sorted(expected.keys() | state.keys()):
            if key not in state or key not in expected or state[key].shape != expected[key].shape:
                found = tuple(state[key].shape) if key in state else "nothing"
                wanted = tuple(expected[key].shape) if key in expected else "nothing"
                raise AdapterMismatchError(
                    f"adapter tensor {key} is {found} where this {self.base.model_type} base needs {wanted}; "
                    "use the adapter trained for this base, or train one with `focusllm train`"
                )
        for (layer, role), wrapped in self._wrapped.items():
            if role == "qkv":
                weight = self.base.fuse({name: state[_key(layer, name)] for name in ("q_proj", "k_proj", "v_proj")})
            else:
                weight = state[_key(layer, role)]
            wrapped.weight.data.copy_(weight)

    def _named(self, pick: object) -> Iterator[tuple[str, Tensor]]:
        for (layer, role), wrapped in self._wrapped.items():
            weight: Tensor = pick(wrapped)  # type: ignore[operator]
            if role == "qkv":
                for name, part in self.base.split_fused(weight).items():
                    yield _key(layer, name), part
            else:
                yield _key(layer, role), weight


def _key(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}.weight"
