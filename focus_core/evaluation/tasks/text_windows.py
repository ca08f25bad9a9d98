"""Cut the ends of long texts: token ids with their characters, the same last tokens at every length.

Places are functions of a seed. The module runs no model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_documents
from focus_core.text.tokenization import Encoded, TextTokenizer


@dataclass(frozen=True)
class Window:
    """The end of a text.

    Args:
        name: of the text and the place.
        text: its characters.
        encoded: its ids and offsets; they end with the targets.
    """

    name: str
    text: str
    encoded: Encoded

    @property
    def fingerprint(self) -> str:
        """Short hash of the token ids."""
        return hashlib.sha256(self.encoded.ids.tobytes()).hexdigest()[:16]

    def end(self, tokens: int) -> Window:
        """Return the last ``tokens`` tokens of this window."""
        first = max(0, len(self.encoded.ids) - tokens)
        at = int(self.encoded.starts[first])
        part = Encoded(
            self.encoded.ids[first:],
            self.encoded.starts[first:] - at,
            self.encoded.clean[first:],
            self.encoded.length - at,
        )
        return Window(self.name, self.text[at:], part)


def read_windows(
    paths: Sequence[Path], tokenizer: TextTokenizer, tokens: int, count: int, seed: int = 0
) -> Iterator[Window]:
    """Yield ``count`` windows of ``tokens`` tokens, text after text, at places drawn from the seed.

    Args:
        paths: files, or folders of files; a text that is too short is left out. Where all texts of a file are, they
            are joined, and where all files are too short, the files.
        tokenizer: of the base.
        tokens: of each window.
        count: how many.
        seed: of the places.

    Raises:
        EmptyCorpusError: the texts hold fewer tokens than asked for.
    """
    texts = list(_texts(paths, tokens))
    known: dict[str, Encoded] = {}
    long = [name for name, text in texts if len(text) >= tokens and _fits(known, tokenizer, name, text, tokens)]
    if not long:
        texts = [("joined", "\n\n".join(text for _, text in texts))]
        long = [name for name, text in texts if _fits(known, tokenizer, name, text, tokens)]
    if not long:
        raise EmptyCorpusError(
            f"no text of {tokens} tokens in {', '.join(map(str, paths))}, not even joined; ask for shorter --lengths"
        )
    by_name = dict(texts)
    for index in range(count):
        name = long[index % len(long)]
        encoded = known[name]
        rng = random.Random(f"window/{seed}/{name}/{index // len(long)}")
        stop = rng.randint(tokens, len(encoded.ids))
        end = int(encoded.starts[stop]) if stop < len(encoded.ids) else encoded.length
        part = Encoded(encoded.ids[:stop], encoded.starts[:stop], encoded.clean[:stop], end)
        yield Window(f"{name}@{stop}", by_name[name][:end], part).end(tokens)


def _texts(paths: Sequence[Path], tokens: int) -> Iterator[tuple[str, str]]:
    for path in paths:
        for file in sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]:
            name, texts = file.name.split(".")[0], read_documents(file)
            if len(texts) > 1 and max(map(len, texts)) < tokens:  # no token is shorter than a character
                yield f"{name}-joined", "\n\n".join(texts)
                continue
            for index, text in enumerate(texts):
                yield f"{name}-{index}", text


def _fits(known: dict[str, Encoded], tokenizer: TextTokenizer, name: str, text: str, tokens: int) -> bool:
    known[name] = tokenizer.encode_with_offsets(text)
    return len(known[name].ids) >= tokens
