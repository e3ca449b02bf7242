"""The tables of docs/targets.md, from exporter/devices/table.py.

    python docs/scripts/devices.py

writes them between the page's markers; a test holds that they are what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from exporter.devices import ARCHITECTURES, DEVICES, RTX, Architecture, Device, precision_advice

PAGE = Path(__file__).parents[1] / "targets.md"
BEGIN, END = "<!-- made by docs/scripts/devices.py -->", "<!-- end -->"


def tables() -> str:
    """Both tables in Markdown."""
    return (
        "## Compute capabilities\n\n"
        + _table(
            ("capability", "architecture", "engine built", "full TensorRT", "worth using"),
            (_architecture(item) for item in ARCHITECTURES.values()),
        )
        + "\n## Devices\n\n"
        + _table(
            ("`TARGET`", "device", "capability", "memory GB", "DLA", "TensorRT"),
            (_device(device) for device in DEVICES.values()),
        )
    )


def with_tables(page: str) -> str:
    """``page`` with what stands between its markers replaced.

    Raises:
        ValueError: if it has no markers.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page needs the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def _architecture(item: Architecture) -> Sequence[str]:
    here = item.builder == RTX
    newest = f" to {_version(item.newest)}" if item.newest else " and later"
    exact = item.newest == item.oldest
    advice = precision_advice(item.capability, item.builder)
    return (
        f"`{item.capability}`",
        item.name,
        "at export, by TensorRT-RTX" if here else "on the device",
        _version(item.oldest) + ("" if exact else newest),
        ", ".join(each.precision for each in advice if each.worth),
    )


def _device(device: Device) -> Sequence[str]:
    software = "; ".join(
        f"{'about ' * each.about}{_version(each.tensorrt)} ({each.name})"
        for each in device.software
    )
    return (
        f"`{device.name}`",
        device.products,
        device.capability,
        " / ".join(map(str, device.memory_gb)),
        " / ".join(map(str, device.dla_cores)) if max(device.dla_cores) else "-",
        software or "as installed",
    )


def _version(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), encoding="utf-8")
