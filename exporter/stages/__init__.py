"""The stages that take more than one step, each judged against the original network.

In the order of an export: `fused_blocks`, `precision` (with `int8`, its `ladder` of recipes and
`mixed_precision`), `prologue`, `evidence`, `engine`, `publication`; `judge` compares, `failure` is
what a failed run leaves. Their order is known to the pipeline alone.
"""
