"""A trained network remembers its preprocessing: its first BatchNorms recorded the mean and
the variance of what its first convolutions made of the training images.

Let those be ``r_c`` and ``s_c`` for channel ``c``. Images on their way to INT8 calibration, run
through the same convolutions, show ``m_c`` and ``v_c``. Their distance, in nats, is

    D = mean over c of KL(N(m_c, v_c) || N(r_c, s_c)).

It is computed for the images as they are and as each of several other preprocessings would have
made them: with ``p`` the pixels on [0, 1], the given tensor is ``x = (p - mean) / std``, and a
hypothesis makes ``x' = (p' - mean') / std'``, where ``p'`` is ``p``, or ``p`` with red and blue
swapped. If one hypothesis fits far better than the images as they are, the network was trained on
that. Nothing is assumed of the images but that they are of the kind the network was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from models.first_norms import IDENTITY, ChannelMap, FirstNorms, Triple

NOTICEABLE = 0.02
"""Distance below which the images as they are fit: 64 images of the right kind are 0.004 away, or
0.02 where training changed them at random."""
FITTING = 0.05
"""Distance above which a hypothesis does not fit either: the images are of another kind."""
DECISIVE = 3.0
"""How many times better than the images as they are a hypothesis must fit to be believed."""
FOREIGN = 0.3
"""Distance above which the images are not of the kind, or not prepared as, the training images.

Photographs of another scene, or grey ones for colour ones, are 0.1 to 0.2 away.
"""
ENOUGH_IMAGES = 16
"""Images below which a large distance may be an accident of the choice."""
_SIMPLER = 2.0
"""How many times better a swapped order must fit than the same normalization unswapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A preprocessing that the network may have been trained with.

    ``mean`` and ``std`` belong to the channels in the order in which the network receives them, on
    the [0, 1] scale; ``swapped`` is blue, green, red. Those that differ in the order alone have one
    ``normalization``.
    """

    name: str
    normalization: str
    mean: Triple
    std: Triple
    swapped: bool = False

    def after(self, mean: Triple, std: Triple) -> ChannelMap:
        """What makes this preprocessing of images normalized by ``mean`` and ``std``."""
        sources = (2, 1, 0) if self.swapped else (0, 1, 2)
        pairs = list(zip(sources, self.mean, self.std, strict=True))
        scale = [std[c] / own_std for c, _, own_std in pairs]
        offset = [(mean[c] - own_mean) / own_std for c, own_mean, own_std in pairs]
        return ChannelMap(
            scale=(scale[0], scale[1], scale[2]),
            offset=(offset[0], offset[1], offset[2]),
            swapped=self.swapped,
        )


def normalization(name: str, mean: Triple, std: Triple) -> Hypothesis:
    """A hypothesis in red, green, blue order."""
    return Hypothesis(name=name, normalization=name, mean=mean, std=std)


_BYTE = (1 / 255, 1 / 255, 1 / 255)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
NORMALIZATIONS = (
    normalization("imagenet", _IMAGENET_MEAN, (0.229, 0.224, 0.225)),
    normalization("unit", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    normalization("symmetric", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    normalization("bytes", (0.0, 0.0, 0.0), _BYTE),
    normalization("centred-bytes", _IMAGENET_MEAN, _BYTE),
)
"""The ways of scaling pixels that published training code uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFit:
    """How well the images fit what the network was trained on.

    ``given`` is D of the images as they are; ``distances`` has D of each hypothesis by name;
    ``best`` is the hypothesis that fits best, and ``images`` how many images were looked at.
    """

    given: float
    distances: dict[str, float]
    best: Hypothesis
    images: int

    @property
    def times_better(self) -> float:
        """By which factor ``best`` fits better than the images as they are."""
        return self.given / max(self.distances[self.best.name], 1e-6)

    @property
    def mistake(self) -> Hypothesis | None:
        """The preprocessing that the network was trained with, where it was surely another."""
        fits = self.distances[self.best.name] < FITTING
        surely = fits and self.given > NOTICEABLE and self.times_better > DECISIVE
        return self.best if surely else None

    @property
    def foreign(self) -> bool:
        """Whether the images are far from the training images and no hypothesis says why."""
        far = self.given > FOREIGN and self.images >= ENOUGH_IMAGES
        return far and self.mistake is None


def hypotheses(
    mean: Triple, std: Triple, candidates: Sequence[Hypothesis] = NORMALIZATIONS
) -> tuple[Hypothesis, ...]:
    """Every preprocessing to try beside the given one: ``candidates``, and all of them in BGR.

    Of two that amount to the same, the first stays.
    """
    given = normalization("given", mean, std)
    plain = [given]
    for candidate in candidates:
        if not any(_same(candidate, other) for other in plain):
            plain.append(candidate)
    return (*plain[1:], *(swapped for h in plain for swapped in _swapped(h)))


def _swapped(plain: Hypothesis) -> Iterator[Hypothesis]:
    """BGR with each channel's own mean; and BGR, as OpenCV reads it, with the means left in RGB."""
    red, green, blue = zip(plain.mean, plain.std, strict=True)
    mean, std = zip(blue, green, red, strict=True)
    turned = replace(plain, name=f"{plain.name}-bgr", mean=mean, std=std, swapped=True)
    yield turned
    unmatched = replace(plain, name=f"{plain.name}-bgr-unmatched", swapped=True)
    if not _same(turned, unmatched):
        yield unmatched


def fit_training_statistics(
    module: nn.Module,
    batches: Iterable[Tensor],
    *,
    mean: Triple,
    std: Triple,
    candidates: Sequence[Hypothesis] = NORMALIZATIONS,
) -> TrainingFit | None:
    """Compare ``batches`` with what ``module`` (eval mode) was trained on.

    ``batches`` are float tensors ``[n, 3, H, W]`` that were normalized by ``mean`` and ``std``;
    ``candidates`` are the normalizations to try, in either order of channels. Where it is not known
    how the images were made, pass mean 0, std 1 and none: then only their order is in question. The
    module is run only as far as its first BatchNorms and is left as it was.

    Returns None where nothing can be learned: no image, no BatchNorm that sees an affine function
    of the image (deploy form has none), or only untrained ones.
    """
    first = None
    for image in (image.detach() for batch in batches for image in batch):
        first = first or FirstNorms.find(module, image)
        if first is None:
            return None
        first.show(image)
    if first is None:
        return None
    given = first.distance(IDENTITY)
    distances = {
        hypothesis: first.distance(hypothesis.after(mean, std))
        for hypothesis in hypotheses(mean, std, candidates)
    }
    return TrainingFit(
        given=given,
        distances={hypothesis.name: distance for hypothesis, distance in distances.items()},
        best=_best(distances, given),
        images=first.images,
    )


def _best(distances: dict[Hypothesis, float], given: float) -> Hypothesis:
    """The best fit; a swapped order only if the order matters (it does not to grey images)."""
    plain = {h.normalization: d for h, d in distances.items() if not h.swapped}
    kept = {
        hypothesis: distance
        for hypothesis, distance in distances.items()
        if not hypothesis.swapped
        or distance * _SIMPLER < plain.get(hypothesis.normalization, given)
    }
    return min(kept or distances, key=distances.__getitem__)


def _same(one: Hypothesis, other: Hypothesis) -> bool:
    pairs = zip((*one.mean, *one.std), (*other.mean, *other.std), strict=True)
    return all(abs(a - b) <= 1e-3 * max(abs(a), abs(b), 1e-3) for a, b in pairs)
