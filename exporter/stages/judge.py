"""Runs every stage on the same images and holds its outputs against the original network's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from exporter import parity
from exporter.errors import GateFailedError
from exporter.graph.prologue import Prologue
from exporter.localization.graphs import Suspect
from exporter.network import Interface, torch_runner
from exporter.parity import Gate, StageResult
from exporter.parity.comparison import accuracy
from exporter.parity.deviation import Localization
from exporter.parity.layer_figures import LayerTable
from exporter.parity.ledger import Ledger, MixedPrecision, Rung
from exporter.parity.worst_images import WorstImages, worst_images
from exporter.running.image_set import ImageSet, LabelArray, outputs_of
from exporter.running.onnx_runner import BATCH_SIZE, Outputs, Runner
from exporter.sources.source import Source
from exporter.spec import ExportSpec, Precision
from exporter.stages.judged_images import JudgedImages

ON_THE_WAY = ("reparameterized", "onnx", "simplified")

LOCALIZATION_IMAGES = 4
"""Rounding is found on one image; a few more reach channels that are seldom active."""

FLOAT_STAGES = ("onnx", "simplified")
UNQUANTIZED = "original without its quantizers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """The ledger so far, by the first ``count`` images, ``limit`` batches of them (None: all).

    ``scored`` are rows with the images that they are worst on.
    """

    ledger: Ledger
    count: int
    limit: int | None
    scored: tuple[tuple[StageResult, WorstImages], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a judge has seen so far, to go on from: the network's outputs and the verdicts."""

    original: Outputs
    verdicts: Verdicts


