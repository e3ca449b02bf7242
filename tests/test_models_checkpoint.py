"""Checkpoints: every dialect and wrapping gives the source network, every bad file one sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from models.checkpoint import (
    CheckpointError,
    LoadedCheckpoint,
    load_checkpoint,
    read_checkpoint_file,
)
from models.fusion import reparameterize
from models.repvgg import RepVGG
from models.variants import VARIANTS, Variant

# Shaped like A0 and a few kilobytes large.
TINY = Variant(
    name="tiny", num_blocks=(2, 1, 2, 1), width_multiplier=(0.0625, 0.0625, 0.03125, 0.015625)
)
CLASSES = 3
State = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def network(variant: Variant = TINY, seed: int = 0) -> RepVGG:
    """A network in eval mode whose statistics are not the initial ones."""
    torch.manual_seed(seed)
    module = RepVGG(variant, num_classes=CLASSES)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.weight, mean=1.0, std=0.3)
            nn.init.normal_(child.bias)
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.running_var, 0.5, 2.0)
    return module.eval()


def state_of(form: str, seed: int = 0) -> State:
    module = network(seed=seed)
    return dict((module if form == "train" else reparameterize(module)).state_dict())


def timm_state(form: str, variant: Variant = TINY, seed: int = 0) -> tuple[State, RepVGG]:
    """A state in timm's layout, built block by block, and the network it was taken from."""
    source = network(variant, seed)
    module = source if form == "train" else reparameterize(source)
    modules = {"stem": module.stage0}
    for stage in range(4):
        for index, block in enumerate(getattr(module, f"stage{stage + 1}")):
            modules[f"stages.{stage}.{index}"] = block
    branches = {
        "conv_kxk": "rbr_dense",
        "conv_1x1": "rbr_1x1",
        "identity": "rbr_identity",
        "reparam_conv": "rbr_reparam",
    }
    state: State = {}
    for place, block in modules.items():
        for theirs, ours in branches.items():
            branch = getattr(block, ours, None)
            if branch is not None:
                state |= {f"{place}.{theirs}.{key}": t for key, t in branch.state_dict().items()}
    state |= {f"head.fc.{key}": tensor for key, tensor in module.linear.state_dict().items()}
    return state, source


def written(path: Path, state: object) -> Path:
    """``state`` as the file's suffix says."""
    if path.suffix == ".safetensors":
        assert isinstance(state, dict)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@torch.no_grad()
def assert_computes(source: nn.Module, loaded: LoadedCheckpoint, tolerance: float = 1e-5) -> None:
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded.module(x), source(x), rtol=tolerance, atol=tolerance)


def refusal(path: Path, expected: Variant | None = TINY) -> str:
    """The message of the refusal, which names the file and fits on one line."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, expected)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path}")
    assert "\n" not in message
    return message.removeprefix(f"checkpoint {path}").strip(": ")


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_official_checkpoints_round_trip(tmp_path, form, suffix):
    """Both forms in both containers give the network they were saved from."""
    loaded = load_checkpoint(written(tmp_path / f"w{suffix}", state_of(form)), TINY)
    found = (loaded.format, loaded.form, loaded.variant, loaded.num_classes)
    assert ("official", form, TINY, CLASSES) == found
    assert not any(child.training for child in loaded.module.modules())
    assert_computes(network(), loaded)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_timm_checkpoints_round_trip(tmp_path, form, suffix):
    """timm's names mean the same network: stem, stages from 0, head.fc."""
    state, source = timm_state(form)
    assert {"stem", "stages", "head"} == {name.partition(".")[0] for name in state}
    loaded = load_checkpoint(written(tmp_path / f"w{suffix}", state), TINY)
    assert ("timm", form, CLASSES) == (loaded.format, loaded.form, loaded.num_classes)
    assert_computes(source, loaded)


WRAPPERS: dict[str, Callable[[State], object]] = {
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "arch": "RepVGG"},
    "model": lambda s: {"model": s},
    "model_state_dict": lambda s: {"model_state_dict": OrderedDict(s)},
    "ema": lambda s: {"ema": s, "optimizer": {"lr": 0.1}},
    "nested": lambda s: {"model": {"state_dict": s}},
    "nested the other way": lambda s: {"state_dict": {"model": s}},
    "module.": lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
    "module._orig_mod.": lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    "_orig_mod.module.": lambda s: {f"_orig_mod.module.{n}": t for n, t in s.items()},
    "wrapped and prefixed": lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}},
    "with other entries": lambda s: {**s, "version": "1.0"},
    "parameters": lambda s: {n: nn.Parameter(t, requires_grad=False) for n, t in s.items()},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("dialect", ["official", "timm"])
