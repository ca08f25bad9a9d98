"""Put trainable candidate projections beside the frozen ones, and take them away again.

The candidate token passes every layer through its own query, key, value and output matrices (arXiv 2408.11745,
equations 2-5); all other rows pass through the base's. Candidate rows always stand last, so one number says where they
start. They are whole matrices, or differences of low rank. Beyond the paper, local rows that read chunks whole may have
differences of low rank of their own, the reader's. The module runs no model and reads no file; with no candidate row
and nothing read whole the base's logits are bit-identical.
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

_READER = "reader."  # begins the names of its tensors


class CandidateRows:
    """Which rows of the running pass are candidates, and which read chunks whole."""

    def __init__(self) -> None:
        self.start: int | None = None
        """First candidate row; ``None`` when there are none."""
        self.readers: Tensor | None = None
        """(n, 1) ones at those of the first n rows that read chunks whole, zeros at the others; ``None`` for none."""

    @contextmanager
    def starting_at(self, start: int | None, readers: Tensor | None = None) -> Iterator[None]:
        """Treat rows from ``start`` on as candidates inside the ``with``, some as readers; ``None`` means no row."""
        self.start, self.readers = start, readers
        try:
            yield
        finally:
            self.start = self.readers = None


class Thin(nn.Module):
    """The product of two thin matrices, which begins at zero.

    Args:
        layer: whose difference it is.
        rank: columns of ``up`` and rows of ``down``, at most what the layer's matrix has.
        dtype: of the thin matrices.
    """

    def __init__(self, layer: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        outputs, inputs, device = layer.out_features, layer.in_features, layer.weight.device
        rank = min(rank, outputs, inputs)
        generator = torch.Generator().manual_seed(outputs * 31 + inputs)  # every process and run begins alike
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.down = nn.Parameter(down.to(device, dtype))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (batch, rows, in) to (batch, rows, out), to zero where the (rows, 1) mask is."""
        thin = F.linear(hidden, self.down.to(hidden.dtype))
        return F.linear(thin if mask is None else thin * mask.to(hidden.dtype), self.up.to(hidden.dtype))


