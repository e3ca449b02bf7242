"""What an export would do, and where each engine is built. Needs neither torch nor onnx.

`planning` puts a plan together from `stages`, `sizes`, `commands` (of NVIDIA's tools) and `advice`;
`content` is what it holds, `view` its tables. `engine` decides for exports and plans alike what is
built here and what is left to the device.
"""
