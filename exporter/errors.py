"""Everything that can go wrong, as one tree; each branch has its exit code.

::

    ExporterError
    |-- GateFailedError      1    a step ran and its result is not good enough; nothing is published
    |-- InputError           2    the request, a checkpoint, an image or a folder cannot be used
    |   `-- InvalidRequestError   everything that is wrong with a request
    `-- EnvironmentLackError 3    this machine lacks a library, a driver or the network

Interrupting (Ctrl-C) exits with 130. Messages say what happened, where, and what to do now, in one
or two lines; the command line prints them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

EXIT_DONE = 0
EXIT_INTERRUPTED = 130


class ExporterError(Exception):
    """Base of all failures that this project reports on purpose."""

    exit_code: ClassVar[int] = 2


class GateFailedError(ExporterError):
    """A gate (parity, accuracy, graph contract, half range) failed.

    ``evidence`` is the ledger up to there as parity.json would hold it, where there is one;
    ``localization`` names the layer at fault, as the ledger holds it. ``report`` is the page that
    shows both, once it is written.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        evidence: Mapping[str, Any] | None = None,
        localization: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.evidence = evidence
        self.localization = localization
        self.report: Path | None = None


class InputError(ExporterError):
    """Bad input or usage."""

    exit_code: ClassVar[int] = 2


class InvalidRequestError(InputError):
    """A request in which ``complaints`` are wrong, each a clause."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("; ".join(complaints))
        self.complaints = tuple(complaints)


class EnvironmentLackError(ExporterError):
    """The environment lacks something that the request needs."""

    exit_code: ClassVar[int] = 3
