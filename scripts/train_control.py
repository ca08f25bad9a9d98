"""Train the control: the base fine-tuned at low rank to answer with the gold passage in its window.

FocusLLM's adapter is trained on the training halves of the benchmarks that it is measured on, the base is not. This
control is: the same questions, the gold passage alone in front, the prompt that suits the base best, the loss on the
answer and the end token. What it writes is a base of its own, to be measured as any other:

    python scripts/train_control.py --file NQ.train.jsonl.gz --file SQUAD.train.jsonl.gz --output build/control
    focusllm eval questions --base build/control --adapter untrained --methods gold,bm25:passages=1 ...

It needs peft (`pip install peft`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from focus_core.engine import FocusEngine
from focus_core.evaluation.methods.prompts import BEST, PROMPTS
from focus_core.evaluation.tasks.multi_document import Question, read_questions

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LONGEST = 700  # tokens of an example; longer passages are left out


def main() -> None:
    """Read the options, train, and write the merged base with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--file", action="append", required=True, type=Path, help="Training questions; may be repeated."
    )
    parser.add_argument("--output", required=True, type=Path, help="Folder of the trained base.")
    parser.add_argument("--base", help="Base; the installed one if not given.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--examples-per-step", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    engine = FocusEngine.from_pretrained(options.base, adapter="untrained", dtype=torch.float32)
    engine.close()  # the base alone is trained
    questions = [row for file in options.file for row in read_questions(file)]
    losses, model = train(engine, questions, options.steps, options.examples_per_step, options.rank,
                          options.learning_rate, options.seed)  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.output)
    engine.loaded.tokenizer.save_pretrained(options.output)
    facts = {name: str(value) for name, value in vars(options).items()} | {"losses": losses}
    (options.output / "control.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"loss {sum(losses[:20]) / len(losses[:20]):.2f} -> {sum(losses[-20:]) / len(losses[-20:]):.2f}")


def train(
    engine: FocusEngine,
    questions: list[Question],
    steps: int,
    examples_per_step: int,
    rank: int,
    learning_rate: float,
    seed: int = 0,
) -> tuple[list[float], Any]:
    """Train low-rank differences of all projections and merge them.

    Returns:
        The loss of each step, and the model with the differences in its weights.
    """
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        engine.loaded.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(_PROJECTIONS))
    )
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    stream, losses = examples(engine, questions, seed), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - 0.95 * step / steps)
        total = 0.0
        for _ in range(examples_per_step):
            ids, labels = next(stream)
            loss = model(input_ids=ids, labels=labels).loss / examples_per_step
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses, model.merge_and_unload().eval()


def examples(engine: FocusEngine, questions: list[Question], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (1, tokens) ids and labels without end, every question once before one comes again."""
    rng, end = random.Random(f"control/{seed}"), min(engine.end_tokens)
    kept = False
    while True:
        for row in rng.sample(questions, len(questions)):
            given = PROMPTS[BEST].ids(engine, row.passage, row.text)
            wanted = [*engine.tokenizer.encode(row.answers[0]), end]
            if len(given) + len(wanted) > _LONGEST:
                continue
            kept = True
            ids = torch.tensor([[*given, *wanted]], device=engine.base.device)
            yield ids, torch.where(torch.arange(ids.shape[1]) < len(given), -100, ids)
        if not kept:
            raise SystemExit(f"no question with its passage has {_LONGEST} tokens or fewer; give other files")


if __name__ == "__main__":
    main()
