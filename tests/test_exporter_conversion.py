"""Conversion: names change and numbers do not; fusing goes one way; nothing is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.conversion import convert
from exporter.errors import InputError
from models.checkpoint import load_checkpoint
from models.dialects import Dialect, from_ours
from models.fusion import fuse_block
from models.registry import bundled_weights
from models.repvgg import QAREPVGG, REPVGG, BlockStyle, RepVGG, RepVGGBlock, mobileone
from models.variants import VARIANTS, Squeeze, Variant

A0 = bundled_weights("A0").checkpoint
State = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights() -> State:
    """The bundled A0's tensors, some half, some float32."""
    return load_file(A0)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Path:
    """The bundled A0 in deploy form and official names."""
    path = tmp_path_factory.mktemp("deploy") / "a0.safetensors"
    convert(A0, path, form="deploy")
    return path


def assert_same(expected: State, actual: State) -> None:
    """The same names, and for each the same type and bits."""
    assert sorted(expected) == sorted(actual)
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype
        assert torch.equal(tensor, actual[name])


def network(style: BlockStyle = REPVGG) -> RepVGG:
    torch.manual_seed(0)
    module = RepVGG(VARIANTS["A0"], num_classes=3, style=style)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.running_var, 0.5, 2.0)
            nn.init.normal_(child.running_mean, std=0.1)
    return module.eval()


def test_a_train_form_round_trip_is_exact(tmp_path, weights):
    """Official -> timm -> official gives every tensor back, data types included."""
    there = convert(A0, tmp_path / "timm.safetensors", to="timm")
    assert ("official", "train", "timm", "train") == (
        there.source_format, there.source_form, there.format, there.form,
    )  # fmt: skip
    renamed = load_file(tmp_path / "timm.safetensors")
    assert {"stem", "stages", "head"} == {name.partition(".")[0] for name in renamed}
    convert(tmp_path / "timm.safetensors", tmp_path / "back.safetensors")
    assert_same(weights, load_file(tmp_path / "back.safetensors"))


def test_a_deploy_form_round_trip_is_exact(tmp_path, deployed):
    """The same for fused kernels, and the files are equal byte for byte."""
    convert(deployed, tmp_path / "timm.safetensors", to="timm")
    convert(tmp_path / "timm.safetensors", tmp_path / "back.safetensors")
    assert deployed.read_bytes() == (tmp_path / "back.safetensors").read_bytes()


def test_counters_travel_with_their_block(tmp_path):
    """`num_batches_tracked` keeps its value under the other name."""
    state = network().state_dict()
    state["stage1.0.rbr_dense.bn.num_batches_tracked"] = torch.tensor(77)
    torch.save({"model": state}, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "timm.safetensors", to="timm")
    renamed = load_file(tmp_path / "timm.safetensors")
    assert 77 == renamed["stages.0.0.conv_kxk.bn.num_batches_tracked"]
    assert len(state) == len(renamed)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_random_numbers_survive_every_rename(tmp_path_factory, data):
    """For any data type and any of the two names there and back is the identity."""
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    deploy = data.draw(st.booleans())
    via = data.draw(st.sampled_from(["official", "timm"]))
    folder = tmp_path_factory.mktemp("r")
    with torch.device("meta"):
        shapes = RepVGG(VARIANTS["A0"], num_classes=2, deploy=deploy).state_dict()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    state = {
        name: torch.rand(tensor.shape, generator=generator).to(dtype)
        for name, tensor in shapes.items()
        if tensor.is_floating_point()
    }
    save_file(state, folder / "a.safetensors")
    convert(folder / "a.safetensors", folder / "b.safetensors", to=via)
    convert(folder / "b.safetensors", folder / "c.safetensors")
    assert_same(state, load_file(folder / "c.safetensors"))


def test_fusing_is_float64_rounded_once(deployed):
    """Each kernel and bias is the float64 one, rounded to float32."""
    original = load_checkpoint(A0).module
    fused = load_file(deployed)
    blocks = {n: m for n, m in original.named_modules() if isinstance(m, RepVGGBlock)}
    assert {f"{n}.rbr_reparam.{p}" for n in blocks for p in ("weight", "bias")} | {
        "linear.weight",
        "linear.bias",
    } == set(fused)
    for name, block in blocks.items():
        kernel, bias = fuse_block(block)
        assert torch.equal(kernel.float(), fused[f"{name}.rbr_reparam.weight"])
        assert torch.equal(bias.float(), fused[f"{name}.rbr_reparam.bias"])


