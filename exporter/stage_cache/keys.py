"""What each cached stage depends on, as names and short texts: its key, and what `--explain` names.

Three stages are kept, each further down the road:

* ``float``: the plain float graph, what the original network answers, and the first ledger rows;
* ``draft``: everything of a bundle but its engine;
* ``engine``: the engine.

Every field of a spec belongs to the first stage that looks at it. Files count by their content and
by the name that the manifest records. The code of this project counts as a whole: any change of it
makes everything anew.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

from calibration.images import ImageDataError, ImageFolder
from exporter.bundle import file_sha256
from exporter.engine import Backend, BuildRequest
from exporter.errors import EnvironmentLackError, InputError
from exporter.provenance import versions
from exporter.sources.image_choice import calibration_root, evaluation_root
from exporter.spec import HUB, RANDOM, ExportSpec
from models.registry import PublicWeightsError, bundled_weights, fetch_public

Inputs = Mapping[str, str]
"""Names and texts; two stages with equal ones are the same."""

FLOAT, DRAFT, ENGINE = "float", "draft", "engine"

FLOAT_FIELDS = (
    "variant",
    "name",
    "weights",
    "evaluation",
    "evaluation_images",
    "image_size",
    "dynamic_size",
    "preprocess",
    "with_preprocess",
    "skip_bad_images",
)
DRAFT_FIELDS = (
    "precision",
    "calibration",
    "calibration_images",
    "recipe",
    "keep_float",
    "min_sqnr_db",
    "min_agreement",
    "max_drop",
    "per_tensor_weights",
    "power_of_two",
    "calibration_table",
)
ENGINE_FIELDS = ("target", "backend", "batch", "build", "workspace_mib")
UNSEEN_FIELDS = ("out",)
"""What no stage but publication looks at."""

_LIBRARIES = ("python", "torch", "onnx", "onnxruntime", "onnxsim", "numpy", "Pillow")
_PACKAGES = ("exporter", "models", "calibration")
_CODE = (".py", ".json", ".j2", ".css")
_SHOWN = 16
_DRAFT_FILES = ("calibration", "calibration_table", "calibration_cache")


def float_inputs(spec: ExportSpec) -> Inputs:
    """Those of the float graph and what it was judged on.

    Raises:
        InputError: if a file or folder cannot be read.
        EnvironmentLackError: if a public checkpoint cannot be downloaded here.
    """
    found = versions()
    root, words, _ = evaluation_root(spec)
    return {
        "code": code_sha256()[:_SHOWN],
        "machine": f"{platform.system()} {platform.machine()}",
        **{name: found[name] or "missing" for name in _LIBRARIES},
        **_stated(spec, FLOAT_FIELDS),
        "weights": _weights(spec),
        "evaluation": _images(root, spec.evaluation_images, words),
        "preprocess": _preprocess(spec.preprocess),
    }


def draft_inputs(spec: ExportSpec, *, half_scales: bool) -> Inputs:
    """Those of everything but the engine; raises as :func:`float_inputs`."""
    calibration = calibration_root(spec) if spec.precision.is_quantized else None
    images = _images(calibration[0], spec.calibration_images, calibration[1]) if calibration else ""
    return {
        **float_inputs(spec),
        **_stated(spec, DRAFT_FIELDS),
        "calibration": images,
        "calibration_table": _file(spec.calibration_table),
        "calibration_cache": _file(spec.build.calibration_cache),
        "half_scales": str(half_scales),
    }


def float_part(draft: Inputs) -> Inputs:
    """Of the inputs of a draft, those of its float graph, without reading a file again."""
    later = {*DRAFT_FIELDS, *_DRAFT_FILES, "half_scales"}
    return {name: text for name, text in draft.items() if name not in later}


def engine_inputs(draft: Inputs, request: BuildRequest, backend: Backend) -> Inputs:
    """Those of the engine that ``backend`` builds from the draft with these inputs.

    Raises:
        InputError: if it is not known what the draft was made from.
    """
    if not draft:
        raise InputError("the draft was made from files that cannot be read")
    return {
        **draft,
        "target": ",".join(request.targets),
        "backend": f"{backend.name} {backend.version()}",
        "batch": str(request.batch),
        "workspace_mib": str(request.workspace_mib or ""),
        "build": ", ".join(f"{k} {v}" for k, v in request.options.to_json().items()),
    }


@functools.cache
def code_sha256() -> str:
    """Hash of the code and tables of this project's packages, by name and content."""
    top = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((top / package).rglob("*")):
            if path.suffix in _CODE and path.is_file():
                digest.update(path.relative_to(top).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _stated(spec: ExportSpec, names: tuple[str, ...]) -> dict[str, str]:
    values = spec.to_json()
    return {name: "" if values[name] is None else str(values[name]) for name in names}


def _weights(spec: ExportSpec) -> str:
    if spec.weights == RANDOM:
        return RANDOM
    variant = spec.variant
    if spec.weights is None:
        bundled = bundled_weights(variant.name) if variant else None
        path = bundled.checkpoint if bundled else None
        return f"bundled {_hash(path)}" if path else ""
    if variant is not None and spec.weights.partition("@")[0] == HUB:
        try:
            public = fetch_public(variant.name, spec.weights.partition("@")[2] or None)
        except PublicWeightsError as error:
            raise EnvironmentLackError(str(error)) from error
        return f"{public.repository}@{public.revision}"
    return _file(Path(spec.weights))


def _file(path: Path | None) -> str:
    """Name and hash. A file that cannot be read is for the stage to complain about."""
    return "" if path is None else f"{path} {_hash(path)}"


def _hash(path: Path) -> str:
    try:
        # What a pipe holds can be read only once.
        if path.is_file():
            return f"sha256:{file_sha256(path)[:_SHOWN]}"
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    raise InputError(f"{path} is no file")


def _preprocess(named: str | None) -> str:
    return named or "" if named in (None, "imagenet") else _file(Path(str(named)))


def _images(root: Path, count: int, words: str) -> str:
    try:
        folder = ImageFolder.open(root).take(count)
        return f"{words}, {len(folder.files)} images, sha256:{folder.sha256()[:_SHOWN]}"
    except ImageDataError as error:
        raise InputError(str(error)) from error
