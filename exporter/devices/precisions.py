"""Which precisions are worth using on a compute capability, and why, in one clause each.

Sources: the hardware tables of the TensorRT support matrices (INT8 tensor cores from sm72 on, bf16
from sm80, fp8 from sm89; docs.nvidia.com/deeplearning/tensorrt), reports that INT8 was cut to about
150 TOPS on B300, and, for TensorRT-RTX, layer tables of engines built here. How fast a precision is
on a device was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from exporter.devices.table import ARCHITECTURES, OLDEST_WITH, RTX


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Whether a precision is worth using somewhere, and why, in one clause."""

    precision: str
    worth: bool
    reason: str


def precision_advice(capability: str, backend: str) -> tuple[Advice, ...]:
    """Every precision on ``capability``, as ``backend`` builds it: worth using, and why."""
    number = ARCHITECTURES[capability].number
    return (
        _fp32(number, backend),
        Advice(precision="fp16", worth=True, reason="half tensor cores, bias and ReLU fused"),
        Advice(
            precision="bf16",
            worth=number >= OLDEST_WITH["bf16"],
            reason="as fast as fp16, with the range of float32: for networks that overflow in half"
            if number >= OLDEST_WITH["bf16"]
            else "bf16 needs sm80 or later",
        ),
        _int8(number, backend),
        _fp8(number, backend),
    )


def _fp32(number: int, backend: str) -> Advice:
    if number == 75 and backend == RTX:
        return Advice(
            precision="fp32", worth=False, reason="TensorRT-RTX does not build fp32 for Turing"
        )
    return Advice(
        precision="fp32", worth=False, reason="several times slower than fp16: for comparison only"
    )


def _fp8(number: int, backend: str) -> Advice:
    worth = number >= OLDEST_WITH["fp8"]
    if not worth:
        reason = "fp8 needs sm89 or later"
    elif backend == RTX:
        reason = (
            "FP8 tensor cores, but bias, ReLU and requantization stay separate kernels: measure it "
            "against fp16 on the device"
        )
    else:
        reason = "as fast as int8, with a wider range of scales; needs TensorRT 10.3"
    return Advice(precision="fp8", worth=worth, reason=reason)


def _int8(number: int, backend: str) -> Advice:
    if number == 70:
        worth, reason = False, "Volta cards have no INT8 tensor cores: fp16 is faster"
    elif number == 75 and backend == RTX:
        worth, reason = (
            False,
            "TensorRT-RTX runs INT8 convolutions in half on Turing; full TensorRT on the device "
            "uses its INT8 tensor cores",
        )
    elif number == 103:
        worth, reason = False, "Blackwell Ultra has a small part of Blackwell's INT8 rate: use fp8"
    elif backend == RTX:
        worth, reason = (
            True,
            "INT8 tensor cores, but bias, ReLU and requantization stay separate kernels: measure "
            "it against fp16 on the device",
        )
    else:
        worth, reason = True, "INT8 tensor cores, up to twice the rate of half, half the weights"
    return Advice(precision="int8", worth=worth, reason=reason)
