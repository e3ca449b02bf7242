"""A calibration table of an earlier run is used whole, or refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from calibration.table import CalibrationTable, TensorRange
from exporter.errors import InputError
from exporter.quantization.replay import load_table


def table(name: str = "images", options: dict[str, Any] | None = None) -> CalibrationTable:
    return CalibrationTable(
        method="minmax", activation_scales={name: 0.5}, onnx_sha256="ab" * 32,
        ranges={name: TensorRange(minimum=-1.0, maximum=1.0, threshold=1.0)},
        data_sha256="cd" * 32, image_count=3, preprocess={}, options=options or {},
    )  # fmt: skip


def test_a_table_is_read(tmp_path):
    """As it was written."""
    written = table(options={"keep_half": ["conv"]})
    (tmp_path / "t.json").write_text(written.dumps())
    assert written == load_table(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (table("\ud800"), "cannot be written to a calibration cache"),
        (table("a b"), "cannot be written to a calibration cache"),
        (table(options={"keep_half": 3}), "option keep_half must be a list of names, not 3"),
        (table(options={"keep_float": [1]}), r"option keep_float must be a list of names"),
        (table(options={"data_type": "fp8"}), "holds scales for fp8, not for int8"),
    ],
)
def test_a_table_that_no_export_can_use_is_refused(tmp_path, wrong, reason):
    """Names that the bundle's cache cannot hold, and options of another kind."""
    (tmp_path / "t.json").write_text(wrong.dumps())
    with pytest.raises(InputError, match=rf"t\.json .*{reason}"):
        load_table(tmp_path / "t.json")
