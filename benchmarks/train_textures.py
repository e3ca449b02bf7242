"""Train the benchmark's second network: a narrow RepVGG on the textured shapes of textures.py.

    python benchmarks/train_textures.py --out benchmarks/weights

AdamW, batches of 32, each turned by a random multiple of 90 degrees and mirrored at random, which
changes no class. Writes ``textures.safetensors`` in train form and prints the accuracy. One thread;
the images repeat exactly, the weights up to the rounding of the machine's kernels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import textures
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.repvgg import RepVGG

SEED = 1607
BATCH_SIZE = 32
TRAIN_IMAGES = 16384
TEST_IMAGES = 3200
PEAK_RATE = 0.004
WARM_UP = 0.1
WEIGHT_DECAY = 0.05


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    with torch.no_grad():
        batches = torch.split(images, BATCH_SIZE)
        found = torch.cat([model(batch).argmax(1) for batch in batches])
    return 100 * float((found == labels).float().mean())


def turned(images: Tensor, rng: torch.Generator) -> Tensor:
    """One of the eight symmetries of the square."""
    which = int(torch.randint(8, (), generator=rng))
    images = torch.rot90(images, which % 4, (2, 3))
    return images.flip(3) if which >= 4 else images


def train(images: Tensor, labels: Tensor, steps: int) -> RepVGG:
    """AdamW, warm-up and cosine decay, weight decay on kernels only."""
    torch.manual_seed(SEED)
    rng = torch.Generator().manual_seed(SEED)
    model = RepVGG(textures.VARIANT, num_classes=len(textures.CLASSES))
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": kernels, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    loss_of = nn.CrossEntropyLoss()
    total = 0.0
    for step in range(steps):
        picks = torch.randint(len(images), (BATCH_SIZE,), generator=rng)
        loss = loss_of(model(turned(images[picks], rng)), labels[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}/{steps}  loss {total / 100:.3f}", flush=True)
            total = 0.0
    return model


def save(model: RepVGG, path: Path) -> None:
    """Kernels in half (they are rounded to INT8 later anyway), the rest in float32."""
    state = {
        name: tensor.half().contiguous() if tensor.ndim > 1 else tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    metadata = {"variant": textures.VARIANT.name, "num_classes": str(len(textures.CLASSES))}
    save_file(state, path, metadata=metadata)
    restored = {name: tensor.float() for name, tensor in load_file(path).items()}
    model.load_state_dict(restored, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    images, labels = map(torch.from_numpy, textures.images("train", TRAIN_IMAGES))
    test = tuple(map(torch.from_numpy, textures.images("test", TEST_IMAGES)))
    started = time.process_time()
    model = train(images, labels, args.steps)
    seconds = time.process_time() - started
    before = accuracy(model, *test)
    save(model, args.out / "textures.safetensors")
    card = {
        "seed": SEED,
        "steps": args.steps,
        "training_images": TRAIN_IMAGES,
        "test_images": TEST_IMAGES,
        "top1_float32": round(before, 2),
        "top1_stored": round(accuracy(model, *test), 2),
        "training_cpu_seconds": round(seconds),
    }
    print(json.dumps(card))


if __name__ == "__main__":
    main()
