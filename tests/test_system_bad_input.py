"""Bad input through the real command: exit code, one or two lines, nothing left behind."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.cli import main
from models.registry import bundled_weights


@pytest.fixture
def refused(command, tmp_path):
    """Run `engine`, require the exit code, one or two lines on stderr, and no trace under OUT.

    Beside it is the report of a failed gate, where the error says so.
    """

    def run(code: int, *arguments: str, out: Path | None = None) -> str:
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        target = out or folder / "bundle"
        process = command("engine", *arguments, "--out", str(target), "--quiet")
        require_refusal(folder, code, process.returncode, process.stdout, process.stderr)
        return process.stderr

    return run


@pytest.fixture
def refused_here(capsys, tmp_path):
    """The same in this process, for what is refused before a graph is made."""

    def run(code: int, *arguments: str, out: Path | None = None) -> str:
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        found = main(["engine", *arguments, "--out", str(out or folder / "bundle"), "--quiet"])
        stdout, stderr = capsys.readouterr()
        require_refusal(folder, code, found, stdout, stderr)
        return stderr

    return run


def require_refusal(folder: Path, code: int, found: int, stdout: str, stderr: str) -> None:
    """What was measured before a gate failed is a result; everything else leaves none."""
    assert code == found, stderr
    if "parity failed" in stderr:
        assert "SQNR dB" in stdout
    assert "" == stdout or 1 == code
    assert 1 <= len(stderr.strip().splitlines()) <= 2, stderr
    assert "Traceback" not in stderr
    told = {"bundle.failed.html", "bundle.failed.json"} if "failed.html" in stderr else set()
    assert told == {path.name for path in folder.iterdir()}
    assert not told or 1 == code


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The bundled A0's tensors."""
    return load_file(bundled_weights("A0").checkpoint)


@pytest.fixture
def images(tmp_path) -> Path:
    """A calibration folder of 20 bundled images."""
    folder = tmp_path / "images"
    source = bundled_weights("A0").calibration_images
    for path in sorted(source.rglob("*.png"))[::6][:20]:
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def test_an_unknown_model_is_refused_with_the_nearest_names(refused):
    """`A9` is not a variant; A0, A1, A2 are near."""
    assert "unknown model 'A9' (nearest: A2, A1, A0; known: A0, A1, " in refused(2, "A9")


def test_an_unknown_precision_is_refused_with_the_nearest_name(refused_here):
    """`int9` is near int8."""
    assert (
        "unknown precision 'int9' (nearest: int8; known: fp32, fp16, bf16, int8, fp8)"
        in refused_here(2, "A0", "--precision", "int9")
    )


def test_an_unknown_target_is_refused_with_the_nearest_name(refused_here):
    """`sm88` is near sm89 and the known ones are listed."""
    assert (
        "unknown target 'sm88' (nearest: sm89; known: sm80, sm86, sm89, sm120, sm121)"
        in refused_here(2, "A0", "--target", "sm88")
    )


def test_all_complaints_about_a_request_come_together(refused_here):
    """One message names the model, the precision and the batch."""
    message = refused_here(2, "Z9", "--precision", "int4", "--batch", "8:1:2")
    for part in ("'Z9'", "'int4'", "8:1:2"):
        assert part in message


def test_a_variant_without_bundled_weights_needs_weights(refused_here):
    """B1 alone is refused, with the way to pass weights."""
    message = refused_here(2, "B1")
    assert "no weights are bundled for B1" in message
    assert "--weights path" in message
    assert "--weights hub (timm/repvgg_b1.rvgg_in1k)" in message


def test_hub_weights_offline_exit_3_and_name_the_file_to_fetch(refused):
    """Without a network the message says which file of which repository is needed."""
    message = refused(3, "A0", "--weights", "hub")
    assert "model.safetensors" in message
    assert "timm/repvgg_a0.rvgg_in1k" in message


def test_a_missing_checkpoint_is_refused(refused_here, tmp_path):
    """The path is named."""
    assert "missing.pth does not exist" in refused_here(
        2, "A0", "--weights", str(tmp_path / "missing.pth")
    )


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_truncated_checkpoint_is_refused(refused_here, tmp_path, weights, suffix):
    """Half a file is not a checkpoint, in either format."""
    path = tmp_path / f"half.{suffix}"
    if suffix == "pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    os.truncate(path, path.stat().st_size // 2)
    message = refused_here(2, "A0", "--weights", str(path))
    assert path.name in message
    assert "truncated" in message


def test_a_file_that_is_no_checkpoint_is_refused(refused_here, tmp_path):
    """A text file is named and refused."""
    path = tmp_path / "notes.pth"
    path.write_text("these are not weights\n" * 100)
    assert "notes.pth" in refused_here(2, "A0", "--weights", str(path))


def test_a_checkpoint_of_another_variant_is_named_for_what_it_fits(refused_here):
    """A0's weights under A1 say that they fit A0."""
    path = str(bundled_weights("A0").checkpoint)
    assert "its shapes fit A0; export it as A0" in refused_here(2, "A1", "--weights", path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(refused_here, tmp_path, weights, value):
    """The tensor that holds NaN or Inf is named."""
    name = "stage2.1.rbr_dense.conv.weight"
    broken = weights[name].clone()
    broken[0, 0, 0, 0] = value
    save_file({**weights, name: broken}, tmp_path / "broken.safetensors")
    assert name in refused_here(2, "A0", "--weights", str(tmp_path / "broken.safetensors"))


class _Touch:
    """A pickle payload that would create a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_is_refused_and_not_executed(refused, tmp_path):
    """The payload's file never appears."""
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"state_dict": _Touch(touched)}))
    message = refused(2, "A0", "--weights", str(path))
    assert (
        f"checkpoint {path} is damaged, truncated or not a file of weights; refused and not "
        "executed, save model.state_dict() as safetensors instead"
    ) in message
    assert not touched.exists()


