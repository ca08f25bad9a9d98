"""Ask, chat, index, train, evaluate and measure from the command line.

Answers go to standard output and everything else to standard error, so both can be piped. Exit codes: 0 done, 1
unexpected failure, 2 bad input, 3 model, adapter or stored memory unusable, 4 out of memory, 130 stopped with Ctrl-C.
All logic lives in the library; these modules only read arguments and print.
"""

from __future__ import annotations

import sys

from focus_core.cli import _ask, _bases, _corpus, _evaluation, _training  # noqa: F401  (they register their commands)
from focus_core.cli._shared import app, note
from focus_core.errors import (
    AdapterError,
    BaseModelError,
    ConfigError,
    ContextTooLongError,
    CorpusError,
    FocusError,
    OutOfMemoryError,
    StoreError,
)

EXIT_CODES: tuple[tuple[type[FocusError], int], ...] = (
    (OutOfMemoryError, 4),
    (BaseModelError, 3),
    (AdapterError, 3),
    (StoreError, 3),
    (ConfigError, 2),
    (CorpusError, 2),
    (ContextTooLongError, 2),
)


def main() -> None:
    """Run the command line and turn errors into one message and an exit code."""
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == 130:
            note.print("stopped; nothing was lost", style="yellow")
        raise
    except FocusError as error:
        note.print(f"error: {error}", style="red", markup=False)
        sys.exit(next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1))
