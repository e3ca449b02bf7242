"""Does a published bundle still compute what it recorded? Needs numpy and a runtime, no torch.

Hashes first; then ``model.onnx`` and the precision graph run in ONNX Runtime, and the engine on the
GPU, each where this machine can, on the reference inputs. All are held against the original
network's recorded outputs with the gates the bundle was published under. The engine has the gate of
the graph it was built from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter import parity
from exporter.bundle import CHECKSUMS, MANIFEST, MODEL, PARITY, Bundle
from exporter.device import (
    RunBackend,
    is_classifier,
    open_runner,
    output_names,
    require_intact,
)
from exporter.errors import EnvironmentLackError, ExporterError, GateFailedError, InputError
from exporter.parity import ORIGINAL, Gate, StageResult
from exporter.parity.ledger import Ledger
from exporter.running.onnx_runner import Batch, OnnxRunner, Outputs

_ENGINE = "engine"
_SIMPLIFIED = "simplified"


def silent(_note: str) -> None:
    """Tell nobody."""


def verify(
    bundle: Bundle, *, runtime_cache: bool = True, say: Callable[[str], None] = silent
) -> Ledger:
    """Return the ledger of what can be checked on this machine; the rest is ``not_run``.

    ``runtime_cache`` keeps the kernels that TensorRT-RTX compiles here; ``say`` is told what went
    wrong with it.

    Raises:
        GateFailedError: if a file is missing, altered or not listed, or SHA256SUMS says otherwise.
        EnvironmentLackError: if nothing beyond the hashes can be checked here.
    """
    require_intact(bundle)
    _require_same_checksums(bundle)
    judge = _Judge.of(bundle)

    def run(backend: RunBackend, batch: Batch) -> Outputs:
        with open_runner(bundle, backend, runtime_cache=runtime_cache) as runner:
            outputs = runner.run(batch)
        for note in runner.startup.notes if runner.startup else ():
            say(note)
        return outputs

    precision = bundle.manifest["spec"]["precision"]
    rows = [_simplified(bundle, judge)]
    if precision != "fp32":
        rows.append(judge.row(precision, lambda batch: run(RunBackend.ONNXRUNTIME, batch)))
    rows.append(judge.row(_ENGINE, lambda batch: run(RunBackend.ENGINE, batch)))
    if all(row.status == "not_run" for row in rows):
        reasons = "; ".join(dict.fromkeys(str(row.reason) for row in rows))
        raise EnvironmentLackError(
            f"bundle {bundle.path}: its files are intact, but nothing can be run here: {reasons}"
        )
    return Ledger(
        stages=tuple(rows),
        images="the bundle's reference inputs",
        image_count=len(judge.batch[0]),
    )


def shortfall(bundle: Bundle, ledger: Ledger, *, require_engine: bool) -> ExporterError | None:
    """Why ``ledger`` is less than what is demanded: the first failed stage, or an engine not run.

    A failed stage comes first, because no other machine would make it good.
    """
    for stage in ledger.stages:
        if stage.status == "fail":
            return GateFailedError(f"bundle {bundle.path}: stage {stage.stage}: {stage.reason}")
    engine = ledger.stages[-1]
    if require_engine and engine.status == "not_run":
        return EnvironmentLackError(
            f"bundle {bundle.path}: the engine was not run, which --require-engine demands: "
            f"{engine.reason}"
        )
    return None


def _require_same_checksums(bundle: Bundle) -> None:
    """SHA256SUMS, which bundles of older versions lack, must not mislead who reads only that."""
    path = bundle.path / CHECKSUMS
    if path.is_file() and path.read_bytes() != bundle.checksums.encode():
        raise GateFailedError(
            f"bundle {bundle.path}: {CHECKSUMS} does not say what {MANIFEST} and its files say"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """The recorded inputs and outputs, and what each stage must satisfy."""

    batch: Batch
    reference: Outputs
    gates: Mapping[str, Gate]
    references: Mapping[str, str]
    skipped: Mapping[str, str]
    classifier: bool

    @classmethod
    def of(cls, bundle: Bundle) -> _Judge:
        inputs, outputs = bundle.reference()
        (name, *_) = output_names(bundle)
        recorded = bundle.parity["stages"]
        gates = {row["stage"]: Gate(**row["tolerance"]) for row in recorded}
        precision = bundle.manifest["spec"]["precision"]
        for stage in (_SIMPLIFIED, precision):
            if stage not in gates and (stage, precision) != (precision, "fp32"):
                raise InputError(
                    f"bundle {bundle.path} is damaged: {PARITY} says nothing of stage {stage}"
                )
        # The export does not run the engine, so its row has no tolerance of its own.
        gates[_ENGINE] = gates[precision if precision in gates else _SIMPLIFIED]
        return cls(
            batch=inputs if isinstance(inputs, tuple) else (inputs,),
            reference=outputs if isinstance(outputs, dict) else {name: outputs},
            gates=gates,
            references={row["stage"]: row["reference"] for row in recorded},
            # No CPU can run some precisions: what the export could not judge, nobody here can.
            skipped={
                row["stage"]: str(row["reason"])
                for row in recorded
                if row["status"] == "not_run" and row["stage"] != _ENGINE
            },
            classifier=is_classifier(bundle),
        )

    def row(self, stage: str, run: Callable[[Batch], Outputs]) -> StageResult:
        """Run a stage and judge it; what this machine lacks makes it ``not_run``."""
        if stage in self.skipped:
            return parity.not_run(stage, self.skipped[stage])
        try:
            outputs = run(self.batch)
        except EnvironmentLackError as error:
            return parity.not_run(stage, str(error))
        except GateFailedError as error:
            return StageResult(
                stage=stage, status="fail", reason=str(error), gate=self.gates[stage]
            )
        gate = on_few(self.gates[stage], len(self.batch[0]))
        found = parity.judge_outputs(
            stage, self.reference, outputs, gate=gate, classifier=self.classifier
        )
        return replace(found, images=len(self.batch[0]))


def on_few(gate: Gate, count: int) -> Gate:
    """The gate of an export for ``count`` of its images.

    What may differ among all of them may be among the few: where not every answer has to agree, one
    of the few may be another.
    """
    wanted = gate.min_top1_agreement
    if wanted is None or wanted >= 1:
        return gate
    return replace(gate, min_top1_agreement=min(wanted, 1 - 1 / count))


def _simplified(bundle: Bundle, judge: _Judge) -> StageResult:
    reference: Any = judge.references.get(_SIMPLIFIED, ORIGINAL)
    if reference != ORIGINAL:
        reason = f"its reference, the {reference}, is not in the bundle"
        return parity.not_run(_SIMPLIFIED, reason)
    return judge.row(_SIMPLIFIED, lambda batch: OnnxRunner(bundle.path / MODEL).run(batch))
