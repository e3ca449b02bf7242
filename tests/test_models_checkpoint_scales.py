"""Checkpoints with the scales of quantization-aware training beside their weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from models import checkpoint as checkpoints
from models.checkpoint import (
    CheckpointError,
    identify,
    load_checkpoint,
    read_checkpoint_file,
)
from models.repvgg import RepVGG
from models.variants import Variant

TINY = Variant(
    name="tiny", num_blocks=(2, 1, 2, 1), width_multiplier=(0.0625, 0.0625, 0.03125, 0.015625)
)
LAYERS = [layer.name for layer in TINY.layers]
State = dict[str, Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(*, deploy: bool = True) -> State:
    torch.manual_seed(0)
    return dict(RepVGG(TINY, num_classes=3, deploy=deploy).state_dict())


def with_scales(state: State, underscore: str = "_") -> State:
    """Quantizers at every convolution and the classifier, as pytorch-quantization names them."""
    found = dict(state)
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.ndim > 1:
            amax = tensor.flatten(1).abs().amax(dim=1)
            shape = (-1, *[1] * (tensor.ndim - 1))
            found[f"{layer}.{underscore}weight_quantizer._amax"] = amax.reshape(shape)
            found[f"{layer}.{underscore}input_quantizer._amax"] = torch.tensor(6.0219)
    return found


def written(path: Path, state: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def refusal(path: Path) -> str:
    """The message, which `inspect` gives too where the variant is known."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, TINY)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == checkpoints.refusal(identify(read_checkpoint_file(path), TINY))
    return str(caught.value).removeprefix(f"checkpoint {path}").lstrip(": ")


