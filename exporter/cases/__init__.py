"""Exports that are run as one of many: read from a TOML file, run, and what came of each.

`toml_file`, `request_keys` and `complaints` read the file, `run` runs one case, `case_result` is
what is left of it.
"""

from exporter.cases.case_result import CaseResult, Status, exit_code_of
from exporter.cases.complaints import Complaints
from exporter.cases.request_keys import KEYS, Layers, read_values
from exporter.cases.run import run_case
from exporter.cases.toml_file import SAFE_NAME, read_toml, table_of, tables_of

__all__ = [
    "KEYS",
    "SAFE_NAME",
    "CaseResult",
    "Complaints",
    "Layers",
    "Status",
    "exit_code_of",
    "read_toml",
    "read_values",
    "run_case",
    "table_of",
    "tables_of",
]
