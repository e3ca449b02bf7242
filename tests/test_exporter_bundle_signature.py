"""Signatures of bundles: those of minisign, both ways; what is refused, and with which sentence."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import minisign
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.bundle import (
    CHECKSUMS,
    ENGINE,
    MANIFEST,
    PARITY,
    SIGNED,
    UNLISTED,
    Bundle,
    signature_path,
)
from exporter.bundle.signature import PASSWORD_VARIABLE, check_signature, is_signed, open_signer
from exporter.bundle.writer import BundleWriter
from exporter.cli import main
from exporter.device import sign_bundle
from exporter.errors import EnvironmentLackError, GateFailedError, InputError

# Made by minisign 0.11: `-G -W`, then `-S` of CONTENT with the trusted comment that it has here.
PUBLIC = """untrusted comment: minisign public key 8DFB99980B4A3C0
RWTAo7SAmbnfCPZXjRqcKDO1zFZWxKPChHmH5l0fc3eo8fJDDwCJV3p5
"""
SECRET = """untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAwKO0gJm53wi4LTUiiSM2sLnyHF\
Ac9DTN9ITbVGf4LmzvleJLTp6jmPZXjRqcKDO1zFZWxKPChHmH5l0fc3eo8fJDDwCJV3p5AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\
AAAAAAAAAAAA=
"""
CONTENT = b'{"files": {}}\n'
SIGNATURE = """untrusted comment: signature from minisign secret key
RUTAo7SAmbnfCAIzqY6lYSgojE8AcKZ5Qe8rUCt9edFgqdBEzWwefW/crsqFdAkWjZX9MseIUnwKjL6DRWQId6e6y0PC8qFRwQg=
trusted comment: timestamp:1700000000\tfile:manifest.json\thashed
JmLnvwXkxuUiXEkQIfn6joIGKt3RsXhr0QYkAIabk0IR5RH9gbc+GtYLNN7xQjYQ2q3ZTtQhUifkEg3spU0MCQ==
"""
PASSWORD = "correct horse"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A secret key without a password."""
    path = tmp_path / "minisign.key"
    path.write_text(SECRET)
    return path


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A key with a password, by a derivation that takes no second; `locked.pub` lies beside it."""
    pair = minisign.KeyPair.generate()
    (tmp_path / "locked.pub").write_bytes(bytes(pair.public_key))
    pair.secret_key.encrypt(PASSWORD, opslimit=32768, memlimit=1 << 20)
    path = tmp_path / "locked.key"
    path.write_bytes(bytes(pair.secret_key) + b"\n")
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The smallest thing that is one."""
    with BundleWriter(tmp_path / "bundles" / "b") as writer:
        writer.write_text(PARITY, json.dumps({"verdict": "pass", "stages": []}))
        writer.path("model.onnx").write_bytes(bytes(100))
        return writer.publish({"spec": {"precision": "fp32", "batch": "1:8:32"}, "model": {}})


def nobody(_words: str) -> str | None:
    """There is no one to ask."""
    return None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_signature_is_the_one_that_minisign_makes(secret: Path, monkeypatch):
    """Byte for byte, since Ed25519 has no chance in it: minisign reads what this project signs."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert SIGNATURE.encode() == open_signer(secret, nobody)(MANIFEST, CONTENT)


def test_what_minisign_signed_is_accepted(tmp_path: Path):
    """By the key's file or its text; the comment is handed on."""
    (tmp_path / MANIFEST).write_bytes(CONTENT)
    signature_path(tmp_path / MANIFEST).write_text(SIGNATURE)
    (tmp_path / "key.pub").write_text(PUBLIC)
    for given_key in (str(tmp_path / "key.pub"), PUBLIC.splitlines()[1]):
        assert SIGNATURE.splitlines()[2].endswith(check_signature(tmp_path, given_key))


