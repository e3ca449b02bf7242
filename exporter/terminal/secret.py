"""Asking for what must not be seen."""

from __future__ import annotations

import getpass
import sys


def ask_secret(words: str) -> str | None:
    """What is typed on the terminal, not shown there; None where no person is at one."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    try:
        return getpass.getpass(words)
    except EOFError:
        return None
