"""Choose what a process of its own may choose before torch loads; a library leaves it to its host program.

Whatever the user has set stays.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def prepare() -> None:
    """Set threads, progress and text streams for a command."""
    # spinning threads take the cores of whatever else runs: beside two busy processes an answer took five times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too; there is one of our own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.platform == "darwin":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    for stream in (sys.stdin, sys.stdout):  # what the terminal's encoding lacks is no reason to end
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no quota, or no such file
        return count