def test_signing_a_bundle_adds_two_files_and_changes_none(bundle: Bundle, secret: Path):
    """The manifest too stays as it was, byte for byte, and nothing is left beside the bundle."""
    before = contents(bundle.path)
    signed = sign_bundle(bundle, open_signer(secret, nobody))
    after = contents(bundle.path)
    added = {signature_path(Path(name)).name for name in SIGNED}
    assert before == {name: after[name] for name in after.keys() - added}
    assert added == after.keys() - before.keys()
    assert () == Bundle.load(bundle.path).damaged_files() == signed.damaged_files()
    assert [bundle.path] == list(bundle.path.parent.iterdir())
    check_signature(bundle.path, PUBLIC.splitlines()[1])


def test_a_bundle_is_published_with_its_signatures_or_not_at_all(tmp_path: Path):
    """A signer that fails leaves no bundle."""

    def broken(_name: str, _content: bytes) -> bytes:
        raise InputError("the key is gone")

    with BundleWriter(tmp_path / "b", broken) as writer:
        writer.write_text(PARITY, "{}")
        with pytest.raises(InputError, match="the key is gone"):
            writer.publish({})
    assert [] == list(tmp_path.iterdir())


def test_a_new_signature_replaces_the_old_one(bundle: Bundle, secret: Path):
    """Both files are of the last key."""
    other = minisign.KeyPair.generate()
    for key in (other.secret_key, minisign.SecretKey.from_file(secret)):
        path = secret.with_name("any.key")
        path.write_bytes(bytes(key))
        sign_bundle(bundle, open_signer(path, nobody))
    check_signature(bundle.path, PUBLIC.splitlines()[1])
    with pytest.raises(GateFailedError, match="by this key"):
        check_signature(bundle.path, other.public_key.to_base64().decode())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(SIGNED), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_bit_of_what_is_signed_can_change_unseen(
    bundle: Bundle, secret: Path, name: str, place: int, bit: int
):
    """Of the manifest, or of the checksums that a device without Python reads."""
    if not is_signed(bundle.path):
        sign_bundle(bundle, open_signer(secret, nobody))
    path = bundle.path / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[place % len(content)] ^= 1 << bit
    path.write_bytes(flipped)
    with pytest.raises(GateFailedError, match=f"no signature of {name} by this key"):
        check_signature(bundle.path, PUBLIC.splitlines()[1])
    path.write_bytes(content)
    check_signature(bundle.path, PUBLIC.splitlines()[1])


def test_a_hash_that_is_changed_with_its_file_is_seen(bundle: Bundle, secret: Path, capsys):
    """The forger puts another model and its hash into the manifest: exit code 1, one sentence."""
    sign_bundle(bundle, open_signer(secret, nobody))
    (bundle.path / "model.onnx").write_bytes(b"another")
    with BundleWriter(bundle.path.with_name("forged")) as writer:
        for name in bundle.manifest["files"]:
            shutil.copy(bundle.path / name, writer.path(name))
        forged = writer.publish({key: bundle.manifest[key] for key in ("spec", "model")})
    for name in (signature_path(Path(name)).name for name in SIGNED):
        shutil.copy(bundle.path / name, forged.path / name)
    assert () == forged.damaged_files()
    assert 1 == main(["verify", str(forged.path), "--public-key", PUBLIC.splitlines()[1]])
    assert (
        f"repvgg-export: bundle {forged.path}: manifest.json.minisig is no signature of "
        "manifest.json by this key (signature verification failed)\n"
    ) == capsys.readouterr().err


def test_an_unsigned_bundle_is_refused_where_a_signature_is_demanded(bundle: Bundle):
    """A removed signature is no way around the check."""
    with pytest.raises(GateFailedError, match=r"is not signed: manifest\.json\.minisig is missing"):
        check_signature(bundle.path, PUBLIC.splitlines()[1])