def test_missing_and_empty_calibration_folders_are_refused(refused_here, tmp_path):
    """Random data never takes their place."""
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused_here(2, "A0", "--calib", str(tmp_path / "nowhere"))
    assert "holds no image" in refused_here(2, "A0", "--calib", str(tmp_path / "empty"))


def test_int8_of_own_weights_without_calibration_images_is_refused(refused_here):
    """The bundled images are not taken for another network's data."""
    path = str(bundled_weights("A0").checkpoint)
    assert "--calib folder" in refused_here(2, "A0", "--weights", path)


def test_a_corrupt_calibration_image_is_named(refused, images):
    """The file's name and the way to leave it out are in the message."""
    victim = sorted(images.rglob("*.png"))[3]
    victim.write_bytes(victim.read_bytes()[:60])
    message = refused(2, "A0", "--calib", str(images))
    assert victim.name in message
    assert "--skip-bad-images" in message


def test_skip_bad_images_counts_them_instead(command, images, tmp_path):
    """With the flag the export succeeds and the manifest counts what was left out."""
    import json

    for victim in sorted(images.rglob("*.png"))[3:5]:
        victim.write_bytes(victim.read_bytes()[:60])
    out = tmp_path / "bundle"
    process = command(
        "engine", "A0", "--calib", str(images), "--skip-bad-images", "--out", str(out), "--quiet",
        "--recipe", "minmax", "--image-size", "32", "--evaluation-images", "16", "--target", "orin",
        "--min-sqnr", "1", "--min-agreement", "0",
    )  # fmt: skip
    assert 0 == process.returncode, process.stderr
    calibration = json.loads((out / "manifest.json").read_text())["calibration"]
    assert (18, 2) == (calibration["images"], calibration["skipped"])


def test_an_out_that_cannot_be_written_is_refused(refused_here, tmp_path):
    """OUT below a file is no folder, whoever runs the command."""
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused_here(2, "A0", out=tmp_path / "file" / "bundle")


def test_an_out_that_holds_something_else_is_left_alone(refused_here, tmp_path):
    """A folder with foreign files is neither replaced nor touched."""
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert "is no bundle" in refused_here(2, "A0", out=precious.parent)
    assert "years of work" == precious.read_text()


def test_too_few_or_identical_calibration_images_are_refused(refused_here, tmp_path, images):
    """Scales of seven pictures, or of one picture twenty times, are no scales."""
    paths = sorted(images.rglob("*.png"))
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(20):
        shutil.copy(paths[0], copies / f"{number}.png")
    message = refused_here(2, "A0", "--calib", str(copies))
    assert "all 20 calibration images are one and the same: pass different ones" in message
    for path in paths[7:]:
        path.unlink()
    message = refused_here(2, "A0", "--calib", str(images))
    assert "only 7 of 7 calibration images are usable" in message


def test_a_failed_gate_exits_1_and_publishes_nothing(refused):
    """An SQNR that INT8 cannot reach ends the run with the measured figure."""
    message = refused(
        1, "A0", "--min-agreement", "1", "--recipe", "entropy", "--calib-images", "32",
        "--evaluation-images", "64", "--target", "orin",
    )  # fmt: skip
    assert "parity failed at stage int8: SQNR is" in message
    assert "--min-sqnr keeps the most sensitive layers in half; nothing was published" in message


def test_half_overflow_is_detected_and_reported_with_the_layer(refused, tmp_path, weights):
    """A network whose activations leave half's range is refused at fp16 by layer."""
    scaled = {
        name: tensor.float() * (1e5 if name.startswith("stage2.1.") and "bn." in name
                                and name.endswith(("weight", "bias")) else 1)
        for name, tensor in weights.items()
    }  # fmt: skip
    save_file(scaled, tmp_path / "large.safetensors")
    message = refused(
        1, "A0", "--precision", "fp16", "--weights", str(tmp_path / "large.safetensors"),
        "--image-size", "32", "--evaluation-images", "16", "--target", "orin",
    )  # fmt: skip
    assert "half overflow in stage2.1" in message


@pytest.mark.parametrize("stage", ["reparameterize", "engine"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_130_and_leaves_nothing(tmp_path, stage, number):
    """Ctrl-C and SIGTERM end the run at once, the builder's process included."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "exporter",
            "engine",
            "A0",
            "--precision",
            "fp16",
            "--image-size",
            "32",
            "--evaluation-images",
            "16",
            "--out",
            str(tmp_path / "o" / "b"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            break
    time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert 130 == process.returncode, errors
    assert "interrupted; nothing was published" in errors
    assert "Traceback" not in errors
    assert "publish" not in errors.replace("nothing was published", "")
    assert [] == psutil.wait_procs(started, timeout=10)[1]
    assert [] == list(tmp_path.iterdir())
