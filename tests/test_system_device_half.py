"""The device half where it has to live: an environment with numpy, ONNX Runtime and this wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import minisign
import numpy as np
import pytest
from PIL import Image

from exporter.bundle import Bundle
from exporter.cli import main
from exporter.engine.driver import driver_lack

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``device("verify", ...)`` runs the installed command in the small environment."""
    home = tmp_path_factory.mktemp("device")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(home)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv", with_pip=True)
    python = home / "venv" / "bin" / "python"
    # Nothing of the environment that runs the tests may be seen in there.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run(
        [*pip, *constraints, str(wheel), "numpy", "onnxruntime"],
        check=True,
        env=environment,
        cwd=home,
    )

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [home / "venv" / "bin" / "repvgg-export", *arguments],
            capture_output=True,
            text=True,
            cwd=home,
            env=environment,
            timeout=300,
            check=False,
        )

    listing = "from importlib.util import find_spec as f; print(*[m for m in {} if f(m)])".format(
        ["torch", "onnx", "onnxsim", "tensorrt", "tensorrt_rtx", "sklearn", "minisign", "cyclonedx"]
    )
    there = subprocess.run(
        [python, "-c", listing], check=True, capture_output=True, text=True, env=environment
    )
    assert "" == there.stdout.strip()
    return run


@pytest.fixture
def precision() -> str:
    """Of the bundle; some tests run at another one too."""
    return "int8"


both = pytest.mark.parametrize("precision", ["int8", "fp16"])


@pytest.fixture
def bundle(bundles, tmp_path: Path, precision: str) -> Path:
    """A copy of the default bundle."""
    made, process = bundles(precision)
    assert process.returncode == 0, process.stderr
    return shutil.copytree(made, tmp_path / "copied")


