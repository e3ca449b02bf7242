"""Arguments -> request -> pipeline -> exit code. With ``console``, the only place that prints.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter import __version__
from exporter.console import print_ledger, print_result, print_table, progress_bars, result_json
from exporter.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EnvironmentLackError,
    ExporterError,
    GateFailedError,
)
from exporter.spec import ExportRequest, Precision, Recipe, validate
from models.variants import VARIANTS

if TYPE_CHECKING:
    from types import FrameType

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
    add("--recipe", help=f"{', '.join(map(str, Recipe))}; auto measures all and takes the best "
        "(default: full, or mse where the network is no chain)")  # fmt: skip
    add("--keep-float", metavar="NAMES", help="nodes that stay float in int8, comma-separated")
    add("--per-tensor-weights", action="store_true", help="one scale a weight in int8, not one a "
        "channel")  # fmt: skip
    add("--power-of-two", action="store_true", help="equalize by powers of two only")
    add("--calibration-table", metavar="FILE", help="calibration.json of an earlier run; refused "
        "unless network, images, preprocessing and recipe are the same")  # fmt: skip
    add("--target", help="compute capabilities, such as sm86,sm89 (default: all that can)")
    add("--backend", default="auto", help="auto or tensorrt-rtx (default: auto)")
    add("--batch", metavar="MIN:OPT:MAX", help="batch profile (default: 1:8:32)")
    add("--image-size", metavar="N or HxW", help="pixels (default: the checkpoint's own, else 224)")
    add("--dynamic-size", metavar="MIN:OPT:MAX",
        help="leave height and width open, or each: MIN:OPT:MAXxMIN:OPT:MAX")  # fmt: skip
    add("--preprocess", metavar="FILE", help="imagenet, a JSON file or another bundle's manifest")
    add("--out", metavar="DIR", help="bundle folder (default: build/MODEL-PRECISION)")
    add("--skip-bad-images", action="store_true", help="leave unreadable images out and count them")
    add("--min-sqnr", dest="min_sqnr_db", type=float, metavar="DB",
        help="gate of fp16 or int8; int8 keeps as many layers in half as it takes")  # fmt: skip
    add("--max-drop", type=float, metavar="POINTS",
        help="top-1 that may be lost; int8 keeps as many layers in half as it takes")  # fmt: skip
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
        evidence = error.evidence if isinstance(error, GateFailedError) else None
        if options.json:
            failure = {"error": str(error), "exit_code": error.exit_code}
            print(json.dumps(failure | ({"parity": evidence} if evidence else {})))
        elif evidence:
            print_ledger(evidence, "what was measured until then")
        print(f"repvgg-export: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # A full disk or a vanished file outside the bundle's own writing.
        if options.debug:
            traceback.print_exc()
        print(f"repvgg-export: {error}", file=sys.stderr)
        return EnvironmentLackError.exit_code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_engine(options: argparse.Namespace) -> int:
    names = ExportRequest.__dataclass_fields__
    request = ExportRequest(**{name: getattr(options, name) for name in names})
    spec = validate(request)
    with progress_bars(quiet=options.quiet) as progress:
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
        print(json.dumps(result_json(result)))
    else:
        print_result(result)
    return EXIT_DONE


def _run_verify(options: argparse.Namespace) -> int:
    from exporter.bundle import Bundle
    from exporter.verify import verify

    bundle = Bundle.load(options.bundle)
    ledger = verify(bundle)
    if options.json:
        print(json.dumps({"bundle": str(bundle.path), "parity": ledger.to_json()}))
    else:
        print_ledger(ledger.to_json(), f"{bundle.path}: files intact")
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
    from exporter.inspection.tables import tables

    for table in tables(inspection):
        print_table(table)
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

    missing = [
        name
        for name in names or ("torch", "onnx", "onnxruntime", "onnxsim", "safetensors")
        if find_spec(name) is None
    ]
    if missing:
        raise EnvironmentLackError(
            f"not installed: {', '.join(missing)}; pip install 'repvgg-exporter[export]'"
        )
