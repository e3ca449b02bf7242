"""One case of the campaign: a file made wrong, where it lies, and the command that reads it.

A case is drawn from its seed and number alone, so that one that failed can be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from corrupt_graph import GRAPH
from corrupt_pictures import PICTURES
from corrupt_text import CACHE, JSON, TOML
from corrupt_weights import NUMPY, SAFETENSORS, TORCH, ZIP
from corruption import BYTES, Corruption
from fuzz_seeds import QUICK, Seeds, adapt_checksums, images_of

from exporter.bundle import CHECKSUMS

_ENGINE = ("engine", "A0", *QUICK, "--out", "{out}")
_INT8 = ("engine", "A0", "--precision", "int8", "--target", "sm90", "--calib-images", "16",
         "--evaluation-images", "16", "--out", "{out}")  # fmt: skip
_BENCHMARK = ("benchmark", "{file}", "--seconds", "0.02", "--warmup", "1", "--threads", "1")
_WEIGHED = 4
"""How much more often a change that knows the format is drawn than one of bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of input: how often it is drawn, and the commands that read it, the first mostly."""

    weight: float
    commands: Sequence[tuple[str, ...]]


KINDS: Mapping[str, Kind] = {
    "checkpoint": Kind(weight=6, commands=(("inspect", "{file}"), ("inspect", "{file}", "--json"))),
    "a0": Kind(
        weight=2.5,
        commands=(("convert", "{file}", "{out}"), (*_ENGINE, "--weights", "{file}"),
            ("convert", "{file}", "{out}", "--form", "deploy")),
    ),
    "graph": Kind(weight=6, commands=(("inspect", "{file}"), ("inspect", "{file}", "--json"))),
    "a0_graph": Kind(weight=0.5, commands=((*_INT8, "--weights", "{file}"),)),
    "picture": Kind(
        weight=5,
        commands=(("evaluate", "{bundle}", "--data", "{folder}", "--threads", "1"),
            ("evaluate", "{bundle}", "--data", "{folder}", "--threads", "1", "--skip-bad-images"),
            (*_ENGINE, "--evaluation", "{folder}")),
    ),
    "table": Kind(weight=3, commands=(("inspect", "{file}"),)),
    "a0_table": Kind(weight=0.3, commands=(
        (*_INT8, "--recipe", "minmax", "--calibration-table", "{file}"),)),
    "cache": Kind(weight=1.5, commands=(("inspect", "{file}"),)),
    "plan": Kind(weight=1, commands=(("inspect", "{file}"),)),
    "preprocess": Kind(weight=1, commands=((*_ENGINE, "--preprocess", "{file}"),)),
    "evaluation": Kind(weight=2, commands=(("evaluate", "--merge", "{file}"),
        ("evaluate", "--merge", "{file}", "--json"))),
    "config": Kind(weight=2.5, commands=(("parity", "{file}", "--results", "{results}"),)),
    "baseline": Kind(weight=1, commands=(
        ("parity", "{config}", "--baseline", "{file}", "--results", "{results}"),)),
    "bundle": Kind(
        weight=10,
        commands=(("verify", "{file}"), ("inspect", "{file}"), ("plan", "{file}"),
            ("inspect", "{file}", "--json"), ("plan", "{file}", "--json"),
            ("evaluate", "{file}", "--data", "{images}", "--threads", "1"), _BENCHMARK,
            (*_BENCHMARK, "--compare", "{bundle}"), ("build", "{file}")),
    ),
}  # fmt: skip
_FORMATS: Mapping[str, Mapping[str, Corruption]] = {
    ".json": JSON, ".toml": TOML, ".cache": CACHE, ".onnx": GRAPH, ".npz": {**ZIP, **NUMPY},
    ".pth": {**TORCH, **ZIP}, ".safetensors": SAFETENSORS,
    **dict.fromkeys((".png", ".jpg", ".ppm", ".bmp", ".webp", ".tif"), PICTURES),
}  # fmt: skip
_READ = (
    "manifest.json",
    "parity.json",
    "engine.json",
    "reference.npz",
    ".onnx",
    "calibration.json",
    CHECKSUMS,
)
"""What the commands open of a bundle."""
_NAMES = ("wrong", "w r o n g", "wrong\nname", "wrong\udcff", "[red]wrong", "\x1b[31mwrong")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to run in ``folder``; ``out`` is where the command would publish, if it does."""

    kind: str
    corruption: str
    command: tuple[str, ...]
    arguments: tuple[str, ...]
    folder: Path
    file: Path
    out: Path | None


