"""Every command that README and docs/ show: read by the real parser, and run in a prepared folder.

The folder holds files by the very names that the pages use (`a1.pth`, `images/val`, `BUNDLE`), so
commands run as they stand there, page by page, from top to bottom. Only `repvgg-export engine` gets
fewer and smaller images. A command that cannot run here, or that CI runs itself, stands in a table.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import minisign
import pytest
import tomllib

from exporter.cli import build_parser
from exporter.engine.driver import driver_lack

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "examples/README.md", "models/weights/a0_digits.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))

BY_CI = {
    "make test", "make audit", "make docs", "make parity", "make parity MODEL=A0 PRECISION=int8",
}  # fmt: skip
"""Run by .ci/run as they stand."""
MEASUREMENTS = {
    "make benchmark-paper": "benchmarks/paper.py",
    "make benchmark-pipeline": "benchmarks/pipeline.py",
    "make engine-table": "benchmarks/engine_table.py",
    "python benchmarks/kill.py --results benchmarks/results/kill.json": "benchmarks/kill.py",
    "make fuzz": "benchmarks/fuzz.py",
    "python examples/train_digits_a0.py --out /tmp/digits": "examples/train_digits_a0.py",
}
"""Take many minutes; the script that they run."""
BY_TESTS = {
    ".venv/bin/python -m hatchling build -t wheel -d dist": "tests/test_system_device_half.py",
}
"""Need the whole repository; the test that does the same in it."""
REFUSED = {
    "make gpu-test": (2, "no NVIDIA driver on this machine (libcuda.so.1 does not load)"),
    "repvgg-export matrix matrix.toml --ray head:6379 --out build/cluster": (
        3,
        "no Ray cluster at head:6379",
    ),
    "repvgg-export build BUNDLE": (3, "there is no GPU to build the engine for: no NVIDIA driver"),
}
"""What a machine without a GPU must answer: exit code and the beginning of the sentence."""
FOREIGN = {
    "cd BUNDLE && sha256sum --check SHA256SUMS": ("sha256sum",),
    "cd BUNDLE && minisign -Vm SHA256SUMS -p ../minisign.pub && sha256sum --check SHA256SUMS": (
        "sha256sum", "minisign",
    ),
}  # fmt: skip
"""Run where these programs are, which are not this project's."""
MENTIONED = {"make", "pip install", "trtexec"}
"""Names in a sentence, not commands."""
SAYS = {
    "python examples/python_api.py build/python-api": (
        "int8 pass 3", "RepVGG-A0: 100% of 8 answers are the same", "InputError (2): ",
    ),
    "repvgg-export verify build/A0-int8": ("int8", "pass"),
}  # fmt: skip
"""What must stand on the standard output of commands whose result the pages promise."""
FOREIGN_OPTIONS = {"--system-site-packages", "--help"}
PRELUDES = {
    "docs/networks.md": """import sys; sys.path.insert(0, "examples")
from custom_detector import initialized, synthetic
my_network, calibration_array = initialized(), synthetic(64, seed=1).numpy()
array = calibration_array[:2]
""",
    "examples/README.md": """import sys, torch; sys.path.insert(0, "examples")
import custom_detector, custom_segmentation
network, detector = custom_segmentation.trained(), custom_detector.initialized()
images, calibration, held_out = (custom_segmentation.synthetic(64, seed=n)[0] for n in (1, 2, 3))
""",
}
"""What the Python of a page takes as given; examples have two networks of different size."""
BEFORE_SECOND = "images = custom_detector.synthetic(64, seed=1)\n"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("make", "repvgg-export", "python", "pip", "trtexec", "mkdocs", "eval")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def fences(page: str) -> list[tuple[str, str]]:
    """Language and text of each block."""
    return _FENCE.findall((ROOT / page).read_text("utf-8"))


def prose(page: str) -> str:
    """The page without its blocks."""
    return _FENCE.sub("", (ROOT / page).read_text("utf-8"))


def is_mention(command: str) -> bool:
    """`repvgg-export verify` alone names the command; `MENTIONED` are names too."""
    return command in MENTIONED or re.fullmatch(r"repvgg-export [a-z]+", command) is not None


