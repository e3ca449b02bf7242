"""Kernels compiled on the device, handed from one start to the next.

TensorRT-RTX finishes an engine where it runs: it compiles kernels when an execution context is made
and when a shape comes for the first time. Its runtime cache keeps them, and takes the place of the
timing cache of full TensorRT. The library itself checks that a cache fits its version, the driver
and the GPU, for which a CUDA context must be current.

Never run so far: no machine with a GPU that TensorRT-RTX knows was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from exporter.engine.capabilities import Api, Capability, needs
from exporter.engine.tensorrt_names import ICudaEngine, IExecutionContext, IRuntimeCache


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilingContext:
    """A context whose kernels are compiled here; ``context`` is None if the library makes none.

    ``accepted`` says whether the content of an earlier cache is in use.
    """

    context: IExecutionContext | None
    cache: IRuntimeCache | None
    accepted: bool


@needs(Capability.RUNTIME_CACHE)
def create_compiling_context(
    api: Api, engine: ICudaEngine, *, caching: bool, content: bytes = b""
) -> CompilingContext:
    """An execution context that compiles every kernel before its first use.

    By default the library runs a general kernel until the one for the shape is compiled beside it:
    what is judged or timed would then not be what runs later. With ``caching`` the kernels are
    collected, beginning with the ``content`` of an earlier cache.
    """
    config = engine.create_runtime_config()
    eager = api.trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.dynamic_shapes_kernel_specialization_strategy = eager
    cache: IRuntimeCache | None = None
    accepted = False
    if caching:
        cache = config.create_runtime_cache()
        accepted = bool(content) and bool(cache.deserialize(content))
        if not config.set_runtime_cache(cache):
            cache, accepted = None, False
    context = engine.create_execution_context(config)
    return CompilingContext(context=context, cache=cache, accepted=accepted)


@needs(Capability.RUNTIME_CACHE)
def serialized(_api: Api, cache: IRuntimeCache) -> bytes:
    """Everything in ``cache``; empty if the library gives nothing."""
    content = cache.serialize()
    return b"" if content is None else bytes(content)
