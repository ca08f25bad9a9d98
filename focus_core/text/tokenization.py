"""Turn text into token ids with exact character offsets, fast.

Byte-level BPE tokenizers are run by tiktoken, several times faster and with the same ids; at construction the two are
compared on difficult strings and any difference switches the fast path off. Special-token strings inside documents are
plain text here, so a document cannot forge a chat turn. The module does not cut text into chunks.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerBase

from focus_core.errors import BaseModelError
from focus_core.text.corpus import read_well_formed

Ints = NDArray[np.int64]

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_GPT2_DIGITS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
_PROBES = (
    "It's a  test,\n\n\tof 1234 words; don't   stop!  ",
    "naïve café — “quotes” … №5 ½ x²\u00a0\u2009y\u200b",
    "漢字かな交じり文。한국어 텍스트, русский текст — العربية हिन्दी",
    "👩‍👩‍👧 emoji 🇩🇪🙂🙂 e\u0301",
    "def f(x):\n    return x**2  # 0xFF\r\n\r\n\t\t}\n",
    "<|im_start|>system <s> </s> <|endoftext|>",
    "   leading and trailing   \n \n  ",
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text and where each begins.

    Args:
        ids: (n,) token ids.
        starts: (n,) index of the character that holds each token's first byte.
        clean: (n,) whether the token begins at a character's first byte; text may be cut only there.
        length: characters of the text.
    """

    ids: Ints
    starts: Ints
    clean: NDArray[np.bool_]
    length: int


