"""The Python API from end to end, in cells that editors run one by one.

    python examples/python_api.py build/python-api

Half a minute at most on 2 cores: the bundled RepVGG-A0 on digits of 64 x 64 pixels.
"""

# %% A trained network, and its three branches as one convolution
import sys
from pathlib import Path

import torch

from exporter import Bundle, export, reparameterize
from exporter.errors import ExporterError
from models import VARIANTS, RepVGG

out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/python-api")

trained = RepVGG(VARIANTS["A0"], num_classes=10).eval()
deployed = reparameterize(trained)  # a copy; `trained` still has its branches
x = torch.rand(2, 3, 64, 64)
with torch.no_grad():
    difference = float((trained(x) - deployed(x)).abs().max())
print(f"three branches and one convolution differ by {difference:.1e}")

# %% From a network to a bundle: ONNX, INT8 scales, engine, evidence
bundle = export(
    "A0",  # or any torch.nn.Module with such blocks, with example_input= and arrays
    precision="int8",
    targets="sm86",
    calibration_images=64,
    evaluation_images=60,
    out=out,
)
for stage in bundle.parity["stages"]:
    sqnr = stage.get("sqnr_db")
    print(stage["stage"], stage["status"], "" if sqnr is None else f"{sqnr:.1f} dB")

# %% Later, elsewhere: numpy and ONNX Runtime are enough, or the engine where there is a GPU
bundle = Bundle.load(out)
images, logits = bundle.reference()  # real inputs, and what the trained network said
found = bundle.run(images)
agree = (found.argmax(1) == logits.argmax(1)).mean()
print(f"{bundle.manifest['model']['name']}: {agree:.0%} of {len(images)} answers are the same")

# %% What cannot be used is one sentence, with the exit code of the command line
try:
    export("A0", precision="int8", targets="sm99", out=out)
except ExporterError as error:
    print(f"{type(error).__name__} ({error.exit_code}): {error}")
