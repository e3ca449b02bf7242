"""Arguments -> a command -> exit code.

Results go to standard output, everything else to standard error. Heavy libraries are imported after
the arguments have been read, so that ``--help`` needs none of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from exporter import __version__
from exporter.commands import (
    cache,
    completion,
    device,
    export,
    files,
    matrix,
    outcome,
    parity,
    signing,
)
from exporter.commands.argument_parser import ArgumentParser, UsageError
from exporter.spec import Precision, Recipe
from exporter.terminal import interruptible
from models.variants import VARIANTS

_EPILOG = """exit codes: 0 done and every gate passed; 1 a gate failed, nothing published;
2 bad input or usage; 3 the environment lacks something; 130 interrupted"""
_EXAMPLES = {
    "engine": "engine A0 --precision int8 --target orin,rtx3060",
    "plan": "plan B1 --target orin --precision int8",
    "verify": "verify build/A0-int8",
    "sign": "sign build/A0-int8 --key minisign.key",
    "build": "build build/A0-int8 --timing-cache kernels.cache",
    "evaluate": "evaluate build/A0-int8 --data images/val",
    "benchmark": "benchmark build/A0-int8 --compare build/A0-fp16",
    "inspect": "inspect a0.pth --json",
    "convert": "convert a0.pth a0.safetensors --form deploy",
    "parity": "parity parity.toml --baseline parity-baseline.json",
    "matrix": "matrix matrix.toml --out build/matrix",
    "cache": "cache ls",
    "completion": "completion bash > ~/.local/share/bash-completion/completions/repvgg-export",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; every command's ``run`` default is the function that executes it."""
    parser = ArgumentParser(
        prog="repvgg-export",
        description="From a trained RepVGG to a checked TensorRT engine.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"repvgg-exporter {__version__}")
    _add_terminal(parser, given_twice=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
        prog=parser.prog)  # fmt: skip

    def command(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=words,
            description=f"{words[0].upper()}{words[1:]}.",
            epilog=f"example: repvgg-export {_EXAMPLES[name]}\n\n{_EPILOG}",
        )

    _add_engine(command("engine", "build a bundle"))
    _add_plan(command("plan", "say what `engine` would do"))
    device.add_commands(command)
    signing.add_command(command)
    files.add_commands(command)
    parity.add_command(command)
    matrix.add_command(command)
    cache.add_command(command)
    completion.add_command(command)
    for each in commands.choices.values():
        _add_terminal(each, given_twice=True)
    return parser


def _add_terminal(parser: argparse.ArgumentParser, *, given_twice: bool) -> None:
    """What every command takes, before its name and after it; the later one counts."""
    add = parser.add_argument_group("terminal").add_argument
    absent = argparse.SUPPRESS
    off = absent if given_twice else False
    add("--json", action="store_true", default=off, help="print the result, or the failure, as one "
        "JSON object")  # fmt: skip
    add("--quiet", action="store_true", default=off, help="no progress and no notes")
    add("--log-file", type=Path, default=absent if given_twice else None, metavar="FILE",
        help="add everything to FILE with its time, also what is hidden")  # fmt: skip
    add("--debug", action="store_true", default=off,
        help="show the traceback of a failure and what libraries print")  # fmt: skip


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"variant: {', '.join(VARIANTS)}")
    _add_request(parser)
    add = parser.add_argument_group("stage cache").add_argument
    add("--explain", action="store_true", help="say which stages were reused, and what has changed "
        "for the others")  # fmt: skip
    add("--no-cache", dest="cached", action="store_false", help="make every stage anew and keep "
        "none")  # fmt: skip
    signed = parser.add_argument_group("signature").add_argument
    signed("--sign", type=Path, metavar="FILE", help="sign the bundle with this secret key of "
        "minisign; its password is asked for, or in REPVGG_EXPORT_KEY_PASSWORD")  # fmt: skip
    parser.set_defaults(run=export.run_engine)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=f"a bundle, or a variant: {', '.join(VARIANTS)}")
    _add_request(parser)
    add("--classes", type=int, metavar="N", help="of the checkpoint, for the sizes (default: 1000)")
    parser.set_defaults(run=export.run_plan)


def _add_request(parser: argparse.ArgumentParser) -> None:
    """The options that make an :class:`ExportRequest`, beside the model."""
    goes_in = parser.add_argument_group("what goes in").add_argument
    int8 = parser.add_argument_group("INT8").add_argument
    gates = parser.add_argument_group("gates").add_argument
    engine = parser.add_argument_group("engine").add_argument
    building = parser.add_argument_group("building the engine")
    result = parser.add_argument_group("result").add_argument
    add = goes_in
    add("--precision", default="int8", help=f"{', '.join(map(str, Precision))} (default: int8)")
    add("--weights", help="checkpoint file, hub, hub@COMMIT or random (default: the bundled ones)")
    add("--calib", dest="calibration", metavar="DIR", help="calibration images")
    add("--calib-images", dest="calibration_images", type=int, default=512, metavar="N",
        help="use at most N of them, spread evenly (default: 512)")  # fmt: skip
    add("--evaluation", metavar="DIR", help="images to compare the stages on, in class folders")
    add("--evaluation-images", type=int, default=512, metavar="N",
        help="use at most N of them, spread evenly (default: 512)")  # fmt: skip
    add = int8
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
    add = engine
    add("--target", help="devices and compute capabilities, such as orin,rtx3060,sm86 "
        "(default: all that can)")  # fmt: skip
    add("--backend", default="auto", help="auto, tensorrt-rtx or tensorrt (default: auto)")
    add("--batch", metavar="MIN:OPT:MAX", help="batch profile (default: 1:8:32)")
    add = goes_in
    add("--image-size", metavar="N or HxW", help="pixels (default: the checkpoint's own, else 224)")
    add("--dynamic-size", metavar="MIN:OPT:MAX",
        help="leave height and width open, or each: MIN:OPT:MAXxMIN:OPT:MAX")  # fmt: skip
    add("--preprocess", metavar="FILE", help="imagenet, a JSON file or another bundle's manifest")
    add("--with-preprocess", nargs="?", const="nhwc", metavar="LAYOUT",
        help="normalize in the graph: it takes uint8 pixels, nhwc (default) or nchw")  # fmt: skip
    result("--out", metavar="DIR", help="bundle folder (default: build/MODEL-PRECISION)")
    add("--skip-bad-images", action="store_true", help="leave unreadable images out and count them")
    add = gates
    add("--min-sqnr", dest="min_sqnr_db", type=float, metavar="DB",
        help="gate of the precision; int8 keeps as many layers in half as it takes")  # fmt: skip
    add("--max-drop", type=float, metavar="POINTS",
        help="top-1 that may be lost; int8 keeps as many layers in half as it takes")  # fmt: skip
    add("--min-agreement", type=float, metavar="FRACTION", help="top-1 agreement gate, 0 to 1")
    add = engine
    add("--workspace-mib", type=int, metavar="MIB", help="builder's scratch memory limit")
    _add_build_options(building)


def _add_build_options(group: argparse._ArgumentGroup) -> None:
    """What only some builders can obey; one that cannot says so."""
    add = group.add_argument
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
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    completion.answer(parser)
    try:
        options = parser.parse_args(words)
    except UsageError as error:
        return outcome.usage_failure(error, as_json="--json" in words)
    with interruptible():
        return outcome.run(options, words)
