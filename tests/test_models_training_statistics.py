"""The network remembers its preprocessing: every mistake is named, and good images are not blamed.

The networks are untrained, but their BatchNorms have settled on colour pictures in one
preprocessing, which is all that is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration.decoding import PixelMemory, batches
from calibration.images import ImageFolder, Preprocess
from models.checkpoint import load_checkpoint
from models.first_norms import IDENTITY, FirstNorms
from models.fusion import reparameterize
from models.registry import bundled_weights
from models.repvgg import POST_NORM, QAREPVGG, REPVGG, BlockStyle, RepVGG, mobileone
from models.training_statistics import (
    NORMALIZATIONS,
    Hypothesis,
    TrainingFit,
    fit_training_statistics,
    hypotheses,
    normalization,
)
from models.variants import Variant

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Variant(name="T", num_blocks=(1, 1, 1, 1), width_multiplier=(0.25, 0.1, 0.1, 0.02))
NAMES = [h.name for h in NORMALIZATIONS]
PLAIN = {h.name: h for h in NORMALIZATIONS}
SWAPPED = {h.name: h for h in hypotheses((0.25,) * 3, (0.3,) * 3) if h.swapped}


def photographs(count: int, seed: int, size: int = 32) -> Tensor:
    """Pictures ``[count, 3, size, size]`` on [0, 1] with the colour statistics of photographs.

    Channels go together, red is the brightest on the mean and blue varies most, neighbours are
    alike, and every picture has a light and a tint of its own.
    """
    random = np.random.default_rng(seed)
    coarse = random.normal(0, 0.16, (count, 1, size // 4, size // 4)).repeat(4, 2).repeat(4, 3)
    fine = random.normal(0, 0.06, (count, 1, size, size))
    light = random.normal(0, 0.1, (count, 1, 1, 1))
    tint = random.normal(0, 1, (count, 3, 1, 1)) * np.array([0.03, 0.04, 0.12]).reshape(1, 3, 1, 1)
    colour = random.normal(0, 0.05, (count, 3, size // 4, size // 4)).repeat(4, 2).repeat(4, 3)
    mean = np.array([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    pixels = np.clip(mean + coarse + fine + light + tint + colour, 0, 1)
    return torch.from_numpy(pixels.astype(np.float32))


TRAINING, GIVEN = photographs(192, seed=1), photographs(64, seed=2)


def prepared(pixels: Tensor, how: Hypothesis) -> Tensor:
    """By the definition, one channel at a time."""
    order = (2, 1, 0) if how.swapped else (0, 1, 2)
    channels = [
        (pixels[:, source] - how.mean[target]) / how.std[target]
        for target, source in enumerate(order)
    ]
    return torch.stack(channels, 1)


def settled(network: nn.Module, images: Tensor) -> nn.Module:
    """Let the running statistics become exactly those of ``images``."""
    for child in network.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = None
    network.train()
    with torch.no_grad():
        network(images)
    return network.eval()


def tiny(seed: int = 0, style: BlockStyle = REPVGG) -> RepVGG:
    torch.manual_seed(seed)
    return RepVGG(TINY, num_classes=4, style=style)


def fit(network: nn.Module, how: Hypothesis, pixels: Tensor = GIVEN) -> TrainingFit | None:
    """``pixels`` prepared as ``how`` says, and said to be."""
    images = prepared(pixels, how)
    return fit_training_statistics(network, images.split(10), mean=how.mean, std=how.std)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_images_of_the_right_kind_are_not_blamed(name: str, seed: int) -> None:
    """Other images in the training preprocessing are at a distance of about 0.01 or less."""
    found = fit(settled(tiny(seed), prepared(TRAINING, PLAIN[name])), PLAIN[name])
    assert found is not None
    assert (None, False, 64) == (found.mistake, found.foreign, found.images)
    assert found.given < 0.012


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("trained", NAMES)
def test_a_wrong_normalization_is_named(trained: str, given: str) -> None:
    """Whatever of the usual normalizations was used in place of another, the right one is named."""
    found = fit(settled(tiny(), prepared(TRAINING, PLAIN[trained])), PLAIN[given])
    assert found is not None
    assert (trained if trained != given else None) == (found.mistake and found.mistake.name)


@pytest.mark.parametrize("name", SWAPPED)
def test_training_in_bgr_is_named(name: str) -> None:
    """Blue-green-red order is named together with the normalization that went with it."""
    trained = SWAPPED[name]
    network = settled(tiny(), prepared(TRAINING, trained))
    found = fit(network, normalization("mine", (0.25,) * 3, (0.3,) * 3))
    assert found is not None
    assert trained == found.mistake


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_alone_is_told(seed: int) -> None:
    """OpenCV's order with the right means, and nothing else wrong, is seen in every network."""
    imagenet = PLAIN["imagenet"]
    trained = next(
        h for h in hypotheses(imagenet.mean, imagenet.std) if h.name == "given-bgr-unmatched"
    )
    found = fit(settled(tiny(seed), prepared(TRAINING, trained)), imagenet)
    assert found is not None
    assert trained == found.mistake
    assert found.times_better > 3


