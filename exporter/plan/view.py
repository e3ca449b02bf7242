"""A plan as tables and lines for people; printing them is the command line's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.devices import Advice, precision_advice
from exporter.plan.content import Plan, PlannedFile

if TYPE_CHECKING:
    from rich.table import Table


def plan_tables(plan: Plan) -> Iterator[Table]:
    """Stages, files, targets and precisions."""
    from rich.markup import escape
    from rich.table import Table

    stages = Table(title=escape(f"{plan.title} {plan.build.precision}: what would be done"))
    stages.add_column("stage")
    stages.add_column("what", overflow="fold")
    for stage in plan.stages:
        stages.add_row(stage.name, escape(stage.what))
    yield stages
    listed = Table(title=escape(f"Files of {plan.out}"))
    listed.add_column("file")
    listed.add_column("MB", justify="right")
    for file in plan.files:
        listed.add_row(escape(file.name), size_text(file))
    yield listed
    targets = Table(title=f"Targets, batch {plan.build.batch}")
    for heading in ("target", "device", "engine built", "by"):
        targets.add_column(heading, overflow="fold")
    for row in plan.targets:
        device = row.target.device
        facts = f"{device.products}; {device.memory}; {device.dla}" if device else ""
        where = "here" if row.here else "on the device"
        targets.add_row(row.target.label, facts, where, row.backend)
    yield targets
    yield _precisions(plan)


def _precisions(plan: Plan) -> Table:
    """Targets of which the same is true share their rows."""
    from rich.table import Table

    alike: dict[tuple[Advice, ...], list[str]] = {}
    for row in plan.targets:
        key = precision_advice(row.target.capability, row.backend)
        alike.setdefault(key, []).append(row.target.capability)
    table = Table(title="Precisions worth using")
    for heading in ("target", "precision", "", "why"):
        table.add_column(heading, overflow="fold")
    for shared, names in alike.items():
        for advice in shared:
            worth = "yes" if advice.worth else "no"
            table.add_row(" ".join(dict.fromkeys(names)), advice.precision, worth, advice.reason)
    return table


def plan_lines(plan: Plan) -> Iterator[str]:
    """Software of the devices, engine, commands, warnings and notes."""
    for device in dict.fromkeys(row.target.device for row in plan.targets if row.target.device):
        if device.software:
            yield f"{device.name}: {'; '.join(map(str, device.software))}"
    guessed = plan.is_engine_estimated
    megabytes = f"{'about ' * guessed}{plan.engine_bytes / 1e6:.1f} MB"
    if plan.built_here:
        yield f"engine: {megabytes} for {', '.join(plan.built_here)}, built here"
    if plan.deferred:
        whose = " (estimate of TensorRT-RTX)" * guessed
        yield f"engine deferred, {megabytes}{whose}: {plan.deferred.reason}"
    for command in plan.commands:
        yield f"{command.library}: {command.line}"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for note in plan.notes:
        yield f"note: {note}"


def size_text(file: PlannedFile) -> str:
    """``about 28.2``; exact sizes without the word; ``< 0.5`` for the small files of evidence."""
    if file.bytes is None:
        return "< 0.5"
    return f"{'' if file.exists else 'about '}{file.bytes / 1e6:.1f}"
