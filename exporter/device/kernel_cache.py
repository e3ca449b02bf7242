"""The file that keeps what TensorRT-RTX compiled on this GPU for the next start of the same engine.

It is ``$XDG_CACHE_HOME/repvgg-exporter/kernels/ENGINE-LIBRARY-GPU.bin`` (``~/.cache`` without the
variable); ENGINE are the first 32 hex digits of the plan's sha256. It holds one line of JSON
(``sha256`` of what follows, ``cold_load_ms``, ``cold_first_run_ms``), then the library's own bytes.
The hash keeps a damaged file away from native code. The folder may be deleted at any time.

A cache is a convenience: whatever is wrong with it becomes a note, and the kernels are compiled.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from exporter.files.user_cache import user_cache
from exporter.files.whole_file import whole_file


class CacheState(str, Enum):
    """How an engine started: COLD compiled everything, WARM began with a cache, OFF wanted none."""

    COLD = "cold"
    WARM = "warm"
    OFF = "off"

    def __str__(self) -> str:
        return self.value


@dataclass(slots=True, kw_only=True)
class Startup:
    """What the start of a runner took; filled in while it runs, complete when it is closed.

    ``load_ms`` is from the file to something that can run. ``first_run_ms`` is the engine's first
    execution, in which kernels for its shape are compiled. ``cache`` is None where the library has
    no runtime cache. The ``cold_`` figures are those of the start that made the cache.
    """

    load_ms: float
    first_run_ms: float | None = None
    cache: CacheState | None = None
    cold_load_ms: float | None = None
    cold_first_run_ms: float | None = None
    notes: list[str] = field(default_factory=list)


def cache_folder() -> Path:
    """Where caches lie.

    Raises:
        RuntimeError: if there is neither the variable nor a home directory.
    """
    return user_cache("kernels")


class KernelCache:
    """The cache of one plan, for one version of one library on one GPU.

    Neither reading nor writing raises: ``notes`` says what went wrong.
    """

    def __init__(self, plan: bytes, *, library: str, gpu: str) -> None:
        self.notes: list[str] = []
        self.cold_load_ms: float | None = None
        self.cold_first_run_ms: float | None = None
        self._content = b""
        self._path: Path | None = None
        words = (hashlib.sha256(plan).hexdigest()[:32], library, gpu)
        name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word) for word in words)
        try:
            self._path = cache_folder() / f"{name}.bin"
        except RuntimeError as error:
            self.notes.append(f"no runtime cache is kept: {error}")

    def read(self) -> bytes:
        """What the library left; empty if there is nothing that can be used."""
        if self._path is None:
            return b""
        try:
            header, _, content = self._path.read_bytes().partition(b"\n")
            facts = json.loads(header)
            if facts["sha256"] != hashlib.sha256(content).hexdigest():
                raise ValueError("its content is not what its first line says")
            self.cold_load_ms = float(facts["cold_load_ms"])
            self.cold_first_run_ms = float(facts["cold_first_run_ms"])
        except FileNotFoundError:
            return b""
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._ignore(getattr(error, "strerror", None) or str(error) or repr(error))
            return b""
        self._content = content
        return content

    def reject(self) -> None:
        """Note that the library did not take what :meth:`read` returned."""
        self._ignore("the library does not accept it here")

    def _ignore(self, reason: str) -> None:
        self._content = b""
        self.cold_load_ms = self.cold_first_run_ms = None
        self.notes.append(f"runtime cache {self._path} is ignored and made anew: {reason}")

    def write(self, content: bytes, *, load_ms: float, first_run_ms: float) -> None:
        """Keep ``content`` in one step, unless it is what is there.

        The times are those of this start; those of the start that made the cache stay in the file.
        """
        if self._path is None or not content or content == self._content:
            return
        cold = (self.cold_load_ms, self.cold_first_run_ms) if self._content else (None, None)
        facts = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "cold_load_ms": load_ms if cold[0] is None else cold[0],
            "cold_first_run_ms": first_run_ms if cold[1] is None else cold[1],
        }
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_file(self._path, private=True) as file:
                file.write(json.dumps(facts).encode() + b"\n" + content)
        except OSError as error:
            reason = error.strerror or error
            self.notes.append(f"runtime cache {self._path} cannot be written: {reason}")
