"""Put trainable candidate projections beside the frozen ones, and take them away again.

The candidate token passes every layer through its own query, key, value and output matrices (arXiv 2408.11745,
equations 2-5); all other rows pass through the base's. Candidate rows always stand last, so one number says where they
start. They are whole matrices, or differences of low rank. The module runs no model and reads no file; with no
candidate row the base's logits are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """A frozen linear layer with projections of its own for candidate rows.

    Args:
        base_layer: the base's projection; its bias serves both.
        rows: tells which rows are candidates.
    """

    def __init__(self, base_layer: nn.Linear, rows: CandidateRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows

    def matrix(self) -> Tensor:
        """Return the whole (out, in) candidate matrix; a low-rank one is put together for it."""
        raise NotImplementedError


class FullCandidate(CandidateLinear):
    """A second matrix for candidate rows.

    Args:
        dtype: of the new matrix.
    """

    def __init__(self, base_layer: nn.Linear, rows: CandidateRows, dtype: torch.dtype) -> None:
        super().__init__(base_layer, rows)
        self.weight = nn.Parameter(base_matrix(base_layer).to(dtype, copy=True))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, rows, in) to (batch, rows, out); rows from ``rows.start`` on use the candidate matrix."""
        start = self.rows.start
        if start is None:
            return self.base_layer(hidden)  # type: ignore[no-any-return]
        candidate = F.linear(hidden[..., start:, :], self.weight.to(hidden.dtype), self.base_layer.bias)
        if start == 0:
            return candidate
        return torch.cat([self.base_layer(hidden[..., :start, :]), candidate], dim=-2)

    def matrix(self) -> Tensor:
        """Return the (out, in) candidate matrix."""
        return self.weight


