"""What a stage made, kept under a hash of everything that it depends on.

A stage whose inputs have not changed is not run again: its values and files come from the cache.
What a key holds is listed in :mod:`exporter.stage_cache.keys`; how entries are stored, locked,
checked and limited is in :mod:`exporter.stage_cache.store`.
"""

from exporter.stage_cache.keys import Inputs, draft_inputs, engine_inputs, float_inputs
from exporter.stage_cache.location import CACHE_VARIABLE, LIMIT_VARIABLE, open_cache
from exporter.stage_cache.store import EntryInfo, StageStore
from exporter.stage_cache.use import CachedStages, StageUse

__all__ = [
    "CACHE_VARIABLE",
    "LIMIT_VARIABLE",
    "CachedStages",
    "EntryInfo",
    "Inputs",
    "StageStore",
    "StageUse",
    "draft_inputs",
    "engine_inputs",
    "float_inputs",
    "open_cache",
]
