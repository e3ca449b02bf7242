"""Shell completion by argcomplete: the shell asks this program for what may come next.

`completion SHELL` prints what the shell has to read once. The answers know the values of options,
those that hold a comma-separated list included; whatever takes a file is left to the shell.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping

from exporter.build_options import OPTIMIZATION_LEVELS, HardwareCompatibility, Quantization, Typing
from exporter.commands import AddCommand
from exporter.console import print_json, print_line
from exporter.devices import ARCHITECTURES, DEVICES
from exporter.errors import EXIT_DONE
from exporter.pixel_input import Layout
from exporter.spec import Precision, Recipe
from models.variants import VARIANTS

SHELLS = ("bash", "zsh", "fish", "tcsh")
_EXECUTABLE = "repvgg-export"
_ASKED = "_ARGCOMPLETE"

Completer = Callable[..., Iterable[str]]
"""Called by argcomplete with ``prefix`` and more, all by keyword."""

_BUILDERS = ("auto", "tensorrt-rtx", "tensorrt")
_RUNNERS = ("auto", "engine", "onnxruntime")
_VALUES: Mapping[str, tuple[str, ...]] = {
    "precision": tuple(map(str, Precision)),
    "recipe": tuple(map(str, Recipe)),
    "backend": _BUILDERS,
    "typing": tuple(map(str, Typing)),
    "quantization": tuple(map(str, Quantization)),
    "with_preprocess": tuple(map(str, Layout)),
    "hardware_compatibility": tuple(map(str, HardwareCompatibility)),
    "optimization_level": tuple(map(str, OPTIMIZATION_LEVELS)),
    "to": ("official", "timm"),
    "form": ("train", "deploy"),
}
_VALUES_OF: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("engine", "model"): tuple(VARIANTS),
    ("evaluate", "backend"): _RUNNERS,
    ("benchmark", "backend"): _RUNNERS,
}
_TEXT = ("batch", "image_size", "dynamic_size", "keep_float", "shard", "ray")
"""Options whose values nobody can guess."""


def add_command(command: AddCommand) -> None:
    """Add the command; its ``run`` default executes it."""
    parser = command("completion", "print what a shell needs to complete this command")
    parser.add_argument("shell", choices=SHELLS, help="whose script to print")
    parser.set_defaults(run=_run_completion)


def answer(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks for completions, give them and end the program; else do nothing."""
    if _ASKED not in os.environ:
        return
    import argcomplete

    for name, command in _commands(parser).items():
        for action in command._actions:
            completer = completer_of(name, action)
            if completer is not None:
                action.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def completer_of(command: str, action: argparse.Action) -> Completer | None:
    """What completes the value of ``action``; None leaves it to argcomplete: choices, or files."""
    values = _VALUES_OF.get((command, action.dest), _VALUES.get(action.dest))
    if action.dest == "target":
        return _list_of((*DEVICES, *ARCHITECTURES))
    if values is not None:
        return _one_of(values)
    if action.dest in _TEXT or action.type in (int, float):
        return _one_of(())
    if (command, action.dest) == ("plan", "model"):
        return _variant_or_folder
    return None


def _one_of(values: Iterable[str]) -> Completer:
    def complete(**_asked: object) -> Iterable[str]:
        return values

    return complete


def _list_of(values: Iterable[str]) -> Completer:
    """Completes the last entry of a comma-separated list; none is offered twice."""

    def complete(prefix: str = "", **_asked: object) -> Iterable[str]:
        before, comma, _ = prefix.rpartition(",")
        given = set(before.split(","))
        return [f"{before}{comma}{value}" for value in values if value not in given]

    return complete


def _variant_or_folder(prefix: str = "", **_asked: object) -> Iterable[str]:
    from argcomplete.completers import DirectoriesCompleter

    return [*VARIANTS, *DirectoriesCompleter()(prefix)]


def _commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _run_completion(options: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    script = shellcode([_EXECUTABLE], shell=options.shell).strip()
    if options.json:
        print_json({"shell": options.shell, "script": script})
    else:
        print_line(script)
    return EXIT_DONE
