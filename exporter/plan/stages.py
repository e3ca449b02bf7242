"""The stages of an export in their order, each with a line that says what it will do."""

from __future__ import annotations

from exporter.plan.content import PlannedStage
from exporter.plan.engine import EngineDecision
from exporter.plan.sizes import TWO_BYTES
from exporter.spec import HUB, RANDOM, ExportSpec, Precision


def export_stages(spec: ExportSpec, decision: EngineDecision) -> tuple[PlannedStage, ...]:
    """Those of ``engine``, by the names that its progress and its ``seconds`` show."""
    stages = {
        "load": f"read {_weights(spec)} and the images to compare on",
        "reparameterize": "fuse every block into one 3x3 convolution, in float64",
        "export": "write the deploy form as ONNX and compare it with the original",
        "simplify": "fold constants, compare again, check that the graph is plain",
        **_precision(spec),
        **_emulation(decision),
        **_prologue(spec),
        "evidence": "write the graphs and reference values, measure every layer",
        "engine": _engine(decision),
        "publish": f"write the report and hashes and move the bundle to {spec.out}",
    }
    return tuple(PlannedStage(name=name, what=what) for name, what in stages.items())


def bundle_stages(decision: EngineDecision) -> tuple[PlannedStage, ...]:
    """The only one that is left for a published bundle."""
    return (PlannedStage(name="engine", what=_engine(decision)),)


def _weights(spec: ExportSpec) -> str:
    if spec.weights is None:
        return "the bundled weights"
    if spec.weights == RANDOM:
        return "random weights"
    if spec.weights.partition("@")[0] == HUB:
        return "the public weights"
    return spec.weights


def _precision(spec: ExportSpec) -> dict[str, str]:
    if spec.precision is Precision.FP32:
        return {}
    if str(spec.precision) in TWO_BYTES:
        name = "half" if spec.precision is Precision.FP16 else "bfloat16"
        return {name: f"convert the graph to {spec.precision} and compare it with the original"}
    if str(spec.weights).endswith(".onnx"):
        return _trained(spec)
    images = _calibration_images(spec)
    if spec.precision is Precision.FP8:
        return {
            "calibrate": f"observe up to {spec.calibration_images} calibration images ({images})",
            "quantize": "scales by the largest magnitude and Q/DQ nodes; compare with the original",
        }
    recipe = f"recipe {spec.recipe}" if spec.recipe else "the best recipe that the graph allows"
    return {
        "calibrate": f"observe up to {spec.calibration_images} calibration images ({images})",
        "quantize": f"scales and Q/DQ nodes by {recipe}; compare with the original",
    }


def _trained(spec: ExportSpec) -> dict[str, str]:
    """A graph brings its scales; images only check them."""
    stages = {"quantize": "Q/DQ nodes by the scales of the graph; compare with the original"}
    if spec.calibration is None:
        return stages
    check = f"observe up to {spec.calibration_images} images ({spec.calibration}) to check scales"
    return {"calibrate": check, **stages}


def _calibration_images(spec: ExportSpec) -> str:
    """Those of the bundled network are no other network's data."""
    if spec.calibration is not None:
        return str(spec.calibration)
    own = spec.weights not in (None, RANDOM)
    return "none were named: pass --calib" if own else "the bundled images"


def _prologue(spec: ExportSpec) -> dict[str, str]:
    if spec.with_preprocess is None:
        return {}
    what = f"put the normalization of uint8 {spec.with_preprocess} pixels in front; compare again"
    return {"prologue": what}


def _emulation(decision: EngineDecision) -> dict[str, str]:
    if not decision.emulated:
        return {}
    return {"half": "write the Q/DQ graph in half, scales included, and compare it again"}


def _engine(decision: EngineDecision) -> str:
    parts = []
    if decision.build_here:
        parts.append(f"build one plan for {', '.join(decision.build_here)} and count its kernels")
    if decision.deferred:
        names = ", ".join(dict.fromkeys(target.label for target in decision.deferred))
        parts.append(f"left to the device for {names}")
    return "; ".join(parts)
