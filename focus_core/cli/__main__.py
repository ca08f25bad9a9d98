"""``python -m focus_core.cli``."""

from focus_core.cli import main

main()
