"""Completion as a shell does it: the printed script is sourced and asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli import main
from exporter.spec import Precision, Recipe
from models.variants import VARIANTS

ASK = """
source <(repvgg-export completion bash)
function_name=$(complete -p repvgg-export | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_LINE="$1" COMP_POINT=${#1}
COMPREPLY=()
"$function_name" repvgg-export
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH that begins with `repvgg-export`, and a home without settings."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "repvgg-export"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m exporter "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}


@pytest.fixture
def complete(environment: dict[str, str], tmp_path: Path):
    """``complete("repvgg-export eng")`` -> what bash would offer."""

    def ask(line: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", ASK, "bash", line],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=True,
        )
        assert "" == done.stderr
        return [word.strip() for word in done.stdout.splitlines() if word.strip()]

    return ask


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("eng", ["engine"]),
        ("engine B1", ["B1", "B1g2", "B1g4"]),
        ("engine A0 --precision ", [str(precision) for precision in Precision]),
        ("engine A0 --recipe ", [str(recipe) for recipe in Recipe]),
        ("engine A0 --backend ", ["auto", "tensorrt-rtx", "tensorrt"]),
        ("benchmark bundle --backend ", ["auto", "engine", "onnxruntime"]),
        ("engine A0 --target orin,rtx306", ["orin,rtx3060"]),
        ("engine A0 --target sm8", ["sm80", "sm86", "sm87", "sm89"]),
        ("engine A0 --log", ["--log-file"]),
        ("convert a b --form ", ["train", "deploy"]),
        ("completion z", ["zsh"]),
        ("engine A0 --batch ", []),
    ],
)
def test_bash_completes_commands_options_and_values(complete, line, expected):
    """What is offered is what the command knows."""
    assert expected == complete(f"repvgg-export {line}")


def test_bash_completes_files_and_folders_where_a_path_is_wanted(complete, tmp_path):
    """A bundle's folder, a checkpoint; a plan takes a variant or a folder."""
    (tmp_path / "bundles").mkdir()
    (tmp_path / "a0.pth").touch()
    assert ["a0.pth"] == complete("repvgg-export inspect a0")
    assert ["bundles/"] == complete("repvgg-export verify bun")
    assert ["bundles/"] == complete("repvgg-export plan bun")
    assert set(VARIANTS) <= set(complete("repvgg-export plan "))


def test_asking_for_completions_loads_no_heavy_library(environment, tmp_path):
    """Pressing Tab must not wait for torch."""
    # argcomplete leaves by os._exit; what was loaded until then is told on the way.
    program = (
        "import os, sys\nfrom exporter.cli import main\nleave = os._exit\n"
        "def told(code):\n"
        "    print([m for m in ('torch', 'onnx', 'numpy') if m in sys.modules], flush=True)\n"
        "    leave(code)\n"
        "os._exit = told\nmain([])"
    )
    output = tmp_path / "answers"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": "repvgg-export engine A0 --precision ",
        "COMP_POINT": "36",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(output),
        "_ARGCOMPLETE_IFS": "\n",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**environment, **asked},
        check=False,
    )
    assert (0, "[]\n") == (done.returncode, done.stdout)
    assert "fp32" in output.read_text()


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_values(environment):
    """The same answers in fish."""
    program = 'repvgg-export completion fish | source; complete -C "repvgg-export engine A0 --pr"'
    done = subprocess.run(
        ["fish", "--no-config", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "--precision" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_every_shell_has_its_script(capsys, shell):
    """It names the command."""
    assert 0 == main(["completion", shell])
    script, error = capsys.readouterr()
    assert "" == error
    assert "repvgg-export" in script


def test_an_unknown_shell_is_refused_with_the_known_ones(command):
    """Exit code 2."""
    refused = command("completion", "ksh")
    assert 2 == refused.returncode
    assert "argument shell: invalid choice: 'ksh'" in refused.stderr