def test_a_float64_checkpoint_is_fused_without_rounding(tmp_path):
    """float64 in, float64 out."""
    module = network().double()
    torch.save(module.state_dict(), tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "d.safetensors", form="deploy")
    kernel, _ = fuse_block(module.stage0)
    written = load_file(tmp_path / "d.safetensors")["stage0.rbr_reparam.weight"]
    assert torch.equal(kernel, written)


@torch.no_grad()
@pytest.mark.parametrize("to", ["official", "timm"])
@pytest.mark.parametrize(
    ("style", "dialect"),
    [
        (REPVGG, Dialect.TIMM),
        (QAREPVGG, Dialect.OFFICIAL),
        (mobileone(2, skip=True), Dialect.MOBILEONE),
    ],
    ids=["timm", "qarepvgg", "mobileone"],
)
def test_every_source_can_be_written_in_deploy_form(tmp_path, style, dialect, to):
    """The written network computes what the source computes, within the export's own gate."""
    source = network(style)
    state = source.state_dict()
    names = from_ours(dialect, state)
    torch.save({names[name]: tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    done = convert(tmp_path / "w.pth", tmp_path / "d.safetensors", to=to, form="deploy")
    loaded = load_checkpoint(tmp_path / "d.safetensors")
    assert (to, "deploy", "A0") == (loaded.format, loaded.form, done.variant)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = source(x)
    limit = 1e-4 * float(expected.max() - expected.min())
    assert float((loaded.module(x) - expected).abs().max()) <= limit


TINY_PLUS = Variant(
    name="tiny",
    num_blocks=(1, 2, 4, 1),
    width_multiplier=(0.125, 0.125, 0.0625, 0.03125),
    squeeze=Squeeze.AFTER_RELU,
    squeeze_reduction=4,
)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_l2pse_is_written_in_repvggplus_names(tmp_path, monkeypatch, form):
    """From our names, and there and back; heads stay in train form and are dropped in deploy."""
    monkeypatch.setattr("models.fitting.VARIANTS", {"tiny": TINY_PLUS})
    state = RepVGG(TINY_PLUS, num_classes=3).state_dict()
    torch.save(state, tmp_path / "ours.pth")
    first = convert(tmp_path / "ours.pth", tmp_path / "plus.safetensors")
    assert ("exporter", "plus") == (first.source_format, first.format)
    written = load_file(tmp_path / "plus.safetensors")
    assert "stage3_second.blocks.1.post_se.down.weight" in written
    save_file({**written, "stage1_aux.3.bias": torch.ones(3)}, tmp_path / "aux.safetensors")
    done = convert(tmp_path / "aux.safetensors", tmp_path / "o.safetensors", form=form)
    last = load_file(tmp_path / "o.safetensors")
    assert ("plus", form) == (done.format, done.form)
    assert ("stage1_aux.3.bias" in last, done.dropped) == (
        (True, ()) if form == "train" else (False, ("stage1_aux",))
    )
    if form == "train":
        del last["stage1_aux.3.bias"]
        assert_same(written, last)


def test_l2pse_has_no_timm_names(tmp_path):
    """timm has no gate behind the ReLU; nothing is written."""
    with torch.device("meta"):
        state = RepVGG(VARIANTS["L2pse"], num_classes=3).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match="timm has no L2pse"):
        convert(tmp_path / "w.pth", tmp_path / "o.safetensors", to="timm")
    assert not (tmp_path / "o.safetensors").exists()


def test_a_backbone_stays_one(tmp_path, weights):
    """Without a classifier there is none afterwards, renamed or fused."""
    save_file(
        {n: t for n, t in weights.items() if not n.startswith("linear.")},
        tmp_path / "w.safetensors",
    )
    for form in ("train", "deploy"):
        out = tmp_path / f"{form}.safetensors"
        convert(tmp_path / "w.safetensors", out, to="timm", form=form)
        assert not any(name.startswith("head") for name in load_file(out))


def test_views_of_one_storage_are_written_apart(tmp_path, weights):
    """A file whose tensors share memory, or are not contiguous, is written like any other."""
    flat = torch.cat([tensor.float().reshape(-1) for tensor in weights.values()])
    sizes = [tensor.numel() for tensor in weights.values()]
    views = [
        part.view(tensor.shape)
        for part, tensor in zip(flat.split(sizes), weights.values(), strict=True)
    ]
    state = dict(zip(weights, views, strict=True))
    kernel = "stage1.1.rbr_dense.conv.weight"
    state[kernel] = state[kernel].contiguous(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "o.safetensors")
    assert_same(state, load_file(tmp_path / "o.safetensors"))


def test_the_result_says_that_it_is_of_torch(tmp_path, deployed):
    """Readers of safetensors look for this entry."""
    with safe_open(deployed, "pt") as file:
        assert {"format": "pt"} == file.metadata()


# --- what is impossible ------------------------------------------------------------------------


def test_deploy_form_is_not_taken_apart(tmp_path, deployed):
    """There is no way back to branches."""
    with pytest.raises(InputError, match="is in deploy form: a fused kernel cannot be taken apart"):
        convert(deployed, tmp_path / "t.safetensors", form="train")
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["official", "timm"])
def test_blocks_without_a_name_there_are_refused(tmp_path, to):
    """QARepVGG's train form exists neither in the official code nor in timm."""
    torch.save(network(QAREPVGG).state_dict(), tmp_path / "w.pth")
    message = f"has qarepvgg blocks, for which {to} has no train form; add --form deploy"
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "w.pth", tmp_path / "t.safetensors", to=to)


