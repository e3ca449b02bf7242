"""A process that makes one cell: a job as JSON on standard input, its result on standard output.

Everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporter.cases import CaseResult, run_case
from exporter.clock import silent
from exporter.request import ExportRequest
from exporter.running.spread import LocalSpread, Spread
from exporter.stage_cache import StageStore, open_cache
from exporter.stage_cache.values import from_json, to_json


def job(
    name: str,
    request: ExportRequest,
    *,
    cached: bool,
    shards: int = 1,
    out: Path | None = None,
) -> str:
    """What :func:`main` reads."""
    content = {"name": name, "request": asdict(request), "cached": cached, "shards": shards}
    return json.dumps({**content, "out": None if out is None else str(out)})


def run_job(text: str, spread: Spread, cache: StageStore | None = None) -> CaseResult:
    """Run a :func:`job`; ``spread`` helps with its images, ``cache`` replaces the user's."""
    content: dict[str, Any] = json.loads(text)
    if content["cached"] and cache is None:
        cache = open_cache()
    return run_case(
        content["name"],
        ExportRequest(**content["request"]),
        silent,
        cache=cache,
        out=None if content["out"] is None else Path(content["out"]),
        spread=spread,
    )


def main() -> int:
    """Read a job, run it, write its result."""
    # What libraries print on file descriptor 1 must not be taken for the result.
    answer = os.dup(1)
    os.dup2(2, 1)
    text = sys.stdin.read()
    with LocalSpread(json.loads(text)["shards"]) as spread:
        result = run_job(text, spread)
    with os.fdopen(answer, "w", encoding="utf-8") as file:
        file.write(json.dumps(to_json(result)))
    return 0


def result_of(text: str) -> CaseResult:
    """What :func:`main` wrote."""
    return from_json(json.loads(text), CaseResult)


if __name__ == "__main__":
    sys.exit(main())
