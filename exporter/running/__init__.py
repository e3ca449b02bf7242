"""Graphs run over images on the CPU. numpy and ONNX Runtime, no torch.

`onnx_runner` runs one graph, `runnable` and `emulation` make what it is handed for each precision,
`image_set` gives the batches, `spread` cuts the work and has other processes help.
"""
