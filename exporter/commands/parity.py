"""The command `parity`: every case of a configuration, its gates, and the baseline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.commands import AddCommand
from exporter.commands.export import prepare_export
from exporter.console import print_json, print_note, print_table
from exporter.errors import GateFailedError, InputError
from exporter.files.private_folder import scratch_folder
from exporter.terminal import progress_bars, streams
from exporter.terminal import sentence as one_line

if TYPE_CHECKING:
    from exporter.cases import CaseResult
    from exporter.parity_run import Case, Comparison, ParityConfig

JUNIT = "junit.xml"
RESULTS = "parity.json"
_RESULTS_FOLDER = Path("build/parity")


def add_command(command: AddCommand) -> None:
    """Add the command; its ``run`` default executes it."""
    parser = command("parity", "run every export of a configuration and hold it to its figures")
    add = parser.add_argument_group("what goes in").add_argument
    add("config", type=Path, help="a TOML file of cases; docs/ci.md describes it")
    add("--baseline", type=Path, metavar="FILE",
        help="figures of an earlier run, which no case may fall behind")  # fmt: skip
    add = parser.add_argument_group("result").add_argument
    add("--update-baseline", action="store_true",
        help="write this run's figures as the baseline, if every gate passed")  # fmt: skip
    add("--results", type=Path, default=_RESULTS_FOLDER, metavar="DIR",
        help=f"where {JUNIT} and {RESULTS} go (default: {_RESULTS_FOLDER})")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="keep the bundles here (default: they are deleted)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    # First: numpy reads how many threads its BLAS may use when it is loaded, and the number moves
    # the INT8 figures by tenths of a decibel.
    prepare_export()
    from exporter.parity_run import (
        Comparison,
        compare,
        read_baseline,
        read_config,
        require_same_cases,
        write_baseline,
    )

    if options.update_baseline and options.baseline is None:
        raise InputError("--update-baseline needs --baseline FILE, the file to write")
    config = read_config(options.config)
    baseline = None
    if options.baseline is not None and not options.update_baseline:
        baseline = read_baseline(options.baseline)
        require_same_cases(baseline, (case.name for case in config.cases), options.baseline)
    results = _run_cases(config, options)
    margins = {case.name: case.margins for case in config.cases}
    comparison = Comparison() if baseline is None else compare(baseline, results, margins)
    sentences = [f"case {r.name}: {r.message}" for r in results if r.message is not None]
    sentences += [change.sentence for change in comparison.regressions]
    code = _exit_code(results, comparison)
    content = {
        "verdict": "fail" if sentences else "pass",
        "exit_code": code,
        "error": "; ".join(sentences) or None,
        **comparison.to_json(),
        "cases": [result.to_json() for result in results],
    }
    _write(options.results, results, comparison, content)
    if options.update_baseline and not sentences:
        write_baseline(options.baseline, results)
        print_note(f"note: baseline {options.baseline} holds the figures of this run")
    _tell(options, results, comparison, content)
    for sentence in sentences:
        streams().error(f"repvgg-export: {one_line(sentence)}")
    return code


def _run_cases(config: ParityConfig, options: argparse.Namespace) -> tuple[CaseResult, ...]:
    from exporter.cases import run_case

    with ExitStack() as stack:
        folder = options.out or stack.enter_context(scratch_folder("parity"))
        progress = stack.enter_context(progress_bars(quiet=options.quiet))

        def run(case: Case) -> CaseResult:
            def report(stage: str, done: float) -> None:
                progress(f"{case.name} {stage}", done)

            request = replace(case.request, out=str(folder / case.name))
            return run_case(case.name, request, report)

        return tuple(map(run, config.cases))


def _exit_code(results: Sequence[CaseResult], comparison: Comparison) -> int:
    """A failed figure counts as a failed gate."""
    from exporter.cases import exit_code_of

    return GateFailedError.exit_code if comparison.regressions else exit_code_of(results)


def _write(
    folder: Path,
    results: Sequence[CaseResult],
    comparison: Comparison,
    content: Mapping[str, Any],
) -> None:
    from exporter.files.whole_file import write_whole
    from exporter.parity_run import junit_xml

    write_whole(folder / JUNIT, junit_xml(results, comparison))
    write_whole(folder / RESULTS, json.dumps(content, indent=2) + "\n")


def _tell(
    options: argparse.Namespace,
    results: Sequence[CaseResult],
    comparison: Comparison,
    content: Mapping[str, Any],
) -> None:
    if options.json:
        print_json(content)
        return
    from exporter.parity_run.tables import results_table

    compared = options.baseline is not None and not options.update_baseline
    title = f"{options.config}: results in {options.results}"
    print_table(results_table(results, comparison, title, has_baseline=compared))
    for change in comparison.improvements:
        print_note(f"note: {change.sentence}; --update-baseline records it")
