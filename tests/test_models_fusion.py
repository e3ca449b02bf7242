"""Fusion: the fused network is the trained one, and the trained one stays as it was."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from models.branches import batch_norm_factors, identity_kernel
from models.equivalence import block_equivalence, eval_mode
from models.fusion import (
    TrainModeWarning,
    fuse_block,
    fused_convolutions,
    reparameterize,
)
from models.repvgg import PlainBlock, RepVGG, RepVGGBlock
from models.variants import VARIANTS, ConvLayer, Variant

TINY = Variant(
    name="tiny", num_blocks=(2, 2, 3, 1), width_multiplier=(0.125, 0.125, 0.0625, 0.0625)
)
TINY_GROUPED = Variant(
    name="tiny-g2",
    num_blocks=(2, 2, 3, 1),
    width_multiplier=(0.125, 0.125, 0.0625, 0.0625),
    groups=2,
)
# Of the largest output: the unit round-off of each type times a margin for the sums.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = st.sampled_from(list(TOLERANCE))
property_test = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)


pytestmark = pytest.mark.usefixtures("one_thread")


def randomized(module: nn.Module, seed: int, *, least_variance: float = 0.1) -> nn.Module:
    """``module`` in eval mode with statistics as unlike the initial ones as training makes them."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if not isinstance(child, nn.BatchNorm2d):
            continue
        assert child.running_mean is not None
        assert child.running_var is not None
        child.running_mean.normal_(generator=generator)
        child.running_var.uniform_(least_variance, 2, generator=generator)
        if child.affine:
            with torch.no_grad():
                child.weight.normal_(generator=generator)
                child.bias.normal_(generator=generator)
    return module.eval()


def block_of(
    in_channels: int = 4,
    out_channels: int = 4,
    *,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    seed: int = 0,
) -> RepVGGBlock:
    torch.manual_seed(seed)
    layer = ConvLayer(
        name="b",
        in_channels=in_channels,
        out_channels=out_channels,
        stride=stride,
        groups=groups,
        dilation=dilation,
    )
    return randomized(RepVGGBlock(layer), seed)  # type: ignore[return-value]


def network(variant: Variant = TINY, seed: int = 0) -> RepVGG:
    torch.manual_seed(seed)
    return randomized(RepVGG(variant, num_classes=5), seed)  # type: ignore[return-value]