class TextTokenizer:
    """A base's tokenizer, for plain text and for the markup of chat templates.

    Args:
        tokenizer: the base's, a fast one.
        fast: ``False`` keeps tiktoken out.

    Attributes:
        byte_tokens: of a byte-fallback vocabulary, the byte that each of its byte tokens stands for; else empty.

    Raises:
        BaseModelError: the tokenizer has no fast implementation, so exact offsets cannot be had.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, fast: bool = True) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BaseModelError(
                f"{type(tokenizer).__name__} has no fast implementation, which exact character offsets need; "
                "convert it to a tokenizer.json first"
            )
        self.tokenizer = tokenizer
        self._plain = FastTokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        spec = json.loads(backend.to_str())
        self._tiktoken = _tiktoken_of(spec) if fast else None
        self.byte_tokens = _byte_tokens(spec)
        if self._tiktoken is not None and any(
            self._tiktoken.encode(probe) != self._plain.encode(probe, add_special_tokens=False).ids for probe in _PROBES
        ):
            self._tiktoken = None

    @property
    def is_fast(self) -> bool:
        """Whether tiktoken does the work."""
        return self._tiktoken is not None

    @property
    def end_token(self) -> int:
        """Id of the token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; special-token strings in it are ordinary characters."""
        text = read_well_formed(text)
        if self._tiktoken is not None and self._tiktoken.accepts(text):
            ids = self._tiktoken.encode(text)
            if ids is not None:
                return ids
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_with_offsets(self, text: str) -> Encoded:
        """Return ids and exact character offsets of plain text."""
        text = read_well_formed(text)
        if self._tiktoken is not None and self._tiktoken.accepts(text):
            fast = self._tiktoken.encode_with_offsets(text)
            if fast is not None:
                return fast
        encoding = self._plain.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], offsets[:, 1]
        clean = np.ones(len(starts), dtype=np.bool_)
        clean[1:] = (starts[1:] >= ends[:-1]) & (starts[1:] > starts[:-1])
        return Encoded(np.array(encoding.ids, dtype=np.int64), starts, clean, len(text))

    def encode_markup(self, text: str) -> list[int]:
        """Return the ids of text that a chat template wrote: special-token strings in it are special tokens."""
        text = read_well_formed(text)
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


_LONG_RUNS = tuple(100_000 * space for space in " \n\t\r")  # tiktoken panics, with a backtrace, at about 500,000
_ABSENT = -1  # stands for single bytes that a vocabulary lacks; such text goes to the model's own tokenizer


class _Tiktoken:
    """tiktoken with the ranks of a byte-level BPE vocabulary."""

    def __init__(self, ranks: dict[bytes, int], ids: Ints, pattern: str, normalized: bool) -> None:
        self._encoding = tiktoken.Encoding("focusllm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._ids = ids
        self._normalized = normalized
        self._lengths = np.zeros(len(ids), dtype=np.int64)
        for token, rank in ranks.items():
            self._lengths[rank] = len(token)

    def accepts(self, text: str) -> bool:
        """Whether the normalizer, if there is one, would leave ``text`` alone, and no run of spaces is too long."""
        if any(run in text for run in _LONG_RUNS):
            return False
        return not self._normalized or unicodedata.is_normalized("NFC", text)

    def encode(self, text: str) -> list[int] | None:
        """Return ids, or ``None`` where tiktoken cannot: a byte that the vocabulary lacks, a run that is too long."""
        ranks = self._ranks(text)
        return None if ranks is None or _ABSENT in self._ids[ranks] else self._ids[ranks].tolist()

    def encode_with_offsets(self, text: str) -> Encoded | None:
        ranks = self._ranks(text)
        if ranks is None or _ABSENT in self._ids[ranks]:
            return None
        starts = np.zeros(len(ranks), dtype=np.int64)
        np.cumsum(self._lengths[ranks[:-1]], out=starts[1:])
        clean = np.ones(len(ranks), dtype=np.bool_)
        if not text.isascii():
            first = (np.frombuffer(text.encode("utf-8"), dtype=np.uint8) & 0xC0) != 0x80
            clean = first[starts]
            starts = (np.cumsum(first) - 1)[starts]
        return Encoded(self._ids[ranks], starts, clean, len(text))

    def _ranks(self, text: str) -> Ints | None:
        try:
            return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)
        except BaseException as error:  # its regular expressions give up on long runs with a panic, no Exception
            if type(error).__name__ != "PanicException":
                raise
            return None


def _tiktoken_of(spec: dict[str, Any]) -> _Tiktoken | None:
    """Build the fast path from a tokenizer.json, or ``None`` where it is not plain byte-level BPE."""
    model, normalizer = spec["model"], spec.get("normalizer")
    pattern = _pattern(spec.get("pre_tokenizer") or {})
    plain = all(token.get("special") for token in spec.get("added_tokens") or [])
    if model.get("type") != "BPE" or pattern is None or not plain:
        return None
    if normalizer is not None and normalizer.get("type") != "NFC":
        return None
    if model.get("byte_fallback") or model.get("dropout") or model.get("continuing_subword_prefix"):
        return None
    to_byte = {character: byte for byte, character in _byte_characters().items()}
    vocabulary: dict[str, int] = model["vocab"]
    ranks: dict[bytes, int] = {}
    ids: list[int] = []
    for character in to_byte:
        ranks[bytes([to_byte[character]])] = len(ids)
        ids.append(vocabulary.get(character, _ABSENT))
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        token = bytes(to_byte[character] for character in left + right)
        if token not in ranks:
            ranks[token] = len(ids)
            ids.append(vocabulary[left + right])
    return _Tiktoken(ranks, np.array(ids, dtype=np.int64), pattern, normalizer is not None)


def _byte_tokens(spec: dict[str, Any]) -> dict[int, int]:
    """Return the byte of each token such as ``<0xE2>``, where the decoder takes them for bytes."""
    if '"ByteFallback"' not in json.dumps(spec.get("decoder")):
        return {}
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram: pairs of token and score
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    return {int(vocabulary[name]): byte for name, byte in names.items() if name in vocabulary}


def _pattern(pre: dict[str, Any]) -> str | None:
    """Return the one regular expression that splits as a ``pre_tokenizer`` does, or ``None``."""
    steps = pre.get("pretokenizers", [pre])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    uses_regex = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return _GPT2 if uses_regex else None
    first = steps[0]
    if len(steps) == 2 and first.get("type") == "Digits" and first.get("individual_digits") and uses_regex:
        return _GPT2_DIGITS
    if len(steps) == 2 and first.get("type") == "Split" and not uses_regex:
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        regex = first.get("pattern", {}).get("Regex")
        return str(regex) if isolated and regex else None
    return None


def _byte_characters() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + index) for index, byte in enumerate(others)}
