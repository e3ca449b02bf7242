"""Does a published bundle still compute what it recorded? Needs numpy and onnxruntime, no torch.

Hashes first; then ``model.onnx`` and the precision graph run on the reference inputs and are held
against the original network's recorded logits with the gates the bundle was published under.
"""

from __future__ import annotations

from exporter import parity
from exporter.bundle import MODEL, Bundle
from exporter.engine import engine_not_run_reason
from exporter.errors import GateFailedError
from exporter.onnx_runner import OnnxRunner
from exporter.parity import Gate, Ledger


def verify(bundle: Bundle) -> Ledger:
    """Return the ledger of what can be checked on this machine.

    Raises:
        GateFailedError: if a file is missing or altered.
    """
    damaged = bundle.damaged_files()
    if damaged:
        raise GateFailedError(
            f"bundle {bundle.path}: {', '.join(damaged)} missing or not what the manifest says"
        )
    images, logits = bundle.reference()
    ledger = Ledger(stages=(), images="the bundle's reference inputs", image_count=len(images))
    gates = {row["stage"]: Gate(**row["tolerance"]) for row in bundle.parity["stages"]}
    ledger = ledger.with_stage(
        parity.judge(
            "simplified", logits, OnnxRunner(bundle.path / MODEL)(images), gate=gates["simplified"]
        )
    )
    precision = bundle.manifest["spec"]["precision"]
    if precision != "fp32":
        ledger = ledger.with_stage(
            parity.judge(precision, logits, bundle.run(images), gate=gates[precision])
        )
    return ledger.with_stage(parity.not_run("engine", engine_not_run_reason()))