class Judge:
    """Holds the original's outputs and the ledger; refuses a stage that fails its gate.

    With ``before`` it goes on where another judge of the same images stopped. A network with a
    ``prologue`` to come is shown whole pixels only.
    """

    def __init__(
        self,
        spec: ExportSpec,
        source: Source,
        images: ImageSet,
        interface: Interface,
        prologue: Prologue | None = None,
        *,
        before: Judged | None = None,
    ) -> None:
        self.images = JudgedImages(images, interface, spec.dynamic_size, prologue)
        self._spec = spec
        self._interface = interface
        self._class_names = source.class_names
        self._scored: list[tuple[StageResult, WorstImages]] = []
        self._unquantized: Outputs | None = None
        if before is None:
            self.original = self._answers(source)
        else:
            self.original, found = before.original, before.verdicts
            self.images.count, self.images.limit = found.count, found.limit
            self._scored = list(found.scored)
        self.labels: LabelArray | None = None
        if interface.num_classes is not None:
            labels = images.labels(source.class_names, interface.num_classes)
            self.labels = labels if labels is None else labels[: self.images.count]
        logits = next(iter(self.original.values()))
        self.ledger = (
            before.verdicts.ledger
            if before
            else Ledger(
                stages=(),
                images=images.description,
                image_count=self.images.count,
                original_top1=accuracy(logits, self.labels),
            )
        )

    def _answers(self, source: Source) -> Outputs:
        """Run the network, and learn how many images there is room for."""
        trained = source.trained
        run = trained.run if trained else torch_runner(source.module, self._interface)
        first = run(self.images.first_batch())
        self.images.make_room(sum(values[:1].nbytes for values in first.values()))
        if trained is not None:
            # Its quantizers are hooks, which do not travel.
            self._unquantized = outputs_of(trained.run_float, self.images.batches())
            return outputs_of(run, self.images.batches())
        return self.images.outputs(run)

    def judged(self) -> Judged:
        """What a new judge needs to go on from here; not for a network with trained quantizers."""
        verdicts = Verdicts(
            ledger=self.ledger,
            count=self.images.count,
            limit=self.images.limit,
            scored=tuple(self._scored),
        )
        return Judged(original=self.original, verdicts=verdicts)

    def score(
        self, stage: str, run: Runner, gate: Gate | None = None, *, again: bool = False
    ) -> StageResult:
        """Run a stage on all images and hold its outputs against the original's.

        A graph that only leads to the one that is built is run on the first of them
        (:meth:`JudgedImages.few_batches`). At fp32 the simplified graph does, until it is judged
        ``again``.

        A network that was trained with quantizers has them in it; the float graphs are held against
        the same network without them.
        """
        is_float = self._unquantized is not None and stage in FLOAT_STAGES
        reference = self._unquantized if is_float and self._unquantized else self.original
        few = self._few_batches(stage, again=again)
        if few is None:
            outputs, count = self.images.outputs(run), self.images.count
        else:
            outputs, count = self.images.few_outputs(run, few), few * BATCH_SIZE
            reference = {name: values[:count] for name, values in reference.items()}
        result = parity.judge_outputs(
            stage,
            reference,
            outputs,
            gate=gate,
            # Accuracy on some of the images is no accuracy.
            labels=self.labels if few is None else None,
            classifier=self._interface.num_classes is not None,
        )
        result = replace(
            result, images=count, reference=UNQUANTIZED if is_float else result.reference
        )
        worst = self._worst_images(result, reference, outputs, count)
        self._scored += [(result, worst)] if worst else []
        return result

    def _few_batches(self, stage: str, *, again: bool) -> int | None:
        is_built = again and stage == "simplified" and self._spec.precision is Precision.FP32
        return None if stage not in ON_THE_WAY or is_built else self.images.few_batches()

    def _worst_images(
        self, result: StageResult, reference: Outputs, outputs: Outputs, count: int
    ) -> WorstImages | None:
        """By the first output; None where not every image has a row in it."""
        name = next(iter(reference))
        if result.comparison is None or len(reference[name]) != count:
            return None
        return worst_images(
            result.stage,
            reference[name],
            outputs[name],
            names=[self.images.images.name(index) for index in range(count)],
            labels=None if self.labels is None else self.labels[:count],
            class_names=self._class_names,
            classifier=self._interface.num_classes is not None,
        )

    def add(self, result: StageResult, advice: str = "", graphs: Suspect | None = None) -> None:
        """Add a row to the ledger; ``advice`` is a further clause for the error.

        ``graphs`` are searched for the layer at fault if the row fails.

        Raises:
            GateFailedError: if the row says so; with the whole ledger as evidence.
        """
        worst = next((worst for scored, worst in self._scored if scored is result), None)
        self._scored = [item for item in self._scored if item[0].stage != result.stage]
        self.ledger = replace(self.ledger.with_stage(result), worst_images=worst)
        if result.status == "fail":
            if graphs is not None and (found := self.localize(result.stage, graphs)):
                advice = f"{found.sentence}{'; ' if advice else ''}{advice}"
            raise GateFailedError(
                f"parity failed at stage {result.stage}: {result.reason}"
                f"{'; ' if advice else ''}{advice}; nothing was published",
                evidence=self.ledger.to_json(),
            )

    def localize(self, stage: str, graphs: Suspect) -> Localization | None:
        """Search ``graphs`` for the layer at fault; what is found is in the ledger too."""
        found: Localization | None = None
        # A graph may be right at one size and wrong at another.
        for batch in self.images.samples(LOCALIZATION_IMAGES):
            found = graphs.localize(stage, batch)
            if found is not None and found.first is not None:
                break
        self.ledger = replace(self.ledger, localization=found)
        return found

    def check(
        self,
        stage: str,
        run: Runner,
        gate: Gate | None = None,
        graphs: Suspect | None = None,
    ) -> None:
        """Score a stage and add its row; ``graphs`` as in :meth:`add`.

        Raises:
            GateFailedError: if it fails its gate.
        """
        frozen = stage == "onnx" and self._spec.variant is None
        advice = "tracing freezes what Python computes from shapes or values" if frozen else ""
        self.add(self.score(stage, run, gate), advice, graphs)

    def carry_over(self, before: str, stage: str) -> None:
        """Add the row of the stage ``before``, which passed, for ``stage``, the same graph."""
        row = next(row for row in self.ledger.stages if row.stage == before)
        worst = self.ledger.worst_images
        if worst is not None and worst.stage == before:
            worst = replace(worst, stage=stage)
        self.ledger = replace(self.ledger.with_stage(replace(row, stage=stage)), worst_images=worst)

    def recheck(self, stage: str, run: Runner, gate: Gate | None = None) -> None:
        """Judge a stage again whose graph was replaced; the row is replaced too."""
        before = self.ledger
        place = [row.stage for row in before.stages].index(stage)
        self.ledger = replace(before, stages=before.stages[:place])
        self.add(self.score(stage, run, gate, again=True))
        later = before.stages[place + 1 :]
        # The worst images are the last row's.
        worst = before.worst_images if later else self.ledger.worst_images
        rows = (*self.ledger.stages, *later)
        self.ledger = replace(before, stages=rows, worst_images=worst)

    def record_int8(self, ladder: tuple[Rung, ...], mixed: MixedPrecision | None) -> None:
        """Put the ladder and the Pareto list into the ledger."""
        self.ledger = replace(self.ledger, ladder=ladder, mixed_precision=mixed)

    def record_layers(self, layers: LayerTable) -> None:
        """Put the figures of the layers into the ledger."""
        self.ledger = replace(self.ledger, layers=layers)

    def skip(self, stage: str, reason: str) -> None:
        """Add a row for a stage that did not run."""
        self.ledger = self.ledger.with_stage(parity.not_run(stage, reason))
