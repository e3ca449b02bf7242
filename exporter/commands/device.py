"""The commands of the device half: build, verify, evaluate, benchmark. They need no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from exporter.commands import AddCommand
from exporter.commands.signing import signature_state
from exporter.console import print_json, print_ledger, print_note, print_table, print_warning
from exporter.errors import EXIT_DONE, InputError
from exporter.files.text_file import read_json
from exporter.spec import choice
from exporter.terminal import progress_bars, streams
from exporter.terminal import sentence as one_line

if TYPE_CHECKING:
    from exporter.device import RunBackend

T = TypeVar("T")
_BUNDLE = "a folder that `engine` made"
_BACKENDS = "auto (the engine where it runs, else ONNX Runtime), engine or onnxruntime"


def add_commands(command: AddCommand) -> None:
    """Add the four commands; each one's ``run`` default executes it."""
    verify = command("verify", "check a bundle's files and figures")
    verify.add_argument("bundle", type=Path, help=_BUNDLE)
    verify.add_argument("--public-key", metavar="KEY",
        help="demand a signature by this minisign key: a file, or its text")  # fmt: skip
    verify.add_argument("--require-engine", action="store_true",
        help="demand that the engine runs: where it does not, exit code 3")  # fmt: skip
    _add_runtime_cache(verify)
    verify.set_defaults(run=_run_verify)
    _add_build(command("build", "build a bundle's engine, on the device it is for"))
    _add_evaluate(command("evaluate", "top-1 and top-5 of a bundle on labelled images"))
    _add_benchmark(command("benchmark", "latency and throughput of a bundle"))


def _add_runtime_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-runtime-cache", dest="runtime_cache", action="store_false",
        help="neither use nor keep the kernels that TensorRT-RTX compiles here")  # fmt: skip


def _add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, help=f"{_BUNDLE}; its engine is replaced")
    add("--backend", default="auto",
        help="who builds it: auto, tensorrt-rtx or tensorrt (default: auto)")  # fmt: skip
    add(
        "--target",
        help="devices and compute capabilities, such as orin or sm86 (default: this machine's GPU)",
    )
    add("--dla", type=int, metavar="CORE",
        help="build for a DLA; the GPU runs what it does not take")  # fmt: skip
    add("--timing-cache", type=Path, metavar="FILE", help="read if it exists, written afterwards")
    add("--optimization-level", type=int, metavar="N", help="0 (fast build) to 5 (long search)")
    add("--version-compatible", action="store_true", help="the engine also runs on later TensorRTs")
    add("--allow-emulated", action="store_true",
        help="accept a target that computes quantized convolutions in half")  # fmt: skip
    parser.set_defaults(run=_run_build)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, nargs="?", help=_BUNDLE)
    add("--data", type=Path, metavar="DIR", help="images, in one folder a class")
    add("--backend", default="auto", help=f"{_BACKENDS} (default: auto)")
    add("--shard", metavar="PART/PARTS", help="count this part of the images only, such as 2/4")
    add("--merge", type=Path, nargs="+", metavar="FILE",
        help="instead: add up what --shard runs printed with --json")  # fmt: skip
    add("--skip-bad-images", action="store_true", help="leave unreadable images out and count them")
    add("--threads", type=int, default=0, metavar="N",
        help="of ONNX Runtime (default: all cores)")  # fmt: skip
    _add_runtime_cache(parser)
    parser.set_defaults(run=_run_evaluate)


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, help=_BUNDLE)
    add("--compare", type=Path, metavar="OTHER",
        help="time another bundle in turns with this one and print the ratios")  # fmt: skip
    add("--backend", default="auto", help=f"{_BACKENDS} (default: auto)")
    add("--batch", metavar="N,N,...", help="batch sizes (default: the profile's three)")
    add("--seconds", type=float, default=2.0, metavar="S",
        help="to measure each batch size (default: 2)")  # fmt: skip
    add("--warmup", type=int, default=5, metavar="N", help="runs before that (default: 5)")
    add("--threads", type=int, default=0, metavar="N",
        help="of ONNX Runtime (default: all cores)")  # fmt: skip
    add("--cuda-graph", action="store_true", help="capture the engine's launch once and replay it")
    _add_runtime_cache(parser)
    parser.set_defaults(run=_run_benchmark)


def _run_verify(options: argparse.Namespace) -> int:
    from exporter.bundle import Bundle
    from exporter.verify import shortfall, verify

    signature = signature_state(options.bundle, options.public_key)
    bundle = Bundle.load(options.bundle)
    ledger = verify(
        bundle, runtime_cache=options.runtime_cache, say=lambda note: _say(note, options)
    )
    failure = shortfall(bundle, ledger, require_engine=options.require_engine)
    if options.json:
        ending = failure and {"error": str(failure), "exit_code": failure.exit_code}
        content = {"bundle": str(bundle.path), "signature": signature.to_json()}
        print_json({**(ending or {}), **content, "parity": ledger.to_json()})
    else:
        words = "; ".join(filter(None, ["files intact", signature.words]))
        print_ledger(ledger.to_json(), f"{bundle.path}: {words}")
    if failure is None:
        return EXIT_DONE
    own = streams()
    own.settle()
    own.error(f"repvgg-export: {one_line(str(failure))}")
    return failure.exit_code


