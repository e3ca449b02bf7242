"""The paper's own figures: Ding et al., arXiv 2101.03697v3, table 4, as printed there.

Images a second on a GTX 1080 Ti at batch 128 in float32; parameters, FLOPs (multiply-accumulates)
and "Wino MULs" of the deploy form. Parameters are printed without rounding up: 8.309 is 8.30. Its
ResNet-50 is the original one, with the stride in the 1x1 (see paper_networks.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """One line of table 4; counts in millions and billions."""

    images_per_second: int
    parameters_m: float
    flops_g: float
    wino_muls_g: float


TABLE_4: Mapping[str, PaperRow] = {
    "A0": PaperRow(images_per_second=3256, parameters_m=8.30, flops_g=1.4, wino_muls_g=0.7),
    "A2": PaperRow(images_per_second=1322, parameters_m=25.49, flops_g=5.1, wino_muls_g=2.7),
    "B1g4": PaperRow(images_per_second=868, parameters_m=36.12, flops_g=7.3, wino_muls_g=3.9),
    "B1": PaperRow(images_per_second=685, parameters_m=51.82, flops_g=11.8, wino_muls_g=5.9),
    "ResNet-50": PaperRow(images_per_second=719, parameters_m=25.53, flops_g=3.9, wino_muls_g=2.8),
    "VGG-16": PaperRow(images_per_second=415, parameters_m=138.35, flops_g=15.5, wino_muls_g=6.9),
}
