"""Blocks are found by what they compute, in anybody's classes; what is none is refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from models.equivalence import block_equivalence
from models.fusion import (
    UntraceableWarning,
    fused_convolutions,
    reparameterize,
)
from models.repvgg import (
    POST_NORM,
    QAREPVGG,
    BlockStyle,
    Branch,
    RepVGG,
    RepVGGBlock,
    mobileone,
)
from models.variants import ConvLayer, Squeeze, Variant

STYLES = {
    "no identity branch": BlockStyle(identity=Branch.NONE),
    "no 1x1 branch": BlockStyle(point=Branch.NONE),
    "post-addition BN": POST_NORM,
    "QARepVGG": QAREPVGG,
    "MobileOne": mobileone(3),
    "MobileOne with skip": mobileone(4, skip=True),
    "3x3 twice, identity plain": BlockStyle(dense_branches=2, identity=Branch.PLAIN),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def settled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics, negative gammas included, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d) and child.running_mean is not None:
            child.running_mean.normal_(generator=generator)
            child.running_var.uniform_(0.1, 2, generator=generator)
            if child.affine:
                nn.init.normal_(child.weight, generator=generator)
                nn.init.normal_(child.bias, generator=generator)
    return module.double().eval()


def fused_equals(original: nn.Module, *inputs: Tensor, blocks: int) -> nn.Module:
    """``original`` fuses into ``blocks`` convolutions and computes the same; returns the fused."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = reparameterize(original)
    assert blocks == len(fused_convolutions(fused))
    left = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        expected, actual = original(*inputs), fused(*inputs)
    if isinstance(expected, Tensor):
        expected, actual = [expected], [actual]
    for wanted, found in zip(expected, actual, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert [] == left
    return fused


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(inputs: int = 4, outputs: int = 4, **options: object) -> ConvLayer:
    values = {"stride": 1, "groups": 1, **options}
    return ConvLayer(name="b", in_channels=inputs, out_channels=outputs, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_every_style_of_block_fuses_exactly(style, stride, dilation):
    """The paper's ablations, QARepVGG and MobileOne become one convolution each."""
    block = settled(RepVGGBlock(layer(stride=stride, dilation=dilation, groups=2), style))
    fused = fused_equals(block, image(2, 4, 9, 7), blocks=1)
    (conv,) = fused_convolutions(fused).values()
    assert ((3, 3), (dilation, dilation), (stride, stride)) == (
        conv.kernel_size,
        conv.dilation,
        conv.stride,
    )


@pytest.mark.parametrize("squeeze", [Squeeze.BEFORE_RELU, Squeeze.AFTER_RELU])
def test_squeeze_and_excitation_stays_and_the_branches_before_it_fuse(squeeze):
    """D2se's and RepVGGplus's blocks keep their gate, on either side of the ReLU."""
    block = settled(RepVGGBlock(layer(squeeze=squeeze, squeeze_channels=2)))
    fused_equals(block, image(2, 4, 6, 6), blocks=1)


@given(
    style=st.sampled_from(list(STYLES.values())),
    groups=st.sampled_from([1, 2]),
    squeeze=st.sampled_from(list(Squeeze)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_whole_networks_of_every_style_fuse_exactly(style, groups, squeeze, seed):
    """Each block of the network is found, under its own name."""
    variant = Variant(
        name="t",
        num_blocks=(1, 2, 1, 1),
        width_multiplier=(0.125, 0.125, 0.0625, 0.0625),
        groups=groups,
        squeeze=squeeze,
        squeeze_reduction=4,
    )
    torch.manual_seed(seed)
    network = settled(RepVGG(variant, num_classes=3, style=style), seed)
    fused = fused_equals(network, image(1, 3, 33, 40, seed=seed), blocks=6)
    assert [item.name for item in variant.layers] == list(fused_convolutions(fused))
    results = block_equivalence(network, fused, image(1, 3, 33, 40))
    assert 6 == len(results)
    assert all(result.max_abs < 1e-9 for result in results)


def conv_bn(inputs: int, outputs: int, kernel: int, **options: int) -> nn.Sequential:
    padding = options.pop("padding", kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class InYoloStyle(nn.Module):
    """``0 + branch`` where there is no identity, as detectors write it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride=stride)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride=stride)
        self.se = nn.Identity()
        self.nonlinearity = nn.SiLU()

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        total = self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out
        return self.nonlinearity(self.se(total))


class NormThatAsserts(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, an assertion, a functional call and an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, factor,
            self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = NormThatAsserts(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.training else x


class InTimmStyle(nn.Module):
    """In-place sums, drop path and attention slots, norms with functions inside."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        use_identity = inputs == outputs and stride == 1
        self.identity = NormThatAsserts(outputs) if use_identity else None
        self.conv_kxk = ConvNorm(inputs, outputs, 3, stride)
        self.conv_1x1 = ConvNorm(inputs, outputs, 1, stride)
        self.drop_path = DropPath()
        self.attn = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.identity is None:
            x = self.conv_1x1(x) + self.conv_kxk(x)
        else:
            identity = self.identity(x)
            x = self.conv_1x1(x) + self.conv_kxk(x)
            x = self.drop_path(x)
            x += identity
        return self.act(self.attn(x))


class Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, self.channels, 1, 1)


class InLinearAddStyle(nn.Module):
    """Scaled bias-free convolutions, one BatchNorm after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.scale_conv = Scale(channels)
        self.conv_1x1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.scale_1x1 = Scale(channels)
        self.scale_identity = Scale(channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        out += self.scale_identity(x)
        return torch.relu(self.bn(out))


class InMobileOneStyle(nn.Module):
    """A loop over branches that starts from zero."""

    def __init__(self, channels: int, branches: int = 3) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(channels)
        self.rbr_conv = nn.ModuleList(
            conv_bn(channels, channels, 3, groups=channels) for _ in range(branches)
        )
        self.rbr_scale = conv_bn(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rbr_scale(x) + self.rbr_skip(x)
        for branch in self.rbr_conv:
            out += branch(x)
        return functional.gelu(out)


class InOneForward(nn.Module):
    """Two blocks written out in one forward, with names of the user's own and mixed kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mid, self.point = (conv_bn(4, 4, k) for k in (5, 3, 1))
        self.strip = nn.Conv2d(4, 6, (1, 3), stride=2, padding=(0, 1))
        self.square = conv_bn(4, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.wide(x) + self.mid(x) + self.point(x) + x)
        return torch.add(self.square(y), self.strip(y)).clamp(min=0)


@pytest.mark.parametrize(
    ("module", "channels", "blocks"),
    [
        (nn.Sequential(InYoloStyle(3, 4, stride=2), InYoloStyle(4, 4)), 3, 2),
        (nn.Sequential(InTimmStyle(3, 4, stride=2), InTimmStyle(4, 4)), 3, 2),
        (InLinearAddStyle(4), 4, 1),
        (InMobileOneStyle(4), 4, 1),
        (InOneForward(), 4, 2),
    ],
    ids=["yolov6", "timm", "linear-add", "mobileone", "one forward"],
)
def test_other_peoples_blocks_are_found_by_structure(module, channels, blocks):
    """Class and attribute names do not matter, nor do in-place sums and functional norms."""
    fused_equals(settled(module), image(2, channels, 12, 10), blocks=blocks)


def test_branches_of_different_grouping_become_the_coarser_one():
    """A depthwise 3x3 beside a grouped 1x1 fuses into the groups of the 1x1."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = conv_bn(8, 8, 3, groups=8)
            self.point = conv_bn(8, 8, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.deep(x) + self.point(x) + x)

    (conv,) = fused_convolutions(
        fused_equals(settled(Mixed()), image(1, 8, 5, 5), blocks=1)
    ).values()
    assert 2 == conv.groups


def test_blocks_inside_a_larger_network_are_fused_and_the_rest_stays():
    """Residuals, plain convolutions, transposed ones and several outputs are left as they are."""

    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv_bn(3, 4, 3, stride=2)
            self.body = nn.ModuleList(InYoloStyle(4, 4) for _ in range(2))
            self.residual = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.relu(self.stem(x))
            first = self.body[0](x) * mask
            second = self.residual(first) + first
            return self.up(self.body[1](second)), first

    original = settled(Larger())
    fused = reparameterize(original)
    assert ["body.0", "body.1"] == sorted(fused_convolutions(fused))
    inputs = image(1, 3, 8, 8), image(1, 1, 4, 4, seed=1)
    with torch.no_grad():
        for wanted, found in zip(original(*inputs), fused(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert {"body.0", "body.1"} == {b.name for b in block_equivalence(original, fused, *inputs)}
    assert isinstance(fused.stem[1], nn.BatchNorm2d)


class Lookalike(nn.Module):
    """A block whose parts the refusals below exchange."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.dense, self.point = conv_bn(4, 4, 3), conv_bn(4, 4, 1)
        self.identity: nn.Module = nn.BatchNorm2d(4)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.dense(x) + self.point(x) + self.identity(x))


def with_relu(kernel: int) -> nn.Sequential:
    return nn.Sequential(*conv_bn(4, 4, kernel), nn.ReLU())


def shared_norm() -> Lookalike:
    norm = nn.BatchNorm2d(4)
    return Lookalike(
        dense=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm),
        point=nn.Sequential(nn.Conv2d(4, 4, 1), norm),
    )


def hooked() -> Lookalike:
    block = Lookalike()
    block.point.register_forward_hook(lambda *_: None)
    block.point[0].register_forward_pre_hook(lambda *_: None)
    return block


def weight_normed() -> Lookalike:
    conv = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    return Lookalike(dense=nn.Sequential(conv, nn.BatchNorm2d(4)))


def without_statistics() -> Lookalike:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return Lookalike(point=nn.Sequential(nn.Conv2d(4, 4, 1), norm))


REFUSED = {
    "a ReLU in the 3x3 branch": (
        lambda: Lookalike(dense=with_relu(3)),
        r"a nonlinearity \(ReLU, dense_2\) stands inside a branch",
    ),
    "a ReLU in the 1x1 branch": (
        lambda: Lookalike(point=with_relu(1)),
        r"a nonlinearity \(ReLU, point_2\) stands inside a branch",
    ),
    "a BatchNorm without statistics": (
        without_statistics,
        r"BatchNorm without running statistics .* \(point.1\)",
    ),
    "a padding that shifts": (
        lambda: Lookalike(dense=conv_bn(4, 4, 3, padding=2, dilation=1)),
        r"do not line up: kernel \(3, 3\) with padding \(2, 2\)",
    ),
    "a module used in two branches": (shared_norm, r"the module \S+ is used 2 times"),
    "hooks": (hooked, r"point.0 has hooks, which fusing would drop"),
    "weight norm": (weight_normed, r"dense.0 has a parametrization \(such as weight norm\)"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_looks_like_a_block_and_is_none_is_refused_by_name(make, message):
    """The block's name and the reason are in the error."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), make()).double().eval()
    with pytest.raises(ValueError, match=rf"^block 1: .*{message}"):
        reparameterize(network)


def test_branches_of_different_stride_are_refused():
    """Strides that would not even add are named before anything runs."""
    block = Lookalike(dense=conv_bn(4, 4, 3, stride=2))
    with pytest.raises(ValueError, match=r"branches of stride \(2, 2\) and \(1, 1\) are added"):
        reparameterize(block.eval())


def test_a_block_that_is_used_twice_is_refused():
    """Once registered under two names, once called twice: both are named."""
    block = Lookalike()
    with pytest.raises(ValueError, match=r"block 0: .*used in several places: 0, 1"):
        reparameterize(nn.Sequential(block, block).eval())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Lookalike()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    with pytest.raises(ValueError, match=r"the block block is used 2 times"):
        reparameterize(Twice().eval())


def test_a_branch_whose_result_is_used_elsewhere_is_refused():
    """Fusing would leave the branch in place for its other reader."""

    class Tapped(Lookalike):
        def forward(self, x: Tensor) -> Tensor:
            dense = self.dense(x)
            return torch.relu(dense + self.point(x)) * torch.sigmoid(dense)

    with pytest.raises(ValueError, match=r"is also used by"):
        reparameterize(Tapped().eval())


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        type(
            "Residual",
            (Lookalike,),
            {"forward": lambda self, x: torch.relu(self.dense(torch.relu(self.dense(x))) + x)},
        )(),
        type(
            "Bottleneck",
            (Lookalike,),
            {"forward": lambda self, x: self.dense(torch.relu(self.point(x))) + self.point(x)},
        )(),
        type(
            "TwoSources",
            (Lookalike,),
            {"forward": lambda self, x: self.dense(x) + self.point(torch.tanh(x))},
        )(),
    ],
    ids=["plain", "residual", "bottleneck", "two sources"],
)
def test_ordinary_networks_are_left_alone(module):
    """Plain layers and residual blocks of other families are neither fused nor refused."""
    fused = reparameterize(module.eval())
    assert {} == fused_convolutions(fused)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(fused(x), module(x))


def test_a_part_that_cannot_be_traced_is_left_with_a_warning():
    """Control flow on values hides what is inside; the rest is fused."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.mean() > 0 else x

    network = settled(nn.Sequential(InYoloStyle(4, 4), Gate()))
    with pytest.warns(UntraceableWarning, match="block 1 was not searched"):
        fused = reparameterize(network)
    assert ["0"] == list(fused_convolutions(fused))
