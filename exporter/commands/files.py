"""The commands that look at one file: inspect, convert."""

from __future__ import annotations

import argparse
from pathlib import Path

from exporter.commands import AddCommand, keep_threads_from_spinning, require_libraries
from exporter.console import print_json, print_line, print_note, print_table
from exporter.errors import EXIT_DONE


def add_commands(command: AddCommand) -> None:
    """Add the two commands; each one's ``run`` default executes it."""
    inspect = command("inspect", "say what a file is")
    inspect.add_argument(
        "file", type=Path, help="a checkpoint, an ONNX, a bundle, an engine, a calibration table"
    )
    inspect.set_defaults(run=_run_inspect)
    convert = command("convert", "write a checkpoint in other key names")
    add = convert.add_argument
    add("file", type=Path, help="a checkpoint")
    add("out", type=Path, help="the safetensors file to write")
    add("--to", default="official", help="key names: official, timm (default: official)")
    add("--form", help="train or deploy, fused if need be (default: the file's own)")
    add("--force", action="store_true", help="replace OUT if it exists")
    convert.set_defaults(run=_run_convert)


def _run_inspect(options: argparse.Namespace) -> int:
    keep_threads_from_spinning()
    from exporter.inspection import inspect_file

    inspection = inspect_file(options.file)
    if options.json:
        print_json(inspection.to_json())
        return EXIT_DONE
    from exporter.inspection.tables import tables

    for table in tables(inspection):
        print_table(table)
    for note in inspection.notes:
        print_line(f"note: {note}")
    return EXIT_DONE


def _run_convert(options: argparse.Namespace) -> int:
    require_libraries("torch", "safetensors")
    keep_threads_from_spinning()
    from exporter.conversion import convert

    done = convert(options.file, options.out, to=options.to, form=options.form, force=options.force)
    if options.json:
        print_json(done.to_json())
        return EXIT_DONE
    if done.dropped:
        print_note(f"note: dropped {', '.join(done.dropped)}")
    print_line(
        f"{done.path}: RepVGG-{done.variant}, {done.tensors} tensors, {done.source_format} "
        f"{done.source_form} -> {done.format} {done.form}"
    )
    return EXIT_DONE
