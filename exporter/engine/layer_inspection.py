"""What a finished plan says of itself, read through TensorRT's engine inspector.

Needs a driver: `driver` is asked first, because a runtime without one may crash.
"""

from __future__ import annotations

from exporter.engine.backend import BuildRequest
from exporter.engine.capabilities import Api
from exporter.engine.refusal import RefusedError
from exporter.engine.tensorrt_names import ICudaEngine, IHostMemory, ILogger


def inspect_plan(api: Api, logger: ILogger, plan: IHostMemory, request: BuildRequest) -> str:
    """The layer information of ``plan`` as JSON text.

    Raises:
        RefusedError: if the plan just built does not load on this device.
    """
    runtime = api.trt.Runtime(logger)
    if request.options.version_compatible:
        # Such plans carry their own runtime as code; this one was built a moment ago.
        runtime.engine_host_code_allowed = True
    if request.options.dla is not None:
        runtime.DLA_core = request.options.dla.core
    engine: ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RefusedError("the finished plan does not load on this device")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(api.trt.LayerInformationFormat.JSON))