def test_an_own_hypothesis_is_tried() -> None:
    """A normalization that nobody else uses is found where it is known from elsewhere."""
    own = normalization("own", (0.3, 0.32, 0.34), (0.35, 0.35, 0.35))
    network = settled(tiny(), prepared(TRAINING, own))
    imagenet = PLAIN["imagenet"]
    images = prepared(GIVEN, imagenet)
    without = fit_training_statistics(network, [images], mean=imagenet.mean, std=imagenet.std)
    assert without is not None
    assert (None, True) == (without.mistake, without.foreign)
    found = fit_training_statistics(
        network, [images], mean=imagenet.mean, std=imagenet.std, candidates=[*NORMALIZATIONS, own]
    )
    assert found is not None
    assert own == found.mistake


def test_the_order_needs_no_knowledge_of_the_normalization() -> None:
    """Of images made nobody knows how a swap is still seen, and nothing else is tried."""
    mean, std = (0.0,) * 3, (1.0,) * 3
    own = normalization("own", (0.3, 0.3, 0.3), (0.35, 0.35, 0.35))
    images = prepared(GIVEN, own)
    for training in (images, images.flip(1)):
        network = settled(tiny(), training)
        found = fit_training_statistics(network, [images], mean=mean, std=std, candidates=())
        assert found is not None
        assert ["given-bgr"] == list(found.distances)
        assert (training is not images) == (found.mistake is not None)


def test_grey_images_are_silent_about_the_order() -> None:
    """Grey pictures fit either order alike, so that no swap is read from them."""
    grey = GIVEN.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    unit = PLAIN["unit"]
    for training in (TRAINING, TRAINING.mean(1, keepdim=True).expand(-1, 3, -1, -1)):
        found = fit(settled(tiny(), prepared(training, unit)), unit, grey)
        assert found is not None
        assert found.distances["given-bgr"] == pytest.approx(found.given, rel=1e-4)
        assert (None, False) == (found.mistake, found.best.swapped)


OTHER_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "dark": lambda pixels: pixels * 0.4,
    "bright": lambda pixels: 1 - (1 - pixels) * 0.4,
    "negative": lambda pixels: 1 - pixels,
    "sea": lambda pixels: (pixels + torch.tensor([-0.2, 0, 0.2]).view(3, 1, 1)).clamp(0, 1),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_images_of_another_kind_are_not_called_a_wrong_preprocessing(name: str, kind: str) -> None:
    """Dark, bright, negative or blue pictures are far from training, and no hypothesis fits."""
    how = PLAIN[name]
    found = fit(settled(tiny(), prepared(TRAINING, how)), how, OTHER_KINDS[kind](GIVEN))
    assert found is not None
    assert found.mistake is None
    assert found.foreign == (found.given > 0.3)
    assert found.given > 0.02


