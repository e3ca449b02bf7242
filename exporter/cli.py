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
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from exporter import __version__
from exporter.commands import EXPORT_LIBRARIES, device, files, require_libraries
from exporter.console import (
    print_ledger,
    print_plan,
    print_result,
    progress_bars,
    result_json,
)
from exporter.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EnvironmentLackError,
    ExporterError,
    GateFailedError,
    InputError,
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
    _add_plan(
        commands.add_parser(
            "plan", parents=[common], help="say what `engine` would do", epilog=_EPILOG
        )
    )

    def command(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=words, epilog=_EPILOG)

    device.add_commands(command)
    files.add_commands(command)
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"variant: {', '.join(VARIANTS)}")
    _add_request(parser)
    parser.set_defaults(run=_run_engine)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=f"a bundle, or a variant: {', '.join(VARIANTS)}")
    _add_request(parser)
    add("--classes", type=int, metavar="N", help="of the checkpoint, for the sizes (default: 1000)")
    parser.set_defaults(run=_run_plan)


def _add_request(parser: argparse.ArgumentParser) -> None:
    """The options that make an :class:`ExportRequest`, beside the model."""
    add = parser.add_argument
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
    add(
        "--keep-float",
        metavar="NAMES",
        help="nodes that stay float in int8 and fp8, comma-separated",
    )
    add("--per-tensor-weights", action="store_true", help="one scale a weight in int8, not one a "
        "channel")  # fmt: skip
    add("--power-of-two", action="store_true", help="equalize by powers of two only")
    add("--calibration-table", metavar="FILE", help="calibration.json of an earlier run; refused "
        "unless network, images, preprocessing and recipe are the same")  # fmt: skip
    add("--target", help="devices and compute capabilities, such as orin,rtx3060,sm86 "
        "(default: all that can)")  # fmt: skip
    add("--backend", default="auto", help="auto, tensorrt-rtx or tensorrt (default: auto)")
    add("--batch", metavar="MIN:OPT:MAX", help="batch profile (default: 1:8:32)")
    add("--image-size", metavar="N or HxW", help="pixels (default: the checkpoint's own, else 224)")
    add("--dynamic-size", metavar="MIN:OPT:MAX",
        help="leave height and width open, or each: MIN:OPT:MAXxMIN:OPT:MAX")  # fmt: skip
    add("--preprocess", metavar="FILE", help="imagenet, a JSON file or another bundle's manifest")
    add("--with-preprocess", nargs="?", const="nhwc", metavar="LAYOUT",
        help="normalize in the graph: it takes uint8 pixels, nhwc (default) or nchw")  # fmt: skip
    add("--out", metavar="DIR", help="bundle folder (default: build/MODEL-PRECISION)")
    add("--skip-bad-images", action="store_true", help="leave unreadable images out and count them")
    add("--min-sqnr", dest="min_sqnr_db", type=float, metavar="DB",
        help="gate of the precision; int8 keeps as many layers in half as it takes")  # fmt: skip
    add("--max-drop", type=float, metavar="POINTS",
        help="top-1 that may be lost; int8 keeps as many layers in half as it takes")  # fmt: skip
    add("--min-agreement", type=float, metavar="FRACTION", help="top-1 agreement gate, 0 to 1")
    add("--workspace-mib", type=int, metavar="MIB", help="builder's scratch memory limit")
    _add_build_options(parser)


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    """What only some builders can obey; one that cannot says so."""
    add = parser.add_argument_group("building").add_argument
    add(
        "--typing",
        default="auto",
        help="data types by the graph or the builder: auto, strong, weak",
    )
    add("--dla", type=int, metavar="CORE", help="build for this DLA core (TensorRT on Jetson)")
    add("--no-gpu-fallback", dest="gpu_fallback", action="store_false",
        help="fail where the DLA does not take a layer")  # fmt: skip
    add("--quantization", default="auto", help="int8 scales from Q/DQ nodes or the bundle's "
        "calibration cache: auto, explicit, implicit (TensorRT 8 and 10)")  # fmt: skip
    add("--calibration-cache", metavar="FILE", help="implicit INT8 from another cache")
    add("--timing-cache", metavar="FILE", help="kernel timings to start from; written back")
    add(
        "--optimization-level",
        type=int,
        metavar="0..5",
        help="thoroughness of the builder's search",
    )
    add("--hardware-compatibility", default="none", help="none, ampere+, same-compute-capability")
    add("--version-compatible", action="store_true", help="a plan for later TensorRT releases too")
    add("--allow-emulated", action="store_true", help="accept targets that compute int8 in half")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    if not options.debug:
        # Libraries warn about their own future; a failure must stay one or two lines.
        warnings.simplefilter("ignore")
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        code = command(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("repvgg-export: interrupted; nothing was published", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ExporterError as error:
        if options.debug:
            traceback.print_exc()
        evidence = error.evidence if isinstance(error, GateFailedError) else None
        page = error.report if isinstance(error, GateFailedError) else None
        if options.json:
            failure = {"error": str(error), "exit_code": error.exit_code}
            failure |= {"parity": evidence} if evidence else {}
            print(json.dumps(failure | ({"report": str(page)} if page else {})))
        elif evidence:
            print_ledger(evidence, "what was measured until then")
        print(f"repvgg-export: {error}", file=sys.stderr)
        if page:
            print(f"the report of the failure: {page}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the result (`| head`) has seen enough; nothing more is written to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        # A full disk or a vanished file outside the bundle's own writing.
        if options.debug:
            traceback.print_exc()
        print(f"repvgg-export: {error}", file=sys.stderr)
        return EnvironmentLackError.exit_code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_engine(options: argparse.Namespace) -> int:
    spec = validate(_request(options))
    with progress_bars(quiet=options.quiet) as progress:
        require_libraries(*EXPORT_LIBRARIES)
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


def _request(options: argparse.Namespace) -> ExportRequest:
    names = ExportRequest.__dataclass_fields__
    return ExportRequest(**{name: getattr(options, name) for name in names})


def _run_plan(options: argparse.Namespace) -> int:
    from exporter.bundle import MANIFEST, Bundle
    from exporter.plan import make_plan, plan_bundle

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
        plan = make_plan(validate(request), num_classes=options.classes, dla_core=options.dla)
    if options.json:
        print(json.dumps(plan.to_json()))
    else:
        print_plan(plan)
    return EXIT_DONE
