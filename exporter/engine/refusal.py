"""How a build ends early inside the building process."""

from __future__ import annotations


class BadInputError(Exception):
    """The request does not fit the model or the library."""


class RefusedError(Exception):
    """The parser or the builder refuses the network; ``args`` are its own words, if it has any."""
