"""What the builder calls back while it works: the logger and the progress monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from exporter.engine import build_log
from exporter.engine.capabilities import Api, Capability, needs
from exporter.engine.progress import PhaseTracker
from exporter.engine.tensorrt_names import IBuilderConfig, ILogger, IProgressMonitor, Severity


def make_logger(api: Api, file: TextIO) -> ILogger:
    """A logger that writes records as `build_log` reads them."""

    base: Any = api.trt.ILogger

    class Logger(base):  # type: ignore[misc]
        """Writes every message at once, so that a crash leaves a log."""

        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Severity, msg: str) -> None:
            file.write(build_log.format_record(severity.name, msg))
            file.flush()

    return Logger()


@needs(Capability.PROGRESS_MONITOR)
def watch(api: Api, config: IBuilderConfig, say: Callable[[str, float], bool]) -> IProgressMonitor:
    """Tell ``say`` phase and fraction of a build; it is cancelled when that returns False.

    The configuration keeps no reference of its own: the caller holds the monitor returned.
    """

    base: Any = api.trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        """Turns nested phases into one fraction."""

        def __init__(self) -> None:
            base.__init__(self)
            self._phases = PhaseTracker()

        def phase_start(self, phase_name: str, _parent: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, num_steps)
            say(phase_name, self._phases.fraction)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.step(phase_name, step)
            return say(phase_name, self._phases.fraction)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor
