"""The gates of an export, held against the few images that its bundle carries."""

from __future__ import annotations

import numpy as np
import pytest

from exporter import parity
from exporter.parity import Gate
from exporter.verify import on_few


@pytest.mark.parametrize(
    ("wanted", "differ", "passes"),
    [(0.98, 0, True), (0.98, 1, True), (0.98, 2, False), (0.7, 2, True), (1.0, 1, False)],
)
def test_one_of_few_answers_may_differ_where_not_all_have_to_agree(
    wanted: float, differ: int, passes: bool
) -> None:
    """2 % of 360 images are 7, and any of them may be among the 8."""
    reference = np.eye(8, 10, dtype=np.float32)
    output = reference.copy()
    output[:differ] = reference[:differ, ::-1]
    gate = on_few(Gate(min_top1_agreement=wanted), 8)
    row = parity.judge("int8", reference, output, gate=gate)
    assert ("pass" if passes else "fail") == row.status


def test_the_other_figures_stay_as_they_are() -> None:
    gate = Gate(min_sqnr_db=25.0, max_relative=1e-4)
    assert gate == on_few(gate, 8)
