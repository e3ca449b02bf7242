"""A run's stages, each taken from the cache or made and kept, and what was done with each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from exporter.errors import EnvironmentLackError, InputError
from exporter.files.private_folder import scratch_folder
from exporter.stage_cache.store import EntryInfo, StageStore, key_of

T = TypeVar("T")

OFF = "the stage cache is off"
NOTHING_LIKE_IT = "nothing like it is in the cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """What became of one stage.

    ``seconds`` is what this run spent on it, ``made_in`` what making it took, then or now.
    ``changed`` names the inputs in which the nearest entry differs, with its text and this run's;
    ``reason`` says in words why the stage was made.
    """

    stage: str
    reused: bool
    seconds: float
    made_in: float
    reason: str = ""
    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields by name; ``changed`` as lists of two texts."""
        return {
            "stage": self.stage,
            "reused": self.reused,
            "seconds": round(self.seconds, 3),
            "made_in": round(self.made_in, 3),
            "reason": self.reason,
            "changed": {name: list(texts) for name, texts in self.changed.items()},
        }


@dataclass(slots=True)
class CachedStages:
    """Stages by way of ``store``; without one, every stage is made.

    Trouble with the cache costs time only: it becomes one of ``notes``.
    """

    store: StageStore | None = None
    why_not: str = OFF
    uses: list[StageUse] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    named: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """The inputs of each stage, as they were when it was asked for."""

    def leave(self, reason: str) -> None:
        """Keep nothing of this run from here on."""
        self.store, self.why_not = None, reason

    def has(self, stage: str, named: Mapping[str, str]) -> bool:
        """Whether there is an entry for these inputs, be it damaged."""
        return self.store is not None and self.store.has(stage, key_of(stage, named))

    def get(
        self,
        stage: str,
        inputs: Callable[[], Mapping[str, str]],
        folder: Path,
        *,
        make: Callable[[], T],
        load: Callable[[Path], T],
        save: Callable[[T, Path], Iterable[Path]],
    ) -> T:
        """The value of a stage.

        ``load`` makes it from the entry's files in ``folder``; ``save`` writes what only the entry
        has into the folder that it is given and names all files of the entry.
        """
        start = time.perf_counter()
        named = self.named[stage] = self._inputs(inputs)
        with ExitStack() as held:
            key = key_of(stage, named)
            found = self._fetch(held, stage, key, folder)
            if found is not None:
                value = load(folder)
                seconds = time.perf_counter() - start
                self.uses.append(
                    StageUse(stage=stage, reused=True, seconds=seconds, made_in=found.seconds)
                )
                return value
            nearest = self._nearest(stage, named)
            value = make()
            seconds = time.perf_counter() - start
            reason, changed = self._why(named, nearest)
            self.uses.append(
                StageUse(
                    stage=stage, reused=False, seconds=seconds, made_in=seconds,
                    reason=reason, changed=changed,
                )
            )  # fmt: skip
            # A file may have changed while the stage read it.
            if self.store is not None and named and self._inputs(inputs) == named:
                self._put(stage, key, named, seconds=seconds, value=value, save=save)
            return value

    def _inputs(self, inputs: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
        """Empty where they cannot be told: the stage itself knows best how to complain."""
        if self.store is None:
            return {}
        try:
            return inputs()
        except (InputError, EnvironmentLackError):
            return {}

    def _fetch(self, held: ExitStack, stage: str, key: str, folder: Path) -> EntryInfo | None:
        if self.store is None:
            return None
        try:
            held.enter_context(self.store.making(stage, key))
            return self.store.fetch(stage, key, folder)
        except (OSError, NotImplementedError) as error:
            self._give_up(error)
            return None

    def _nearest(self, stage: str, named: Mapping[str, str]) -> EntryInfo | None:
        """The entry with the fewest other inputs; of several, the one used last."""
        if self.store is None:
            return None
        with contextlib.suppress(OSError):
            alike = [entry for entry in self.store.entries() if entry.stage == stage]
            return min(alike, key=lambda e: len(_difference(e.inputs, named)), default=None)
        return None

    def _why(
        self, named: Mapping[str, str], nearest: EntryInfo | None
    ) -> tuple[str, Mapping[str, tuple[str, str]]]:
        if self.store is None:
            return self.why_not, {}
        if nearest is None:
            return NOTHING_LIKE_IT, {}
        changed = _difference(nearest.inputs, named)
        return ", ".join(changed) if changed else "the entry was damaged", changed

    def _put(
        self,
        stage: str,
        key: str,
        named: Mapping[str, str],
        *,
        seconds: float,
        value: T,
        save: Callable[[T, Path], Iterable[Path]],
    ) -> None:
        assert self.store is not None
        try:
            with scratch_folder("stages") as temporary:
                self.store.put(stage, key, named, seconds, save(value, temporary))
        except (OSError, NotImplementedError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        assert self.store is not None
        words = (error.strerror if isinstance(error, OSError) else None) or str(error)
        self.notes.append(f"the stage cache {self.store.root} cannot be used: {words}")
        self.leave("the stage cache cannot be used")


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    names = [*now, *(name for name in before if name not in now)]
    return {
        name: (before.get(name, ""), now.get(name, ""))
        for name in names
        if before.get(name, "") != now.get(name, "")
    }