def _run_build(options: argparse.Namespace) -> int:
    from exporter.bundle import ENGINE_SUMMARY, JUNIT, PARITY, REPORT, Bundle
    from exporter.bundle.signature import is_signed
    from exporter.commands.device_tables import engine_table
    from exporter.device import build_engine, options_for

    bundle = Bundle.load(options.bundle)
    was_signed = is_signed(bundle.path)
    names = (
        "dla", "timing_cache", "optimization_level", "version_compatible", "allow_emulated",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in names}
    build_options = _parsed(lambda: options_for(bundle, **given))
    with progress_bars(quiet=options.quiet) as progress:
        built = build_engine(
            bundle,
            backend=options.backend,
            target=options.target,
            options=build_options,
            progress=lambda _phase, fraction: progress("engine", fraction),
        )
    evidence = f"{REPORT}, {PARITY} and {JUNIT} are still those of the export"
    _say(f"{evidence}; `repvgg-export verify` judges the new engine", options)
    if was_signed:
        _say("the bundle is no longer signed: `repvgg-export sign` signs it as it is now", options)
    engine = json.loads((built.path / ENGINE_SUMMARY).read_text("utf-8"))
    if options.json:
        print_json({"bundle": str(built.path), "engine": engine})
    else:
        print_table(engine_table(built.path, engine))
        for warning in engine["warnings"]:
            print_warning(warning)
    return EXIT_DONE


def _run_evaluate(options: argparse.Namespace) -> int:
    from exporter.bundle import Bundle
    from exporter.commands.device_tables import evaluation_tables
    from exporter.device.accuracy import Shard, merge
    from exporter.evaluation import evaluate

    if options.merge:
        if options.bundle or options.data or options.shard:
            raise InputError(
                "--merge reads finished evaluations; leave out BUNDLE, --data and --shard"
            )
        result = merge([_read_evaluation(path) for path in options.merge])
    else:
        if options.bundle is None or options.data is None:
            raise InputError("evaluate needs a bundle and --data DIR, or --merge FILE ...")
        with progress_bars(quiet=options.quiet) as progress:
            result = evaluate(
                Bundle.load(options.bundle),
                options.data,
                _backend(options.backend),
                shard=_parsed(lambda: Shard.parse(options.shard)) if options.shard else None,
                progress=lambda fraction: progress("evaluate", fraction),
                skip_bad_images=options.skip_bad_images,
                threads=_threads(options),
                runtime_cache=options.runtime_cache,
            )
    if options.json:
        print_json(result.to_json())
        return EXIT_DONE
    _say(result.note, options)
    for table in evaluation_tables(result):
        print_table(table)
    return EXIT_DONE


def _run_benchmark(options: argparse.Namespace) -> int:
    from exporter.bundle import Bundle
    from exporter.commands.device_tables import latency_table, ratio_table
    from exporter.device.timing import Effort
    from exporter.latency import benchmark, compare

    backend, threads = _backend(options.backend), _threads(options)
    sizes = _parsed(lambda: _batches(options.batch))
    effort = _parsed(lambda: Effort(seconds=options.seconds, warmup=options.warmup))
    bundle = Bundle.load(options.bundle)
    if options.compare is None:
        found = benchmark(
            bundle,
            backend,
            batches=sizes,
            effort=effort,
            threads=threads,
            cuda_graph=options.cuda_graph,
            runtime_cache=options.runtime_cache,
        )
        content: Mapping[str, Any] = found.to_json()
        results, ratios = [found], []
    else:
        both = compare(
            bundle,
            Bundle.load(options.compare),
            backend,
            batches=sizes,
            effort=effort,
            threads=threads,
            cuda_graph=options.cuda_graph,
            runtime_cache=options.runtime_cache,
        )
        content, results, ratios = both.to_json(), [both.first, both.second], [both]
    if options.json:
        print_json(content)
        return EXIT_DONE
    for note in dict.fromkeys(result.note for result in results):
        _say(note, options)
    for result in results:
        print_table(latency_table(result))
    for pair in ratios:
        print_table(ratio_table(pair))
    return EXIT_DONE


def _read_evaluation(path: Path) -> Any:
    from exporter.device.accuracy import Evaluation

    try:
        return Evaluation.from_json(read_json(path))
    except OSError as error:
        raise InputError(f"evaluation {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path} is not what `evaluate --json` prints: {error or type(error).__name__}"
        ) from error


def _backend(text: str) -> RunBackend:
    from exporter.device import RunBackend

    return _parsed(lambda: choice(RunBackend, "backend", text))


def _threads(options: argparse.Namespace) -> int:
    if options.threads < 0:
        raise InputError(f"threads must be at least 0 (all cores), not {options.threads}")
    return int(options.threads)


def _batches(text: str | None) -> Sequence[int]:
    try:
        sizes = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        sizes = [0]
    if any(size < 1 for size in sizes):
        raise ValueError(f"batch {text!r} must be numbers of at least 1, such as 1,8,32")
    return sizes


def _parsed(parse: Callable[[], T]) -> T:
    try:
        return parse()
    except ValueError as error:
        raise InputError(str(error)) from error


def _say(note: str | None, _options: argparse.Namespace) -> None:
    if note:
        print_note(f"note: {note}")
