"""Where trained weights come from: the bundled checkpoint and the public ones.

``weights/registry.json`` is the data; this module gives it types. Standard library only, but for
:func:`fetch_public`, which needs huggingface_hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
PUBLIC_FILE = "model.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


class PublicWeightsError(RuntimeError):
    """The public checkpoint cannot be had here; the message says which file to fetch by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledWeights:
    """A trained checkpoint that ships with the package, and its images.

    ``preprocess`` is the JSON form of the preprocessing that the network was trained with.
    """

    variant: str
    checkpoint: Path
    test_images: Path
    calibration_images: Path
    class_names: tuple[str, ...]
    preprocess: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicWeights:
    """A downloaded public checkpoint: the file, its repository and the exact commit."""

    checkpoint: Path
    repository: str
    revision: str


@cache
def _registry() -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads((WEIGHTS_FOLDER / "registry.json").read_text("utf-8"))
    return data


def bundled_weights(variant: str) -> BundledWeights | None:
    """The checkpoint that ships for ``variant``, or None."""
    entry = _registry()["bundled"].get(variant)
    if entry is None:
        return None
    return BundledWeights(
        variant=variant,
        checkpoint=WEIGHTS_FOLDER / entry["file"],
        test_images=WEIGHTS_FOLDER / entry["test_images"],
        calibration_images=WEIGHTS_FOLDER / entry["calibration_images"],
        class_names=tuple(entry["class_names"]),
        preprocess=entry["preprocess"],
    )


def public_repository(variant: str) -> str | None:
    """The Hugging Face repository of the ImageNet checkpoint of ``variant``, or None."""
    name: str | None = _registry()["hub"].get(variant)
    return name


def fetch_public(variant: str, revision: str | None = None) -> PublicWeights:
    """Download the public checkpoint of ``variant`` at one exact commit.

    ``revision`` is a full commit hash; without it the repository's current commit is asked for
    first and then downloaded by its hash, so that the result can be recorded and repeated.

    Raises:
        PublicWeightsError: if there is none for the variant, the revision is no commit hash, the
            library is missing or the hub cannot be reached.
    """
    repository = public_repository(variant)
    if repository is None:
        known = ", ".join(_registry()["hub"])
        raise PublicWeightsError(f"no public checkpoint is known for {variant} (known: {known})")
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise PublicWeightsError(f"revision {revision!r} is not a full 40-digit commit hash")
    at = f" at commit {revision}" if revision else ""
    advice = (
        f"fetch {PUBLIC_FILE} from {repository} on the Hugging Face hub{at} by hand and pass "
        f"--weights path/to/{PUBLIC_FILE}"
    )
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as error:
        raise PublicWeightsError(f"huggingface_hub is not installed; {advice}") from error
    try:
        commit = revision or HfApi().model_info(repository, timeout=10.0).sha
        if commit is None:
            raise LookupError(f"{repository} names no commit")
        path = hf_hub_download(repository, PUBLIC_FILE, revision=commit, etag_timeout=10.0)
    except Exception as error:
        # The hub client raises its own errors, its HTTP library's and OSError for "no network",
        # and which ones changed between its versions; every one of them means the same to a user.
        reason = type(error).__name__
        raise PublicWeightsError(
            f"{repository} cannot be downloaded here ({reason}); {advice}"
        ) from error
    return PublicWeights(checkpoint=Path(path), repository=repository, revision=commit)