class CandidateLinear(nn.Module):
    """A frozen linear layer with projections of its own for candidate rows.

    Args:
        base_layer: the base's projection; its bias serves both.
        rows: tells which rows are candidates.
        reader: difference of the rows that read chunks whole; ``None`` leaves them the base's.
    """

    def __init__(self, base_layer: nn.Linear, rows: CandidateRows, reader: Thin | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows
        self.reader = reader

    def frozen(self, hidden: Tensor) -> Tensor:
        """Map rows that are no candidates: through the base's projection, and the reader's where they read."""
        out: Tensor = self.base_layer(hidden)
        readers = self.rows.readers
        if readers is None or self.reader is None:
            return out
        count = len(readers)
        read = out[..., :count, :] + self.reader(hidden[..., :count, :], readers)
        return read if count == out.shape[-2] else torch.cat([read, out[..., count:, :]], dim=-2)

    def matrix(self) -> Tensor:
        """Return the whole (out, in) candidate matrix; a low-rank one is put together for it."""
        raise NotImplementedError


class FullCandidate(CandidateLinear):
    """A second matrix for candidate rows.

    Args:
        dtype: of the new matrix.
    """

    def __init__(self, base_layer: nn.Linear, rows: CandidateRows, reader: Thin | None, dtype: torch.dtype) -> None:
        super().__init__(base_layer, rows, reader)
        self.weight = nn.Parameter(base_matrix(base_layer).to(dtype, copy=True))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, rows, in) to (batch, rows, out); rows from ``rows.start`` on use the candidate matrix."""
        start = self.rows.start
        if start is None:
            return self.frozen(hidden)
        candidate = F.linear(hidden[..., start:, :], self.weight.to(hidden.dtype), self.base_layer.bias)
        if start == 0:
            return candidate
        return torch.cat([self.frozen(hidden[..., :start, :]), candidate], dim=-2)

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

    def __init__(
        self, base_layer: nn.Linear, rows: CandidateRows, reader: Thin | None, dtype: torch.dtype, rank: int
    ) -> None:
        super().__init__(base_layer, rows, reader)
        self.thin = Thin(base_layer, rank, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, rows, in) to (batch, rows, out); rows from ``rows.start`` on get the difference too."""
        out, start = self.frozen(hidden), self.rows.start
        if start is None:
            return out
        candidate = out[..., start:, :] + self.thin(hidden[..., start:, :])
        return candidate if start == 0 else torch.cat([out[..., :start, :], candidate], dim=-2)

    def matrix(self) -> Tensor:
        """Return the (out, in) candidate matrix."""
        base = base_matrix(self.base_layer)
        return base.to(self.thin.up.dtype) + self.thin.up.detach() @ self.thin.down.detach()


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
        reader_rank: of the differences of local rows that read chunks whole; 0 leaves them the base's.
    """

    def __init__(
        self,
        base: BaseDecoder,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
        reader_rank: int = 0,
    ) -> None:
        self.base, self.rank, self.reader_rank = base, rank, reader_rank
        self.rows = CandidateRows()
        self._wrapped: dict[tuple[int, str], FullCandidate | LowRankCandidate] = {}
        for layer, role, parent, attribute in list(base.projection_parents()):
            linear = getattr(parent, attribute)
            if isinstance(linear, CandidateLinear):
                raise AdapterError("this base has an adapter attached already; detach it first")
            kind = dtype or base.dtype
            reader = Thin(linear, reader_rank, kind) if reader_rank else None
            wrapped: FullCandidate | LowRankCandidate = (
                FullCandidate(linear, self.rows, reader, kind)
                if rank is None
                else LowRankCandidate(linear, self.rows, reader, kind, rank)
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
        """Return the candidate matrices and the reader's: exactly what is saved."""
        return [*self.candidate_parameters(), *self.reader_parameters()]

    def candidate_parameters(self) -> list[nn.Parameter]:
        """Return the candidate matrices."""
        own = (
            [it.weight] if isinstance(it, FullCandidate) else [it.thin.up, it.thin.down]
            for it in self._wrapped.values()
        )
        return [parameter for parameters in own for parameter in parameters]

    def reader_parameters(self) -> list[nn.Parameter]:
        """Return the reader's thin matrices; none without a reader."""
        readers = (it.reader for it in self._wrapped.values() if it.reader is not None)
        return [parameter for reader in readers for parameter in (reader.up, reader.down)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``layers.{i}.{q,k,v,o}_proj.weight``, fused matrices split; at low rank ``.up`` and ``.down``.

        A reader's are ``reader.layers.{i}.{q,k,v,o}_proj.up`` and ``.down``.
        """
        return (self.matrices() if self.rank is None else self.thin_state()) | self.reader_state()

    def thin_state(self) -> dict[str, Tensor]:
        """Return the thin candidate matrices; empty where they are whole."""
        return {
            f"layers.{layer}.{role}.{name}": getattr(wrapped.thin, name).detach()
            for (layer, role), wrapped in self._wrapped.items()
            if isinstance(wrapped, LowRankCandidate)
            for name in ("up", "down")
        }

    def reader_state(self) -> dict[str, Tensor]:
        """Return the reader's thin matrices; empty without a reader."""
        return {
            f"{_READER}layers.{layer}.{role}.{name}": getattr(wrapped.reader, name).detach()
            for (layer, role), wrapped in self._wrapped.items()
            if wrapped.reader is not None
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

        A reader that ``state`` does not have stays as it began, and does nothing.

        Raises:
            AdapterMismatchError: keys or shapes are not those of this base; nothing is copied then.
        """
        reader = {key: value for key, value in state.items() if key.startswith(_READER)}
        if reader:
            self._check(reader, {key: tuple(value.shape) for key, value in self.reader_state().items()})
        state = {key: value for key, value in state.items() if key not in reader}
        low = any(key.endswith(".up") for key in state)
        self._check(state, self._thin_shapes(state) if low else self._whole_shapes())
        own = self.reader_state()
        for key, value in reader.items():
            own[key].copy_(value)
        for (layer, role), wrapped in self._wrapped.items():
            key = f"layers.{layer}.{role}"
            if not low:
                self._set_whole(wrapped, self._whole(state, layer, role))
            elif isinstance(wrapped, FullCandidate):
                device = wrapped.weight.device
                change = state[f"{key}.up"].to(device).float() @ state[f"{key}.down"].to(device).float()
                wrapped.weight.data.copy_(base_matrix(wrapped.base_layer).float() + change)
            elif state[f"{key}.up"].shape == wrapped.thin.up.shape:
                wrapped.thin.up.data.copy_(state[f"{key}.up"])
                wrapped.thin.down.data.copy_(state[f"{key}.down"])
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
        up, down = low_rank(change, wrapped.thin.up.shape[1])
        needed = up.norm(dim=0) > 1e-3 * up.norm()  # the root of a singular value that is rounding
        wrapped.thin.up.data.copy_(up * needed)
        wrapped.thin.down.data.copy_(torch.where(needed[:, None], down, wrapped.thin.down.data.to(down)))

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
