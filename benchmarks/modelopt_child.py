"""The child that runs NVIDIA Model Optimizer's ONNX PTQ, in modelopt_environment.py's environment.

Methods: ``modelopt max`` and ``modelopt entropy``. Everything else is the tool's default, except
that the float parts stay float32 and that it calibrates on the CPU.
"""

from __future__ import annotations

import sys
import warnings

from modelopt.onnx.quantization import quantize
from quantizer_job import Job, answer


def main() -> None:
    warnings.simplefilter("ignore")
    job = Job.from_json(sys.argv[1])
    images = job.all_images()
    answer(
        job,
        lambda: quantize(
            job.source,
            quantize_mode="int8",
            calibration_data=images,
            calibration_method=job.method.partition(" ")[2],
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=job.target,
            log_level="WARNING",
        ),
    )


if __name__ == "__main__":
    main()