def test_wrappers_and_prefixes_are_removed(tmp_path, dialect, wrap):
    """What training scripts put around the state does not matter."""
    state = state_of("deploy") if dialect == "official" else timm_state("deploy")[0]
    loaded = load_checkpoint(written(tmp_path / "w.pth", wrap(state)), TINY)
    assert dialect == loaded.format
    assert_computes(network(), loaded)


def test_a_safetensors_prefix_is_removed(tmp_path):
    """`module.` goes from safetensors names too."""
    state = {f"module.{name}": tensor for name, tensor in state_of("train").items()}
    loaded = load_checkpoint(written(tmp_path / "w.safetensors", state), TINY)
    assert_computes(network(), loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_precisions_are_read_as_float32(tmp_path, dtype, suffix):
    """Half, bfloat16 and double files give the float32 network of the rounded weights."""
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state_of("train").items()}
    loaded = load_checkpoint(written(tmp_path / f"w{suffix}", state), TINY)
    source = network()
    source.load_state_dict(state)
    assert {torch.float32} == {p.dtype for p in loaded.module.parameters()}
    assert_computes(source, loaded, tolerance=0)


@pytest.mark.parametrize("keep", [True, False])
def test_batch_counters_may_be_there_or_not(tmp_path, keep):
    """`num_batches_tracked`, which inference does not use, is optional."""
    state = state_of("train")
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert counters
    state = {n: t for n, t in state.items() if keep or n not in counters}
    assert_computes(network(), load_checkpoint(written(tmp_path / "w.pth", state), TINY))


def test_the_content_decides_and_not_the_suffix(tmp_path):
    """A torch file named .safetensors and the reverse are read as what they are."""
    torch.save(state_of("train"), tmp_path / "torch.safetensors")
    (tmp_path / "safe.pth").write_bytes(save(state_of("train")))
    torch.save(state_of("train"), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("torch.safetensors", "safe.pth", "old.bin"):
        assert_computes(network(), load_checkpoint(tmp_path / name, TINY))


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 3])
def test_another_pickle_protocol_is_read_in_silence(tmp_path, protocol, is_zip):
    """A file that torch wrote with another pickle protocol loads without its warning."""
    path = tmp_path / "w.pth"
    torch.save(
        state_of("train"),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=is_zip,
    )
    assert_computes(network(), load_checkpoint(path, TINY))


def test_tensors_are_read_bit_for_bit(tmp_path):
    """Names and values come back as they were saved, nothing else with them."""
    state = state_of("train")
    path = written(tmp_path / "w.pth", {"state_dict": state, "epoch": 1})
    read = read_checkpoint_file(path).tensors
    assert list(state) == list(read)
    assert all(torch.equal(tensor, read[name]) for name, tensor in state.items())


@pytest.fixture(scope="module")
def a0(tmp_path_factory) -> tuple[Path, RepVGG]:
    """A full-size A0 in timm's names, half precision, and its source."""
    state, source = timm_state("train", VARIANTS["A0"])
    path = tmp_path_factory.mktemp("a0") / "a0.safetensors"
    halves = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    return written(path, halves), source


def test_variant_and_classes_are_inferred(a0):
    """Without an expected variant the shapes alone say A0 and the number of classes."""
    path, source = a0
    loaded = load_checkpoint(path)
    assert (VARIANTS["A0"], CLASSES, "train") == (loaded.variant, loaded.num_classes, loaded.form)
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter.half().float(), loaded.module.get_parameter(name))


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_told_from_its_shapes(tmp_path, name, form):
    """Each of the 15 is recognized in both forms; no two are confused."""
    with torch.device("meta"):
        state = RepVGG(VARIANTS[name], num_classes=2, deploy=form == "deploy").state_dict()
    torch.save(state, tmp_path / "w.pth")  # names and shapes only: tensors on meta have no data
    other = "B3" if name != "B3" else "A0"
    assert f"is not RepVGG-{other}: its shapes fit {name}; export it as {name}" == refusal(
        tmp_path / "w.pth", VARIANTS[other]
    )