def test_what_is_no_repvgg_is_refused(tmp_path, weights):
    """Unknown networks, near misses, values that are not finite."""
    broken = {**weights, "linear.bias": torch.full((10,), float("nan"))}
    near = {n: t for n, t in weights.items() if n != "stage0.rbr_1x1.bn.bias"}
    for state, message in (
        ({"x": torch.ones(1)}, "fits no RepVGG variant"),
        (near, "fits A0 but for 1 key: stage0.rbr_1x1.bn.bias is missing"),
        (broken, "has 10 NaN or Inf values, first in linear.bias"),
    ):
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "w.safetensors", tmp_path / "o.safetensors")
    assert ["w.safetensors"] == [path.name for path in tmp_path.iterdir()]


def test_a_fused_kernel_beyond_float32_is_refused(tmp_path):
    """Fusing may overflow where the branches did not; the block is named."""
    state = network().state_dict()
    for part in ("conv.weight", "bn.weight"):
        state[f"stage2.1.rbr_dense.{part}"] = torch.full_like(
            state[f"stage2.1.rbr_dense.{part}"], 1e30
        )
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"stage2\.1.*not finite"):
        convert(tmp_path / "w.pth", tmp_path / "o.safetensors", form="deploy")


# --- where it is written -----------------------------------------------------------------------


def test_a_file_is_replaced_only_by_force(tmp_path, deployed):
    """What was there stays as it was, until --force."""
    out = tmp_path / "o.safetensors"
    out.write_text("precious")
    with pytest.raises(InputError, match="exists; name another file or add --force"):
        convert(deployed, out)
    assert "precious" == out.read_text()
    convert(deployed, out, force=True)
    assert deployed.read_bytes() == out.read_bytes()


def test_a_file_may_be_converted_in_place(tmp_path, deployed):
    """With --force the source itself can be the destination."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(deployed.read_bytes())
    convert(path, path, to="timm", force=True)
    assert "timm" == load_checkpoint(path).format


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("o.pth", "must end in .safetensors"),
        ("folder.safetensors", "is a folder"),
        ("missing/o.safetensors", "cannot be written: No such file or directory"),
    ],
)
def test_places_that_cannot_be_written_are_refused(tmp_path, deployed, name, message):
    """With the reason, and nothing is left behind."""
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match=message):
        convert(deployed, tmp_path / name, force=True)
    assert ["folder.safetensors"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize("option", [{"to": "keras"}, {"form": "frozen"}])
def test_unknown_choices_are_refused_with_the_known_ones(tmp_path, deployed, option):
    """Names and form are closed lists."""
    with pytest.raises(InputError, match=r"unknown (names|form) '\w+' \(known: "):
        convert(deployed, tmp_path / "o.safetensors", **option)


def test_a_failure_while_writing_leaves_nothing(tmp_path, deployed, monkeypatch):
    """The staging file goes, the old file stays."""
    out = tmp_path / "o.safetensors"
    out.write_text("precious")

    def fail(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("exporter.conversion.os.fsync", fail)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        convert(deployed, out, force=True)
    assert ([out], "precious") == (list(tmp_path.iterdir()), out.read_text())
