"""Know where each supported decoder keeps its layers, projections and positions.

One table row per family; an unknown family raises with the list. :class:`BaseDecoder` runs the base's own layers with
an attention function of ours in the place of softmax attention: no modeling file is copied, and the base is left as it
was found. The module knows nothing of chunks or candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from focus_core.errors import UnsupportedModelError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

Attend = Callable[[int, Tensor, Tensor, Tensor, float, float | None], Tensor]
"""``attend(layer, q, k, v, scale, softcap) -> out``.

``q`` is (batch, heads, rows, head_dim), ``k`` and ``v`` (batch, kv_heads, rows, head_dim), rotated already; ``out`` is
(batch, rows, heads, head_dim).
"""


@dataclass(frozen=True)
class Family:
    """Per-architecture facts of a decoder.

    Args:
        attention: name of the attention module inside a layer.
        modules: projection modules inside it; one entry ``qkv`` where query, key and value are fused.
        fused: how a fused matrix interleaves its rows (``blocks``: q, k, v; ``heads``: per head q, k, v).
        rotary: ``half`` (rotate-half RoPE, keys can be moved) or ``learned`` (absolute, keys cannot be moved).
        tables: whether layers of different types have rotary tables of their own.
        unturned: config field that says which layers rotate (1) and which know no positions (0).
        embedding: config field of what embeddings are multiplied by, where the module does not do it itself.
        logits: config field of what logits are divided by.
        places: whether attention itself asks for positions.
    """

    attention: str
    modules: dict[str, str]
    fused: Literal["blocks", "heads"] | None = None
    rotary: Literal["half", "learned"] = "half"
    tables: bool = False
    unturned: str | None = None
    embedding: str | None = None
    logits: str | None = None
    places: bool = False


_SEPARATE = {name: name for name in PROJECTIONS}
FAMILIES: dict[str, Family] = {
    "llama": Family("self_attn", _SEPARATE),
    "mistral": Family("self_attn", _SEPARATE),
    "qwen2": Family("self_attn", _SEPARATE),
    "qwen3": Family("self_attn", _SEPARATE),
    "gemma2": Family("self_attn", _SEPARATE),
    "gemma3_text": Family("self_attn", _SEPARATE, tables=True),
    "smollm3": Family("self_attn", _SEPARATE, unturned="no_rope_layers"),
    "olmo2": Family("self_attn", _SEPARATE),
    "granite": Family("self_attn", _SEPARATE, embedding="embedding_multiplier", logits="logits_scaling"),
    "ministral": Family("self_attn", _SEPARATE),
    "ministral3": Family("self_attn", _SEPARATE, places=True),
    "phi3": Family("self_attn", {"qkv": "qkv_proj", "o_proj": "o_proj"}, fused="blocks"),
    "gpt_neox": Family("attention", {"qkv": "query_key_value", "o_proj": "dense"}, fused="heads"),
    "opt": Family("self_attn", {**_SEPARATE, "o_proj": "out_proj"}, rotary="learned"),
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_NO_KV = "some of its layers keep a recurrent state instead of keys and values, which has no chunk KV to read"
_LATENT = "it keeps one latent vector a token instead of keys and values, with projections of another shape"
_DISTANCE = "its scores depend on the distance of two tokens (ALiBi), so that a chunk's keys have one place only"
_PAIRS = "it turns neighbouring numbers of a key as pairs, not its halves"
_ENCODER = "it is not a decoder alone; chunks are read by a decoder's own layers"
CANNOT: dict[str, str] = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba2"), _NO_KV),
    **dict.fromkeys(("falcon_h1", "granitemoehybrid", "qwen3_next", "lfm2", "nemotron_h"), _NO_KV),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), _LATENT),
    **dict.fromkeys(("bloom", "mpt"), _DISTANCE),
    **dict.fromkeys(("gptj", "codegen", "glm", "glm4", "cohere", "cohere2"), _PAIRS),
    **dict.fromkeys(("t5", "bart", "pegasus", "mbart", "bert", "roberta"), _ENCODER),
    "gemma3n_text": "later layers share the keys and values of earlier ones, so a layer's projections are not its own",
    "gpt_oss": "every softmax has a learned sink, which attention that is put together from parts leaves out",
    "llama4_text": "attention is cut into blocks of fixed places, which a moved key would leave",
    "gpt2": "its projections are Conv1D modules with learned positions; OPT is served instead",
}
"""Why a family cannot be served; another unknown family may only lack its row."""


def family_of(model_type: str) -> Family:
    """Return the table row of ``model_type``; raises :class:`UnsupportedModelError` with the reason."""
    if model_type not in FAMILIES:
        why = CANNOT.get(model_type)
        raise UnsupportedModelError(
            f"decoder family {model_type!r} is not supported{f': {why}' if why else ''}; supported are "
            f"{', '.join(sorted(FAMILIES))}"
            + ("" if why else ". A new family is one row of focus_core/model/families.py")
        )
    return FAMILIES[model_type]


class Rope(NamedTuple):
    """Rotary tables of some positions.

    Args:
        tables: (cosine, sine) by layer type; one under ``""`` where all layers share it.
        positions: (batch, rows) they are of.
    """

    tables: dict[str, tuple[Tensor, Tensor]]
    positions: Tensor

    def without(self, start: int, stop: int) -> Rope:
        """Return what is left without rows ``start`` to ``stop``."""

        def cut(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[:, :start], tensor[:, stop:]], dim=1)

        tables = {kind: (cut(cos), cut(sin)) for kind, (cos, sin) in self.tables.items()}
        return Rope(tables, cut(self.positions))


def _call_attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    attend: Attend = kwargs["focus_attend"]
    return attend(module.layer_idx, query, key, value, kwargs["scaling"], kwargs.get("softcap")), None  # type: ignore[arg-type]


_INTERFACE = "focusllm"
AttentionInterface.register(_INTERFACE, _call_attend)


class BaseDecoder:
    """The frozen decoder, run layer by layer with a given attention function.

    Raises:
        UnsupportedModelError: unknown family, or a rotary scheme whose keys depend on the sequence length.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config: Any = model.config.get_text_config(decoder=True)  # of a model that sees images too
        self.model_type = str(self.config.model_type)
        self.family = family_of(self.model_type)
        self._lock = threading.RLock()
        body: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        self._body = body.decoder if hasattr(body, "decoder") else body
        self.layers: nn.ModuleList = self._body.layers
        self._check()
        self.frequencies: list[Tensor] = self._frequencies() if self.rotary else []
        """(rotary_dim / 2,) float32 angles a position, of every layer; zeros where a layer knows no positions."""

    def _check(self) -> None:
        if getattr(self.config, "use_bidirectional_attention", False):
            raise UnsupportedModelError(
                "this base reads in both directions; candidates need a decoder that reads forward"
            )
        if not self.rotary:
            return
        known = getattr(self._body.rotary_emb, "rope_type", "default")
        for rope_type in known.values() if isinstance(known, dict) else [known]:
            if rope_type not in _ROPE_TYPES:
                raise UnsupportedModelError(
                    f"rope type {rope_type!r} changes keys with the sequence length, so chunk KV could not be reused; "
                    f"supported are {', '.join(_ROPE_TYPES)}"
                )

    def _frequencies(self) -> list[Tensor]:
        rotary, family = self._body.rotary_emb, self.family
        if family.tables:
            tables = {kind: getattr(rotary, f"{kind}_inv_freq").float() for kind in set(self.config.layer_types)}
            return [tables[kind] for kind in self.config.layer_types]
        table = rotary.inv_freq.float()
        still, turns = torch.zeros_like(table), self._turns()
        return [table if turned else still for turned in turns]

    def _turns(self) -> list[bool]:
        """Return which layers rotate their keys."""
        field = self.family.unturned
        return [True] * self.num_layers if field is None else [bool(it) for it in getattr(self.config, field)]

    # -- shapes -------------------------------------------------------------------------------------------------

    @property
    def rotary(self) -> bool:
        """Whether keys carry rotary positions and can be moved."""
        return self.family.rotary == "half"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_heads)

    @property
    def window(self) -> int:
        """Most positions the base was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def sliding_window(self) -> int | None:
        """Tokens that the narrowest layer attends to, or ``None`` when every layer sees all."""
        size = getattr(self.config, "sliding_window", None)
        if size is None or getattr(self.config, "use_sliding_window", True) is False:
            return None
        kinds = getattr(self.config, "layer_types", None)
        return int(size) if kinds is None or "sliding_attention" in kinds else None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[return-value]

    # -- running ------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens.

        Args:
            ids: (batch, rows) token ids.
            positions: (batch, rows) positions; only learned ones are read here.

        Returns:
            (batch, rows, hidden).
        """
        hidden: Tensor = self.model.get_input_embeddings()(ids)
        if self.family.rotary == "learned":
            if self._body.project_in is not None:
                hidden = self._body.project_in(hidden)
            hidden = hidden + self._body.embed_positions(None, position_ids=positions)
        if self.family.embedding is not None:
            hidden = hidden * getattr(self.config, self.family.embedding)
        return hidden

    def rope(self, hidden: Tensor, positions: Tensor) -> Rope | None:
        """Return the cosine and sine tables of ``positions`` (batch, rows), or ``None`` for learned positions."""
        if not self.rotary:
            return None
        if not self.family.tables:
            return Rope({"": self._body.rotary_emb(hidden, positions)}, positions)
        kinds = sorted(set(self.config.layer_types))
        return Rope({kind: self._body.rotary_emb(hidden, positions, kind) for kind in kinds}, positions)

    def run_layer(self, index: int, hidden: Tensor, rope: Rope | None, attend: Attend) -> Tensor:
        """Run one layer of the base with ``attend`` for its attention; call inside :meth:`own_attention`.

        Args:
            index: layer number.
            hidden: (batch, rows, hidden).
            rope: from :meth:`rope`.
            attend: see :data:`Attend`.

        Returns:
            (batch, rows, hidden).
        """
        extra: dict[str, Any] = {}
        if rope is not None:
            kind = self.config.layer_types[index] if self.family.tables else ""
            extra = {"position_embeddings": rope.tables[kind]}
            if self.family.places:
                extra["position_ids"] = rope.positions
        out = self.layers[index](hidden, attention_mask=None, focus_attend=attend, **extra)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Map last-layer states (batch, rows, hidden) to logits (batch, rows, vocabulary) in the base's dtype."""
        norm = getattr(self._body, "norm", None) or getattr(self._body, "final_layer_norm", None)
        hidden = norm(hidden) if norm is not None else hidden
        project_out = getattr(self._body, "project_out", None)
        hidden = project_out(hidden) if project_out is not None else hidden
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[no-untyped-call]
        if self.family.logits is not None:
            logits = logits / getattr(self.config, self.family.logits)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap is not None else logits

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Route the base's attention to :data:`Attend` functions; the base's own choice is put back on exit.

        One thread at a time may be inside, so passes of several requests take turns.
        """
        with self._lock:
            before = self.config._attn_implementation
            self.config._attn_implementation = _INTERFACE
            try:
                yield
            finally:
                self.config._attn_implementation = before

    # -- projections --------------------------------------------------------------------------------------------

    def projection_parents(self) -> Iterator[tuple[int, str, nn.Module, str]]:
        """Yield (layer, role, parent module, attribute) of every attention projection; role is a key of ``modules``."""
        for index, layer in enumerate(self.layers):
            parent = getattr(layer, self.family.attention)
            for role, attribute in self.family.modules.items():
                yield index, role, parent, attribute

    def split_fused(self, weight: Tensor) -> dict[str, Tensor]:
        """Split a fused (q+k+v rows, hidden) matrix into ``q_proj``, ``k_proj``, ``v_proj``."""
        if self.family.fused == "heads":
            per_head = weight.view(self.num_heads, 3, self.head_dim, -1)
            parts = [per_head[:, index].reshape(self.num_heads * self.head_dim, -1) for index in range(3)]
        else:
            query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            parts = list(torch.split(weight, [query, key, key]))
        return dict(zip(PROJECTIONS[:3], parts, strict=True))

    def fuse(self, parts: dict[str, Tensor]) -> Tensor:
        """Undo :meth:`split_fused`."""
        weights = [parts[name] for name in PROJECTIONS[:3]]
        if self.family.fused == "heads":
            stacked = torch.stack([weight.view(self.num_heads, self.head_dim, -1) for weight in weights], dim=1)
            return stacked.reshape(3 * self.num_heads * self.head_dim, -1)
        return torch.cat(weights)
