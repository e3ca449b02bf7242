"""Cells on a Ray cluster. Nothing but Ray's object store is shared between the machines.

A task makes one cell in a folder of its own and returns three objects: the result, the bundle as an
archive, and the stages that others will want, which go from node to node without passing here. A
task whose worker or node dies is run again by Ray.

Every node needs this project installed, and weights and images at the paths of the configuration.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle
from exporter.bundle.writer import BundleWriter
from exporter.cases import CaseResult, Status
from exporter.child_process import thread_environment
from exporter.errors import EnvironmentLackError, ExporterError
from exporter.files.private_folder import scratch_folder
from exporter.matrix.config import Cell
from exporter.matrix.ray_spread import RETRIES, RaySpread
from exporter.matrix.worker import job, result_of, run_job
from exporter.running.spread import Spread
from exporter.stage_cache import StageStore, open_cache
from exporter.stage_cache.store import packed, unpack_into
from exporter.stage_cache.values import to_json
from exporter.stages.failure import failure_paths

_CONNECT_S = 10
_BUNDLE = "bundle"

Shared = Sequence[tuple[str, str]]
"""Stage and key of what several cells share."""


class RayPool:
    """A cluster at ``address``: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    ``shared`` has each cell's stages for other cells. Each cell's images are cut into ``shards``,
    tasks of their own. Used as a context manager.

    Raises:
        EnvironmentLackError: Ray is not installed, or there is no such cluster.
    """

    def __init__(
        self,
        address: str,
        *,
        threads: int,
        cached: bool,
        shared: Mapping[str, Shared],
        shards: int = 1,
    ) -> None:
        self._ray = _connect(address, threads)
        self._cached, self._shared = cached, shared
        self._spread = RaySpread(width=shards, threads=threads)
        self._task = self._ray.remote(num_returns=3, num_cpus=threads, max_retries=RETRIES)(
            run_remotely
        )
        self._running: dict[Any, tuple[Cell, Any]] = {}
        self._stages: dict[str, Any] = {}

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_error: object) -> None:
        self._ray.shutdown()

    @property
    def width(self) -> int:
        """Ray itself holds back what there is no room for.

        But of cells that wait for their shards, whose processors are free meanwhile, it would begin
        one after the other, all in memory at once.
        """
        if self._spread.width == 1:
            return 10**6
        processors = int(self._ray.cluster_resources().get("CPU", 1))
        return max(1, processors // self._spread.threads)

    def start(self, cell: Cell, after: tuple[str, ...]) -> None:
        """Begin a cell, with the stages that ``after`` made."""
        text = job(cell.name, cell.request, cached=self._cached)
        result, bundle, stages = self._task.remote(
            text,
            self._spread,
            list(self._shared[cell.name]),
            *(self._stages[name] for name in after),
        )
        self._running[result] = (cell, bundle)
        self._stages[cell.name] = stages

    def wait(self) -> tuple[Cell, CaseResult]:
        """The next cell that ends; its bundle is at its place then."""
        (ended,), _ = self._ray.wait(list(self._running), num_returns=1)
        cell, bundle = self._running.pop(ended)
        try:
            result = result_of(self._ray.get(ended))
            _receive(Path(str(cell.request.out)), self._ray.get(bundle))
        except ExporterError as error:
            return cell, _failed(cell, error.exit_code, str(error))
        except self._ray.exceptions.RayError as error:
            # Whoever follows it makes what it wants itself.
            self._stages[cell.name] = []
            words = str(error).strip().splitlines() or [type(error).__name__]
            return cell, _failed(cell, EnvironmentLackError.exit_code, words[-1])
        return cell, result


def run_remotely(
    text: str, spread: Spread, shared: Shared, *given: Sequence[bytes]
) -> tuple[str, bytes, list[bytes]]:
    """Make a cell on the node that this runs on: its result, its bundle, its stages for others."""
    content = json.loads(text)
    with scratch_folder("matrix") as folder:
        store = None
        if content["cached"]:
            store = open_cache() or StageStore(root=folder / "cache", limit=1 << 40)
            for archives in given:
                for archive in archives:
                    store.unpack(archive)
        results = folder / "results"
        results.mkdir()
        result = run_job(json.dumps({**content, "out": str(results / _BUNDLE)}), spread, store)
        own = [store.pack(stage, key) for stage, key in shared] if store else []
        stages = [archive for archive in own if archive is not None]
        return json.dumps(to_json(result)), packed(results), stages


def _connect(address: str, threads: int) -> Any:
    # Nobody who deploys models expects a report of it to be sent away.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise EnvironmentLackError(
            "Ray is not installed; pip install 'repvgg-exporter[cluster]'"
        ) from error
    _require_listener(address)
    variables = thread_environment(threads)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables},
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentLackError(f"no Ray cluster at {address}: {first}") from error
    return ray


def _require_listener(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise EnvironmentLackError(
            f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}"
        ) from error


def _receive(out: Path, archive: bytes) -> None:
    """Publish the bundle of a cell, or put the report of its failure beside."""
    with scratch_folder("matrix") as folder:
        unpack_into(archive, folder)
        for path, kept in zip(failure_paths(folder / _BUNDLE), failure_paths(out), strict=True):
            kept.unlink(missing_ok=True)
            if path.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, kept)
        if not (folder / _BUNDLE).exists():
            return
        with BundleWriter(out) as writer:
            bundle = Bundle.load(folder / _BUNDLE)
            for name in bundle.manifest["files"]:
                shutil.move(bundle.path / name, writer.path(name))
            writer.publish(bundle.manifest)


def _failed(cell: Cell, exit_code: int, message: str) -> CaseResult:
    return CaseResult(
        name=cell.name, status=Status.ERROR, seconds=0.0, exit_code=exit_code, message=message
    )
