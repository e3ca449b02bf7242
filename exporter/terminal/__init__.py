"""Where words go: the two streams, the log file, and progress in between.

Only what this project says reaches the streams. What libraries print, on whatever level, goes to
the log file or nowhere; with ``--debug`` it goes where they send it.
"""

from exporter.terminal.interrupts import interruptible
from exporter.terminal.progress import Progress, progress_bars
from exporter.terminal.secret import ask_secret
from exporter.terminal.streams import Streams, opened, streams
from exporter.terminal.visible import sentence, visible

__all__ = [
    "Progress",
    "Streams",
    "ask_secret",
    "interruptible",
    "opened",
    "progress_bars",
    "sentence",
    "streams",
    "visible",
]