# --- another network --------------------------------------------------------------------------


def test_another_variant_is_named(a0):
    """A0's file under B1g4 says what it is and how to use it."""
    path, _ = a0
    message = "is not RepVGG-B1g4: its shapes fit A0; export it as A0"
    assert message == refusal(path, VARIANTS["B1g4"])


def test_a_checkpoint_that_fits_none_names_the_first_difference(tmp_path):
    """The message counts the differences and shows one, against the nearest variant."""
    path = written(tmp_path / "w.pth", {"conv1.weight": torch.ones(2, 2)})
    assert re.fullmatch(
        r"fits no RepVGG variant; tensors that differ from A\d in train form: \d+, the first: "
        r"stage0\.rbr_dense\.conv\.weight is missing",
        refusal(path, None),
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("stage2.0.rbr_1x1.bn.bias"), "stage2.0.rbr_1x1.bn.bias is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra is not expected"),
        (
            lambda s: s.update({"stage0.rbr_dense.conv.weight": torch.ones(4, 3, 5, 5)}),
            "stage0.rbr_dense.conv.weight is [4, 3, 5, 5], not [4, 3, 3, 3]",
        ),
        (
            lambda s: s.update({"stage1.0.rbr_dense.bn.weight": torch.tensor(1.0)}),
            "stage1.0.rbr_dense.bn.weight is [], not [4]",
        ),
        (
            lambda s: s.update({"stage0.rbr_reparam.bias": torch.ones(4)}),
            None,
        ),
    ],
)
def test_one_wrong_tensor_is_named(tmp_path, change, complaint):
    """A missing, unknown or misshapen tensor is told by name, with both shapes."""
    state = state_of("train")
    change(state)
    message = refusal(written(tmp_path / "w.pth", state))
    assert message.startswith("is not RepVGG-tiny and fits no other variant; ")
    if complaint is not None:
        assert message.endswith(f"differ from tiny in train form: 1, the first: {complaint}")


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.ones(CLASSES, 9), torch.ones(CLASSES)),
        (torch.ones(CLASSES, 8), torch.ones(CLASSES + 1)),
        (torch.ones(CLASSES, 8, 1, 1), torch.ones(CLASSES)),
        (torch.ones(8), torch.ones(8)),
        (torch.ones(CLASSES, 8), torch.tensor(1.0)),
        (torch.ones(0, 8), torch.ones(0)),
    ],
    ids=["width", "bias", "rank 4", "rank 1", "scalar bias", "no classes"],
)
def test_a_classifier_of_another_shape_is_refused(tmp_path, weight, bias):
    """Found and wanted shapes of the classifier are in the message."""
    state = {**state_of("train"), "linear.weight": weight, "linear.bias": bias}
    expected = (
        f"has a classifier that does not fit RepVGG-tiny: weight {list(weight.shape)} "
        f"and bias {list(bias.shape)}, not [classes, 8] and [classes]"
    )
    assert expected == refusal(written(tmp_path / "w.pth", state))


@pytest.mark.parametrize(
    "missing", [["linear.weight"], ["linear.bias"], ["linear.weight", "linear.bias"]]
)
def test_a_network_without_its_classifier_is_refused(tmp_path, missing):
    """A backbone alone is told for what it is."""
    state = {n: t for n, t in state_of("train").items() if n not in missing}
    assert refusal(written(tmp_path / "w.pth", state)) == (
        "is a RepVGG-tiny without a classifier (linear.weight and linear.bias); "
        "save the whole network"
    )


# --- wrong values -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    """NaN and Inf are counted and their tensor is named."""
    state = state_of("train")
    name = "stage3.1.rbr_identity.running_mean"
    state[name] = state[name].clone().to(dtype)
    state[name][:2] = value
    message = refusal(written(tmp_path / "w.safetensors", state))
    assert f"has 2 NaN or Inf values, first in {name}" == message


def test_values_beyond_float32_are_refused(tmp_path):
    """A double that float32 cannot hold is as bad as Inf."""
    state = {**state_of("train"), "linear.bias": torch.tensor([1e300, 0, 0], dtype=torch.float64)}
    message = refusal(written(tmp_path / "w.pth", state))
    assert message == "has 1 NaN or Inf values, first in linear.bias"


