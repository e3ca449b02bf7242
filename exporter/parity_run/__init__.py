"""The ledger of many exports, held against their gates and against the figures of an earlier run.

`config` reads what to run, :mod:`exporter.cases` runs it, `baseline` compares,
`junit` and `tables` tell.
"""

from exporter.parity_run.baseline import (
    Baseline,
    Comparison,
    compare,
    read_baseline,
    require_same_cases,
    write_baseline,
)
from exporter.parity_run.config import Case, ParityConfig, read_config
from exporter.parity_run.junit import junit_xml
from exporter.parity_run.margins import Margins

__all__ = [
    "Baseline",
    "Case",
    "Comparison",
    "Margins",
    "ParityConfig",
    "compare",
    "junit_xml",
    "read_baseline",
    "read_config",
    "require_same_cases",
    "write_baseline",
]
