"""Runs every stage on the same images and holds its outputs against the original network's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import TypeVar

from exporter import parity
from exporter.errors import GateFailedError
from exporter.graph.prologue import Prologue
from exporter.localization.graphs import Suspect
from exporter.network import Interface, resized, torch_runner
from exporter.parity import Gate, StageResult
from exporter.parity.comparison import accuracy
from exporter.parity.deviation import Localization
from exporter.parity.layer_figures import LayerTable
from exporter.parity.ledger import Ledger, MixedPrecision, Rung
from exporter.parity.worst_images import WorstImages, worst_images
from exporter.running.image_set import Advance, ImageSet, LabelArray, Sizes, outputs_of, sizes_of
from exporter.running.onnx_runner import BATCH_SIZE, Batch, Outputs, Runner, joined
from exporter.sources.source import Source
from exporter.spec import ExportSpec, Precision

MAX_OUTPUT_BYTES = 256 << 20
"""Of the original's outputs that are kept to compare with; large feature maps need fewer images."""

ON_THE_WAY = ("reparameterized", "onnx", "simplified")
PIXELS_ON_THE_WAY = 64 * 224 * 224
"""Of the images on which graphs are compared that lead to the one that is built: float32 leaves no
image to chance, and on 512 images of 224 x 224 these stages were two thirds of an export."""

LOCALIZATION_IMAGES = 4
"""Rounding is found on one image; a few more reach channels that are seldom active."""

Result = TypeVar("Result")
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

    With ``before`` it goes on where another judge of the same images stopped.

    With a dynamic size the first batch is compared at the profile's smallest and largest size too,
    rounded to whole pixels where a ``prologue`` will ask for such.
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
        self._images = images
        self._prologue = prologue
        self._spec = spec
        self._interface = interface
        self._class_names = source.class_names
        self._scored: list[tuple[StageResult, WorstImages]] = []
        self._count = images.count
        self._limit: int | None = None
        self._unquantized: Outputs | None = None
        if before is None:
            self.original = self._answers(source)
        else:
            self.original, found = before.original, before.verdicts
            self._count, self._limit = found.count, found.limit
            self._scored = list(found.scored)
        self.labels: LabelArray | None = None
        if interface.num_classes is not None:
            labels = images.labels(source.class_names, interface.num_classes)
            self.labels = labels if labels is None else labels[: self._count]
        logits = next(iter(self.original.values()))
        self.ledger = (
            before.verdicts.ledger
            if before
            else Ledger(
                stages=(),
                images=images.description,
                image_count=self._count,
                original_top1=accuracy(logits, self.labels),
            )
        )

    def _answers(self, source: Source) -> Outputs:
        """Run the network, and learn how many images there is room for."""
        trained = source.trained
        run = trained.run if trained else torch_runner(source.module, self._interface)
        first = run(self.first_batch())
        image_bytes = sum(values[:1].nbytes for values in first.values())
        if self._count * image_bytes > MAX_OUTPUT_BYTES:
            self._limit = max(1, MAX_OUTPUT_BYTES // (image_bytes * BATCH_SIZE))
            self._count = sum(len(batch[0]) for batch in self._own_batches())
        if trained is not None:
            # Its quantizers are hooks, which do not travel.
            self._unquantized = outputs_of(trained.run_float, self.batches())
            return outputs_of(run, self.batches())
        return self._outputs(run)

    def _outputs(self, run: Runner) -> Outputs:
        return joined(self.in_parts(partial(outputs_of, run, own=self._own_sizes)))

    @cached_property
    def _own_sizes(self) -> Sizes:
        return sizes_of(self.first_batch())

    def judged(self) -> Judged:
        """What a new judge needs to go on from here; not for a network with trained quantizers."""
        verdicts = Verdicts(
            ledger=self.ledger, count=self._count, limit=self._limit, scored=tuple(self._scored)
        )
        return Judged(original=self.original, verdicts=verdicts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the comparison."""
        if self._count == self._images.count:
            return ()
        return (
            f"parity is measured on the first {self._count} of {self._images.count} images, "
            f"because the network's outputs are large",
        )

    def first_batch(self) -> Batch:
        """A few of the images."""
        return next(self._images.batches())

    def batches(self) -> Iterator[Batch]:
        """Everything that each stage is run on."""
        yield from self._own_batches()
        yield from self._further_batches()

    def in_parts(self, work: Callable[[Iterator[Batch]], Result]) -> list[Result]:
        """``work`` on :meth:`batches`, or on parts of them that follow one another.

        ``work`` has to travel as :mod:`exporter.running.spread` says. Where not all images are
        compared, outputs are so large that they had better stay in one process.
        """
        if self._limit is not None:
            return [work(self.batches())]
        found = self._images.in_parts(partial(_on_batches, work))
        if self._further_sizes():
            found.append(work(self._further_batches()))
        return found

    def _further_batches(self) -> Iterator[Batch]:
        for sides in self._further_sizes():
            yield self._resized(self.first_batch(), sides)

    def _own_batches(self) -> Iterator[Batch]:
        return islice(self._images.batches(), self._limit)

    def samples(self, count: int) -> list[Batch]:
        """The first ``count`` images, in each size."""
        batch = tuple(array[:count] for array in self.first_batch())
        return [batch, *(self._resized(batch, sides) for sides in self._further_sizes())]

    def _resized(self, batch: Batch, sides: tuple[int, int]) -> Batch:
        found = resized(batch, sides, self._interface)
        return found if self._prologue is None else self._prologue.whole(found)

    def _further_sizes(self) -> list[tuple[int, int]]:
        size = self._spec.dynamic_size
        if size is None:
            return []
        own = next(shape[2:] for shape in self._interface.example if len(shape) == 4)
        ends = [(size.height[end], size.width[end]) for end in (0, 2)]
        return [end for end in dict.fromkeys(ends) if end != own]

    def score(
        self, stage: str, run: Runner, gate: Gate | None = None, *, again: bool = False
    ) -> StageResult:
        """Run a stage on all images and hold its outputs against the original's.

        A graph that only leads to the one that is built is run on the first of them, as many as
        `PIXELS_ON_THE_WAY` allows. At fp32 the simplified graph does, until it is judged ``again``.

        A network that was trained with quantizers has them in it; the float graphs are held against
        the same network without them.
        """
        is_float = self._unquantized is not None and stage in FLOAT_STAGES
        reference = self._unquantized if is_float and self._unquantized else self.original
        few = self._few_batches(stage, again=again)
        if few is None:
            outputs, count = self._outputs(run), self._count
        else:
            outputs, count = outputs_of(run, islice(self._images.batches(), few)), few * BATCH_SIZE
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
        """Of the images, full ones, on which a stage is run; None: all."""
        is_built = again and stage == "simplified" and self._spec.precision is Precision.FP32
        # With a free size neighbours may differ in size, and every size has outputs of its own.
        if stage not in ON_THE_WAY or is_built or self._spec.dynamic_size is not None:
            return None
        shapes = [shape for shape in self._interface.example if len(shape) == 4]
        pixels = sum(height * width for _, _, height, width in shapes)
        few = max(1, PIXELS_ON_THE_WAY // (max(1, pixels) * BATCH_SIZE))
        return few if shapes and few * BATCH_SIZE < self._count else None

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
            names=[self._images.name(index) for index in range(count)],
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
        for batch in self.samples(LOCALIZATION_IMAGES):
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


def _on_batches(
    work: Callable[[Iterator[Batch]], Result], images: ImageSet, _advance: Advance
) -> Result:
    return work(images.batches())
