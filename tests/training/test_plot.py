"""Check the picture of a run's losses."""

from __future__ import annotations

import pytest

from focus_core.errors import (
    AdapterError,
    ConfigError,
    DocumentNotFoundError,
)
from focus_core.training.plot import plot_loss
from tests.conftest import byte_level_tokenizer
from tests.training.test_run import (
    _train,
    book,  # noqa: F401
    command,  # noqa: F401
)


@pytest.mark.slow
def test_train_shows_losses_and_draws_them(command, tmp_path):
    """The command tells held-out losses and where picture, best and last adapter are; plot-loss draws again."""
    code, err = command("--steps", 2, "--eval-every", 1, "--dtype", "float32", "--compact")
    assert code == 0, err
    assert "step 1: held-out loss" in err
    assert "lowest held-out loss" in err
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert plot_loss(tmp_path / "run", tmp_path / "other.png", by="tokens").stat().st_size > 5000
    with pytest.raises(ConfigError, match="by step or by tokens; got 'hour'"):
        plot_loss(tmp_path / "run", by="hour")
    with pytest.raises(DocumentNotFoundError, match="no training log"):
        plot_loss(tmp_path)
    assert command("--steps", 2, "--dtype", "int4")[0] == 2
    code, err = command("--output", tmp_path / "none", "--max-minutes", 0)
    assert code == 0
    assert "no plot" in err
    assert "stopped after step 0" in err
    assert command("--config", tmp_path / "none.json")[0] == 2
    with pytest.raises(AdapterError, match="other settings"):
        _train(byte_level_tokenizer(), tmp_path / "book.txt", tmp_path / "run", steps=2)