def commands(page: str) -> Iterator[str]:
    """Every command line in order: blocks of shell, indented lines, code within sentences."""
    text = (ROOT / page).read_text("utf-8")
    found = [
        (match.start(), line)
        for match in _FENCE.finditer(text)
        if match[1] == "sh"
        for line in match[2].replace("\\\n", "").splitlines()
    ]
    blank = _FENCE.sub(lambda match: " " * len(match[0]), text)
    inline = [*_CODE.finditer(blank), *re.finditer(r"^ {4,}(\S.*)$", blank, re.MULTILINE)]
    found += [(m.start(), m[1]) for m in inline if m[1].split(" ")[0] in _PROGRAMS]
    for _, line in sorted(found, key=lambda item: item[0]):
        command = re.sub(r"\s+#.*$", "", line).strip()
        if command and not is_mention(command):
            yield command


FIRST_PAGE: dict[str, str] = {}
for _page in PAGES:
    for _command in commands(_page):
        FIRST_PAGE.setdefault(_command, _page)
"""Each command once, with the page that shows it first."""


def program_lines(command: str) -> Iterator[list[str]]:
    """The words of each `repvgg-export` in ``command``, also as `make` would call it."""
    if command.startswith("make "):
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", *shlex.split(command)[1:]],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        lines = done.stdout.replace("\\\n", " ").splitlines()
    else:
        lines = re.findall(r"\$\((.*?)\)", command) or [command]
    for line in lines:
        words = shlex.split(re.sub(r"\s>\s.*$", "", line))
        if words and Path(words[0]).name == "repvgg-export":
            yield words[1:]


def test_the_pages_have_commands():
    """The extraction finds the README's first two, and dozens in all."""
    assert ["make engine MODEL=A0 PRECISION=int8", "make test"] == list(commands("README.md"))[:2]
    assert len(FIRST_PAGE) > 25


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """A block without a language could hide a command."""
    assert {language for language, _ in fences(page)} <= {"sh", "python", "toml", "text"}


@pytest.mark.parametrize("command", FIRST_PAGE)
def test_every_command_is_one(command):
    """The real parser reads it; make knows the target; scripts exist."""
    lines = list(program_lines(command))
    for words in lines:
        if words[-1] != "--help":
            build_parser().parse_args(words)
    script = MEASUREMENTS.get(command) or next(iter(re.findall(r"^python (\S+)", command)), None)
    assert script is None or (ROOT / script).is_file()
    assert lines or script or command in BY_CI.union(REFUSED, FOREIGN, BY_TESTS)


def test_every_command_and_option_that_a_sentence_names_exists():
    """`verify`, `--recipe auto` and the like, in any page, the architecture and the changelog."""
    parsers = build_parser()._subparsers._group_actions[0].choices
    known = {option for each in parsers.values() for option in each._option_string_actions}
    for page in (*PAGES, "ARCHITECTURE.md", "CHANGELOG.md"):
        for code in _CODE.findall(prose(page)):
            for name in re.findall(r"^repvgg-export ([a-z]+)", code):
                assert name in parsers, page
            options = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", code)) - FOREIGN_OPTIONS
            assert options <= known, page


def test_no_table_outlives_its_command():
    """Each exception is still shown by a page, and CI runs what it is said to run."""
    tables = (MEASUREMENTS, REFUSED, SAYS, FOREIGN, BY_TESTS)
    assert BY_CI.union(*tables) <= FIRST_PAGE.keys()
    assert BY_CI <= set((ROOT / ".ci" / "run").read_text().splitlines())
    assert PRELUDES.keys() <= set(PAGES)
    for command, test in BY_TESTS.items():
        assert str(command.split()[1:5])[1:-1].replace("'", '"') in (ROOT / test).read_text("utf-8")