def test_a_negative_variance_is_refused(tmp_path):
    """A variance below zero, which has no square root, is named."""
    state = state_of("train")
    state["stage1.0.rbr_1x1.bn.running_var"] = torch.tensor([1.0, 1.0, -1e-3, 1.0])
    message = refusal(written(tmp_path / "w.pth", state))
    assert message == "has a negative variance in stage1.0.rbr_1x1.bn.running_var"


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(CLASSES, dtype=torch.int64), "int64 strided on cpu"),
        (torch.ones(CLASSES, dtype=torch.int8), "int8 strided on cpu"),
        (torch.ones(CLASSES, dtype=torch.bool), "bool strided on cpu"),
        (torch.ones(CLASSES, dtype=torch.complex64), "complex64 strided on cpu"),
        (torch.ones(CLASSES).to(torch.float8_e4m3fn), "float8_e4m3fn strided on cpu"),
        (torch.ones(CLASSES).to_sparse(), "float32 sparse_coo on cpu"),
        (torch.empty(CLASSES, device="meta"), "float32 strided on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_of_another_kind_are_refused(tmp_path, tensor, kind):
    """Integers and other kinds are not silently turned into weights."""
    message = refusal(written(tmp_path / "w.pth", {**state_of("train"), "linear.bias": tensor}))
    assert message == (
        f"linear.bias is {kind}; weights must be dense tensors of float16, bfloat16, float32 "
        "or float64"
    )


# --- no checkpoint ----------------------------------------------------------------------------


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    """Neither is opened."""
    assert refusal(tmp_path / "missing.pth") == "does not exist"
    assert refusal(tmp_path / "missing" / "w.safetensors") == "does not exist"
    assert refusal(tmp_path) == "is a folder, not a file"


def test_a_path_that_the_system_refuses_is_refused(tmp_path):
    """The system's own words follow the path, or it does not exist."""
    assert refusal(tmp_path / ("n" * 300)) in (
        f"cannot be read ({os.strerror(36)})",
        "does not exist",
    )
    os.mkfifo(tmp_path / "pipe.pth")
    assert refusal(tmp_path / "pipe.pth") == "is not a regular file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path):
    """The system's own words follow the path."""
    path = written(tmp_path / "w.pth", state_of("train"))
    path.chmod(0)
    assert refusal(path) == "cannot be read (Permission denied)"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_an_empty_file_is_refused(tmp_path, suffix):
    """Nothing in it, whatever its name."""
    path = tmp_path / f"w{suffix}"
    path.touch()
    assert refusal(path) == "is empty"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"these are not weights\n" * 50,
        b'{"a": 1}',
        bytes(range(256)) * 20,
        b"\x80",
        b"PK\3\4",
    ],
    ids=["one byte", "text", "json", "bytes", "pickle start", "zip start"],
)
def test_files_of_another_kind_are_refused(tmp_path, content, suffix):
    """Text and random bytes are called what they are not."""
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith("is damaged, truncated or not a ")


SMALL = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3).half(), "n": torch.tensor(3)}


def torch_bytes(content: object, *, is_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


CONTAINERS = {
    "safetensors": save(SMALL),
    "zip": torch_bytes(SMALL, is_zip=True),
    "legacy": torch_bytes(SMALL, is_zip=False),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "w"


fuzz = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path, container, share):
    """A file cut anywhere is called damaged or truncated, under either suffix."""
    content = CONTAINERS[container]
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content[: int(len(content) * share)])
        assert re.search("is damaged, truncated or not a |, or damaged; refused", refusal(path))


@pytest.mark.parametrize("container", CONTAINERS)
@fuzz
@given(data=st.data())
def test_cut_files_raise_nothing_else(scratch, container, data):
    """Every length short of the whole raises CheckpointError."""
    content = CONTAINERS[container]
    scratch.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError):
        read_checkpoint_file(scratch)


@pytest.mark.parametrize("container", CONTAINERS)
@fuzz
@given(data=st.data())
def test_flipped_bits_raise_nothing_else(scratch, container, data):
    """A damaged file loads (the flip lay in the numbers) or raises CheckpointError."""
    content = bytearray(CONTAINERS[container])
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(content)
    try:
        load_checkpoint(scratch)
    except CheckpointError as error:
        assert str(scratch) in str(error)  # noqa: PT017