@pytest.mark.parametrize("underscore", ["_", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_scales_are_amax_over_127(tmp_path, underscore, prefix):
    """Both tools' names, under any prefix: one scale an input, one for each output channel."""
    state = state_of()
    named = {f"{prefix}{n}": t for n, t in with_scales(state, underscore).items()}
    loaded = load_checkpoint(written(tmp_path / "qat.safetensors", named), TINY)
    assert loaded.scales is not None
    assert {*LAYERS, "linear"} == set(loaded.scales)
    first = loaded.scales["stage0"]
    assert float(torch.tensor(6.0219) / 127) == first.input_scale
    amax = state["stage0.rbr_reparam.weight"].flatten(1).abs().amax(dim=1)
    assert torch.equal(amax / 127, first.weight_scales)
    assert ("official", "deploy", 3) == (loaded.format, loaded.form, loaded.num_classes)


def test_the_weights_stay_as_they_were_stored(tmp_path):
    """Scales are beside the weights, not in them."""
    state = state_of()
    loaded = load_checkpoint(written(tmp_path / "qat.safetensors", with_scales(state)), TINY)
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_timms_names_are_understood(tmp_path):
    """timm calls the fused convolution reparam_conv and the classifier head.fc."""
    names = {"stage0.rbr_reparam": "stem.reparam_conv", "linear": "head.fc"}
    for layer in LAYERS[1:]:
        stage, index = layer.removeprefix("stage").split(".")
        names[f"{layer}.rbr_reparam"] = f"stages.{int(stage) - 1}.{index}.reparam_conv"
    state = {}
    for name, tensor in with_scales(state_of()).items():
        ours = next(layer for layer in names if name.startswith(f"{layer}."))
        state[f"{names[ours]}{name.removeprefix(ours)}"] = tensor
    loaded = load_checkpoint(written(tmp_path / "timm.safetensors", state), TINY)
    assert ("timm", {*LAYERS, "linear"}) == (loaded.format, set(loaded.scales or ()))


def test_without_quantizers_there_are_no_scales(tmp_path):
    """None, not an empty mapping."""
    assert load_checkpoint(written(tmp_path / "a.safetensors", state_of()), TINY).scales is None


def test_one_range_for_a_weight_is_the_scale_of_each_channel(tmp_path):
    """A scalar amax belongs to all output channels."""
    state = with_scales(state_of())
    state["stage0.rbr_reparam._weight_quantizer._amax"] = torch.tensor(2.54)
    loaded = load_checkpoint(written(tmp_path / "qat.safetensors", state), TINY)
    assert loaded.scales is not None
    expected = torch.full((TINY.stage_widths[0],), 2.54) / 127
    assert torch.equal(expected, loaded.scales["stage0"].weight_scales)


def test_a_quantizer_of_the_pooling_has_a_scale_and_no_weight(tmp_path):
    """pytorch-quantization gives AdaptiveAvgPool2d an input quantizer."""
    state = with_scales(state_of()) | {"gap._input_quantizer._amax": torch.tensor(1.27)}
    loaded = load_checkpoint(written(tmp_path / "qat.safetensors", state), TINY)
    assert loaded.scales is not None
    assert float(torch.tensor(1.27) / 127) == loaded.scales["gap"].input_scale
    assert loaded.scales["gap"].weight_scales is None


def test_a_channel_of_zeros_may_have_the_range_zero(tmp_path):
    """Zeros are exact at any scale; a pruned channel's amax is 0."""
    state = state_of()
    state["stage0.rbr_reparam.weight"][1] = 0
    loaded = load_checkpoint(written(tmp_path / "qat.safetensors", with_scales(state)), TINY)
    assert loaded.scales is not None
    scales = loaded.scales["stage0"].weight_scales
    assert scales is not None
    assert 1 / 127 == pytest.approx(float(scales[1]))


def test_scales_of_branches_are_refused(tmp_path):
    """A train form's scales belong to its branches; the remedy is to reparameterize first."""
    path = written(tmp_path / "train.safetensors", with_scales(state_of(deploy=False)))
    found = refusal(path)
    assert found.startswith("carries scales of branches (stage0.rbr_1x1.conv._input_quantizer")
    assert "reparameterize first, then train with quantizers" in found


def test_a_checkpoint_with_scales_is_recognized(tmp_path):
    """Quantizers are no weights: dialect, form and variant are found beside them."""
    path = written(tmp_path / "qat.safetensors", with_scales(state_of()))
    found = identify(read_checkpoint_file(path), TINY)
    assert (TINY, "deploy", True) == (found.variant, found.form, found.nearest.exact)
    assert 2 * (len(LAYERS) + 1) == len(found.quantizers)


STEM = "stage0.rbr_reparam"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{STEM}._input_quantizer._amax", torch.tensor(-1.0), "is -1, expected positive finite"),
        (f"{STEM}._input_quantizer._amax", torch.tensor(float("nan")), "is nan, expected posi"),
        (f"{STEM}._input_quantizer._amax", torch.tensor(0.0), "input quantizer of stage0 has the"),
        (f"{STEM}._input_quantizer._amax", torch.ones(3), "quantizer of stage0 has 3 ranges; INT8"),
        (f"{STEM}._input_quantizer._amax", torch.tensor(1), r"is torch.int64 \[\], expected"),
        (f"{STEM}._weight_quantizer._amax", torch.ones(1, 2), r"has ranges \[1, 2\], expected one"),
        (f"{STEM}._weight_quantizer._amax", torch.zeros(4, 1, 1, 1), "has the range 0 for a chan"),
        (f"{STEM}._output_quantizer._amax", torch.tensor(1.0), "only the _amax of input and weig"),
        (f"{STEM}.input_quantizer._pre_quant_scale", torch.ones(3), "has stage0.rbr_reparam.inp"),
        ("gap._weight_quantizer._amax", torch.tensor(1.0), "has scales of gap, which has no weig"),
    ],
)
def test_scales_that_no_engine_can_express_are_refused(tmp_path, name, tensor, message):
    """One sentence names the quantizer, what was found and what was expected."""
    state = with_scales(state_of()) | {name: tensor}
    found = refusal(written(tmp_path / "qat.safetensors", state))
    assert re.search(message, found), found


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(amax=st.floats(2.0**-20, 2.0**20, width=32))
def test_a_scale_is_the_float32_quotient(tmp_path, amax):
    """The division is float32's, as in the tools' own export, for every range."""
    state = with_scales(state_of()) | {f"{STEM}._input_quantizer._amax": torch.tensor(amax)}
    loaded = load_checkpoint(written(tmp_path / "qat.safetensors", state), TINY)
    assert loaded.scales is not None
    assert float(torch.tensor(amax) / 127) == loaded.scales["stage0"].input_scale