@pytest.mark.parametrize("page", ["docs/ci.md"])
def test_the_sample_configuration_is_toml(page):
    """Its keys are held by tests/test_examples_ci.py."""
    (sample,) = (body for language, body in fences(page) if language == "toml")
    assert {"defaults", "margins", "case"} == set(tomllib.loads(sample))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bundles) -> Path:
    """A folder in which every name that the pages use is a real file."""
    import torch

    from models import VARIANTS, RepVGG, load_checkpoint
    from models.registry import bundled_weights

    home = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, home)
    for name in ("benchmarks", "examples"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    binaries = home / ".venv" / "bin"
    binaries.mkdir(parents=True)
    fewer = "--calib-images 40 --evaluation-images 40 --image-size 64"
    scripts = {
        "python": f'exec {sys.executable} "$@"',
        "repvgg-export": f'test "$1" = engine && set -- "$@" {fewer}\n'
        f'exec {sys.executable} -m exporter "$@"',
    }
    for name, text in scripts.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    for name in (".installed", ".with-cuda"):
        (home / ".venv" / name).touch()
    bundled = bundled_weights("A0")
    for source, name in ((bundled.calibration_images, "train"), (bundled.test_images, "val")):
        for label in sorted(source.iterdir()):
            kept = home / "images" / name / label.name
            kept.mkdir(parents=True)
            for image in sorted(label.iterdir())[:6]:
                shutil.copy(image, kept)
    narrow = load_checkpoint(bundled.checkpoint).module.state_dict()
    torch.save(narrow, home / "a0.pth")
    # A0 within A1, which is as deep and wider: the other channels are zero, and so is what they do.
    wide = RepVGG(VARIANTS["A1"], num_classes=10).state_dict()
    for name, tensor in wide.items():
        tensor.fill_(1 if name.endswith("running_var") else 0)
        tensor[tuple(slice(0, size) for size in narrow[name].shape)] = narrow[name]
    torch.save(wide, home / "a1.pth")
    made, process = bundles("int8")
    assert process.returncode == 0, process.stderr
    shutil.copytree(made, home / "build" / "A0-int8")
    for name in ("BUNDLE", "OTHER"):
        shutil.copytree(made, home / name)
    pair = minisign.KeyPair.generate()
    (home / "minisign.key").write_bytes(bytes(pair.secret_key))
    (home / "minisign.pub").write_bytes(bytes(pair.public_key))
    (home / "DIR").symlink_to("images/val")
    (home / "docs").mkdir()
    (home / ".config/fish/completions").mkdir(parents=True)
    (home / "matrix.toml").write_text(
        '[matrix]\nmodel = ["A0"]\nprecision = ["fp16"]\ntarget = ["sm86", "orin"]\n'
        "[defaults]\nevaluation_images = 40\n"
    )
    (home / "parity.toml").write_text(
        '[[case]]\nmodel = "A0"\nprecision = "fp16"\ntarget = "sm86"\nevaluation_images = 40\n'
    )
    return home


def run(arguments: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """With the folder's own programs first, and without the network."""
    path = os.pathsep.join([str(home / ".venv" / "bin"), os.environ["PATH"]])
    own = {"PATH": path, "HOME": str(home), "HF_HUB_OFFLINE": "1", "REPVGG_EXPORT_CACHE": ""}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        arguments, cwd=home, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page in FIRST_PAGE.values()])
def test_the_pages_commands_run(page, place):
    """From top to bottom, as they stand: exit code 0, or what `REFUSED` says."""
    for command in (each for each, first in FIRST_PAGE.items() if first == page):
        if command in BY_CI.union(MEASUREMENTS, BY_TESTS):
            continue
        if None in map(shutil.which, FOREIGN.get(command, ())):
            continue
        code, sentence = REFUSED.get(command, (0, ""))
        if code and driver_lack() is None:
            continue
        done = run(["bash", "-c", command], place)
        assert (code, True) == (done.returncode, sentence in done.stderr), (command, done.stderr)
        for words in SAYS.get(command, ()):
            assert words in done.stdout, command


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(f[0] == "python" for f in fences(p))])
def test_the_pages_python_runs(page, place):
    """Each block, after the page's prelude, in a process of its own."""
    blocks = [body for language, body in fences(page) if language == "python"]
    for number, block in enumerate(blocks):
        given = PRELUDES.get(page, "") + (BEFORE_SECOND if number else "")
        done = run([sys.executable, "-c", given + block], place)
        assert 0 == done.returncode, (block, done.stderr)
        assert "pass" in done.stdout or "verdict" not in block
