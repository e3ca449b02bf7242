"""Train the bundled RepVGG-A0 again: scikit-learn's handwritten digits, enlarged to 3x64x64.

    pip install -e '.[export,dev]' -c constraints.txt
    python examples/train_digits_a0.py --out /tmp/digits

Writes under ``--out``: ``a0_digits.safetensors``, the images ``digits/test/<class>/*.png`` and
``digits/calibration/<class>/*.png``, and ``a0_digits.json`` (split, seed, accuracy). Needs no
download; about 5 minutes on 2 cores. The split and the images repeat exactly; the weights repeat up
to the rounding of the machine's convolution kernels.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from calibration.images import Preprocess
from models.repvgg import RepVGG
from models.variants import find_variant

SEED = 2021
TEST_IMAGES = 360
CALIBRATION_IMAGES = 128
NUM_CLASSES = 10
# Close to the calibration images' grey values: mean 0.31, standard deviation 0.35.
PREPROCESS = Preprocess(
    image_size=(64, 64),
    crop_fraction=1.0,
    interpolation="bicubic",
    mean=(0.3,) * 3,
    std=(0.35,) * 3,
)


def enlarged(digit: np.ndarray) -> Image.Image:
    """An 8x8 digit of 17 grey levels as a 64x64 8-bit picture."""
    grey = np.round(digit * (255 / 16)).astype(np.uint8)
    return Image.fromarray(grey, mode="L").resize((64, 64), Image.Resampling.BICUBIC)


def augmented(batch: Tensor, rng: torch.Generator) -> Tensor:
    """Random rotation (12 degrees), scale (0.85-1.15), shift (8 %) and contrast (0.7-1.3)."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(batch)).uniform_(low, high, generator=rng)

    angle = uniform(-12, 12) * (math.pi / 180)
    scale = uniform(0.85, 1.15)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [cos, -sin, uniform(-0.16, 0.16), sin, cos, uniform(-0.16, 0.16)]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(theta, list(batch.shape), align_corners=False)
    moved = nn.functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    return moved * uniform(0.7, 1.3).view(-1, 1, 1, 1)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(60), labels.split(60), strict=True)
        )
    return 100 * hits / len(labels)


def train(images: Tensor, labels: Tensor, *, epochs: int, batch_size: int) -> RepVGG:
    """SGD with Nesterov momentum, one warm-up epoch, cosine decay, weight decay on kernels only."""
    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    model = RepVGG(find_variant("A0"), num_classes=NUM_CLASSES)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.05,
        total_steps=steps,
        pct_start=min(0.5, 1 / epochs),
        cycle_momentum=False,
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=rng)
        total = 0.0
        for picks in order.split(batch_size)[: len(images) // batch_size]:
            batch = augmented(images[picks], rng).to(memory_format=torch.channels_last)
            loss = loss_of(model(batch), labels[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(
            f"epoch {epoch + 1:3d}/{epochs}  loss {total / (len(images) // batch_size):.4f}",
            flush=True,
        )
    return model


def save_images(folder: Path, digits: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> None:
    """One PNG a digit, named after its index in scikit-learn's array, in class folders."""
    for index in indices:
        path = folder / str(labels[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        enlarged(digits[index]).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()

    digits, labels = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8)
    train_indices, test_indices = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, random_state=SEED, stratify=labels
    )
    _, calibration_indices = train_test_split(
        train_indices,
        test_size=CALIBRATION_IMAGES,
        random_state=SEED,
        stratify=labels[train_indices],
    )
    save_images(args.out / "digits" / "test", digits, labels, test_indices)
    save_images(args.out / "digits" / "calibration", digits, labels, calibration_indices)

    everything = torch.from_numpy(np.stack([PREPROCESS(enlarged(digit)) for digit in digits]))
    targets = torch.from_numpy(labels)
    x_test, y_test = everything[test_indices], targets[test_indices]
    model = train(
        everything[train_indices], targets[train_indices], epochs=args.epochs, batch_size=64
    )
    before = accuracy(model, x_test, y_test)

    # Kernels in half (they are rounded to INT8 later anyway), BatchNorm and biases in float32.
    state = {
        name: tensor.half().contiguous() if tensor.ndim > 1 else tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    weights = args.out / "a0_digits.safetensors"
    save_file(state, weights, metadata={"variant": "A0", "num_classes": str(NUM_CLASSES)})
    restored = {name: tensor.float() for name, tensor in load_file(weights).items()}
    model.load_state_dict(restored, strict=False)
    after = accuracy(model, x_test, y_test)
    card = {
        "seed": SEED,
        "epochs": args.epochs,
        "train_images": len(train_indices),
        "test_images": len(test_indices),
        "calibration_images": len(calibration_indices),
        "top1_float32": round(before, 2),
        "top1_stored": round(after, 2),
        "preprocess": PREPROCESS.to_json(),
    }
    (args.out / "a0_digits.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
