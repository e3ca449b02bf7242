"""A module's inputs and outputs: names, free axes, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.network import (
    Port,
    classifier_interface,
    flatten,
    multiply_accumulates,
    probe,
    resized,
    torch_runner,
)
from exporter.profiles import SizeProfile

SIZE = SizeProfile((8, 16, 24), (8, 12, 32))


class Made(nn.Module):
    """Calls ``function``."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor, other: Tensor | None = None) -> Any:
        return self.function(image) if other is None else self.function(image, other)


def image(*shape: int) -> Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape)


def test_outputs_get_flat_names() -> None:
    """A tensor is ``output``; sequences are numbered; dicts give their keys; nesting joins them."""
    a = torch.zeros(1)
    assert ["output"] == [name for name, _ in flatten(a)]
    assert ["output_0", "output_1"] == [name for name, _ in flatten((a, a))]
    nested = {"cls": [a, a], 3: {"x/y": a}}
    assert ["cls_0", "cls_1", "3_x_y"] == [name for name, _ in flatten(nested)]


def test_the_batch_is_free_and_everything_else_fixed() -> None:
    """Shapes are those of the example; an input is called as in the forward's signature."""
    found = probe(
        Made(lambda x: {"map": x[:, :1], "mean": x.mean((2, 3))}), (image(2, 3, 8, 6),), None
    )
    assert (Port(name="image", shape=("batch", 3, 8, 6)),) == found.inputs
    assert (
        Port(name="map", shape=("batch", 1, 8, 6)),
        Port(name="mean", shape=("batch", 3)),
    ) == found.outputs
    assert (((1, 3, 8, 6),), (8, 6), None) == (found.example, found.image_size, found.num_classes)
    assert {0: "batch"} == found.inputs[0].free_axes


def test_height_and_width_are_free_within_a_profile() -> None:
    """Only axes that really follow the image are free in an output."""
    network = Made(lambda x: (x, x.flatten(2).mean(2), x[:, :, :4]))
    found = probe(network, (image(1, 3, 16, 8),), SIZE)
    assert ("batch", 3, "height", "width") == found.inputs[0].shape
    assert [
        ("batch", 3, "output_0_2", "output_0_3"),
        ("batch", 3),
        ("batch", 3, 4, "output_2_3"),
    ] == [port.shape for port in found.outputs]


def test_a_classifier_has_one_output_of_two_axes() -> None:
    """Two outputs, one score, or a map are no classifier."""
    example = (image(1, 3, 8, 8),)
    pooled = Made(lambda x: x.mean((2, 3)))
    assert 3 == probe(pooled, example, None).num_classes
    for function in (
        lambda x: (x.mean((2, 3)), x.mean((2, 3))),
        lambda x: x.mean((1, 2, 3))[:, None],
        lambda x: x,
    ):
        assert probe(Made(function), example, None).num_classes is None


def test_inputs_without_names_are_numbered_and_clashes_are_avoided() -> None:
    """``*inputs`` gives input_0, ...; an input called like an output is marked."""

    class Anything(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0] + inputs[1]

    example = (image(1, 4), image(1, 4))
    names = [port.name for port in probe(Anything(), example, None).inputs]
    assert ["input_0", "input_1"] == names
    clash = probe(Made(lambda x: {"image": x}), (image(1, 4, 4),), None)
    assert ["image_input"] == [port.name for port in clash.inputs]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.argmax(1), r"output output of the network is torch.int64, expected float32"),
        (lambda _: {"a": "text"}, "a of the network is a str"),
        (lambda _: None, "output of the network is a NoneType"),
        (lambda x: x.mean(0, keepdim=True), "its first axis is not the batch"),
        (lambda x: x.sum(), "its first axis is not the batch"),
        (lambda x: x @ image(5, 5), r"does not run on inputs \[1, 3, 8, 8\]: "),
        (lambda x: {"a b": x, "a_b": x}, "outputs need names of their own"),
        (lambda _: (), "outputs need names of their own"),
    ],
)
def test_what_cannot_be_compared_is_refused(function: Any, message: str) -> None:
    """Each refusal names the output and what was found."""
    with pytest.raises(InputError, match=message):
        probe(Made(function), (image(1, 3, 8, 8),), None)


def test_a_profile_must_fit_the_network_and_the_example() -> None:
    """Sizes that the network refuses, and examples outside the profile, are named."""
    fixed = Made(lambda x: x * image(16, 8))
    with pytest.raises(InputError, match=r"does not run on inputs \[1, 3, 8, 8\]"):
        probe(fixed, (image(1, 3, 16, 8),), SIZE)
    with pytest.raises(InputError, match="outside dynamic size 8:16:24x8:12:32"):
        probe(fixed, (image(1, 3, 64, 8),), SIZE)
    with pytest.raises(InputError, match="of one height and width"):
        probe(Made(lambda x, _: x), (image(1, 3, 16, 8), image(1, 3, 8, 16)), SIZE)
    with pytest.raises(InputError, match="of one height and width"):
        probe(fixed, (image(1, 3),), SIZE)


def test_only_free_inputs_are_resized() -> None:
    """A vector beside the image stays; the image is scaled to the sides asked for."""
    network = Made(lambda x, v: x.mean((2, 3)) + v)
    found = probe(network, (image(1, 3, 16, 8), image(1, 3)), SIZE)
    batch = (np.ones((2, 3, 16, 8), np.float32), np.ones((2, 3), np.float32))
    assert [(2, 3, 8, 32), (2, 3)] == [a.shape for a in resized(batch, (8, 32), found)]


def test_a_runner_maps_arrays_to_named_arrays() -> None:
    """The torch module is called with all inputs in order."""
    network = Made(lambda x, y: {"sum": x + y, "difference": x - y})
    run = torch_runner(network, probe(network, (image(1, 4), image(1, 4)), None))
    x, y = np.full((2, 4), 3, np.float32), np.full((2, 4), 1, np.float32)
    found = run((x, y))
    np.testing.assert_array_equal(x + y, found["sum"])
    np.testing.assert_array_equal(x - y, found["difference"])


def test_the_interface_of_the_variants() -> None:
    """images to logits; with a profile height and width have names."""
    fixed = classifier_interface((64, 96), 10, None)
    assert (("batch", 3, 64, 96), "images") == (fixed.inputs[0].shape, fixed.inputs[0].name)
    free = classifier_interface((64, 96), 10, SIZE)
    assert ("batch", 3, "height", "width") == free.inputs[0].shape
    assert (10, ((1, 3, 64, 96),)) == (free.num_classes, free.example)


def test_multiply_accumulates_by_hand() -> None:
    """3x3 convolution 2 -> 4 on 5 x 6 with padding, then a linear layer 4 -> 7."""
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    )
    interface = probe(network, (image(1, 2, 5, 6),), None)
    assert 5 * 6 * 4 * 2 * 9 + 4 * 7 == multiply_accumulates(network, interface)