@fuzz
@given(content=st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(scratch, content):
    """No bytes are a checkpoint of a RepVGG by chance, and none break the reader."""
    scratch.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(scratch)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A gigabyte of zeros that deflate to a megabyte: what torch.save writes is not compressed."""
    torch.save({"a": torch.ones(3)}, tmp_path / "right.pth")
    path = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(tmp_path / "right.pth") as right,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for name in right.namelist():
            bomb.writestr(name, bytes(200 << 20) if name.endswith("data/0") else right.read(name))
    assert path.stat().st_size < 2**20
    assert refusal(path).startswith("would unpack to 0.21 GB out of a file of ")


def test_one_number_that_is_said_to_be_many_is_refused(tmp_path):
    """A tensor of stride 0 declares 4 TB in a file of a kilobyte; copying it would need them."""
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "w.pth")
    assert refusal(tmp_path / "w.pth").startswith("would unpack to 4.4e+03 GB out of a file of ")


@pytest.mark.parametrize("length", [2**63, 2**40, 2**31, 10**8, 9])
def test_an_absurd_header_length_is_refused_without_reading_it(tmp_path, length):
    """A header that claims to be larger than the file costs no memory."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}      " + bytes(64))
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message.startswith("is damaged, truncated or not a safetensors file (")
    assert peak < 2**24


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**40]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32"},
        7,
    ],
)
def test_a_wrong_safetensors_header_is_refused(tmp_path, entry):
    """Shapes, offsets and types that do not fit the data are damage."""
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert refusal(path).startswith("is damaged, truncated or not a safetensors file (")


# --- unsafe and unsuitable pickles --------------------------------------------------------------


class Runs:
    """A pickle that creates a file when it is loaded without care."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.touched}",))


@pytest.mark.parametrize(
    "wrap", [lambda p: p, lambda p: {"state_dict": p}, lambda p: [1, {"a": p}]]
)
@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 2", "pickle 4", "pickle 0"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pickle_that_would_run_code_is_not_executed(tmp_path, wrap, writer, suffix):
    """The payload's file never appears, however it is packed."""
    touched, path = tmp_path / "touched", tmp_path / f"w{suffix}"
    payload = wrap(Runs(touched))
    if writer.startswith("pickle"):
        path.write_bytes(pickle.dumps(payload, protocol=int(writer[-1])))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=writer == "zip")
    message = refusal(path)
    assert not touched.exists()
    assert re.search("refused and not executed, save |not a safetensors file", message)
    if writer in ("zip", "legacy", "pickle 2"):
        assert message.startswith("is a pickle that would run posix.system, or damaged; ")


def test_the_payload_would_run_without_care(tmp_path):
    """The test above is worth something: plain pickle does run the payload."""
    pickle.loads(pickle.dumps(Runs(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    """`torch.save(model)` needs code to load; the message asks for the state instead."""
    message = refusal(written(tmp_path / "w.pth", network()))
    assert message.startswith("is a pickle that would run models.repvgg.RepVGG, or damaged; ")
    assert message.endswith("save model.state_dict() as safetensors instead")


@pytest.mark.parametrize(
    ("content", "kind"), [([1, 2], "list"), (torch.ones(2), "Tensor"), (3.5, "float")]
)
def test_other_content_is_refused_by_its_type(tmp_path, content, kind):
    """What is no mapping of tensors is named."""
    message = refusal(written(tmp_path / "w.pth", content))
    assert f"holds a {kind}, not named tensors; save model.state_dict()" == message


def test_a_plain_pickled_list_is_refused(tmp_path):
    """A pickle that torch did not write is no file of weights."""
    (tmp_path / "w.pkl").write_bytes(pickle.dumps([1, 2, 3]))
    assert "not a file of weights" in refusal(tmp_path / "w.pkl")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}, {"model": {"lr": 0.1}}])
def test_a_file_without_tensors_is_refused(tmp_path, content):
    """A mapping that holds no tensor is no checkpoint."""
    assert refusal(written(tmp_path / "w.pth", content)) == "holds no tensors"


def test_a_mapping_that_holds_itself_is_refused(tmp_path):
    """A cycle of wrappers ends."""
    cycle: dict[str, object] = {}
    cycle["model"] = cycle
    assert refusal(written(tmp_path / "w.pth", cycle)) == "holds no tensors"