def test_few_images_are_never_foreign() -> None:
    """Below 16 images a large distance may be chance."""
    how = PLAIN["imagenet"]
    network = settled(tiny(), prepared(TRAINING, how))
    dark = GIVEN * 0.3
    many, few = fit(network, how, dark[:16]), fit(network, how, dark[:15])
    assert many is not None
    assert few is not None
    assert (True, False) == (many.foreign, few.foreign)


def test_the_bundled_network_and_its_images_agree() -> None:
    """A0 as trained is 0.0005 away from its calibration images, and far from every other scale."""
    bundled = bundled_weights("A0")
    assert bundled is not None
    preprocess = Preprocess.from_json(bundled.preprocess)
    network = load_checkpoint(bundled.checkpoint).module
    folder = ImageFolder.open(bundled.calibration_images).take(64)
    images = [torch.from_numpy(batch) for batch in batches(folder, PixelMemory(preprocess), 16)]
    found = fit_training_statistics(network, images, mean=preprocess.mean, std=preprocess.std)
    assert found is not None
    assert (None, False) == (found.mistake, found.foreign)
    assert found.given < 0.002
    plain = {name: found.distances[name] for name in NAMES}
    assert min(plain.values()) > 0.1


@pytest.mark.parametrize(
    "style", [REPVGG, QAREPVGG, POST_NORM, mobileone(2)], ids=["repvgg", "qa", "post", "mobileone"]
)
def test_every_kind_of_block_remembers(style: BlockStyle) -> None:
    """One BatchNorm a branch, several, or one after the sum: all tell the preprocessing."""
    network = settled(tiny(style=style), prepared(TRAINING, PLAIN["unit"]))
    found = fit(network, PLAIN["imagenet"])
    assert found is not None
    assert PLAIN["unit"] == found.mistake


