"""Trained Q/DQ files and checkpoints as networks of a variant: the same function, re-exported."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from calibration.images import Preprocess
from calibration.observer import TensorObserver
from exporter.errors import GateFailedError, InputError
from exporter.graph.prologue import Prologue, with_prologue
from exporter.onnx_export import export_onnx
from exporter.parity.comparison import compare
from exporter.pixel_input import Layout
from exporter.quantization.trained_scales import TrainedGraph, quantize_trained, weight_notes
from exporter.quantize import RoundedWeight
from exporter.running.onnx_runner import OnnxRunner
from exporter.sources.qdq_source import import_quantized
from exporter.sources.trained_network import EXACT_GATE, NEAR_GATE, TrainedNetwork, from_checkpoint
from models.checkpoint import load_checkpoint
from models.repvgg import RepVGG
from models.variants import VARIANTS, Variant

# Shaped like A0 and a few kilobytes large.
TINY = Variant(
    name="tiny", num_blocks=(2, 1, 2, 1), width_multiplier=(0.125, 0.125, 0.0625, 0.03125)
)
CLASSES, SIZE = 3, (32, 32)
LAYERS = [layer.name for layer in TINY.layers]

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> RepVGG:
    """A deploy form whose activations keep their size."""
    torch.manual_seed(seed)
    module = RepVGG(TINY, num_classes=CLASSES, deploy=True).eval()
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            nn.init.normal_(child.bias, std=0.1)
    return module.requires_grad_(requires_grad=False)


def images(count: int = 20) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, *SIZE)).astype(np.float32)


@torch.no_grad()
def input_scales(module: RepVGG) -> dict[str, float]:
    """``max |x| / 127`` of what each layer reads, as QAT would have initialized it."""
    found: dict[str, float] = {}

    def observe(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = float(inputs[0].abs().max() / 127)

        return hook

    places = {name: module.get_submodule(name) for name in LAYERS}
    handles = [
        getattr(place, "rbr_reparam", place).register_forward_pre_hook(observe(name))
        for name, place in {**places, "linear": module.linear, "gap": module.gap}.items()
    ]
    module(torch.from_numpy(images()))
    for handle in handles:
        handle.remove()
    return found


class Quantized(nn.Module):
    """A layer as QAT tools export it: its input and its float weight through fake quantization."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        amax = layer.weight.flatten(1).abs().amax(dim=1)
        self.register_buffer("scales", amax / 127)
        self.register_buffer("zeros", torch.zeros(len(amax), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, 0, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(
            self.layer.weight, self.scales, self.zeros, 0, -128, 127
        )
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return nn.functional.linear(x, weight, self.layer.bias)


class Official(nn.Module):
    """The forward of the official repository, whose ``view`` exports to shape arithmetic."""

    def __init__(self, module: RepVGG) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        for stage in (m.stage0, m.stage1, m.stage2, m.stage3, m.stage4):
            x = stage(x)
        x = m.gap(x)
        return m.linear(x.view(x.size(0), -1))


def trained(*, linear: bool = True) -> Official:
    """A network with fake quantization at every convolution, and the classifier's if asked."""
    module = network()
    scales = input_scales(module)
    for name in LAYERS:
        block = module.get_submodule(name)
        block.rbr_reparam = Quantized(block.rbr_reparam, scales[name])
    if linear:
        module.linear = Quantized(module.linear, scales["linear"])
    return Official(module).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph as torch exports a network with fake quantization, free in its batch."""
    return exported(trained(), tmp_path_factory.mktemp("qat") / "qat.onnx")


def exported(module: nn.Module, path: Path, *, batch: int | None = None) -> Path:
    free = {"input": {0: "n"}, "output": {0: "n"}} if batch is None else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an exporter that QAT tools use as it is
        torch.onnx.export(
            module,
            (torch.zeros(batch or 1, 3, *SIZE),),
            path,
            dynamo=False,
            opset_version=13,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=free,
        )
    return path


def again(network: TrainedNetwork) -> tuple[onnx.ModelProto, TrainedGraph]:
    """The float graph of what was imported, and the Q/DQ graph made from it."""
    model = export_onnx(network.module, SIZE, {})
    return model, quantize_trained(model, network.scales)


def decibel(network: TrainedNetwork, graph: onnx.ModelProto) -> float:
    expected = network.run((images(),))["logits"]
    return compare(expected, OnnxRunner(graph, optimize=False)(images())).sqnr_db


def test_a_graph_of_torch_with_fake_quantization_is_exported_as_it_was_trained(file):
    """Every layer in INT8, nothing dropped, and the new Q/DQ graph computes what the file does."""
    imported = import_quantized(file, TINY)
    model, made = again(imported)
    assert [*LAYERS, "linear"] == list(imported.scales.layers)
    assert ((), EXACT_GATE) == (imported.notes, imported.gate)
    assert decibel(imported, made.graph) > 80
    expected = imported.run_float((images(),))["logits"]
    assert compare(expected, OnnxRunner(model)(images())).relative < 1e-5


def test_the_trained_scales_are_the_exported_ones(file):
    """Scales and integers of the file stand in the new graph bit for bit."""
    imported = import_quantized(file, TINY)
    module = network()
    expected = [np.float32(scale) for name, scale in input_scales(module).items() if name != "gap"]
    made = again(imported)[1]
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.graph.initializer}
    tensors = ["images", *(f"{name}.output" for name in LAYERS[:-1]), "head.flatten.output"]
    np.testing.assert_array_equal(expected, [stored[f"{name}.scale"] for name in tensors])
    weight = module.stage1[0].rbr_reparam.weight
    scales = weight.flatten(1).abs().amax(dim=1) / 127
    np.testing.assert_array_equal(scales.numpy(), stored["stage1.0.weight.scale"])
    integers = torch.round(weight / scales.reshape(-1, 1, 1, 1)).numpy()
    np.testing.assert_array_equal(integers, stored["stage1.0.weight.int8"])


def test_the_table_says_where_the_scales_came_from(file):
    """Method imported, the file's hash, no images; a range is what the scale covers."""
    imported = import_quantized(file, TINY)
    table = again(imported)[1].table
    assert ("imported", 0) == (table.method, table.image_count)
    assert imported.scales.sha256 == table.data_sha256
    images_range = table.ranges["images"]
    assert 127 * table.activation_scales["images"] == images_range.threshold
    assert -images_range.threshold == images_range.minimum


def test_a_fixed_batch_is_run_in_steps(tmp_path):
    """A file fixed to a batch of 8 computes the logits of 20 images."""
    path = exported(trained(linear=False), tmp_path / "fixed.onnx", batch=8)
    imported = import_quantized(path, TINY)
    assert (SIZE, ("no scales for /linear/Gemm: computed in float",)) == (
        imported.image_size,
        imported.notes,
    )
    assert (20, CLASSES) == imported.run((images(),))["logits"].shape
    assert decibel(imported, again(imported)[1].graph) > 80


def test_a_graph_of_onnx_runtimes_quantizer_is_exported(tmp_path):
    """Int8 weights, int32 biases, quantizers behind Conv and the pooling: close, and named."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize_by_onnxruntime

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"images": images()}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    source, path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(export_onnx(network(), SIZE, {}), source)
    quantize_by_onnxruntime(
        source,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": True},
    )
    imported = import_quantized(path, TINY)
    made = again(imported)[1]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    found = {t.name: numpy_helper.to_array(t) for t in made.graph.graph.initializer}
    for name in LAYERS:
        np.testing.assert_array_equal(
            stored[f"{name}.weight_quantized"], found[f"{name}.weight.int8"]
        )
    assert NEAR_GATE == imported.gate
    assert "dropped the quantizers of logits" in imported.notes[0]
    assert decibel(imported, made.graph) > 30


def test_a_layer_can_be_kept_in_float(file):
    """keep_float takes a layer out of INT8 whatever scales it has; all of them is an error."""
    imported = import_quantized(file, TINY)
    model = export_onnx(imported.module, SIZE, {})
    made = quantize_trained(model, imported.scales, keep_float=["stage0.conv"])
    assert "images" not in made.table.activation_scales
    assert ("stage0.conv",) == made.float_convolutions
    nodes = [node.name for node in model.graph.node]
    with pytest.raises(InputError, match="no layer with scales is left"):
        quantize_trained(model, imported.scales, keep_float=nodes)


def test_another_variant_is_refused_by_the_contract(file):
    """The first node that is not the variant's is named."""
    with pytest.raises(GateFailedError, match="is not a plain RepVGG-A0: "):
        import_quantized(file, VARIANTS["A0"])


def test_a_graph_with_another_activation_is_refused(file, tmp_path):
    """A LeakyRelu where the variant has a ReLU is no RepVGG."""
    model = onnx.load(file)
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "LeakyRelu"
    onnx.save(model, tmp_path / "leaky.onnx")
    with pytest.raises(GateFailedError, match="is LeakyRelu, expected Relu"):
        import_quantized(tmp_path / "leaky.onnx", TINY)


def test_variants_with_gates_are_refused(file):
    """Scales are imported for plain chains only."""
    with pytest.raises(InputError, match="for a plain RepVGG only, not for D2se"):
        import_quantized(file, VARIANTS["D2se"])


def test_a_large_fixed_batch_is_refused(file, tmp_path):
    """The reference would need all of its images at once."""
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 64
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(InputError, match="fixed to a batch of 64; export it with a free batch"):
        import_quantized(tmp_path / "large.onnx", TINY)


def test_a_graph_with_two_outputs_is_refused(file, tmp_path):
    """There must be one output, the logits."""
    model = onnx.load(file)
    name = next(node for node in model.graph.node if node.op_type == "Conv").output[0]
    more = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4)
    model.graph.output.append(more)
    onnx.save(model, tmp_path / "two.onnx")
    with pytest.raises(InputError, match=r"the graph's outputs are output, .*, expected the"):
        import_quantized(tmp_path / "two.onnx", TINY)


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_files_that_are_no_graph_are_refused(tmp_path, content):
    """One sentence, whatever the bytes are."""
    (tmp_path / "file.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model"):
        import_quantized(tmp_path / "file.onnx", TINY)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_else(file, data):
    """Flipped bytes and a cut end give an InputError, a broken contract, or the network."""
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = file.with_name("damaged.onnx")
    damaged.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    with contextlib.suppress(InputError, GateFailedError):
        import_quantized(damaged, TINY)


def checkpoint(path: Path, *, without: str = "-", gap: bool = False) -> Path:
    """A state dict as pytorch-quantization saves it."""
    module = network()
    state = dict(module.state_dict())
    for name, scale in input_scales(module).items():
        if name == "gap" and not gap:
            continue
        layer = name if name in ("linear", "gap") else f"{name}.rbr_reparam"
        state[f"{layer}._input_quantizer._amax"] = torch.tensor(scale * 127)
        if name != "gap":
            amax = state[f"{layer}.weight"].flatten(1).abs().amax(dim=1)
            shape = (-1, *[1] * (state[f"{layer}.weight"].ndim - 1))
            state[f"{layer}._weight_quantizer._amax"] = amax.reshape(shape)
    save_file({name: t.contiguous() for name, t in state.items() if without not in name}, path)
    return path


def test_a_checkpoint_with_scales_is_exported_as_it_was_trained(tmp_path):
    """Its amax / 127 are the graph's scales; torch's fake quantization agrees with the graph."""
    loaded = load_checkpoint(checkpoint(tmp_path / "qat.safetensors"), TINY)
    found = from_checkpoint(loaded, "0" * 64)
    assert {*LAYERS, "linear"} == set(found.scales.layers)
    model, made = again(found)
    # Rounding turns the last bit of a sum into a whole step now and then, hence no equality.
    assert decibel(found, made.graph) > 35
    expected = found.run_float((images(),))["logits"]
    assert compare(expected, OnnxRunner(model)(images())).relative < 1e-5


def test_the_checkpoint_and_the_graph_of_one_network_give_the_same_scales(tmp_path, file):
    """Both ways in carry the same integers and scales."""
    loaded = load_checkpoint(checkpoint(tmp_path / "qat.safetensors"), TINY)
    ours, theirs = from_checkpoint(loaded, "0" * 64).scales, import_quantized(file, TINY).scales
    for name, layer in theirs.layers.items():
        found = ours.layers[name]
        np.testing.assert_allclose(layer.input_scale, found.input_scale, rtol=1e-6)
        np.testing.assert_array_equal(layer.weight.integers, found.weight.integers)
        np.testing.assert_array_equal(layer.weight.scales, found.weight.scales)


def test_a_quantized_pooling_is_dropped_and_named(tmp_path):
    """An engine pools in float; the trained network, which parity asks, rounds there."""
    path = checkpoint(tmp_path / "gap.safetensors", gap=True)
    found = from_checkpoint(load_checkpoint(path, TINY), "0" * 64)
    assert NEAR_GATE == found.gate
    assert "dropped the quantizers of gap" in found.notes[0]
    assert decibel(found, again(found)[1].graph) > 25


def test_layers_without_scales_stay_float(tmp_path):
    """A classifier that was not quantized is computed in float, which is said."""
    path = checkpoint(tmp_path / "part.safetensors", without="linear._")
    found = from_checkpoint(load_checkpoint(path, TINY), "0" * 64)
    assert ("no scales for linear: computed in float",) == found.notes
    assert LAYERS == list(found.scales.layers)


def test_a_checkpoint_whose_layers_have_one_scale_only_is_refused(tmp_path):
    """INT8 needs the scale of the input and those of the weight."""
    path = checkpoint(tmp_path / "half.safetensors", without="_input_quantizer")
    with pytest.raises(InputError, match="no layer with scales for its input and its weight"):
        from_checkpoint(load_checkpoint(path, TINY), "0" * 64)


def weight(integers: np.ndarray) -> dict[str, RoundedWeight]:
    scales = np.ones(len(integers), dtype=np.float32)
    return {"w": RoundedWeight(integers=integers.astype(np.int8), scales=scales)}


def test_weights_that_leave_levels_unused_are_named():
    """Integers that reach 40 of 127 mean a scale three times too large."""
    (note,) = weight_notes(weight(np.linspace(-40, 40, 400).reshape(4, 100)))
    assert note == (
        "w: its integers reach 40 of 127: the scale is 3.2 times too large, INT8 loses precision"
    )


def test_weights_that_saturate_are_named():
    """More than 1 % on the outermost levels, beyond one value a channel, is clipping."""
    values = np.zeros((4, 100))
    values[:, :5] = -128
    (note,) = weight_notes(weight(values))
    assert note.startswith("w: 5.0 % of its integers stand on the outermost levels")
    values[:, 2:] = 0
    assert () == weight_notes(weight(values))


@pytest.mark.parametrize(
    ("factor", "words"), [(8.0, "clips most of it"), (0.1, "leaves most levels unused"), (1.5, "")]
)
def test_ranges_that_do_not_match_the_images_are_named(file, factor, words):
    """The scale's range against what the images show; within a factor of four it is meant."""
    imported = import_quantized(file, TINY)
    model = export_onnx(imported.module, SIZE, {})
    reach = 127 * imported.scales.layers["stage0"].input_scale * factor
    observer = TensorObserver()
    observer.update(np.array([[-reach, reach / 2]], dtype=np.float32))
    made = quantize_trained(model, imported.scales, observers={"images": observer}, image_count=7)
    assert bool(words) == bool(made.notes)
    assert words in "".join(made.notes)
    assert 7 == made.table.image_count
    assert pytest.approx(-reach) == made.table.ranges["images"].minimum


def test_the_trained_module_is_not_changed(tmp_path):
    """Rounded weights go into a copy: the loaded checkpoint keeps what was stored."""
    loaded = load_checkpoint(checkpoint(tmp_path / "qat.safetensors"), TINY)
    before = copy.deepcopy(loaded.module.state_dict())
    from_checkpoint(loaded, "0" * 64)
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(before[name], tensor)


@pytest.mark.parametrize("layout", Layout)
def test_a_graph_that_takes_pixels_is_refused(file, tmp_path, layout):
    """Its scales belong to the network behind the normalization."""
    model = with_prologue(onnx.load(file), Prologue(layout=layout, preprocess=Preprocess()))
    onnx.save(model, tmp_path / "pixels.onnx")
    with pytest.raises(InputError) as refusal:
        import_quantized(tmp_path / "pixels.onnx", TINY)
    name = model.graph.input[0].name
    assert (
        f"the graph's input {name} is uint8: pass the graph without normalization in it, as "
        "exported without --with-preprocess"
    ) == str(refusal.value)
