"""Ask, chat, index, train, evaluate and measure from the command line.

Answers go to standard output and everything else to standard error, so both can be piped. Exit codes: 0 done, 1 a file
or the system failed, 2 bad input, 3 model, adapter or stored memory unusable, 4 out of memory, 130 stopped with Ctrl-C.
All logic lives in the library; these modules only read arguments and print.
"""

from __future__ import annotations

import errno
import sys

from focus_core.cli import _ask, _bases, _corpus, _evaluation, _serve, _training  # noqa: F401  (they register their commands)
from focus_core.cli._process import prepare
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
    prepare()
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == 130:
            note.print("stopped; nothing was lost", style="yellow")
        raise
    except FocusError as error:
        note.print(f"error: {error}", style="red")
        sys.exit(next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1))
    except OSError as error:
        note.print(f"error: {_told(error)}", style="red")
        sys.exit(1)


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or name a place on another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions, or name another place"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "check the path"),
}


def _told(error: OSError) -> str:
    """Return an operating system's error in one line: what, where, what to do."""
    lines = (error.strerror or str(error) or type(error).__name__).strip().splitlines()
    where = f" at {error.filename}" if error.filename else ""
    return f"{lines[0]}{where}; {_ADVICE.get(error.errno or 0, 'try again')}"
