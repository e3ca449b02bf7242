"""Words that hold what came from a file, made fit for a terminal.

Names of files, tensors and classes are whatever somebody wrote: escape sequences that would colour
or clear the screen, line ends, halves of surrogate pairs that no encoding knows, megabytes of text.
"""

from __future__ import annotations

import re

_HEAD, _TAIL = 2000, 900
"""Characters of a sentence that are shown where it is longer than both."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LINE_ENDS = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


def visible(text: str) -> str:
    """``text`` with control characters written as Python would, such as ``\\x1b``; lines stay."""
    return _UNPRINTABLE.sub(_escaped, text)


def sentence(text: str) -> str:
    """``text`` visible and in one line, its middle left out where it is very long."""
    line = visible(_LINE_ENDS.sub(_escaped, text.strip()))
    return line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} ... {line[-_TAIL:]}"


def _escaped(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]
