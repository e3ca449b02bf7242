"""The variant table against the paper, and against the networks that torch builds from it."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import models
from models.repvgg import PlainBlock, RepVGG, RepVGGBlock
from models.variants import (
    TOTAL_STRIDE,
    VARIANTS,
    ConvLayer,
    UnknownVariantError,
    Variant,
    find_variant,
)

# Tables 2 to 5 of the paper, recomputed: deploy parameters in M, MACs in G at 224 x 224.
DEPLOY = {
    "A0": ("8.31", "1.36"),
    "A1": ("12.79", "2.36"),
    "A2": ("25.50", "5.12"),
    "B0": ("14.34", "3.06"),
    "B1": ("51.83", "11.82"),
    "B1g2": ("41.36", "8.81"),
    "B1g4": ("36.13", "7.31"),
    "B2": ("80.32", "18.38"),
    "B2g2": ("63.96", "13.68"),
    "B2g4": ("55.78", "11.33"),
    "B3": ("110.96", "26.21"),
    "B3g2": ("87.40", "19.45"),
    "B3g4": ("75.63", "16.06"),
}
# Parameters of the train form in M, as the paper and the official repository publish them.
TRAIN = {
    "A0": "9.11",
    "A1": "14.09",
    "A2": "28.21",
    "B0": "15.82",
    "B1": "57.42",
    "B1g2": "45.78",
    "B1g4": "39.97",
    "B2": "89.02",
    "B2g4": "61.76",
    "B3": "123.09",
    "B3g4": "83.83",
    "D2se": "133.33",
}
EVERY = pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)


@functools.cache
def on_meta(variant: Variant, *, deploy: bool) -> RepVGG:
    """The network without storage: shapes only."""
    with torch.device("meta"):
        return RepVGG(variant, deploy=deploy)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def millions(number: int) -> str:
    return f"{number / 1e6:.2f}"


def test_the_table_holds_the_published_variants():
    """The names are the paper's, each row carries its own, and the table cannot be changed."""
    assert [*DEPLOY, "D2se", "L2pse"] == list(VARIANTS)
    assert list(VARIANTS) == [variant.name for variant in VARIANTS.values()]
    with pytest.raises(TypeError):
        VARIANTS["A0"] = VARIANTS["A1"]  # type: ignore[index]


@pytest.mark.parametrize("name", DEPLOY)
def test_deploy_parameters_and_macs_are_the_published_ones(name):
    """Both agree with the paper to the second decimal at 1000 classes and 224 x 224."""
    variant = VARIANTS[name]
    expected_parameters, expected_macs = DEPLOY[name]
    assert expected_parameters == millions(variant.deploy_parameters())
    assert expected_macs == f"{variant.macs() / 1e9:.2f}"


@pytest.mark.parametrize(("name", "expected"), TRAIN.items())
def test_train_form_parameters_are_the_published_ones(name, expected):
    """The multi-branch network has the paper's number of parameters."""
    assert expected == millions(parameters(on_meta(VARIANTS[name], deploy=False)))


@EVERY
@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_deploy_parameters_count_the_real_network(variant, num_classes):
    """The formula equals the number of parameters that torch allocates, for any classifier."""
    with torch.device("meta"):
        module = RepVGG(variant, num_classes=num_classes, deploy=True)
    assert parameters(module) == variant.deploy_parameters(num_classes)


@EVERY
def test_the_networks_of_both_forms_are_the_table(variant):
    """Names, shapes, strides, groups and identity branches of the modules are the layers'."""
    plain, branched = on_meta(variant, deploy=True), on_meta(variant, deploy=False)
    layers = {layer.name: layer for layer in variant.layers}
    plain_blocks = {n: m for n, m in plain.named_modules() if isinstance(m, PlainBlock)}
    branched_blocks = {n: m for n, m in branched.named_modules() if isinstance(m, RepVGGBlock)}
    assert list(layers) == list(plain_blocks) == list(branched_blocks)
    for name, layer in layers.items():
        block = branched_blocks[name]
        for conv in (plain_blocks[name].rbr_reparam, block.rbr_dense.conv):
            assert layer.weight_shape == tuple(conv.weight.shape)
            assert (layer.stride, layer.stride) == conv.stride
            assert layer.groups == conv.groups
            assert (1, 1) == conv.padding
        assert (*layer.weight_shape[:2], 1, 1) == tuple(block.rbr_1x1.conv.weight.shape)
        assert layer.has_identity == (block.rbr_identity is not None)


@EVERY
def test_the_network_maps_images_to_one_logit_a_class(variant):
    """A forward pass gives [N, classes], also for sides that 32 does not divide."""
    images = torch.empty(2, 3, 70, 33, device="meta")
    for deploy in (False, True):
        assert (2, 1000) == tuple(on_meta(variant, deploy=deploy).eval()(images).shape)