@pytest.mark.parametrize(
    "text", ["", "nonsense", "a\nb\nc\nd\n", SIGNATURE.replace("RUTA", "RUTB")]
)
def test_a_damaged_signature_is_a_failed_check(bundle: Bundle, text: str):
    """Exit code 1: the bundle is not what was published."""
    signature_path(bundle.path / MANIFEST).write_text(text)
    with pytest.raises(GateFailedError, match=r"manifest\.json\.minisig is no signature of "):
        check_signature(bundle.path, PUBLIC.splitlines()[1])


@pytest.mark.parametrize(
    "given_key", ["", "nonsense", "RWTAo7SA", "ü" * 56, PUBLIC, "\0", "k" * 5000]
)
def test_what_is_no_public_key_is_bad_usage(bundle: Bundle, secret: Path, given_key: str):
    """Exit code 2, whether the bundle is signed or not; a secret key is none either."""
    with pytest.raises(InputError, match="public key"):
        check_signature(bundle.path, given_key)
    with pytest.raises(InputError, match="neither the file of a minisign public key nor its text"):
        check_signature(bundle.path, str(secret))


def test_what_is_no_secret_key_is_bad_usage(tmp_path: Path):
    """A missing file, a public key, anything else."""
    with pytest.raises(InputError, match="cannot be read: No such file"):
        open_signer(tmp_path / "missing.key", nobody)
    for content in (
        b"",
        PUBLIC.encode(),
        b"\xff\xfe\n\xff\n",
        SECRET.replace("RWQA", "RWQB").encode(),
    ):
        (tmp_path / "bad.key").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.key is no secret key of minisign"):
            open_signer(tmp_path / "bad.key", nobody)


def test_a_locked_key_takes_its_password_from_the_environment(
    bundle: Bundle, locked: Path, monkeypatch
):
    """Nobody is asked then."""
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)

    def asked(_words: str) -> str | None:
        raise AssertionError("nobody should be asked")

    sign_bundle(bundle, open_signer(locked, asked))
    check_signature(bundle.path, str(locked.with_suffix(".pub")))


def test_a_locked_key_without_its_password_is_bad_usage(locked: Path, monkeypatch):
    """A wrong one, or nobody to ask; the sentence names the variable."""
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    with pytest.raises(InputError, match=f"has a password: set {PASSWORD_VARIABLE}, or run this"):
        open_signer(locked, nobody)
    with pytest.raises(InputError, match=r"cannot be unlocked: wrong password for that key"):
        open_signer(locked, lambda _words: "wrong")


