"""Detached signatures that minisign makes and checks too: Ed25519, by py-minisign.

The manifest is signed, and SHA256SUMS for machines without Python. Between them they have the
sha256 of every other file, and a file that they do not list is not taken for the bundle's: nothing
in a signed bundle can change unseen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.bundle import MANIFEST, SIGNED, signature_path
from exporter.bundle.writer import Signer
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.provenance import moment

if TYPE_CHECKING:
    from minisign import PublicKey, SecretKey

PASSWORD_VARIABLE = "REPVGG_EXPORT_KEY_PASSWORD"
"""Environment variable with the password of the secret key."""

AskPassword = Callable[[str], str | None]
"""Asks a person, in the given words; None where nobody is there to answer."""


def is_signed(folder: Path) -> bool:
    """Whether the bundle in ``folder`` has a signature, right or wrong."""
    return signature_path(folder / MANIFEST).is_file()


def open_signer(path: Path, ask: AskPassword) -> Signer:
    """What signs with the minisign secret key in the file ``path``.

    A key with a password is unlocked by the one in ``PASSWORD_VARIABLE``, or by what ``ask`` gets.

    Raises:
        InputError: the file is missing or no secret key, its password is missing or wrong.
        EnvironmentLackError: py-minisign is not installed, or the memory to unlock it is not there.
    """
    _require_library()
    from minisign import Error, SecretKey

    try:
        key = SecretKey.from_file(path)
    except OSError as error:
        raise InputError(f"secret key {path} cannot be read: {error.strerror}") from error
    except Error as error:
        raise InputError(
            f"{path} is no secret key of minisign ({error}); `minisign -G` makes one"
        ) from error
    if key.is_encrypted():
        _unlock(key, path, ask)

    def sign(name: str, content: bytes) -> bytes:
        comment = f"timestamp:{int(moment().timestamp())}\tfile:{name}\thashed"
        return bytes(key.sign(content, trusted_comment=comment)) + b"\n"

    return sign


def _unlock(key: SecretKey, path: Path, ask: AskPassword) -> None:
    from minisign import Error

    password = os.environ.get(PASSWORD_VARIABLE)
    if password is None:
        password = ask(f"Password of {path}: ")
    if password is None:
        raise InputError(
            f"secret key {path} has a password: set {PASSWORD_VARIABLE}, or run this on a terminal"
        )
    try:
        key.decrypt(password)
    except Error as error:
        raise InputError(f"secret key {path} cannot be unlocked: {error}") from error
    except MemoryError as error:
        raise EnvironmentLackError(
            f"unlocking secret key {path} takes more memory than there is; sign on another machine"
        ) from error


def check_signature(folder: Path, public_key: str) -> str:
    """Return only if the manifest in ``folder`` is what the owner of ``public_key`` signed.

    ``public_key`` is a file of minisign, or the text of its second line. What is returned is the
    signature's trusted comment, which is signed as well. SHA256SUMS is checked too where it has a
    signature of its own.

    Raises:
        GateFailedError: there is no signature, or it is damaged, of another key or other content.
        InputError: that is no public key, or the folder cannot be read.
        EnvironmentLackError: py-minisign is not installed.
    """
    _require_library()
    key = _public_key(public_key)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a bundle: there is no such folder")
    if not is_signed(folder):
        name = signature_path(folder / MANIFEST).name
        raise GateFailedError(f"bundle {folder} is not signed: {name} is missing")
    comments = [
        _check(folder / name, key) for name in SIGNED if signature_path(folder / name).is_file()
    ]
    return comments[0]


def _check(path: Path, key: PublicKey) -> str:
    from minisign import Error, Signature, VerifyError

    own = signature_path(path)
    try:
        signature = Signature.from_file(own)
        key.verify_file(path, signature)
    except VerifyError as error:
        raise GateFailedError(
            f"bundle {path.parent}: {own.name} is no signature of {path.name} by this key ({error})"
        ) from error
    except Error as error:
        raise GateFailedError(
            f"bundle {path.parent}: {own.name} is no signature of minisign ({error})"
        ) from error
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return str(signature.trusted_comment)


def _public_key(given: str) -> PublicKey:
    from minisign import Error, PublicKey

    try:
        if Path(given).is_file():
            return PublicKey.from_file(given)
        return PublicKey.from_base64(given.strip())
    except OSError as error:
        raise InputError(f"public key {given} cannot be read: {error.strerror}") from error
    except Error as error:
        raise InputError(
            f"{given} is neither the file of a minisign public key nor its text ({error}); the "
            "text is 56 characters that begin with RW"
        ) from error


def _require_library() -> None:
    """Raises EnvironmentLackError where py-minisign, or what it needs, is missing."""
    try:
        import minisign
    except ImportError as error:
        raise EnvironmentLackError(
            "signatures need py-minisign: pip install 'repvgg-exporter[sign]'; or check them by "
            f"`minisign -Vm {MANIFEST} -p KEY.pub` in the bundle"
        ) from error
    if not hasattr(minisign, "SecretKey"):
        raise EnvironmentLackError(
            "the installed package minisign is not py-minisign, which has the same name in Python: "
            "uninstall it, then pip install 'repvgg-exporter[sign]'"
        )
