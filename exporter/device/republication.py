"""A bundle that is published already, written again with its files: by links, in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from exporter.bundle import UNLISTED, Bundle
from exporter.bundle.writer import BundleWriter, Signer
from exporter.device.runners import require_intact
from exporter.errors import InputError


def sign_bundle(bundle: Bundle, signer: Signer) -> Bundle:
    """Publish the bundle with signatures by ``signer``, which replace any that it has.

    All its files stay as they are, its manifest included. Whatever fails, the bundle is left as it
    was.

    Raises:
        GateFailedError: a file of the bundle is damaged.
        InputError: the folder holds files that are not the bundle's, or it cannot be written.
    """
    require_intact(bundle)
    require_own_files(bundle)
    with BundleWriter(bundle.path, signer) as writer:
        carry_over(bundle, writer)
        return writer.publish(bundle.manifest)


def require_own_files(bundle: Bundle) -> None:
    """Return only if a new folder in place of the old one loses nothing.

    Raises:
        InputError: the folder holds files that are not the bundle's.
    """
    own = UNLISTED | bundle.manifest["files"].keys()
    strangers = sorted(path.name for path in bundle.path.iterdir() if path.name not in own)
    if strangers:
        raise InputError(
            f"bundle {bundle.path} holds what is not its own ({', '.join(strangers[:3])}) and "
            "would be lost; move it elsewhere"
        )


def carry_over(bundle: Bundle, writer: BundleWriter, without: Collection[str] = ()) -> None:
    """The listed files but ``without``: by a link where the file system has them, else a copy."""
    for name in bundle.manifest["files"]:
        if name not in without:
            _carry_over(bundle.path / name, writer.path(name))


def _carry_over(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