def test_a_locked_key_without_the_memory_to_unlock_it_is_the_environments_lack(
    locked: Path, monkeypatch
):
    """minisign's own keys take 1 GiB."""

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(minisign.SecretKey, "decrypt", exhausted)
    with pytest.raises(EnvironmentLackError, match="takes more memory than there is"):
        open_signer(locked, lambda _words: PASSWORD)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with numpy alone."""
    monkeypatch.setitem(sys.modules, "minisign", None)


@pytest.mark.usefixtures("no_library")
def test_without_the_library_the_sentence_says_both_ways(bundle: Bundle, secret: Path, capsys):
    """Exit code 3; a bundle is verified all the same where no signature is asked about."""
    for words in (
        ["verify", str(bundle.path), "--public-key", "key.pub"],
        ["sign", str(bundle.path), "--key", str(secret)],
        ["engine", "A0", "--sign", str(secret), "--out", str(bundle.path / "x")],
    ):
        assert 3 == main(words)
        assert (
            "repvgg-export: signatures need py-minisign: pip install 'repvgg-exporter[sign]'; or "
            "check them by `minisign -Vm manifest.json -p KEY.pub` in the bundle\n"
        ) == capsys.readouterr().err
    assert not is_signed(bundle.path)


def test_the_namesake_of_the_library_is_told_from_it(bundle: Bundle, monkeypatch):
    """Another distribution installs a module of the same name, without a function in it."""
    monkeypatch.delattr(minisign, "SecretKey")
    with pytest.raises(EnvironmentLackError, match="is not py-minisign"):
        check_signature(bundle.path, PUBLIC.splitlines()[1])


def test_an_engine_that_was_put_into_a_signed_bundle_is_refused(
    bundle: Bundle, secret: Path, tmp_path: Path, capsys
):
    """The signature is right, and says nothing of the file: exit code 1."""
    sign_bundle(bundle, open_signer(secret, nobody))
    (bundle.path / ENGINE).write_bytes(b"garbage")
    assert 1 == main(["verify", str(bundle.path), "--public-key", PUBLIC.splitlines()[1]])
    assert (
        f"repvgg-export: bundle {bundle.path}: model.engine not among the files that the manifest "
        "lists, and no part of the bundle; move it elsewhere\n"
    ) == capsys.readouterr().err


def test_nothing_strange_is_lost_or_signed(bundle: Bundle, secret: Path):
    """A damaged bundle is not signed, nor one with files that are not its own."""
    signer = open_signer(secret, nobody)
    (bundle.path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"\(notes\.txt\) and would be lost"):
        sign_bundle(bundle, signer)
    (bundle.path / "notes.txt").unlink()
    (bundle.path / "model.onnx").write_bytes(b"")
    with pytest.raises(GateFailedError, match=r"model\.onnx missing or not what the manifest says"):
        sign_bundle(bundle, signer)
    assert not is_signed(bundle.path)


def test_the_files_made_from_the_manifest_are_neither_damage_nor_strangers(
    bundle: Bundle, secret: Path
):
    """Four names, and whoever writes the bundle again makes them again."""
    sign_bundle(bundle, open_signer(secret, nobody))
    assert contents(bundle.path).keys() - bundle.manifest["files"].keys() == UNLISTED
    again = sign_bundle(Bundle.load(bundle.path), open_signer(secret, nobody))
    assert () == again.damaged_files()


def test_the_password_is_asked_for_on_a_terminal_and_not_shown(bundle: Bundle, locked: Path):
    """The whole command, with a terminal of its own."""
    own_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.executable, [sys.executable, '-m', 'exporter', *sys.argv[1:]])"
    )
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", own_terminal, "sign", str(bundle.path), "--key", str(locked)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE},
        start_new_session=True,
    )
    os.close(follower)
    seen = b""
    while b"locked.key: " not in seen:
        seen += os.read(leader, 4096)
    os.write(leader, f"{PASSWORD}\n".encode())
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
        seen += piece
    assert 0 == process.wait(timeout=60), seen
    os.close(leader)
    assert PASSWORD.encode() not in seen
    check_signature(bundle.path, str(locked.with_suffix(".pub")))


@pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
def test_minisign_itself_accepts_a_signed_bundle(bundle: Bundle, secret: Path):
    """And then sha256sum has checksums that can be trusted."""
    sign_bundle(bundle, open_signer(secret, nobody))
    for name in SIGNED:
        subprocess.run(
            ["minisign", "-Vm", name, "-P", PUBLIC.splitlines()[1]], cwd=bundle.path, check=True
        )


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no coreutils here")
def test_sha256sum_accepts_every_bundle_and_sees_every_change(bundle: Bundle):
    """All files but the checksums themselves are in them, the manifest included."""
    check = ["sha256sum", "--check", "--strict", CHECKSUMS]
    listed = {line.split("  ")[1] for line in (bundle.path / CHECKSUMS).read_text().splitlines()}
    assert contents(bundle.path).keys() - {CHECKSUMS} == listed
    for name in sorted(listed):
        path = bundle.path / name
        subprocess.run(check, cwd=bundle.path, check=True, capture_output=True)
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        done = subprocess.run(check, cwd=bundle.path, capture_output=True, text=True, check=False)
        assert (1, True) == (done.returncode, f"{name}: FAILED" in done.stdout)
        path.write_bytes(content)
