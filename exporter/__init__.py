"""repvgg-exporter: a trained RepVGG in, a checked TensorRT bundle out.

Importing this package loads none of torch, onnx, onnxruntime and tensorrt; they are loaded by the
stages that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__project__ = "repvgg-exporter"
__version__ = "0.1.0"


def _require_own_siblings() -> None:
    """``models`` is a common name: make sure that the packages beside this one are ours."""
    import calibration
    import models

    for sibling in (models, calibration):
        if getattr(sibling, "__project__", None) != __project__:
            raise ImportError(
                f"the package {sibling.__name__!r} found at {sibling.__path__} is not the one of "
                "repvgg-exporter: start from another folder or use an environment of its own"
            )


_require_own_siblings()

if TYPE_CHECKING:
    from exporter.api import export, reparameterize
    from exporter.bundle import Bundle

__all__ = ["Bundle", "export", "reparameterize"]

_LAZY = {"Bundle": "bundle", "export": "api", "reparameterize": "api"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"exporter.{_LAZY[name]}"), name)
