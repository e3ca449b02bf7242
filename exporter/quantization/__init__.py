"""A float graph with INT8 or FP8 in it.

`quantizers` is the door: two ways to INT8. Chains (`chain_walk`, `plain_chain`) are observed once
(`chain_observer`) and quantized by any recipe (`chain_quantizer`), both with `onnx_kernels`; other
graphs get scales by tensor. `replay` quantizes by a table that exists, `fp8` has a way of its own,
`half_nodes`, `half_scales` and `full_range` are forms of the Q/DQ graph; `qdq_removal`,
`qdq_import` and `trained_scales` read graphs and checkpoints that come with scales.
"""
