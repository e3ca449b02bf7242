"""Everything that a build sets on TensorRT's builder configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.build_options import Dla, HardwareCompatibility
from exporter.engine.approach import Approach
from exporter.engine.backend import BuildRequest
from exporter.engine.capabilities import Api, Capability, needs
from exporter.engine.profile_shapes import profile_shapes
from exporter.engine.refusal import BadInputError, RefusedError
from exporter.engine.tensorrt_names import (
    Builder,
    IBuilderConfig,
    ILayer,
    INetworkDefinition,
    LayerType,
)
from exporter.spec import Precision

_MIB = 1 << 20
_SHOWN_LAYERS = 12


def configure(
    api: Api, builder: Builder, network: INetworkDefinition, request: BuildRequest, way: Approach
) -> tuple[IBuilderConfig, tuple[str, ...]]:
    """The configuration for ``request``, all but calibrator and monitor, and notes for people.

    Raises:
        BadInputError: if the library or the model cannot obey.
        RefusedError: if layers do not fit the DLA and may not fall back.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = api.trt.ProfilingVerbosity.DETAILED
    # On by default, it would quietly give fp32 the 10-bit mantissa of TF32.
    config.clear_flag(api.trt.BuilderFlag.TF32)
    if request.workspace_mib is not None:
        pool = api.trt.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, request.workspace_mib * _MIB)
    if api.can(Capability.NAMED_TARGETS):
        _set_targets(api, config, request.targets)
    _allow(api, config, way.allowed)
    _set_options(api, config, request)
    _set_profile(builder, network, config, request)
    notes: tuple[str, ...] = ()
    if request.options.dla is not None:
        notes = _set_dla(api, builder, network, config, request.options.dla)
    return config, notes


@needs(Capability.NAMED_TARGETS)
def _set_targets(api: Api, config: IBuilderConfig, targets: Sequence[str]) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = getattr(api.trt.ComputeCapability, target.upper(), None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise BadInputError(f"tensorrt_rtx {api.version} cannot build for {target}")


def _allow(api: Api, config: IBuilderConfig, allowed: frozenset[Precision]) -> None:
    if Precision.FP16 in allowed:
        _allow_half(api, config)
    if Precision.BF16 in allowed:
        _allow_bfloat16(api, config)
    if Precision.INT8 in allowed:
        _allow_int8(api, config)
    if Precision.FP8 in allowed:
        _allow_fp8(api, config)


@needs(Capability.FP16_FLAG)
def _allow_half(api: Api, config: IBuilderConfig) -> None:
    config.set_flag(api.trt.BuilderFlag.FP16)


@needs(Capability.BF16_FLAG)
def _allow_bfloat16(api: Api, config: IBuilderConfig) -> None:
    config.set_flag(api.trt.BuilderFlag.BF16)


@needs(Capability.FP8_FLAG)
def _allow_fp8(api: Api, config: IBuilderConfig) -> None:
    config.set_flag(api.trt.BuilderFlag.FP8)


@needs(Capability.INT8_FLAG)
def _allow_int8(api: Api, config: IBuilderConfig) -> None:
    config.set_flag(api.trt.BuilderFlag.INT8)


def _set_options(api: Api, config: IBuilderConfig, request: BuildRequest) -> None:
    options = request.options
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(api.trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility is HardwareCompatibility.AMPERE_PLUS:
        level = api.trt.HardwareCompatibilityLevel.AMPERE_PLUS
        config.hardware_compatibility_level = level
    elif options.hardware_compatibility is HardwareCompatibility.SAME_COMPUTE_CAPABILITY:
        if not api.can(Capability.SAME_CAPABILITY):
            raise BadInputError(
                f"TensorRT {api.version} has no hardware compatibility "
                f"{options.hardware_compatibility}; it has none and ampere+"
            )
        _fit_same_capability(api, config)
    if options.timing_cache is not None:
        _read_timing_cache(config, options.timing_cache)


@needs(Capability.SAME_CAPABILITY)
def _fit_same_capability(api: Api, config: IBuilderConfig) -> None:
    level = api.trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    config.hardware_compatibility_level = level


def _read_timing_cache(config: IBuilderConfig, path: Path) -> None:
    """Start from the file's timings, or from none if there is no file."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BadInputError(f"timing cache {path} cannot be read: {error}") from error
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BadInputError(
            f"timing cache {path} comes from another TensorRT or GPU: name another file"
        )


def write_timing_cache(config: IBuilderConfig, path: Path) -> None:
    """Replace the file by the timings of ``config``, in one step."""
    cache = config.get_timing_cache()
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(cache.serialize())
        partial.replace(path)
    except OSError as error:
        raise BadInputError(f"timing cache {path} cannot be written: {error}") from error


def _set_profile(
    builder: Builder, network: INetworkDefinition, config: IBuilderConfig, request: BuildRequest
) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *profile_shapes(tensor.name, tuple(tensor.shape), request))
    if config.add_optimization_profile(profile) < 0:
        size = "" if request.size is None else f", size {request.size}"
        raise RefusedError(f"the builder rejects the profile batch {request.batch}{size}")


def _set_dla(
    api: Api, builder: Builder, network: INetworkDefinition, config: IBuilderConfig, dla: Dla
) -> tuple[str, ...]:
    """Prefer the DLA for every layer; say which layers it does not take."""
    cores = builder.num_DLA_cores
    if dla.core >= cores:
        raise BadInputError(f"no DLA core {dla.core} on this machine, it has {cores}")
    config.default_device_type = api.trt.DeviceType.DLA
    config.DLA_core = dla.core
    if dla.gpu_fallback:
        config.set_flag(api.trt.BuilderFlag.GPU_FALLBACK)
    layers: list[ILayer] = [network.get_layer(index) for index in range(network.num_layers)]
    left = [_title(layer) for layer in layers if not config.can_run_on_DLA(layer)]
    if not left:
        return ()
    shown = ", ".join(left[:_SHOWN_LAYERS])
    if len(left) > _SHOWN_LAYERS:
        shown += f" and {len(left) - _SHOWN_LAYERS} more"
    sentence = f"the DLA does not take {len(left)} of {len(layers)} layers: {shown}"
    if not dla.gpu_fallback:
        raise RefusedError(f"{sentence}; allow the GPU fallback to run them on the GPU")
    return (f"{sentence}; the GPU runs them",)


def _title(layer: ILayer) -> str:
    kind: LayerType = layer.type
    return f"{layer.name} ({kind.name})"