@pytest.fixture(scope="module")
def deferred(command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose engine waits for a Jetson Orin."""
    out = tmp_path_factory.mktemp("deferred") / "bundle"
    process = command("engine", "A0", "--precision", "fp16", "--target", "orin", "--out", str(out))
    assert process.returncode == 0, process.stderr
    return out


def test_a_bf16_bundle_says_what_its_graph_needs_to_run(device: Run, bundles, data: Path):
    """Without the onnx package the graph is not judged, the rest is; a time is refused."""
    made, process = bundles("bf16")
    assert process.returncode == 0, process.stderr
    done = device("verify", made, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["stage"]: row for row in json.loads(done.stdout)["parity"]["stages"]}
    needs = (
        "ONNX Runtime has no bf16 convolutions on the CPU, and emulating them needs the onnx "
        "package: pip install onnx, or run the engine on a GPU"
    )
    assert ("pass", "not_run", needs) == (
        rows["simplified"]["status"],
        rows["bf16"]["status"],
        rows["bf16"]["reason"],
    )
    for command in (("evaluate", made, "--data", data), ("benchmark", made)):
        done = device(*command, "--backend", "onnxruntime")
        assert (3, f"repvgg-export: {needs}\n") == (done.returncode, done.stderr)


def test_a_signed_bundle_is_verified_without_the_library_and_says_that_it_is_signed(
    device: Run, bundle: Path, tmp_path: Path
):
    """The small environment has no cryptography: a check that was demanded is exit code 3."""
    pair = minisign.KeyPair.generate()
    (tmp_path / "my.key").write_bytes(bytes(pair.secret_key))
    assert 0 == main(["sign", str(bundle), "--key", str(tmp_path / "my.key"), "--quiet"])
    done = device("verify", bundle, "--json")
    assert 0 == done.returncode, done.stderr
    assert "not_checked" == json.loads(done.stdout)["signature"]["status"]
    done = device("verify", bundle, "--public-key", pair.public_key.to_base64().decode())
    assert (
        3,
        "repvgg-export: signatures need py-minisign: pip install 'repvgg-exporter[sign]'; or "
        "check them by `minisign -Vm manifest.json -p KEY.pub` in the bundle\n",
    ) == (done.returncode, done.stderr)


@pytest.fixture
def data(bundle: Path, tmp_path: Path) -> Path:
    """The bundle's reference inputs as image files, in folders named by the original's answer."""
    images, logits = Bundle.load(bundle).reference()
    manifest = Bundle.load(bundle).manifest
    preprocess = manifest["preprocess"]
    mean, std = (np.array(preprocess[key])[:, None, None] for key in ("mean", "std"))
    for number, (image, answer) in enumerate(zip(images, logits.argmax(axis=1), strict=True)):
        folder = tmp_path / "data" / manifest["class_names"][answer]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.rint((image * std + mean) * 255).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number}.png")
    return tmp_path / "data"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@both
def test_a_copied_bundle_is_verified(device: Run, bundle: Path, precision: str):
    """Hashes and graphs are checked; the engine row says why it did not run, or passes."""
    done = device("verify", bundle, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["stage"]: row for row in json.loads(done.stdout)["parity"]["stages"]}
    assert "pass" == rows["simplified"]["status"] == rows[precision]["status"]
    assert "not_run" == rows["engine"]["status"]
    if driver_lack():
        assert driver_lack() == rows["engine"]["reason"]


@both
def test_a_copied_bundle_is_evaluated(device: Run, bundle: Path, data: Path, tmp_path: Path):
    """On ONNX Runtime, whole and in two shards that merge to the whole."""
    arguments = ("--data", data, "--backend", "onnxruntime", "--json")
    done = device("evaluate", bundle, *arguments)
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert (8, 1.0, "onnxruntime") == (whole["images"], whole["top1"], whole["backend"])
    parts = []
    for part in ("1/2", "2/2"):
        parts.append(tmp_path / f"part{len(parts)}.json")
        parts[-1].write_text(device("evaluate", bundle, *arguments, "--shard", part).stdout)
    merged = json.loads(device("evaluate", "--merge", *parts, "--json").stdout)
    assert ["1/2", "2/2"] == merged["shards"]
    for key in ("images", "top1", "top5", "confusion"):
        assert whole[key] == merged[key]


@both
def test_a_copied_bundle_is_timed(device: Run, bundle: Path):
    """Alone and in turns with another, on ONNX Runtime."""
    arguments = ("--backend", "onnxruntime", "--batch", "1,2", "--seconds", "0", "--json")
    done = device("benchmark", bundle, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [1, 2] == [row["batch"] for row in found["rows"]]
    assert (None, None) == (found["runtime_cache"], found["first_run_ms"])
    assert found["load_ms"] > 0
    done = device("benchmark", bundle, "--compare", bundle, *arguments)
    assert done.returncode == 0, done.stderr
    assert [1, 2] == [ratio["batch"] for ratio in json.loads(done.stdout)["ratios"]]


@both
def test_a_copied_bundle_is_planned(device: Run, bundle: Path, precision: str):
    """For the targets that it has, for another device by name; a variant can be planned too."""
    done = device("plan", bundle, "--json")
    assert (0, "") == (done.returncode, done.stderr)
    own = json.loads(done.stdout)
    assert ("RepVGG-A0", precision) == (own["model"], own["precision"])
    done = device("plan", bundle, "--target", "orin", "--json")
    assert (0, "") == (done.returncode, done.stderr)
    lines = json.loads(done.stdout)["engine"]["deferred"]["commands"]
    graphs = {release: line.split()[1] for release, line in lines.items()}
    assert f"--onnx=model.{precision}.onnx" == graphs["10.3"]
    # TensorRT 8 chooses half by itself, from the float graph.
    float_graph = "--onnx=model.onnx" if precision == "fp16" else graphs["10.3"]
    assert {float_graph} == {graph for release, graph in graphs.items() if release[0] == "8"}
    done = device("plan", "A0", "--precision", precision, "--target", "rtx3060", "--json")
    assert (0, "") == (done.returncode, done.stderr)
    assert ["sm86"] == json.loads(done.stdout)["engine"]["build_here"]


def test_a_deferred_bundle_is_planned_inspected_and_verified(device: Run, deferred: Path, tmp_path):
    """It is whole without its engine, and says how to make it."""
    bundle = shutil.copytree(deferred, tmp_path / "copied")
    done = device("plan", bundle, "--json")
    assert (0, "") == (done.returncode, done.stderr)
    assert ["sm87"] == json.loads(done.stdout)["engine"]["deferred"]["targets"]
    done = device("inspect", bundle, "--json")
    assert (0, "") == (done.returncode, done.stderr)
    engine = json.loads(done.stdout)["engine"]
    assert ("deferred", ["orin"], "repvgg-export build BUNDLE") == (
        engine["status"], engine["devices"], engine["build_with"],
    )  # fmt: skip
    done = device("verify", bundle, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["parity"]["stages"][-1]
    assert ("engine", "not_run") == (row["stage"], row["status"])
    assert (
        f"bundle {bundle} holds no engine yet; `repvgg-export build` makes one on the device"
        == row["reason"]
    )


def test_tables_are_printed_for_people(device: Run, bundle: Path, data: Path):
    """Without --json each command prints a table and nothing on standard error when quiet."""
    for arguments in (
        ("verify", bundle),
        ("evaluate", bundle, "--data", data),
        ("benchmark", bundle, "--batch", "1", "--seconds", "0"),
    ):
        done = device(*arguments, "--quiet")
        assert done.returncode == 0, done.stderr
        assert "━" in done.stdout
        assert "" == done.stderr


@both
@pytest.mark.parametrize(
    "arguments",
    [
        ("verify",),
        ("evaluate", "--backend", "onnxruntime", "--data", "."),
        ("benchmark", "--backend", "onnxruntime"),
        ("build", "--target", "sm86"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_flipped_byte_is_refused_with_the_file(device: Run, bundle: Path, precision, arguments):
    """Exit code 1 and one line that names it."""
    flip_a_byte(bundle / f"model.{precision}.onnx")
    done = device(arguments[0], bundle, *arguments[1:])
    assert 1 == done.returncode
    assert (
        f"repvgg-export: bundle {bundle}: model.{precision}.onnx missing or not what the manifest "
        "says\n"
    ) == done.stderr


def test_without_tensorrt_nothing_is_built(device: Run, bundle: Path):
    """Exit code 3; the bundle stays whole."""
    done = device("build", bundle, "--target", "sm86")
    assert 3 == done.returncode
    assert "not installed" in done.stderr
    assert 0 == device("verify", bundle).returncode


@pytest.mark.skipif(driver_lack() is None, reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["evaluate", "benchmark"])
def test_an_engine_without_a_driver_is_a_lack(device: Run, bundle: Path, data: Path, command: str):
    """Exit code 3 and one sentence."""
    options = ("--data", data) if command == "evaluate" else ("--cuda-graph",)
    done = device(command, bundle, "--backend", "engine", *options)
    assert 3 == done.returncode
    assert f"repvgg-export: {driver_lack()}\n" == done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("evaluate",), "evaluate needs a bundle and --data DIR, or --merge FILE ..."),
        (
            ("evaluate", "--merge", "x", "--shard", "1/2"),
            "--merge reads finished evaluations; leave out BUNDLE, --data and --shard",
        ),
        (("evaluate", "--merge", "absent"), "evaluation absent cannot be read: No such file or"),
        (
            ("evaluate", "{bundle}", "--data", "{data}", "--shard", "3/2"),
            "shard 3/2 must be part/parts with 1 <= part <= parts",
        ),
        (
            ("evaluate", "{bundle}", "--data", "{data}", "--backend", "engin"),
            "unknown backend 'engin' (nearest: engine; known: auto, engine, onnxruntime)",
        ),
        (
            ("evaluate", "{bundle}", "--data", "{data}", "--threads", "-1"),
            "threads must be at least 0 (all cores), not -1",
        ),
        (
            ("benchmark", "{bundle}", "--batch", "1,x"),
            "batch '1,x' must be numbers of at least 1, such as 1,8,32",
        ),
        (
            ("benchmark", "{bundle}", "--batch", "64", "--backend", "onnxruntime"),
            "batch 64 is outside the bundle's profile 1:8:32",
        ),
        (
            ("benchmark", "{bundle}", "--cuda-graph", "--backend", "onnxruntime"),
            "CUDA graphs belong to the engine, not to ONNX Runtime",
        ),
    ],
)
def test_bad_usage_is_one_sentence(device: Run, bundle: Path, data: Path, arguments, sentence):
    """Exit code 2."""
    done = device(*(word.format(bundle=bundle, data=data) for word in arguments))
    assert 2 == done.returncode
    assert done.stderr.startswith(f"repvgg-export: {sentence}")
    assert 1 == done.stderr.count("\n")
