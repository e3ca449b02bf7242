"""What runs `engine` and `plan`; their options are in `cli`."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from exporter.commands import EXPORT_LIBRARIES, keep_threads_from_spinning, require_libraries
from exporter.commands.signing import signer
from exporter.console import (
    print_json,
    print_note,
    print_plan,
    print_result,
    print_stages,
    print_table,
    result_json,
)
from exporter.errors import EXIT_DONE, InputError, InvalidRequestError
from exporter.request import ExportRequest, absences, validate
from exporter.spec import ExportSpec
from exporter.terminal import progress_bars


def prepare_export() -> None:
    """Before torch is imported, in every command that exports.

    Raises:
        EnvironmentLackError: naming what is not installed.
    """
    require_libraries(*EXPORT_LIBRARIES)
    keep_threads_from_spinning()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Python looks for cycles once more at its end: 0.4 s among torch's objects, for nothing.
    atexit.register(gc.freeze)


def run_engine(options: argparse.Namespace) -> int:
    """Export, and tell what was made."""
    spec = _possible(_request(options))
    sign = signer(options.sign)
    with progress_bars(quiet=options.quiet) as progress:
        prepare_export()
        from exporter import pipeline
        from exporter.stage_cache import open_cache

        cache = open_cache() if options.cached else None
        result = pipeline.run(spec, progress, cache=cache, signer=sign)
    for note in result.notes:
        print_note(f"note: {note}")
    if options.json:
        print_json(result_json(result))
        return EXIT_DONE
    from exporter.commands.export_tables import made_table

    print_result(result)
    print_table(made_table(result.bundle))
    if options.explain:
        print_stages(result)
    return EXIT_DONE


def _request(options: argparse.Namespace) -> ExportRequest:
    names = ExportRequest.__dataclass_fields__
    return ExportRequest(**{name: getattr(options, name) for name in names})


def _possible(request: ExportRequest, complaints: Sequence[str] = ()) -> ExportSpec:
    """The spec, where all that it names is there and OUT can be replaced.

    Raises:
        InvalidRequestError: with every complaint, ``complaints`` included.
    """
    spec, out = None, Path(request.out) if request.out else None
    found = [*complaints, *absences(request)]
    try:
        spec = validate(request)
        out = spec.out
    except InvalidRequestError as error:
        found = [*error.complaints, *found]
    if out is not None:
        found += _out_complaints(out)
    if found or spec is None:
        raise InvalidRequestError(found)
    return spec


def _out_complaints(out: Path) -> list[str]:
    """What the writer of the bundle would say."""
    from exporter.bundle.writer import require_replaceable

    # A loop of links, a zero byte: the writer knows how to tell them.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        try:
            require_replaceable(out.resolve())
        except InputError as error:
            return [str(error)]
    return []


def run_plan(options: argparse.Namespace) -> int:
    """Say what an export would do, or what a bundle still needs."""
    from exporter.bundle import MANIFEST, Bundle
    from exporter.plan.planning import make_plan, plan_bundle

    request = _request(options)
    if (Path(request.model) / MANIFEST).is_file():
        own = ("model", "target", "backend", "dla")
        options_of_an_export = [item for item in fields(request) if item.name not in own]
        if options.classes is not None or any(
            getattr(request, item.name) != item.default for item in options_of_an_export
        ):
            raise InputError(
                f"{request.model} is exported already: beside a bundle `plan` takes --target, "
                "--backend and --dla only"
            )
        plan = plan_bundle(
            Bundle.load(request.model),
            target=request.target,
            backend=request.backend,
            dla_core=options.dla,
        )
    else:
        few = options.classes is not None and options.classes < 1
        spec = _possible(
            request, [f"classes must be at least 1, not {options.classes}"] if few else []
        )
        plan = make_plan(spec, num_classes=options.classes, dla_core=options.dla)
    if options.json:
        print_json(plan.to_json())
    else:
        print_plan(plan)
    return EXIT_DONE
