"""The command that signs a bundle, and how others get to sign one or check its signature."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.commands import AddCommand
from exporter.console import print_json, print_line
from exporter.errors import EXIT_DONE
from exporter.terminal import ask_secret

if TYPE_CHECKING:
    from exporter.bundle.writer import Signer

UNCHECKED = "signed, not checked (pass --public-key)"


def add_command(command: AddCommand) -> None:
    """Add the command; its ``run`` default executes it."""
    parser = command("sign", "sign a bundle that exists, by minisign")
    parser.add_argument("bundle", type=Path, help="a folder that `engine` made")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="secret key of "
        "minisign; its password is asked for, or in REPVGG_EXPORT_KEY_PASSWORD")  # fmt: skip
    parser.set_defaults(run=_run_sign)


def signer(key: Path | None) -> Signer | None:
    """What signs with ``key``, once a person or the environment has unlocked it."""
    if key is None:
        return None
    from exporter.bundle.signature import open_signer

    return open_signer(key, ask_secret)


def _run_sign(options: argparse.Namespace) -> int:
    from exporter.bundle import SIGNED, Bundle, signature_path
    from exporter.device import sign_bundle

    bundle = Bundle.load(options.bundle)
    sign = signer(options.key)
    assert sign is not None, "the option is required"
    signed = sign_bundle(bundle, sign)
    names = [signature_path(signed.path / name).name for name in SIGNED]
    if options.json:
        print_json({"bundle": str(signed.path), "signatures": names})
    else:
        print_line(f"{signed.path}: signed, {' and '.join(names)}")
    return EXIT_DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureState:
    """What `verify` knows of a bundle's signature; ``comment`` is its trusted comment."""

    status: str
    words: str = ""
    comment: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """``status`` is none, not_checked or valid."""
        return {"status": self.status, "trusted_comment": self.comment}


def signature_state(folder: Path, public_key: str | None) -> SignatureState:
    """Of the bundle in ``folder``; with a ``public_key`` only if there is a signature by it.

    Raises:
        As :func:`exporter.bundle.signature.check_signature`.
    """
    from exporter.bundle.signature import check_signature, is_signed

    if public_key is not None:
        comment = check_signature(folder, public_key)
        return SignatureState(status="valid", words="signature valid", comment=comment)
    if is_signed(folder):
        return SignatureState(status="not_checked", words=UNCHECKED)
    return SignatureState(status="none")
