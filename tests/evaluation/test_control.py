"""Check the trained control's script: it learns its questions with their passages, and a base comes out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from focus_core.evaluation.tasks.multi_document import Question

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_control.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_control_learns_and_is_a_base_of_its_own(make_engine):
    """The loss falls, also in the merged model, and no low-rank part is left in it; only answers count."""
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("train_control", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine = make_engine(window=512)
    engine.close()
    questions = [
        Question("who sat?", ("the cat",), "", "the cat sat"),
        Question("who ate?", ("a dog",), "", "a dog ate"),
    ]
    losses, model = module.train(engine, questions, 60, 2, 8, 2e-2)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    ids, labels = next(module.examples(engine, questions, 0))
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=labels).loss) < losses[0] - 1  # what was learnt is in the weights
    assert labels[0, -1] == min(engine.end_tokens)
    assert torch.equal(labels[labels >= 0], ids[0, -int((labels >= 0).sum()) :])
