"""Write whole-sentence answers for question rows: the frozen base says them with the gold passage in its window.

Each sentence is kept only if it holds an accepted answer. The output is question rows with a ``sentence``, which
`focusllm train --data` takes; run it again to go on where it stopped.

    python scripts/data/sentences.py --data TRAIN/litm_nq --data TRAIN/squad --output sentences.jsonl
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from focus_core.model.hub import LoadedBase, load_base
from focus_core.training.texts import QuestionRow, read_training_texts

PROMPT = "{context}\n\nQuestion: {question}\nAnswer the question in one complete sentence."
_END = re.compile(r"(?<=[^\W\d][.!?])(?:\s|$)|(?<=\d[.!?])(?:\s|$)|(?<=[\"”)][.!?])(?:\s|$)")
_ABOUT_TEXT = re.compile(r"\b(?:passage|text|paragraph|context|question|document)\b", re.IGNORECASE)
_NAMES = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Dr|St|Jr|U\.S|vs|No|c)\.$")


def first_sentence(text: str) -> str:
    """Return the first sentence of ``text``; empty where it has no end."""
    text = " ".join(text.split())
    for end in _END.finditer(text):
        sentence = text[: end.start()]
        if not _NAMES.search(sentence):
            return sentence
    return ""


def kept_sentence(text: str, row: QuestionRow, most_words: int = 40) -> str:
    """Return the sentence that answers a row, or an empty one.

    It holds an accepted answer as whole words, says more than the answer, and speaks of the matter, not of the passage.
    """
    sentence = first_sentence(text)
    words = sentence.split()
    held = [
        answer for answer in row.answers if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", sentence, re.IGNORECASE)
    ]
    if not held or not len(max(held, key=len).split()) + 2 <= len(words) <= most_words:
        return ""
    return "" if _ABOUT_TEXT.search(sentence) else sentence


@torch.no_grad()
def say(loaded: LoadedBase, rows: Sequence[QuestionRow], most_tokens: int) -> list[str]:
    """Return what the base says to each row, greedily, in one batch."""
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT.format(context=row.context, question=row.question)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(loaded.model.device)
    made: Any = loaded.model.generate(  # type: ignore[operator]
        **batch, max_new_tokens=most_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return list(tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def missing(rows: Sequence[QuestionRow], output: Path) -> Iterator[QuestionRow]:
    """Yield the rows that the output does not tell of yet, shortest passages first, so that batches are even."""
    lines = output.read_text(encoding="utf-8").split("\n") if output.exists() else []
    known = {(row["question"], row["context"]) for line in lines if line.strip() for row in [json.loads(line)]}
    for row in sorted(rows, key=lambda row: len(row.context)):
        if (row.question, row.context) not in known:
            yield row


def main(
    data: Annotated[list[Path], typer.Option(help="Files and folders with question rows; training halves only.")],
    output: Annotated[Path, typer.Option(help="JSON lines; gone on with if it is there.")],
    base: Annotated[str | None, typer.Option(help="Hub name, folder or GGUF file.")] = None,
    most: Annotated[int, typer.Option(help="Rows to ask at most.")] = 100_000,
    batch: Annotated[int, typer.Option(help="Rows a batch.")] = 16,
    most_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 48,
) -> None:
    """Ask the base, check what it says, and append a line a row; rows without a good sentence keep an empty one."""
    loaded, start = load_base(base), time.monotonic()
    rows = list(missing(read_training_texts(data).questions, output))[:most]
    kept = 0
    with output.open("a", encoding="utf-8") as file:
        for at in range(0, len(rows), batch):
            some = rows[at : at + batch]
            for row, text in zip(some, say(loaded, some, most_tokens), strict=True):
                sentence = kept_sentence(text, row)
                kept += bool(sentence)
                made = {"question": row.question, "answers": row.answers, "title": row.title, "context": row.context}
                file.write(json.dumps({**made, "sentence": sentence}, ensure_ascii=False) + "\n")
            file.flush()
            asked = min(at + batch, len(rows))
            typer.echo(
                f"{asked}/{len(rows)} asked, {kept} kept, {(time.monotonic() - start) / asked:.2f} s a row", err=True
            )


if __name__ == "__main__":
    typer.run(main)
