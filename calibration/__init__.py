"""Which numbers INT8 uses: images, streaming statistics, clip values, the calibration table.

numpy and Pillow only. It is handed a callable that returns tensors and never knows who runs the
network.
"""

__project__ = "repvgg-exporter"

__all__: list[str] = []