def in_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` in ``dtype``, in float64 with more digits than float32 holds."""
    module = module.to(dtype)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                tensor.mul_(math.pi / 3)
    return module


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def relative_error(expected: nn.Module, actual: nn.Module, x: Tensor) -> float:
    """The largest difference over the largest magnitude of the expected output."""
    reference = expected(x)
    difference = float((actual(x) - reference).abs().max())
    return difference / max(float(reference.abs().max()), 1e-30) if difference else 0.0


def branch_scale(block: RepVGGBlock, x: Tensor) -> float:
    """The largest magnitude among the branches, whose sum may cancel or be cut by ReLU."""
    outputs = [block.rbr_dense(x), block.rbr_1x1(x)]
    if block.rbr_identity is not None:
        outputs.append(block.rbr_identity(x))
    return max(float(output.abs().max()) for output in outputs)


@st.composite
def blocks(draw: st.DrawFn) -> RepVGGBlock:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    in_channels = groups * draw(st.integers(1, 4))
    out_channels = draw(st.sampled_from([in_channels, groups * draw(st.integers(1, 4))]))
    block = block_of(
        in_channels,
        out_channels,
        stride=draw(st.sampled_from([1, 1, 2])),
        groups=groups,
        dilation=draw(st.sampled_from([1, 1, 2, 3])),
        seed=draw(st.integers(0, 2**16)),
    )
    for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        for channel in range(bn.num_features):
            with torch.no_grad():
                bn.running_var[channel] = draw(st.sampled_from([1e-10, 1e-5, 0.3, 1.0, 40.0]))  # type: ignore[index]
                bn.weight[channel] = draw(st.sampled_from([-2.0, -0.5, 0.0, 1e-6, 1.0, 3.0]))
    return block


@property_test
@given(
    block=blocks(),
    dtype=DTYPES,
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**16),
)
def test_a_fused_block_is_the_block(block, dtype, size, seed):
    """Output for output, within the data type's rounding of the branches that are summed.

    Tiny variances, negative and zero gammas, groups, strides, dilation and one-pixel images
    included.
    """
    block = in_type(block, dtype)
    x = images(2, block.rbr_dense.conv.in_channels, *size, seed=seed, dtype=dtype)
    with torch.no_grad():
        expected, actual = block(x), reparameterize(block)(x)
        scale = branch_scale(block, x)
    assert expected.shape == actual.shape
    assert dtype == actual.dtype
    assert float((expected - actual).abs().max()) <= TOLERANCE[dtype] * scale


@property_test
@given(
    variant=st.sampled_from([TINY, TINY_GROUPED]),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_a_fused_network_is_the_network(variant, dtype, seed, size):
    """Logits agree within the data type's rounding, for any image size."""
    original = in_type(network(variant, seed), dtype)
    x = images(2, 3, *size, seed=seed, dtype=dtype)
    assert relative_error(original, reparameterize(original), x) <= 3 * TOLERANCE[dtype]


def test_a_full_size_a0_fuses_exactly():
    """All 22 blocks of A0 in float64 agree within 1e-12 of the largest logit."""
    original = in_type(network(VARIANTS["A0"]), torch.float64)
    x = images(1, 3, 64, 64, dtype=torch.float64)
    assert relative_error(original, reparameterize(original), x) <= 1e-12


@pytest.mark.parametrize("alive", ["rbr_dense", "rbr_1x1", "rbr_identity"])
@pytest.mark.parametrize("groups", [1, 2])
def test_each_branch_alone_is_fused(alive, groups):
    """With the other branches' gammas at zero the block is one branch, and so is its kernel."""
    block = block_of(4, 4, groups=groups).double()
    branches = {
        "rbr_dense": block.rbr_dense.bn,
        "rbr_1x1": block.rbr_1x1.bn,
        "rbr_identity": block.rbr_identity,
    }
    for name, bn in branches.items():
        if name != alive:
            nn.init.zeros_(bn.weight)
            nn.init.zeros_(bn.bias)
    kernel, bias = fuse_block(block)
    x = images(1, 4, 5, 5, dtype=torch.float64)
    fused = functional.conv2d(x, kernel, bias, padding=1, groups=groups)
    alone = getattr(block, alive)(x)
    torch.testing.assert_close(fused, alone, rtol=1e-12, atol=1e-12)
    edge = kernel.clone()
    edge[:, :, 1, 1] = 0
    assert (alive == "rbr_dense") == bool(edge.any())


@given(per_group=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 2**16))
@property_test
def test_the_identity_kernel_is_the_identity(per_group, groups, seed):
    """A convolution with it returns its input bit for bit, whatever the groups."""
    channels = per_group * groups
    kernel = identity_kernel(channels, groups)
    x = images(1, channels, 3, 2, seed=seed, dtype=torch.float64)
    assert (channels, per_group, 1, 1) == tuple(kernel.shape)
    assert torch.equal(x, functional.conv2d(x, kernel, groups=groups))


def test_batch_norm_is_known_numbers():
    """gamma 6, mean 5, variance 4 - eps, beta 1: outputs triple, and 15 less than beta is added."""
    mean, var, gamma, beta = (torch.tensor([value]) for value in (5.0, 3.5, 6.0, 1.0))
    factor, shift = batch_norm_factors(mean, var, gamma, beta, 0.5)
    assert (3.0, -14.0) == (factor.item(), shift.item())
    assert torch.float64 == factor.dtype == shift.dtype


def test_batch_norm_without_affine_is_fused():
    """Missing gamma and beta mean one and zero."""
    block = block_of()
    for branch in (block.rbr_dense, block.rbr_1x1):
        branch.bn = nn.BatchNorm2d(4, affine=False)
    block.rbr_identity = nn.BatchNorm2d(4, affine=False)
    block = randomized(block, 3).double()
    x = images(2, 4, 6, 6, dtype=torch.float64)
    assert relative_error(block, reparameterize(block), x) <= 1e-12


def test_batch_norm_without_a_bias_is_fused():
    """A missing beta alone means zero."""
    block = block_of().double()
    block.rbr_identity.bias = None
    x = images(2, 4, 6, 6, dtype=torch.float64)
    assert relative_error(block, reparameterize(block), x) <= 1e-12


def test_batch_norm_without_running_statistics_is_refused_by_name():
    """No fixed kernel equals batch statistics; the error names the block."""
    original = network()
    original.stage2[1].rbr_1x1.bn = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(ValueError, match=r"^block stage2\.1: BatchNorm without running statistics"):
        reparameterize(original.eval())


class Halved(RepVGGBlock):
    """A block that computes something else than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_a_subclass_with_another_forward_keeps_it():
    """What comes after the branches in a forward of its own stays."""
    original = nn.Sequential(Halved(TINY.layers[0])).double().eval()
    fused = reparameterize(original)
    assert ["0"] == list(fused_convolutions(fused))
    assert relative_error(original, fused, images(1, 3, 8, 8, dtype=torch.float64)) <= 1e-12


def test_a_kernel_beyond_the_data_type_is_refused():
    """A fused weight that half cannot hold is an error, not an Inf in the network."""
    block = block_of()
    nn.init.constant_(block.rbr_dense.bn.weight, 60_000.0)
    nn.init.constant_(block.rbr_dense.conv.weight, 100.0)
    with pytest.raises(ValueError, match=r"^block 0: the fused kernel .* in torch\.float16$"):
        reparameterize(nn.Sequential(block).half().eval())


def test_another_activation_is_kept():
    """A block whose ReLU was exchanged keeps the exchanged activation."""
    block = block_of().double()
    block.nonlinearity = nn.SiLU().eval()
    fused = reparameterize(block)
    assert isinstance(fused.nonlinearity, nn.SiLU)
    assert fused.nonlinearity is not block.nonlinearity
    assert relative_error(block, fused, images(1, 4, 5, 5, dtype=torch.float64)) <= 1e-12


def test_a_spike_survives_a_float64_fusion_and_not_a_float32_one():
    """Branches that nearly cancel lose digits when they are added in float32.

    gamma / sigma of 3x3 and 1x1 are about +1e6 and -1e6; what remains of the centre tap is of the
    order of 1. The judge is the block in float64.
    """
    block = block_of(8, 8)
    for child in block.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.uniform_(-1, 1)
            child.running_var.uniform_(1e-10, 3e-10)
            child.eps = 1e-12
    with torch.no_grad():
        block.rbr_dense.bn.weight.fill_(10)
        block.rbr_1x1.conv.weight.copy_(block.rbr_dense.conv.weight[:, :, 1:2, 1:2])
        block.rbr_1x1.bn.weight.fill_(-10)
        block.rbr_1x1.bn.running_var.copy_(block.rbr_dense.bn.running_var * (1 + 1e-6))
        block.rbr_1x1.bn.running_mean.copy_(block.rbr_dense.bn.running_mean)
        block.rbr_dense.conv.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        block.rbr_identity.weight.fill_(1e-6)
    exact_kernel, exact_bias = fuse_block(copy.deepcopy(block).double())
    fused = reparameterize(block).rbr_reparam
    naive_kernel, naive_bias = float32_fusion(block)
    assert torch.float32 == fused.weight.dtype == naive_kernel.dtype

    def worst(kernel: Tensor, bias: Tensor) -> float:
        return max(
            float((kernel - exact_kernel).abs().max() / exact_kernel.abs().max()),
            float((bias - exact_bias).abs().max() / exact_bias.abs().max()),
        )

    assert worst(fused.weight.detach(), fused.bias.detach()) <= torch.finfo(torch.float32).eps
    assert worst(naive_kernel, naive_bias) >= 1e3 * torch.finfo(torch.float32).eps


@torch.no_grad()
def float32_fusion(block: RepVGGBlock) -> tuple[Tensor, Tensor]:
    """The same algebra as the official code has it, in float32 throughout."""

    def folded(kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        std = (bn.running_var + bn.eps).sqrt()
        factor = (bn.weight / std).reshape(-1, 1, 1, 1)
        return kernel * factor, bn.bias - bn.running_mean * bn.weight / std

    channels = block.rbr_dense.conv.in_channels
    eye = torch.zeros(channels, channels, 3, 3)
    eye[range(channels), range(channels), 1, 1] = 1
    dense, dense_bias = folded(block.rbr_dense.conv.weight, block.rbr_dense.bn)
    point, point_bias = folded(block.rbr_1x1.conv.weight, block.rbr_1x1.bn)
    unit, unit_bias = folded(eye, block.rbr_identity)
    return dense + functional.pad(point, [1, 1, 1, 1]) + unit, dense_bias + point_bias + unit_bias


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """All that reparameterize() could touch."""
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "modules": {name: id(child) for name, child in module.named_modules()},
        "training": {name: child.training for name, child in module.named_modules()},
        "hooks": {n: list(child._forward_hooks.items()) for n, child in module.named_modules()},
        "gradients": {name: p.requires_grad for name, p in module.named_parameters()},
        "storage": {name: p.data_ptr() for name, p in module.named_parameters()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    state, later = before.pop("state"), after.pop("state")
    assert before == after
    assert state.keys() == later.keys()
    assert [] == [name for name in state if not torch.equal(state[name], later[name])]


def test_the_callers_module_is_bit_identical_afterwards():
    """State, modules, training flags, hooks and storage are what they were, in mixed modes too."""
    original = network()
    original.train()
    original.stage1.eval()
    original.linear.register_forward_hook(lambda *_: None)
    before = fingerprint(original)
    with pytest.warns(TrainModeWarning):
        fused = reparameterize(original)
    block_equivalence(original, fused, images(2, 3, 32, 32))
    assert_same(before, fingerprint(original))


def test_the_fused_network_shares_no_storage_with_the_original():
    """Writing into the fused network cannot reach the trained one."""
    original = network()
    fused = reparameterize(original)
    pointers = {p.data_ptr() for p in original.parameters()}
    assert not pointers & {p.data_ptr() for p in fused.parameters()}


def test_fusion_draws_no_random_numbers():
    """Fusing in the middle of a seeded training leaves the generator where it was."""
    original = network()
    before = torch.random.get_rng_state()
    reparameterize(original)
    assert torch.equal(before, torch.random.get_rng_state())


def test_train_mode_warns_and_gives_the_eval_network():
    """A network in train() mode is fused as its eval() form, and the warning says so."""
    original = network().double()
    with pytest.warns(TrainModeWarning, match=r"in train\(\) mode; a copy switched to eval\(\)"):
        fused = reparameterize(original.train())
    assert original.training
    assert not any(child.training for child in fused.modules())
    x = images(2, 3, 40, 40, dtype=torch.float64)
    assert relative_error(original.eval(), fused, x) <= 1e-12


def test_one_forgotten_batch_norm_in_train_mode_warns():
    """The mode of every submodule counts, not only the outermost."""
    original = network()
    original.stage3[1].rbr_dense.bn.train()
    with pytest.warns(TrainModeWarning):
        reparameterize(original)


def test_eval_mode_does_not_warn():
    """A network in eval() mode is fused silently."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparameterize(network())


def test_eval_mode_gives_every_flag_back_after_an_error():
    """Mixed training flags return also when the body raises."""
    original = network().train()
    original.stage1.eval()
    before = fingerprint(original)
    seen = []

    def fail() -> None:
        with eval_mode(original):
            seen.extend(child.training for child in original.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(seen)
    assert_same(before, fingerprint(original))


class Backbone(nn.Module):
    """RepVGG blocks among other layers, at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.first = block_of()
        self.body = nn.ModuleDict({"a": nn.Sequential(block_of(seed=1), nn.BatchNorm2d(4))})
        self.drop = nn.Dropout(0.5)
        self.head = nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body["a"](self.first(self.stem(x)))))


def test_nested_blocks_are_replaced_and_others_left():
    """Any module's RepVGG blocks are fused where they are; every other layer keeps its kind."""
    original = Backbone().double().eval()
    fused = reparameterize(original)
    kinds = {name: type(child) for name, child in fused.named_modules()}
    assert not any(isinstance(child, RepVGGBlock) for child in fused.modules())
    assert PlainBlock == kinds["first"] == kinds["body.a.0"]
    assert kinds["stem"] is nn.Conv2d
    assert kinds["body.a.1"] is nn.BatchNorm2d
    assert kinds["head"] is nn.ConvTranspose2d
    x = images(1, 3, 8, 8, dtype=torch.float64)
    assert relative_error(original, fused, x) <= 1e-12


def test_a_bare_block_is_fused():
    """A block that is the whole module becomes one convolution."""
    block = block_of(3, 6, stride=2).double()
    fused = reparameterize(block)
    assert isinstance(fused, PlainBlock)
    x = images(1, 3, 7, 5, dtype=torch.float64)
    assert relative_error(block, fused, x) <= 1e-12
    assert [""] == [result.name for result in block_equivalence(block, fused, x)]


@pytest.mark.parametrize("make", [lambda: RepVGG(TINY, deploy=True), lambda: nn.Linear(3, 2)])
def test_a_module_without_branches_is_copied(make: Callable[[], nn.Module]):
    """What has nothing to fuse comes back as an equal copy."""
    original = make().eval()
    copied = reparameterize(original)
    assert copied is not original
    assert type(original) is type(copied)
    state = copied.state_dict()
    assert original.state_dict().keys() == state.keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.data_ptr() != state[name].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_data_type_is_kept_and_rounded_once(dtype):
    """The fused weights are the float64 fusion rounded to the block's own type."""
    block = block_of().to(dtype)
    fused = reparameterize(block).rbr_reparam
    kernel, bias = fuse_block(block)
    assert dtype == fused.weight.dtype == fused.bias.dtype
    assert torch.equal(kernel.to(dtype), fused.weight)
    assert torch.equal(bias.to(dtype), fused.bias)


def test_the_deploy_state_has_the_official_names():
    """Keys and shapes of a fused network are those of the official deploy checkpoints."""
    state = reparameterize(network()).state_dict()
    blocks = [layer.name for layer in TINY.layers]
    expected = [f"{n}.rbr_reparam.{kind}" for n in blocks for kind in ("weight", "bias")]
    assert [*expected, "linear.weight", "linear.bias"] == list(state)
    RepVGG(TINY, num_classes=5, deploy=True).load_state_dict(state, strict=True)


def test_block_equivalence_names_every_block_in_order():
    """One result a block, under the official name, with errors of rounding size."""
    original = network().double()
    x = images(2, 3, 48, 48, dtype=torch.float64)
    results = block_equivalence(original, reparameterize(original), x)
    assert [layer.name for layer in TINY.layers] == [result.name for result in results]
    assert all(0 <= result.relative <= 1e-12 for result in results)


@pytest.mark.parametrize("damaged", ["stage0", "stage2.1", "stage4.0"])
def test_block_equivalence_catches_exactly_the_damaged_block(damaged):
    """A wrong weight shows in its own block and in none behind it."""
    original = network().double()
    fused = reparameterize(original)
    with torch.no_grad():
        fused.get_submodule(damaged).rbr_reparam.bias.add_(1.0)
    results = block_equivalence(original, fused, images(2, 3, 48, 48, dtype=torch.float64))
    assert [damaged] == [result.name for result in results if result.relative > 1e-6]
    worst = {result.name: result for result in results}[damaged]
    assert worst.max_abs == pytest.approx(1.0)


def test_block_equivalence_reports_nan():
    """A block that gives NaN has a NaN error, which no tolerance passes."""
    original = network()
    fused = reparameterize(original)
    nn.init.constant_(fused.stage0.rbr_reparam.bias, torch.nan)
    first, *others = block_equivalence(original, fused, images(1, 3, 32, 32))
    assert not first.relative <= 1e30
    assert all(result.relative <= 1e-4 for result in others)


def test_block_equivalence_of_a_silent_block_is_absolute():
    """Where the original gives only zeros the relative error is the absolute one."""
    block = block_of()
    for bn in (block.rbr_dense.bn, block.rbr_1x1.bn, block.rbr_identity):
        nn.init.zeros_(bn.weight)
        nn.init.constant_(bn.bias, -1.0)
    fused = reparameterize(block)
    (exact,) = block_equivalence(block, fused, images(1, 4, 3, 3))
    assert (0.0, 0.0) == (exact.max_abs, exact.relative)
    nn.init.constant_(fused.rbr_reparam.bias, 0.25)
    (off,) = block_equivalence(block, fused, images(1, 4, 3, 3))
    assert (0.25, 0.25) == (off.max_abs, off.relative)


def test_block_equivalence_refuses_unlike_networks():
    """A network that lacks one of the blocks is refused by the block's name."""
    shallow = Variant(name="s", num_blocks=(1, 2, 3, 1), width_multiplier=TINY.width_multiplier)
    other = RepVGG(shallow, deploy=True)
    with pytest.raises(ValueError, match=r"^the fused module has no block stage1\.1$"):
        block_equivalence(network(), other, images(1, 3, 32, 32))


def test_block_equivalence_of_a_network_in_train_mode_uses_eval_mode():
    """Batch statistics neither enter the comparison nor are updated by it."""
    original = network().double()
    fused = reparameterize(original)
    original.train()
    before = fingerprint(original)
    results = block_equivalence(original, fused, images(2, 3, 32, 32, dtype=torch.float64))
    assert all(result.relative <= 1e-12 for result in results)
    assert_same(before, fingerprint(original))
