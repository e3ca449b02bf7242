"""The Python API does what the command does, and refuses what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import exporter
from exporter import Bundle, export, reparameterize
from exporter.errors import InputError
from exporter.parity.comparison import compare
from models import RepVGG, Variant, find_variant
from models.repvgg import PlainBlock, RepVGGBlock
from models.variants import Squeeze

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = "sm86"


@pytest.fixture(scope="module")
def network() -> RepVGG:
    """A full-size A0 with BatchNorm statistics of real magnitude, in eval mode."""
    torch.manual_seed(1)
    module = RepVGG(find_variant("A0"), num_classes=7)
    with torch.no_grad():
        module.train()(torch.randn(16, 3, 32, 32))
    return module.eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """32 float32 images ``[32, 3, 32, 32]``."""
    return np.random.default_rng(0).normal(size=(32, 3, 32, 32)).astype(np.float32)


def test_the_door_exposes_exactly_its_names():
    """`from exporter import *` gives export, reparameterize and Bundle."""
    assert ["Bundle", "export", "reparameterize"] == exporter.__all__
    assert all(getattr(exporter, name) is not None for name in exporter.__all__)
    with pytest.raises(AttributeError, match="no attribute 'expert'"):
        _ = exporter.expert


def test_reparameterize_returns_a_fused_copy_and_leaves_the_module_alone(network):
    """The result has no branches left; the argument keeps all of its own."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fused = reparameterize(network)
    assert not any(isinstance(m, RepVGGBlock) for m in fused.modules())
    assert 22 == sum(isinstance(m, PlainBlock) for m in fused.modules())
    after = network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_is_no_module_cannot_be_reparameterized():
    with pytest.raises(InputError, match="a int is no torch module"):
        reparameterize(3)


def test_a_module_is_exported_with_arrays_as_calibration(network, images, tmp_path):
    """The bundle runs the half graph and stays close to the module it was made from."""
    bundle = export(
        network,
        example_input=torch.zeros(1, 3, 32, 32),
        precision="fp16",
        calibration=iter([images[:20], images[20:]]),
        targets=[TARGET],
        out=tmp_path / "b",
    )
    assert isinstance(bundle, Bundle)
    assert "module" == bundle.manifest["weights"]["source"]
    assert [TARGET] == bundle.manifest["targets"]
    with torch.no_grad():
        reference = network(torch.from_numpy(images)).numpy()
    assert compare(reference, bundle.run(images)).sqnr_db > 50
    assert "pass" == bundle.parity["verdict"]