def make_case(seeds: Seeds, kind: str, random: Random, folder: Path) -> Case:
    """Draw and write a case of ``kind`` under ``folder``, which is empty."""
    source = random.choice(seeds.of(kind))
    commands = KINDS[kind].commands
    command = commands[0] if random.random() < 0.5 else random.choice(commands)
    name = "right" if random.random() < 0.9 else random.choice(_NAMES)
    place = folder / "in" / "0" if kind == "picture" else folder / "in"
    place.mkdir(parents=True)
    target = place / f"{name}{source.suffix}"
    if source.is_dir():
        corruption = _wrong_bundle(source, target, random)
    elif random.random() < 0.04:
        corruption = _no_file(target, random)
    else:
        corruption, content = corrupted(source.read_bytes(), source.suffix, random)
        target.write_bytes(content)
    return placed(seeds, kind, command, corruption, file=target, folder=folder)


def placed(
    seeds: Seeds, kind: str, command: tuple[str, ...], corruption: str, *, file: Path, folder: Path
) -> Case:
    """The case whose input lies at ``file``, with everything else that the command is given."""
    if kind == "picture":
        _fill(folder / "in", images_of(seeds))
    suffix = ".safetensors" if command[0] == "convert" else ""
    (folder / "published").mkdir()
    places = {
        "file": file, "out": folder / "published" / f"out{suffix}", "folder": folder / "in",
        "bundle": seeds.bundle, "images": images_of(seeds), "results": folder / "results",
        "config": seeds.of("config")[0],
    }  # fmt: skip
    arguments = tuple(str(places[word[1:-1]]) if word.startswith("{") else word for word in command)
    return Case(
        kind=kind, corruption=corruption, command=command, arguments=(*arguments, "--quiet"),
        folder=folder, file=file, out=places["out"] if "{out}" in command else None,
    )  # fmt: skip


def corrupted(
    data: bytes, suffix: str, random: Random, *, leave_out: Sequence[str] = ()
) -> tuple[str, bytes]:
    """What was done, and the result; formats are known by their suffix."""
    knowing = _FORMATS.get(suffix, {})
    if suffix == ".pth" and not data.startswith(b"PK"):
        knowing = TORCH
    chances = [(name, make, 1) for name, make in BYTES.items()]
    chances += [(n, make, _WEIGHED) for n, make in knowing.items() if n not in leave_out]
    (name, make, _) = random.choices(chances, [weight for *_, weight in chances])[0]
    return name, make(data, random)


def _wrong_bundle(source: Path, target: Path, random: Random) -> str:
    """A copy with one file wrong, missing or not a file; mostly the manifest says so too."""
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)
    victims = sorted(path for path in target.iterdir() if path.name.endswith(_READ))
    weights = [3 if path.name == "manifest.json" else 1 for path in victims]
    victim = random.choices(victims, weights)[0]
    if random.random() < 0.05:
        victim.unlink()
        return f"{victim.name}: {_no_file(victim, random)}"
    words, content = corrupted(victim.read_bytes(), victim.suffix, random)
    victim.unlink()
    victim.write_bytes(content)
    if random.random() < 0.2 or victim.name == CHECKSUMS:
        return f"{victim.name}: {words}"
    if victim.name != "manifest.json":
        manifest_path = target / "manifest.json"
        manifest = json.loads(manifest_path.read_text("utf-8"))
        entry = manifest["files"].get(victim.name)
        if entry is not None:
            entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest_path.unlink()
        manifest_path.write_text(json.dumps(manifest), "utf-8")
        words += ", manifest adapted"
    adapt_checksums(target)
    return f"{victim.name}: {words}"


def _no_file(target: Path, random: Random) -> str:
    """Something that is there and is no file, or nothing."""
    how = random.choice(("folder", "pipe", "loop", "missing", "device"))
    if how == "folder":
        target.mkdir()
    elif how == "pipe":
        os.mkfifo(target)
    elif how == "loop":
        target.symlink_to(target)
    elif how == "device":
        target.symlink_to("/dev/zero")
    return f"a {how}" if how != "missing" else how


def _fill(folder: Path, images: Path) -> None:
    for label in images.iterdir():
        shutil.copytree(label, folder / label.name, dirs_exist_ok=True)
