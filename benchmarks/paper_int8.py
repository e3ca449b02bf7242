"""Q/DQ graphs for the speed comparison, by this project and by ONNX Runtime's own quantizer.

Both calibrate by min-max on a few random images: speed depends on where the quantizers stand, not
on their scales. Ours are placed for TensorRT, in front of each convolution and nowhere else; ONNX
Runtime's are placed for its own kernels.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_ptq
from ort_profile import open_session, session_options

from exporter.quantization.plain_chain import read_chain
from exporter.quantization.quantizers import QuantizerOptions, open_quantizer
from exporter.running.image_set import ArrayImages
from exporter.spec import Recipe

OURS, ONNXRUNTIME = "ours", "onnxruntime"
QUANTIZERS = (OURS, ONNXRUNTIME)
_IMAGES = 4


def quantized(quantizer: str, source: Path, target: Path, image_size: tuple[int, int]) -> None:
    """Write the Q/DQ graph of the float graph ``source`` to ``target``."""
    shape = (_IMAGES, 3, *image_size)
    images = np.random.default_rng(1).standard_normal(shape, np.float32)
    if quantizer == OURS:
        model = onnx.load(source)
        calibration = ArrayImages(chunks=((images,),))
        chain = read_chain(model)
        opened = open_quantizer(model, chain, calibration, QuantizerOptions(), lambda _: None)
        onnx.save(opened.make(Recipe.MINMAX).graph, target)
        return
    onnxruntime_ptq.quantize(source, target, iter([images]), "MinMax")


def int8_kernels(model: Path) -> tuple[int, int]:
    """How many convolutions ONNX Runtime computes in INT8, and how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options()
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        open_session(model, options)
        optimized = onnx.load(options.optimized_model_filepath)
    count = Counter(node.op_type for node in optimized.graph.node)
    int8 = count["QLinearConv"]
    return int8, int8 + count["Conv"] + count["FusedConv"]
