"""The first stage: from a valid spec to the trained network and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.images import Preprocess
from exporter.bundle import file_sha256
from exporter.errors import EnvironmentLackError, InputError
from exporter.network import Interface, classifier_interface
from exporter.sources.qdq_source import import_quantized
from exporter.sources.trained_network import TrainedNetwork, from_checkpoint
from exporter.spec import HUB, RANDOM, ExportSpec, Precision, weights_advice
from models.checkpoint import CheckpointError, LoadedCheckpoint, load_checkpoint
from models.registry import (
    PublicWeightsError,
    bundled_weights,
    fetch_public,
)
from models.repvgg import RepVGG, RepVGGBlock, SqueezeExcitation
from models.variants import Variant

RANDOM_SEED = 0
RANDOM_CLASSES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The network in eval mode, in the form its checkpoint had, and where it came from.

    ``variant`` is None for a network of the caller's own, whose ``interface`` is then known.
    ``origin`` is what the manifest records about the weights; ``notes`` is for the user.
    ``trained`` is set where the weights carry INT8 scales that are to be used.
    """

    module: nn.Module
    variant: Variant | None
    form: str
    origin: dict[str, Any]
    notes: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    interface: Interface | None = None
    trained: TrainedNetwork | None = None


def load_network(spec: ExportSpec) -> Source:
    """Load the variant ``spec.variant`` with what ``spec.weights`` names.

    Raises:
        InputError: if the checkpoint cannot be used.
        EnvironmentLackError: if a public checkpoint cannot be downloaded here.
    """
    variant = spec.variant
    if variant is None:
        raise InputError(f"{spec.title} can only be exported from Python: exporter.export(module)")
    if spec.weights is None:
        return _bundled(variant)
    if spec.weights == RANDOM:
        return _random(variant)
    if spec.weights == HUB or spec.weights.startswith(f"{HUB}@"):
        return _public(variant, spec.weights)
    path = Path(spec.weights)
    origin = {"source": "file", "file": str(path)}
    if path.suffix.lower() == ".onnx":
        return _from_graph(spec, variant, path, origin)
    loaded = _loaded(variant, path)
    return _with_scales(spec, loaded, _described(loaded, path, origin, ()))


def _from_file(
    variant: Variant, path: Path, origin: dict[str, Any], notes: tuple[str, ...]
) -> Source:
    return _described(_loaded(variant, path), path, origin, notes)


def _loaded(variant: Variant, path: Path) -> LoadedCheckpoint:
    try:
        return load_checkpoint(path, variant)
    except CheckpointError as error:
        raise InputError(str(error)) from error


def _described(
    loaded: LoadedCheckpoint, path: Path, origin: dict[str, Any], notes: tuple[str, ...]
) -> Source:
    found = {"format": loaded.format, "form": loaded.form, "num_classes": loaded.num_classes}
    return Source(
        module=loaded.module,
        variant=loaded.variant,
        form=loaded.form,
        origin={**origin, "sha256": file_sha256(path), **found},
        notes=notes,
    )


def _from_graph(spec: ExportSpec, variant: Variant, path: Path, origin: dict[str, Any]) -> Source:
    """A Q/DQ graph from quantization-aware training."""
    if spec.precision is not Precision.INT8:
        raise InputError(
            f"{path} is a graph with INT8 scales: use --precision int8, or pass the checkpoint"
        )
    trained = import_quantized(path, variant)
    size = trained.image_size
    if size is not None and (spec.dynamic_size or spec.image_size not in (None, size)):
        raise InputError(
            f"{path} was exported for images of {size[0]}x{size[1]}; leave the size away, or "
            "export it with free height and width"
        )
    found = {"format": "qdq", "form": "deploy", "num_classes": trained.num_classes}
    return Source(
        module=trained.module,
        variant=variant,
        form="deploy",
        origin={**origin, "sha256": trained.scales.sha256, **found},
        notes=trained.notes,
        interface=classifier_interface(size, trained.num_classes, None) if size else None,
        trained=trained,
    )


def _with_scales(spec: ExportSpec, loaded: LoadedCheckpoint, source: Source) -> Source:
    """``source`` with the scales that its checkpoint carries, if it does."""
    if not loaded.scales:
        return source
    if spec.precision is not Precision.INT8:
        note = f"{spec.weights} carries INT8 scales, which {spec.precision} does not use"
        return replace(source, notes=(*source.notes, note))
    trained = from_checkpoint(loaded, source.origin["sha256"])
    notes = (*source.notes, *trained.notes)
    return replace(source, module=trained.module, notes=notes, trained=trained)


def _bundled(variant: Variant) -> Source:
    bundled = bundled_weights(variant.name)
    if bundled is None:
        raise InputError(f"no weights are bundled for {variant.name}")
    note = (
        f"using the bundled weights ({bundled.checkpoint.name}, {len(bundled.class_names)} "
        f"classes); pass your own with {weights_advice(variant)}"
    )
    origin = {"source": "bundled", "file": bundled.checkpoint.name}
    return replace(
        _from_file(variant, bundled.checkpoint, origin, (note,)),
        class_names=bundled.class_names,
        preprocess=Preprocess.from_json(bundled.preprocess),
    )


def _public(variant: Variant, weights: str) -> Source:
    _, _, revision = weights.partition("@")
    try:
        public = fetch_public(variant.name, revision or None)
    except PublicWeightsError as error:
        raise EnvironmentLackError(str(error)) from error
    note = (
        f"using {public.repository} at commit {public.revision}; repeat it with "
        f"--weights hub@{public.revision}"
    )
    origin = {"source": "hub", "file": public.repository, "revision": public.revision}
    return _from_file(variant, public.checkpoint, origin, (note,))


def _random(variant: Variant) -> Source:
    """An untrained network whose activations keep their size from the first layer to the last.

    He et al. 2015: a kernel drawn from N(0, 2 / fan_in) after a ReLU keeps the second moment. The
    branches share it (identity 0.4 of a ReLU output is 0.2), so that none of the variants leaves
    half's range. BatchNorm's statistics are not the trivial ones, so fusing has something to do.
    The gates of squeeze-and-excitation stand near one, for 47 of them multiply.
    """
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(RANDOM_SEED)
    module = RepVGG(variant, num_classes=RANDOM_CLASSES)
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
    for block in module.modules():
        if isinstance(block, SqueezeExcitation):
            nn.init.constant_(block.up.bias, 4.0)  # type: ignore[arg-type]
        if isinstance(block, RepVGGBlock):
            _randomize_norm(block.rbr_dense.bn, 0.5)
            assert block.rbr_1x1 is not None
            _randomize_norm(block.rbr_1x1.bn, 0.5 if block.rbr_identity is None else 0.3)
            if block.rbr_identity is not None:
                _randomize_norm(block.rbr_identity, 0.4)
    torch.random.set_rng_state(generator_state)
    origin = {
        "source": RANDOM,
        "file": None,
        "seed": RANDOM_SEED,
        "form": "train",
        "num_classes": RANDOM_CLASSES,
    }
    note = "RANDOM WEIGHTS: the network is untrained, its answers mean nothing"
    return Source(module=module.eval(), variant=variant, form="train", origin=origin, notes=(note,))


def _randomize_norm(norm: Any, share: float) -> None:
    """Random statistics for a BatchNorm2d whose branch carries ``share`` of the second moment."""
    nn.init.normal_(norm.running_mean, std=0.05)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.bias, std=0.05)
    with torch.no_grad():
        norm.weight.copy_(torch.sqrt(share * (norm.running_var + norm.eps)))