def test_a_variant_name_exports_the_bundled_weights(tmp_path):
    """export("A0") is `engine A0`."""
    bundle = export(
        "A0", precision="fp32", targets="orin", evaluation_images=16, image_size="32",
        out=tmp_path / "b",
    )  # fmt: skip
    assert "bundled" == bundle.manifest["weights"]["source"]
    assert bundle.path == tmp_path / "b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"module": torch.nn.Linear(1, 1)}, "a module needs example_input, a float tensor"),
        ({"module": "A0", "colour": "red"}, "unknown option colour"),
        ({"module": "A0", "calibration": [np.zeros((2, 3, 4, 4))]}, "expected float32"),
        ({"module": "A0", "calibration": np.zeros((0, 3, 4, 4), np.float32)}, "no images"),
        ({"module": "A0", "calibration": ["a"]}, "calibration holds str"),
        (
            {"module": "A0", "calibration": np.zeros((20, 3, 32, 32), np.float32)},
            r"calibration holds float32 \[20, 3, 32, 32\], expected float32 \[N, 3, 64, 64\]",
        ),
        ({"module": "A0", "target": "orin", "sparsity": 2}, "unknown option sparsity, target"),
        ({"module": "A0", "targets": ["sm12"]}, "sm12"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(arguments, message, tmp_path):
    """Each refusal is an InputError with the reason, and leaves nothing."""
    module = arguments.pop("module")
    with pytest.raises(InputError, match=message):
        export(module, out=tmp_path / "b", **arguments)
    assert [] == list(tmp_path.iterdir())


def test_a_module_needs_an_example_input_and_no_weights(network, images):
    """What is missing or contradictory is named."""
    with pytest.raises(InputError, match="needs example_input"):
        export(network, calibration=images)
    with pytest.raises(InputError, match="not both"):
        export(network, weights="x.pth", calibration=images)
    with pytest.raises(InputError, match=r"expected \[N, 3, H, W\]"):
        export(network, example_input=torch.zeros(3, 32, 32), calibration=images)


def test_a_module_of_a_hand_made_variant_keeps_its_own_table(images, tmp_path):
    """The graph contract follows the module's variant, not a published one's name."""
    bundle = export(
        small(images),
        example_input=torch.zeros(1, 3, 32, 32),
        precision="int8",
        calibration=images,
        targets="orin",
        min_sqnr_db=15,
        min_agreement=0.5,
        out=tmp_path / "b",
    )
    assert "tiny" == bundle.manifest["model"]["variant"]


def small(images: np.ndarray, **changed: object) -> RepVGG:
    """A tiny variant whose BatchNorms have seen ``images``."""
    table = {
        "name": "tiny", "num_blocks": (1, 1, 2, 1), "width_multiplier": (0.25, 0.25, 0.25, 0.25),
    } | changed  # fmt: skip
    torch.manual_seed(0)
    module = RepVGG(Variant(**table), num_classes=5)
    with torch.no_grad():
        module.train()(torch.from_numpy(images))
    return module.eval()


def test_a_plain_module_keeps_height_and_width_open_on_request(images, tmp_path):
    """Parity is measured at both ends of the profile; the graph is still the plain one."""
    bundle = export(
        small(images),
        example_input=torch.zeros(1, 3, 32, 32),
        precision="fp16",
        calibration=images,
        targets=TARGET,
        dynamic_size="32:64:96x32:32:64",
        out=tmp_path / "b",
    )
    outputs = {row["stage"]: row for row in bundle.parity["stages"]}["fp16"]["outputs"]
    assert ["logits", "logits@96x64"] == list(outputs)
    assert all(figures["top1_agreement"] >= 0.98 for figures in outputs.values())
    assert {} == bundle.manifest["contract"]["allowed_extras"]
    wide = np.random.default_rng(0).normal(size=(2, 3, 64, 48)).astype(np.float32)
    assert (2, 5) == bundle.run(wide).shape


def test_squeeze_and_excitation_is_an_allowed_extra(images, tmp_path):
    """A variant with SE keeps its names and interface; its gates are listed beside the blocks."""
    module = small(images, squeeze=Squeeze.BEFORE_RELU)
    bundle = export(
        module,
        example_input=torch.zeros(1, 3, 32, 32),
        precision="int8",
        calibration=images,
        targets=TARGET,
        min_sqnr_db=12,
        min_agreement=0.5,
        out=tmp_path / "b",
    )
    contract = bundle.manifest["contract"]
    assert (6, 18) == (contract["blocks"], contract["convolutions"])
    assert 12 == contract["allowed_extras"]["Conv"]
    assert 6 == contract["allowed_extras"]["Sigmoid"]
    assert module.variant.deploy_parameters(5) == bundle.manifest["model"]["parameters"]
    assert [["images"], ["logits"]] == [
        [port["name"] for port in bundle.manifest[key]] for key in ("inputs", "outputs")
    ]


def test_a_module_in_train_mode_is_exported_in_eval_mode_and_said_so(images, tmp_path):
    """The bundle's notes tell; the caller's module stays in train mode."""
    network = small(images).train()
    bundle = export(
        network,
        example_input=torch.zeros(1, 3, 32, 32),
        precision="fp32",
        calibration=images,
        targets="orin",
        out=tmp_path / "b",
    )
    assert network.training
    network.eval()
    assert any("train() mode" in note for note in bundle.manifest["notes"])
    with torch.no_grad():
        reference = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(bundle.run(images), reference, atol=1e-3)
