"""Arguments -> request -> pipeline -> exit code. The only place that prints.

Results go to standard output, everything else to standard error. Heavy libraries are imported after
the arguments have been read, so that ``--help`` needs none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import __version__
from exporter.errors import EXIT_DONE, EXIT_INTERRUPTED, ExporterError, GateFailedError
from exporter.spec import ExportRequest, Precision, Recipe, validate
from models.variants import VARIANTS

if TYPE_CHECKING:
    from types import FrameType

    from exporter.parity import Ledger
    from exporter.pipeline import ExportResult

_EPILOG = """exit codes: 0 done and every gate passed; 1 a gate failed, nothing published;
2 bad input or usage; 3 the environment lacks something; 130 interrupted"""


def build_parser() -> argparse.ArgumentParser:
    """The command line; every command's ``run`` default is the function that executes it."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("--quiet", action="store_true", help="no progress and no notes")
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser = argparse.ArgumentParser(
        prog="repvgg-export",
        description="From a trained RepVGG to a checked TensorRT engine.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"repvgg-exporter {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_engine(
        commands.add_parser("engine", parents=[common], help="build a bundle", epilog=_EPILOG)
    )
    verify = commands.add_parser(
        "verify", parents=[common], help="check a bundle's files and figures", epilog=_EPILOG
    )
    verify.add_argument("bundle", type=Path, help="a folder that `engine` made")
    verify.set_defaults(run=_run_verify)
    inspect = commands.add_parser(
        "inspect", parents=[common], help="say what a file is", epilog=_EPILOG
    )
    inspect.add_argument(
        "file", type=Path, help="a checkpoint, an ONNX, a bundle, an engine, a calibration table"
    )
    inspect.set_defaults(run=_run_inspect)
    _add_convert(
        commands.add_parser(
            "convert",
            parents=[common],
            help="write a checkpoint in other key names",
            epilog=_EPILOG,
        )
    )
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, help="a checkpoint")
    add("out", type=Path, help="the safetensors file to write")
    add("--to", default="official", help="key names: official, timm (default: official)")
    add("--form", help="train or deploy, fused if need be (default: the file's own)")
    add("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run_convert)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=f"variant: {', '.join(VARIANTS)}")
    add("--precision", default="int8", help=f"{', '.join(map(str, Precision))} (default: int8)")
    add("--weights", help="checkpoint file, hub, hub@COMMIT or random (default: the bundled ones)")
    add("--calib", dest="calibration", metavar="DIR", help="calibration images")
    add("--calib-images", dest="calibration_images", type=int, default=512, metavar="N",
        help="use at most N of them, spread evenly (default: 512)")  # fmt: skip
    add("--evaluation", metavar="DIR", help="images to compare the stages on, in class folders")
    add("--evaluation-images", type=int, default=512, metavar="N",
        help="use at most N of them, spread evenly (default: 512)")  # fmt: skip
    add("--recipe", help=f"{', '.join(map(str, Recipe))} (default: full, mse off plain RepVGG)")
    add("--keep-float", metavar="NAMES", help="nodes that stay float in int8, comma-separated")
    add("--target", help="compute capabilities, such as sm86,sm89 (default: all that can)")
    add("--backend", default="auto", help="auto or tensorrt-rtx (default: auto)")
    add("--batch", metavar="MIN:OPT:MAX", help="batch profile (default: 1:8:32)")
    add("--image-size", metavar="N or HxW", help="pixels (default: the checkpoint's own, else 224)")
    add("--dynamic-size", metavar="MIN:OPT:MAX",
        help="leave height and width open, or each: MIN:OPT:MAXxMIN:OPT:MAX")  # fmt: skip
    add("--preprocess", metavar="FILE", help="imagenet, a JSON file or another bundle's manifest")
    add("--out", metavar="DIR", help="bundle folder (default: build/MODEL-PRECISION)")
    add("--skip-bad-images", action="store_true", help="leave unreadable images out and count them")
    add("--min-sqnr", dest="min_sqnr_db", type=float, metavar="DB", help="gate of fp16 or int8")
    add("--min-agreement", type=float, metavar="FRACTION", help="top-1 agreement gate, 0 to 1")
    add("--workspace-mib", type=int, metavar="MIB", help="builder's scratch memory limit")
    parser.set_defaults(run=_run_engine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    if not options.debug:
        # Libraries warn about their own future; a failure must stay one or two lines.
        warnings.simplefilter("ignore")
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except KeyboardInterrupt:
        print("repvgg-export: interrupted; nothing was published", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ExporterError as error:
        if options.debug:
            traceback.print_exc()
        if options.json:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        print(f"repvgg-export: {error}", file=sys.stderr)
        return error.exit_code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_engine(options: argparse.Namespace) -> int:
    names = ExportRequest.__dataclass_fields__
    request = ExportRequest(**{name: getattr(options, name) for name in names})
    spec = validate(request)
    with _progress(options) as progress:
        _require_libraries()
        # Read when torch loads its OpenMP: threads that spin while others work slow a forward pass
        # down 40 times on a machine with another busy process.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from exporter import pipeline

        result = pipeline.run(spec, progress)
    if not options.quiet:
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
    if options.json:
        print(json.dumps(_result_json(result)))
    else:
        _print_result(result)
    return EXIT_DONE


def _run_verify(options: argparse.Namespace) -> int:
    from exporter.bundle import Bundle
    from exporter.verify import verify

    bundle = Bundle.load(options.bundle)
    ledger = verify(bundle)
    if options.json:
        print(json.dumps({"bundle": str(bundle.path), "parity": ledger.to_json()}))
    else:
        _print_ledger(ledger, f"{bundle.path}: files intact")
    if ledger.verdict != "pass":
        failed = next(stage for stage in ledger.stages if stage.status == "fail")
        raise GateFailedError(f"bundle {bundle.path}: stage {failed.stage}: {failed.reason}")
    return EXIT_DONE


def _run_inspect(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from exporter.inspection import inspect_file

    inspection = inspect_file(options.file)
    if options.json:
        print(json.dumps(inspection.to_json(), allow_nan=False))
        return EXIT_DONE
    from rich.console import Console

    from exporter.inspection.tables import tables

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for table in tables(inspection):
        console.print(table)
    for note in inspection.notes:
        print(f"note: {note}")
    return EXIT_DONE


def _run_convert(options: argparse.Namespace) -> int:
    _require_libraries("torch", "safetensors")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from exporter.conversion import convert

    done = convert(options.file, options.out, to=options.to, form=options.form, force=options.force)
    if options.json:
        print(json.dumps(done.to_json()))
        return EXIT_DONE
    if done.dropped and not options.quiet:
        print(f"note: dropped {', '.join(done.dropped)}", file=sys.stderr)
    print(
        f"{done.path}: RepVGG-{done.variant}, {done.tensors} tensors, {done.source_format} "
        f"{done.source_form} -> {done.format} {done.form}"
    )
    return EXIT_DONE


def _require_libraries(*names: str) -> None:
    """Say which extra is missing before any work is done."""
    from importlib.util import find_spec

    from exporter.errors import EnvironmentLackError

    missing = [
        name
        for name in names or ("torch", "onnx", "onnxruntime", "onnxsim", "safetensors")
        if find_spec(name) is None
    ]
    if missing:
        raise EnvironmentLackError(
            f"not installed: {', '.join(missing)}; pip install 'repvgg-exporter[export]'"
        )


@contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, one line a stage elsewhere, nothing with --quiet."""
    if options.quiet:
        yield _silent
    elif not sys.stderr.isatty():
        seen: set[str] = set()

        def announce(stage: str, _fraction: float) -> None:
            if stage not in seen:
                seen.add(stage)
                print(f"{stage} ...", file=sys.stderr, flush=True)

        yield announce
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:15}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def update(stage: str, fraction: float) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=1.0)
                bars.update(tasks[stage], completed=fraction)

            yield update


def _silent(_stage: str, _fraction: float) -> None:
    return


def _result_json(result: ExportResult) -> dict[str, Any]:
    return {
        "bundle": str(result.bundle.path),
        "verdict": result.ledger.verdict,
        "parity": result.ledger.to_json(),
        "engine": result.engine,
        "notes": list(result.notes),
        "seconds": result.seconds,
    }


def _print_result(result: ExportResult) -> None:
    spec = result.bundle.manifest["spec"]
    _print_ledger(result.ledger, f"RepVGG-{spec['variant']} {spec['precision']}")
    for targets, figures in _same_figures(result.engine["per_target"]):
        counts = figures["convolutions"]
        print(
            f"{targets}: {counts['total']} convolutions ({counts['int8']} INT8, {counts['half']} "
            f"half, {counts['float']} float), {figures['epilogue_fused']} with fused epilogue, "
            f"{figures['other_kernels']} other kernels"
        )
    for warning in result.engine["warnings"]:
        print(f"warning: {warning}")
    total = sum(result.seconds.values())
    print(
        f"{spec['out']}: engine of {result.engine['plan_bytes'] / 1e6:.1f} MB for "
        f"{', '.join(result.engine['targets'])}; {total:.1f} s"
    )


def _same_figures(per_target: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Targets with equal figures on one line: a plan for several has one layer table."""
    groups: list[tuple[str, dict[str, Any]]] = []
    for target, figures in per_target.items():
        if groups and groups[-1][1] == figures:
            groups[-1] = (f"{groups[-1][0]} {target}", figures)
        else:
            groups.append((target, figures))
    return groups


def _print_ledger(ledger: Ledger, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    top1 = (
        ""
        if ledger.original_top1 is None
        else f", original top-1 {100 * ledger.original_top1:.2f} %"
    )
    table = Table(title=f"{title}: {ledger.image_count} images ({ledger.images}){top1}")
    table.add_column("stage")
    table.add_column("status")
    for heading in ("SQNR dB", "max |diff|", "cosine", "agreement", "top-1"):
        table.add_column(heading, justify="right")
    for row in ledger.stages:
        figures = row.comparison
        cells = ["", "", "", ""]
        if figures is not None:
            cells = [
                f"{figures.sqnr_db:.1f}",
                f"{figures.max_abs:.3g}",
                f"{figures.cosine:.6f}",
                "" if figures.top1_agreement is None else f"{100 * figures.top1_agreement:.2f} %",
            ]
        top = "" if row.top1 is None else f"{100 * row.top1:.2f} %"
        table.add_row(row.stage, row.status.replace("_", " "), *cells, top)
    # Off a terminal rich assumes 80 columns and would cut figures off.
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False).print(table)
    for row in ledger.stages:
        if row.status == "not_run":
            print(f"{row.stage} not run: {row.reason}")
