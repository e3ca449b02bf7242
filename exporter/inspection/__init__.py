"""What is this file? A checkpoint, an ONNX, a bundle, an engine or a calibration table.

The content decides, not the suffix. Each kind has a file of its own; torch is imported for
checkpoints only, onnx for ONNX only.
"""

from __future__ import annotations

from pathlib import Path

from exporter.bundle import MANIFEST
from exporter.engine.plan_header import MAGIC
from exporter.errors import EnvironmentLackError, InputError
from exporter.inspection.finding import Inspection, Kind
from exporter.inspection.outlook import KernelOutlook, Outlook
from exporter.inspection.recognition import (
    is_safetensors,
    may_be_bundle,
    may_be_weights,
    nothing_known,
)

__all__ = ["Inspection", "KernelOutlook", "Kind", "Outlook", "inspect_file"]

_ONNX_START = b"\x08"
"""The tag of ``ir_version``, the first field of a ModelProto."""


def inspect_file(path: Path) -> Inspection:
    """Describe ``path``. Values that are not finite are counted, not refused.

    Raises:
        InputError: if it cannot be read, or is nothing that this program knows.
        EnvironmentLackError: if the library that reads this kind is not installed.
    """
    try:
        return _inspect(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
    except ImportError as error:
        raise EnvironmentLackError(
            f"not installed: {error.name}; pip install 'repvgg-exporter[export]'"
        ) from error


def _inspect(path: Path) -> Inspection:
    if path.is_dir():
        from exporter.inspection.bundle_folder import inspect_bundle

        if not may_be_bundle(path):
            raise nothing_known(path)
        return inspect_bundle(path)
    head = _first_bytes(path)
    if head.startswith(MAGIC):
        from exporter.inspection.engine_plan import inspect_plan

        return inspect_plan(path)
    if head.startswith(b"TRT-"):
        from exporter.inspection.calibration_text import inspect_cache

        return inspect_cache(path)
    if head.lstrip().startswith(b"{"):
        from exporter.inspection.calibration_text import inspect_table

        return inspect_table(path)
    if head.startswith(_ONNX_START) and not is_safetensors(head):
        from exporter.inspection.onnx_graph import inspect_onnx

        return inspect_onnx(path)
    if not may_be_weights(path, head):
        raise nothing_known(path)
    from exporter.inspection.weights import inspect_checkpoint

    return inspect_checkpoint(path)


def _first_bytes(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path} is empty")
    if path.name == MANIFEST:
        raise InputError(f"{path} is a bundle's manifest; inspect its folder {path.parent}")
    return head
