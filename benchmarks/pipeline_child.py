"""The peers' road from a checkpoint to a Q/DQ graph, in a process of its own.

    pipeline_child.py prepare VARIANT FILE
    pipeline_child.py ROAD

``ROAD`` is a :class:`Road` as JSON. Its ``method`` is ``onnxruntime CALIBRATOR`` (torch.onnx,
onnxsim, quantize_static) or ``modelopt CALIBRATOR`` (torch.onnx, Model Optimizer, which simplifies
by itself, in modelopt_environment.py's environment). Blocks are fused and images prepared by our
own functions, which the peers do not have. ``prepare`` writes a checkpoint with random weights.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from quantizer_job import BATCH_SIZE

from calibration.decoding import PixelMemory, batches
from calibration.images import ImageFolder, Preprocess
from models.checkpoint import load_checkpoint
from models.fusion import reparameterize
from models.variants import find_variant

OPSET = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """``weights`` of ``variant`` become a Q/DQ graph in ``folder``, by ``images`` of a folder."""

    method: str
    variant: str
    weights: str
    images: str
    count: int
    size: int
    folder: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def batches(self) -> Iterator[npt.NDArray[np.float32]]:
        folder = ImageFolder.open(Path(self.images)).take(self.count)
        memory = PixelMemory(Preprocess(image_size=(self.size, self.size)))
        return batches(folder, memory, BATCH_SIZE)


def export(road: Road, target: Path) -> None:
    """What torch.onnx makes of the fused network."""
    network = reparameterize(load_checkpoint(Path(road.weights), find_variant(road.variant)).module)
    torch.onnx.export(
        network.eval(),
        (torch.zeros(1, 3, road.size, road.size),),
        str(target),
        dynamo=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )


def travel(road: Road) -> None:
    peer, _, calibrator = road.method.partition(" ")
    source, target = (Path(road.folder, name) for name in ("float.onnx", "quantized.onnx"))
    export(road, source)
    if peer == "modelopt":
        from modelopt_child import run_modelopt

        run_modelopt(source, target, np.concatenate([*road.batches()]), calibrator)
        return
    import onnx
    import onnxruntime_ptq
    import onnxsim

    simplified, equal = onnxsim.simplify(str(source))
    assert equal
    onnx.save(simplified, source)
    onnxruntime_ptq.quantize(source, target, road.batches(), calibrator)


def prepare(variant: str, target: Path) -> None:
    """A checkpoint in train form whose activations keep their size."""
    from safetensors.torch import save_file

    from exporter.sources.source import load_network
    from exporter.spec import RANDOM, ExportSpec, Precision

    spec = ExportSpec(
        variant=find_variant(variant), precision=Precision.FP32, weights=RANDOM, out=target.parent
    )
    save_file(load_network(spec).module.state_dict(), target)


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1] == "prepare":
        prepare(sys.argv[2], Path(sys.argv[3]))
    else:
        travel(Road(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
