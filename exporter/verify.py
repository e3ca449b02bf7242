"""Does a published bundle still compute what it recorded? Needs numpy and onnxruntime, no torch.

Hashes first; then ``model.onnx`` and the precision graph run on the reference inputs and are held
against the original network's recorded outputs with the gates the bundle was published under.
"""

from __future__ import annotations

from typing import Any

from exporter import parity
from exporter.bundle import MODEL, Bundle
from exporter.engine import engine_not_run_reason
from exporter.errors import GateFailedError
from exporter.ledger import Ledger
from exporter.onnx_runner import OnnxRunner
from exporter.parity import ORIGINAL, Gate, StageResult


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
    inputs, outputs = bundle.reference()
    batch = inputs if isinstance(inputs, tuple) else (inputs,)
    reference = outputs if isinstance(outputs, dict) else {"": outputs}
    ledger = Ledger(stages=(), images="the bundle's reference inputs", image_count=len(batch[0]))
    gates = {row["stage"]: Gate(**row["tolerance"]) for row in bundle.parity["stages"]}
    # Bundles of older versions are all classifiers and do not say so.
    classifier = bundle.manifest["model"].get("num_classes") is not None

    def judged(stage: str, found: Any) -> StageResult:
        named = found if isinstance(found, dict) else {"": found}
        return parity.judge_outputs(
            stage, reference, named, gate=gates[stage], classifier=classifier
        )

    references = {row["stage"]: row["reference"] for row in bundle.parity["stages"]}
    if references.get("simplified", ORIGINAL) == ORIGINAL:
        found = OnnxRunner(bundle.path / MODEL).run(batch)
        ledger = ledger.with_stage(
            judged("simplified", found if len(found) > 1 else next(iter(found.values())))
        )
    else:
        reason = f"its reference, the {references['simplified']}, is not in the bundle"
        ledger = ledger.with_stage(parity.not_run("simplified", reason))
    precision = bundle.manifest["spec"]["precision"]
    if precision != "fp32":
        ledger = ledger.with_stage(judged(precision, bundle.run(inputs)))
    return ledger.with_stage(parity.not_run("engine", engine_not_run_reason()))
