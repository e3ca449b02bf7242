"""argparse, with failures in one sentence: what is wrong, the nearest known word, where help is."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from exporter.errors import InputError

_MAX_WIDTH = 100
_CHOICE = re.compile(r"argument COMMAND: invalid choice: '(.*?)'")


class UsageError(InputError):
    """The command line cannot be read."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the epilog, no line longer than a page is wide, usage in one line."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((_MAX_WIDTH, 24)).columns, _MAX_WIDTH)
        super().__init__(prog, max_help_position=30, width=width - 2)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        """The options are listed below; thirty of them in brackets are no help."""
        del groups
        places = [action for action in actions if not action.option_strings]
        words = [self._format_args(a, self._get_default_metavar_for_positional(a)) for a in places]
        super().add_usage(usage or " ".join([self._prog, "[OPTION ...]", *words]), [], [], prefix)


class ArgumentParser(argparse.ArgumentParser):
    """Raises where argparse would print its whole usage."""

    def __init__(
        self,
        prog: str | None = None,
        description: str | None = None,
        epilog: str | None = None,
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=_HelpFormatter,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse, but what is left over is told by the command that was chosen.

        Raises:
            UsageError: where the words are no command line.
        """
        options, left = self.parse_known_args(args, namespace)
        if left:
            chosen = self._subparsers_by_name().get(getattr(options, "command", ""), self)
            _refuse(left[0], chosen)
        return options

    def error(self, message: str) -> NoReturn:
        """Raise, never return.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self._words(message)}; {self.prog} --help lists what is known")

    def _words(self, message: str) -> str:
        command = _CHOICE.match(message)
        if command is not None:
            return f"unknown command {command[1]!r}{_nearest(command[1], self._commands())}"
        return message

    def _commands(self) -> list[str]:
        return list(self._subparsers_by_name())

    def _subparsers_by_name(self) -> dict[str, argparse.ArgumentParser]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}


def _refuse(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    """A word that ``parser`` does not know; other commands may."""
    if not word.startswith("-"):
        parser.error(f"unexpected argument {word!r}")
    option, name = word.partition("=")[0], parser.prog.split()[-1]
    words = {known.lstrip("-"): known for known in sorted(parser._option_string_actions)}
    near = difflib.get_close_matches(option.lstrip("-"), words, n=1)
    hint = f" (nearest: {words[near[0]]})" if near else ""
    parser.error(f"{name} has no option {option}{hint}")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""
