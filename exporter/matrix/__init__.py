"""Many exports as one job: variants x precisions x targets x recipes, sharing what they share.

`config` reads what to make, `schedule` decides what waits for what, `subprocess_pool` and
`ray_pool` run it, `state` remembers it for a re-run, `page` compares the bundles.
"""

from exporter.matrix.config import Cell, MatrixConfig, read_matrix
from exporter.matrix.page import index_page
from exporter.matrix.schedule import run_cells
from exporter.matrix.state import INDEX, STATE, MatrixState

__all__ = [
    "INDEX",
    "STATE",
    "Cell",
    "MatrixConfig",
    "MatrixState",
    "index_page",
    "read_matrix",
    "run_cells",
]