class Normalizing(nn.Module):
    """A network that normalizes by itself and counts how often it ran to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.late = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.finished = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.norm(self.first((x - 0.45) / 0.25)))
        self.finished += 1
        return x


def test_a_network_that_normalizes_by_itself_is_understood() -> None:
    """What counts is the tensor that it was given in training, here [0, 1]."""
    network = settled(Normalizing(), TRAINING)
    found = fit(network, PLAIN["imagenet"])
    assert found is not None
    assert PLAIN["unit"] == found.mistake


def test_the_network_is_not_run_to_its_end_and_left_as_it_was() -> None:
    """It is run no further than its BatchNorms, and neither a hook nor a changed value is left."""
    network = settled(Normalizing(), TRAINING)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    finished = network.finished
    assert fit(network, PLAIN["unit"]) is not None
    assert finished == network.finished
    assert all(not child._forward_pre_hooks for child in network.modules())
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())


def test_a_relu_that_faint_images_would_pass_is_seen() -> None:
    """A BatchNorm settled on 0..255 lifts images on [0, 1] above zero, which hides no ReLU."""
    network = Normalizing()
    nn.init.constant_(network.norm.bias, 20.0)
    network = settled(network, TRAINING * 255)
    first = FirstNorms.find(network, GIVEN[0])
    assert first is not None
    assert [network.norm] == list(first._norms)


def test_only_batch_norms_before_every_nonlinearity_are_asked() -> None:
    """The BatchNorm behind a ReLU is left out; where there is no other, nothing is said."""
    network = settled(Normalizing(), TRAINING)
    first = FirstNorms.find(network, TRAINING[0])
    assert first is not None
    assert [network.norm] == list(first._norms)
    behind = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), TRAINING)
    assert fit(behind, PLAIN["unit"]) is None


SILENT: dict[str, Callable[[], nn.Module]] = {
    "deploy form": lambda: reparameterize(settled(tiny(), TRAINING)),
    "untrained": lambda: tiny().eval(),
    "no BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(),
    "no statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    ).eval(),
    "blind to the image": lambda: settled(
        nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False), nn.BatchNorm2d(4)), TRAINING
    ),
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_network_without_memory_says_nothing(kind: str) -> None:
    """Deploy form, untrained or absent BatchNorms give None, not a guess."""
    network = SILENT[kind]()
    if kind == "blind to the image":
        nn.init.zeros_(network[0].weight)  # type: ignore[index, arg-type]
    assert fit(network, PLAIN["imagenet"]) is None


def test_no_images_say_nothing() -> None:
    """Without images there is no answer."""
    unit = PLAIN["unit"]
    empty = [torch.zeros(0, 3, 8, 8)]
    network = settled(tiny(), TRAINING)
    assert fit_training_statistics(network, empty, mean=unit.mean, std=unit.std) is None
    assert fit_training_statistics(network, [], mean=unit.mean, std=unit.std) is None


@pytest.mark.parametrize("how", hypotheses((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)), ids=lambda h: h.name)
def test_equation_1_is_what_the_network_computes(how: Hypothesis) -> None:
    """The distance of a hypothesis is that of images prepared so, run through the network."""
    network = settled(tiny(), prepared(TRAINING, PLAIN["unit"])).double()
    mine = normalization("mine", (0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    first, direct = (FirstNorms.find(network, GIVEN[0].double()) for _ in range(2))
    assert first is not None
    assert direct is not None
    for image in prepared(GIVEN[:5].double(), mine):
        first.show(image)
    for image in prepared(GIVEN[:5].double(), how):
        direct.show(image)
    expected = direct.distance(IDENTITY)
    assert first.distance(how.after(mine.mean, mine.std)) == pytest.approx(expected, rel=1e-6)


def test_the_distance_is_the_divergence_of_normal_distributions() -> None:
    """D equals torch's own Kullback-Leibler divergence, over the channels of all BatchNorms."""
    network = settled(tiny(), prepared(TRAINING, PLAIN["unit"]))
    first = FirstNorms.find(network, GIVEN[0])
    assert first is not None
    for image in GIVEN[:7]:
        first.show(image)
    terms = []
    for branch in (network.stage0.rbr_dense, network.stage0.rbr_1x1):  # type: ignore[union-attr]
        values, norm = branch.conv(GIVEN[:7]).detach().double(), branch.bn  # type: ignore[union-attr, operator]
        seen = torch.distributions.Normal(
            values.mean((0, 2, 3)), (values.var((0, 2, 3), correction=0) + norm.eps).sqrt()
        )
        trained = torch.distributions.Normal(
            norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
        )
        terms.append(torch.distributions.kl_divergence(seen, trained))
    assert first.distance(IDENTITY) == pytest.approx(float(torch.cat(terms).mean()), rel=1e-4)


def test_batches_of_any_size_say_the_same() -> None:
    """The grouping of images into batches does not change a bit of the result."""
    how = PLAIN["imagenet"]
    network = settled(tiny(), prepared(TRAINING, how))
    images = prepared(GIVEN[:20], how)
    results = [
        fit_training_statistics(network, images.split(size), mean=how.mean, std=how.std)
        for size in (1, 7, 20)
    ]
    assert results[0] == results[1] == results[2]


def test_images_of_different_sizes_are_taken_together() -> None:
    """Where the network leaves the size open, each image weighs the same."""
    how = PLAIN["unit"]
    network = settled(tiny(), TRAINING)
    larger = photographs(20, seed=3, size=48)
    found = fit_training_statistics(network, [GIVEN, larger], mean=how.mean, std=how.std)
    assert found is not None
    assert (84, None) == (found.images, found.mistake)


def test_what_is_given_is_no_hypothesis_beside_itself() -> None:
    """A normalization equal to the given one, be it under a name of its own, is not tried again."""
    imagenet = PLAIN["imagenet"]
    own = normalization("own", imagenet.mean, imagenet.std)
    names = [h.name for h in hypotheses(imagenet.mean, imagenet.std, [own, *NORMALIZATIONS])]
    assert ["unit", "symmetric", "bytes", "centred-bytes"] == [n for n in names if "bgr" not in n]
    assert len(names) == len(set(names))
    assert {"given-bgr", "given-bgr-unmatched", "unit-bgr"} <= set(names)
    assert "unit-bgr-unmatched" not in names
