"""Runs a command and turns how it ended into words, JSON and an exit code.

On failure standard error has the sentence; with ``--json`` standard output has one object,
``{"error": ..., "exit_code": ...}``, and where a gate failed that has evidence ``"parity"`` and
``"report"``, the path of the page that shows it.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence

from exporter import __version__
from exporter.commands.argument_parser import UsageError
from exporter.console import print_json, print_ledger
from exporter.errors import (
    EXIT_INTERRUPTED,
    EnvironmentLackError,
    ExporterError,
    GateFailedError,
)
from exporter.terminal import opened, streams
from exporter.terminal import sentence as one_line

_NAME = "repvgg-export"


def usage_failure(error: UsageError, *, as_json: bool) -> int:
    """What was typed is no command line."""
    return _fail(str(error), error.exit_code, as_json=as_json)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run ``options.run``; ``words`` is what was typed, for the log file."""
    try:
        with opened(quiet=options.quiet, debug=options.debug, log_file=options.log_file) as own:
            start = time.monotonic()
            own.record("command", shlex.join([_NAME, *words]))
            own.record("command", f"version {__version__}, Python {platform.python_version()}")
            code = _run(options)
            own.record("end", f"exit code {code} after {time.monotonic() - start:.1f} s")
            return code
    except ExporterError as error:
        # Only the log file itself can fail here.
        return _fail(str(error), error.exit_code, as_json=options.json)


def _run(options: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int] = options.run
    own = streams()
    if not options.debug and own.log is None:
        # Libraries warn about their own future; nobody would see it.
        warnings.simplefilter("ignore")
    try:
        code = command(options)
        with own.writing() as out:
            out.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was published", EXIT_INTERRUPTED, as_json=options.json)
    except (ExporterError, OSError) as error:
        _tell_traceback(options)
        return _failure(error, options)
    except Exception as error:
        own.record("error", traceback.format_exc())
        if options.json:
            words = f"internal error: {type(error).__name__}: {error}"
            print_json({"error": words, "exit_code": 1})
            own.settle()
        raise


def _failure(error: ExporterError | OSError, options: argparse.Namespace) -> int:
    if not isinstance(error, ExporterError):
        # A full disk or a vanished file outside the bundle's own writing.
        streams().settle()
        return _fail(str(error), EnvironmentLackError.exit_code, as_json=options.json)
    if not isinstance(error, GateFailedError):
        return _fail(str(error), error.exit_code, as_json=options.json)
    if error.evidence and not options.json:
        print_ledger(error.evidence, "what was measured until then")
    more: dict[str, object] = {"parity": error.evidence} if error.evidence else {}
    if error.report:
        more["report"] = str(error.report)
    code = _fail(str(error), error.exit_code, as_json=options.json, more=more)
    if error.report:
        streams().error(one_line(f"the report of the failure: {error.report}"))
    return code


def _fail(
    sentence: str, code: int, *, as_json: bool, more: Mapping[str, object] | None = None
) -> int:
    if as_json:
        print_json({"error": sentence, "exit_code": code, **(more or {})})
    own = streams()
    own.settle()
    own.error(f"{_NAME}: {one_line(sentence)}")
    own.settle()
    return code


def _tell_traceback(options: argparse.Namespace) -> None:
    text = traceback.format_exc()
    if options.debug:
        streams().error(text.rstrip())
    else:
        streams().record("error", text)
