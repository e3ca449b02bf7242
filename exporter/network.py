"""A torch module seen from outside: named float inputs, named float outputs, free axes.

The outputs of a module may be a tensor, or tuples, lists and dicts of them, nested; they get flat
names: ``output``; ``output_0``, ``output_1``; the keys of a dict.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.parallel import on_all_cores
from exporter.errors import InputError
from exporter.profiles import SizeProfile
from exporter.running.onnx_runner import Batch, Outputs, Runner, in_steps, joined
from models.repvgg import RepVGG

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
_STEP_VALUES, _STEP_IMAGES = 2 * 3 * 224**2, 8
"""The most that is run at once: small enough for caches and for several steps in a batch of 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An input or output: its name, and its shape with a name in place of each free extent."""

    name: str
    shape: tuple[int | str, ...]

    @property
    def free_axes(self) -> dict[int, str]:
        """The axes that are not fixed, with their names."""
        return {axis: name for axis, name in enumerate(self.shape) if isinstance(name, str)}

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it."""
        return {"name": self.name, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What goes in and comes out, in order. ``example`` has each input's shape, batch 1.

    ``num_classes`` is set if the network is a classifier: its only output is ``[N, classes]``.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: tuple[tuple[int, ...], ...]
    num_classes: int | None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width, if there is one input and it is an image ``[N, 3, H, W]``."""
        (shape, *more) = self.example
        return (shape[2], shape[3]) if not more and len(shape) == 4 and shape[1] == 3 else None


def classifier_interface(
    image_size: tuple[int, int], num_classes: int, size: SizeProfile | None
) -> Interface:
    """The interface of the published variants: ``images`` to ``logits``."""
    extents: tuple[int | str, ...] = image_size if size is None else (HEIGHT, WIDTH)
    return Interface(
        inputs=(Port(name="images", shape=(BATCH, 3, *extents)),),
        outputs=(Port(name="logits", shape=(BATCH, num_classes)),),
        example=((1, 3, *image_size),),
        num_classes=num_classes,
    )


def probe(module: nn.Module, example: tuple[Tensor, ...], size: SizeProfile | None) -> Interface:
    """Find out the interface of ``module`` (eval mode) by running it.

    ``example`` has one float tensor ``[N, ...]`` an input. The batch is free, and height and width
    of image inputs too if ``size`` bounds them.

    Raises:
        InputError: if the module does not run on it, or at the profile's ends, or returns something
            other than float tensors with the batch as their first axis.
    """
    free = _free_inputs(example, size)
    ones = tuple(tensor[:1] for tensor in example)
    shapes = [_shapes(module, ones), _shapes(module, tuple(torch.cat([t, t]) for t in ones))]
    for name, shape in shapes[0].items():
        if shape[:1] != (1,) or shapes[1][name][:1] != (2,):
            raise InputError(f"output {name} is {list(shape)}: its first axis is not the batch")
    if size is not None:
        for corner in (0, 2):
            sides = (size.height[corner], size.width[corner])
            shapes.append(_shapes(module, _resized(ones, sides, free)))
    names = _input_names(module, len(example), set(shapes[0]))
    outputs = tuple(
        Port(name=name, shape=_free_shape(name, [found[name] for found in shapes]))
        for name in shapes[0]
    )
    only = next(iter(shapes[0].values()))
    is_classifier = len(outputs) == 1 and len(only) == 2 and only[1] > 1
    inputs = tuple(
        Port(name=name, shape=(BATCH, *t.shape[1:2], HEIGHT, WIDTH) if opened else _fixed(t))
        for name, t, opened in zip(names, example, free, strict=True)
    )
    return Interface(
        inputs=inputs,
        outputs=outputs,
        example=tuple(tuple(tensor.shape) for tensor in ones),
        num_classes=only[1] if is_classifier else None,
    )


def flatten(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a module returned, with their names.

    Raises:
        InputError: if something else is among them.
    """
    if isinstance(value, Tensor):
        yield re.sub(r"\W", "_", name), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, str(key) if name == "output" else f"{name}_{key}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from flatten(item, f"{name}_{index}")
    else:
        raise InputError(
            f"{name} of the network is a {type(value).__name__}, expected float tensors or tuples, "
            "lists and dicts of them"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRunner:
    """``module`` as a function of arrays; it travels to other processes if the module does.

    Several images at a time, each on one thread, are faster than many threads for one: a RepVGG of
    ours remembers nothing from one image for the next, which another module may.
    """

    module: nn.Module
    names: tuple[str, ...]

    def __call__(self, batch: Batch) -> Outputs:
        values = sum(array[0].size for array in batch)
        size = max(1, min(_STEP_IMAGES, _STEP_VALUES // max(1, values)))
        steps = in_steps(batch, size)
        if not isinstance(self.module, RepVGG):
            return joined(map(self._step, steps))
        threads = torch.get_num_threads()
        try:
            return joined(on_all_cores(self._step_on_one_thread, steps))
        finally:
            torch.set_num_threads(threads)

    def _step_on_one_thread(self, batch: Batch) -> Outputs:
        torch.set_num_threads(1)
        return self._step(batch)

    def _step(self, batch: Batch) -> Outputs:
        with torch.no_grad():
            tensors = [t for _, t in flatten(self.module(*map(torch.from_numpy, batch)))]
        return {name: t.numpy() for name, t in zip(self.names, tensors, strict=True)}


def torch_runner(module: nn.Module, interface: Interface) -> Runner:
    """``module`` as a function of arrays."""
    return TorchRunner(module=module, names=tuple(port.name for port in interface.outputs))


def multiply_accumulates(module: nn.Module, interface: Interface) -> int:
    """Of all convolutions and linear layers, for one image of the example's size."""
    total = 0

    def count(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += output[0].numel() * weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            module(*(torch.zeros(shape) for shape in interface.example))
    finally:
        for handle in handles:
            handle.remove()
    return total


def resized(batch: Batch, sides: tuple[int, int], interface: Interface) -> Batch:
    """The batch with every free image input scaled to ``sides`` (height, width)."""
    free = [HEIGHT in port.shape for port in interface.inputs]
    return tuple(t.numpy() for t in _resized(tuple(map(torch.from_numpy, batch)), sides, free))


def _resized(
    tensors: tuple[Tensor, ...], sides: tuple[int, int], free: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        functional.interpolate(tensor, size=sides, mode="bilinear") if opened else tensor
        for tensor, opened in zip(tensors, free, strict=True)
    )


def _free_inputs(example: tuple[Tensor, ...], size: SizeProfile | None) -> list[bool]:
    """Which inputs have open height and width."""
    if size is None:
        return [False] * len(example)
    images = [tensor for tensor in example if tensor.ndim == 4]
    sides = {(int(tensor.shape[2]), int(tensor.shape[3])) for tensor in images}
    if len(sides) != 1:
        raise InputError(
            "dynamic_size needs image inputs [N, C, H, W] of one height and width; found "
            f"{', '.join(str(list(tensor.shape)) for tensor in example)}"
        )
    if not size.holds(*next(iter(sides))):
        raise InputError(f"example_input is {list(images[0].shape)}, outside dynamic size {size}")
    return [tensor.ndim == 4 for tensor in example]


def _shapes(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, tuple[int, ...]]:
    given = ", ".join(str(list(tensor.shape)) for tensor in inputs)
    try:
        with torch.no_grad():
            result = module(*inputs)
    except Exception as error:
        # The caller's own code runs here: anything may be raised.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the network does not run on inputs {given}: {first_line}") from error
    tensors = list(flatten(result))
    for name, tensor in tensors:
        if tensor.dtype != torch.float32:
            raise InputError(
                f"output {name} of the network is {tensor.dtype}, expected float32: export it "
                "without its post-processing"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
    if not tensors or len(shapes) != len(tensors):
        raise InputError(
            f"the network's outputs need names of their own: {[n for n, _ in tensors]}"
        )
    return shapes


def _input_names(module: nn.Module, count: int, taken: set[str]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    if len(names) < count:
        names = [f"input_{index}" for index in range(count)]
    return tuple(f"{name}_input" if name in taken else name for name in names)


def _fixed(tensor: Tensor) -> tuple[int | str, ...]:
    return (BATCH, *(int(extent) for extent in tensor.shape[1:]))


def _free_shape(name: str, found: list[tuple[int, ...]]) -> tuple[int | str, ...]:
    """An output's shape, from its shapes for the example, two of it, and other sizes."""
    free = [f"{name}_{axis}" for axis in range(len(found[0]))]
    extents = zip(*found, strict=True)
    return (
        BATCH,
        *(values[0] if len(set(values)) == 1 else free[axis]
          for axis, values in enumerate(extents) if axis > 0),
    )  # fmt: skip
