"""The child that runs NVIDIA Model Optimizer's ONNX PTQ, in modelopt_environment.py's environment.

Methods: ``modelopt max`` and ``modelopt entropy``. Everything else is the tool's default, except
that the float parts stay float32 and that it calibrates on the CPU.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from modelopt.onnx.quantization import quantize
from quantizer_job import Job, answer


def run_modelopt(source: Path, target: Path, images: npt.NDArray[np.float32], method: str) -> None:
    """Write the Q/DQ graph of ``source``; ``method`` is ``max`` or ``entropy``."""
    quantize(
        str(source),
        quantize_mode="int8",
        calibration_data=images,
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(target),
        log_level="WARNING",
    )


def main() -> None:
    warnings.simplefilter("ignore")
    job = Job.from_json(sys.argv[1])
    images = job.all_images()
    method = job.method.partition(" ")[2]
    answer(job, lambda: run_modelopt(Path(job.source), Path(job.target), images, method))


if __name__ == "__main__":
    main()