@EVERY
def test_layers_chain_and_halve_five_times(variant):
    """Each layer reads what the one before wrote; five strides of 2 make the total stride."""
    layers = variant.layers
    assert layers[0].in_channels == 3
    for before, after in itertools.pairwise(layers):
        assert before.out_channels == after.in_channels
    assert [2] * 5 == [layer.stride for layer in layers if layer.stride != 1]
    assert TOTAL_STRIDE == 2**5
    assert layers[-1].out_channels == variant.feature_channels


@EVERY
def test_depth_is_22_28_or_48(variant):
    """A variants have 22 convolutions, B variants 28, D and L 48, each with its own name."""
    names = [layer.name for layer in variant.layers]
    assert {"A": 22, "B": 28, "D": 48, "L": 48}[variant.name[0]] == len(names)
    assert len(names) == len(set(names))


@EVERY
def test_exactly_the_even_blocks_of_grouped_variants_are_grouped(variant):
    """In g2 and g4 blocks 2, 4, ... 26 are grouped, every other layer is dense."""
    groups = int(variant.name.partition("g")[2] or 1)
    expected = [groups if i in range(2, 27, 2) else 1 for i in range(len(variant.layers))]
    assert expected == [layer.groups for layer in variant.layers]


@EVERY
def test_only_first_blocks_of_stages_lack_the_identity(variant):
    """The identity branch exists exactly where the stride is 1 and the width stays."""
    firsts = {"stage0", "stage1.0", "stage2.0", "stage3.0", "stage4.0"}
    assert firsts == {layer.name for layer in variant.layers if not layer.has_identity}


def test_identity_needs_equal_widths():
    """A layer of stride 1 that changes the width has no identity branch."""
    narrow = ConvLayer(name="b", in_channels=4, out_channels=8, stride=1, groups=1)
    assert narrow.has_identity is False


def test_macs_follow_the_image_size():
    """Every term grows with the area where 32 divides the sides, and rounds up where not."""
    a0 = VARIANTS["A0"]
    head = a0.feature_channels * 10
    assert (a0.macs((64, 64), 10) - head) * 6 == a0.macs((128, 192), 10) - head
    assert a0.macs((33, 33), 10) == a0.macs((34, 34), 10)
    assert a0.macs((32, 32), 10) < a0.macs((33, 32), 10)


@given(
    name=st.sampled_from(list(VARIANTS)),
    prefix=st.sampled_from(["", "RepVGG-", "repvgg_", "REPVGG", " RepVgg-"]),
    upper=st.booleans(),
)
def test_find_variant_ignores_case_and_prefix(name, prefix, upper):
    """Any spelling of a published name finds its row."""
    spelled = prefix + (name.upper() if upper else name.lower())
    assert VARIANTS[name] is find_variant(spelled)


@pytest.mark.parametrize(
    ("name", "nearest"), [("A9", "A"), ("b1g3", "B1g"), ("RepVGG-B2g", "B2g"), ("B33", "B3")]
)
def test_unknown_names_list_the_nearest(name, nearest):
    """The error quotes what was asked for, and names near and known variants."""
    with pytest.raises(UnknownVariantError) as caught:
        find_variant(name)
    message = str(caught.value)
    assert message.startswith(f"unknown model {name!r} (nearest: {nearest}")
    assert message.endswith(f"known: {', '.join(VARIANTS)})")


@pytest.mark.parametrize("name", ["", "RepVGG-", "resnet", "???"])
def test_names_far_from_all_variants_list_the_known_ones(name):
    """Without a near name the error lists what is known, and invents nothing."""
    with pytest.raises(UnknownVariantError) as caught:
        find_variant(name)
    assert str(caught.value) == f"unknown model {name!r} (known: {', '.join(VARIANTS)})"


@given(st.text(max_size=8))
def test_find_variant_raises_nothing_else(name):
    """Any text gives a variant or UnknownVariantError."""
    try:
        found = find_variant(name)
    except UnknownVariantError:
        return
    assert found in VARIANTS.values()


def test_every_public_name_can_be_imported():
    """`models` offers what `__all__` says, and nothing under an unknown name."""
    assert models.VARIANTS is VARIANTS
    for name in set(models.__all__) - {"VARIANTS"}:
        assert name == getattr(models, name).__name__
    with pytest.raises(AttributeError, match="module 'models' has no attribute 'ResNet'"):
        _ = models.ResNet


def test_the_table_needs_no_torch():
    """Importing `models` and its variants loads neither torch nor numpy."""
    code = (
        "import sys, models, models.registry; models.find_variant('B3g4').macs();"
        "print({'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (0, "set()\n", "") == (done.returncode, done.stdout, done.stderr)