class LowRankCandidate(CandidateLinear):
    """The base's product on all rows, and on candidate rows a product of two thin matrices more.

    Nothing of the size of the base's matrix is made, so the base may be quantised.

    Args:
        dtype: of the thin matrices.
        rank: columns of ``up`` and rows of ``down``, at most what the base's matrix has.
    """

    def __init__(self, base_layer: nn.Linear, rows: CandidateRows, dtype: torch.dtype, rank: int) -> None:
        super().__init__(base_layer, rows)
        outputs, inputs = base_layer.out_features, base_layer.in_features
        rank, device = min(rank, outputs, inputs), base_layer.weight.device
        generator = torch.Generator().manual_seed(outputs * 31 + inputs)  # every process and run begins alike
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.down = nn.Parameter(down.to(device, dtype))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, rows, in) to (batch, rows, out); rows from ``rows.start`` on get the difference too."""
        out: Tensor = self.base_layer(hidden)
        start = self.rows.start
        if start is None:
            return out
        thin = F.linear(hidden[..., start:, :], self.down.to(hidden.dtype))
        candidate = out[..., start:, :] + F.linear(thin, self.up.to(hidden.dtype))
        return candidate if start == 0 else torch.cat([out[..., :start, :], candidate], dim=-2)

    def matrix(self) -> Tensor:
        """Return the (out, in) candidate matrix."""
        base = base_matrix(self.base_layer)
        return base.to(self.up.dtype) + self.up.detach() @ self.down.detach()


def base_matrix(layer: nn.Linear) -> Tensor:
    """Return the (out, in) matrix of a frozen projection, dequantised where it is quantised."""
    return plain(layer.weight)


def plain(weight: Tensor) -> Tensor:
    """Return a tensor without gradient and, where it is quantised, in its values."""
    weight = weight.detach()
    values: Tensor = weight if type(weight) is Tensor else weight.dequantize()
    return values


def low_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``up`` (out, rank) and ``down`` (rank, in) whose product is nearest to ``difference`` (out, in).

    The singular values are shared out evenly, so that both store equally well.
    """
    left, values, right = torch.linalg.svd(difference.float(), full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


class CandidateAdapter:
    """The candidate projections of one base; attached on construction, gone after :meth:`detach`.

    Args:
        base: the decoder to attach to.
        dtype: of the candidate matrices; the base's by default, float32 for training.
        rank: of the differences from the base's matrices; ``None`` for whole matrices.
    """

    def __init__(self, base: BaseDecoder, dtype: torch.dtype | None = None, rank: int | None = None) -> None:
        self.base, self.rank = base, rank
        self.rows = CandidateRows()
        self._wrapped: dict[tuple[int, str], FullCandidate | LowRankCandidate] = {}
        for layer, role, parent, attribute in list(base.projection_parents()):
            linear = getattr(parent, attribute)
            if isinstance(linear, CandidateLinear):
                raise AdapterError("this base has an adapter attached already; detach it first")
            kind = dtype or base.dtype
            wrapped: FullCandidate | LowRankCandidate = (
                FullCandidate(linear, self.rows, kind)
                if rank is None
                else LowRankCandidate(linear, self.rows, kind, rank)
            )
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
        own = ([it.weight] if isinstance(it, FullCandidate) else [it.up, it.down] for it in self._wrapped.values())
        return [parameter for parameters in own for parameter in parameters]

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``layers.{i}.{q,k,v,o}_proj.weight``, fused matrices split; at low rank ``.up`` and ``.down``."""
        if self.rank is None:
            return self.matrices()
        return {
            f"layers.{layer}.{role}.{name}": getattr(wrapped, name).detach()
            for (layer, role), wrapped in self._wrapped.items()
            for name in ("up", "down")
        }

    def matrices(self) -> dict[str, Tensor]:
        """Return the whole candidate matrices, ``layers.{i}.{q,k,v,o}_proj.weight``, whatever form they have."""
        return {key: value.detach() for key, value in self._named(lambda wrapped: wrapped.matrix())}

    def base_state_dict(self) -> dict[str, Tensor]:
        """Return the base's own matrices under the same keys as :meth:`matrices`."""
        return dict(self._named(lambda wrapped: base_matrix(wrapped.base_layer)))

    def differences(self, rank: int) -> dict[str, Tensor]:
        """Return ``.up`` and ``.down`` of rank ``rank`` nearest to the matrices' differences from the base's."""
        state = {}
        for (layer, role), wrapped in self._wrapped.items():
            change = wrapped.matrix().detach().float() - base_matrix(wrapped.base_layer).float()
            state[f"layers.{layer}.{role}.up"], state[f"layers.{layer}.{role}.down"] = low_rank(change, rank)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy tensors into the candidate matrices; those of the other form are put together, or cut by SVD.

        Raises:
            AdapterMismatchError: keys or shapes are not those of this base; nothing is copied then.
        """
        low = any(key.endswith(".up") for key in state)
        self._check(state, self._thin_shapes(state) if low else self._whole_shapes())
        for (layer, role), wrapped in self._wrapped.items():
            key = f"layers.{layer}.{role}"
            if not low:
                self._set_whole(wrapped, self._whole(state, layer, role))
            elif isinstance(wrapped, FullCandidate):
                device = wrapped.weight.device
                change = state[f"{key}.up"].to(device).float() @ state[f"{key}.down"].to(device).float()
                wrapped.weight.data.copy_(base_matrix(wrapped.base_layer).float() + change)
            elif state[f"{key}.up"].shape == wrapped.up.shape:
                wrapped.up.data.copy_(state[f"{key}.up"])
                wrapped.down.data.copy_(state[f"{key}.down"])
            else:
                self._set_thin(wrapped, state[f"{key}.up"].float() @ state[f"{key}.down"].float())

    def _set_whole(self, wrapped: FullCandidate | LowRankCandidate, weight: Tensor) -> None:
        if isinstance(wrapped, FullCandidate):
            wrapped.weight.data.copy_(weight)
        else:
            base = base_matrix(wrapped.base_layer).float()
            self._set_thin(wrapped, weight.to(base.device).float() - base)

    def _set_thin(self, wrapped: LowRankCandidate, change: Tensor) -> None:
        """Set the differences; where they need fewer ranks, the others stay as they began and can be trained."""
        up, down = low_rank(change, wrapped.up.shape[1])
        needed = up.norm(dim=0) > 1e-3 * up.norm()  # the root of a singular value that is rounding
        wrapped.up.data.copy_(up * needed)
        wrapped.down.data.copy_(torch.where(needed[:, None], down, wrapped.down.data.to(down)))

    def _whole(self, state: dict[str, Tensor], layer: int, role: str) -> Tensor:
        if role != "qkv":
            return state[_key(layer, role)]
        return self.base.fuse({name: state[_key(layer, name)] for name in ("q_proj", "k_proj", "v_proj")})

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for (layer, role), wrapped in self._wrapped.items():
            if role == "qkv":
                parts = self.base.split_fused(base_matrix(wrapped.base_layer))
                shapes.update({_key(layer, name): tuple(part.shape) for name, part in parts.items()})
            else:
                shapes[_key(layer, role)] = (wrapped.base_layer.out_features, wrapped.base_layer.in_features)
        return shapes

    def _thin_shapes(self, state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Return the shapes at the rank that each ``.down`` of ``state`` has."""
        shapes: dict[str, tuple[int, ...]] = {}
        for (layer, role), wrapped in self._wrapped.items():
            rank = len(state.get(f"layers.{layer}.{role}.down", ()))
            shapes[f"layers.{layer}.{role}.up"] = (wrapped.base_layer.out_features, rank)
            shapes[f"layers.{layer}.{role}.down"] = (rank, wrapped.base_layer.in_features)
        return shapes

    def _check(self, state: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
        for key in sorted(expected.keys() | state.keys()):
            found = tuple(state[key].shape) if key in state else "nothing"
            wanted = expected.get(key, "nothing")
            if found != wanted:
                raise AdapterMismatchError(
                    f"adapter tensor {key} is {found} where this {self.base.model_type} base needs {wanted}; "
                    "use the adapter trained for this base, or train one with `focusllm train`"
                )

    def _named(self, pick: Callable[[CandidateLinear], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for (layer, role), wrapped in self._wrapped.items():
            weight = pick(wrapped)
            if role == "qkv":
                for name, part in self.base.split_fused(weight).items():
                    yield _key(layer, name), part
            else:
                yield _key(layer, role), weight


def _key(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}.weight"
