"""A fake TensorRT that has exactly the names of one release and records what is done with them.

It exists for one purpose: to see which calls our code makes on which release. It builds nothing,
so nothing it returns says anything about engines.
"""

from __future__ import annotations

import enum
import json
from types import SimpleNamespace
from typing import Any

LAYERS = json.dumps({"Layers": []})


class RecordingTensorRt:
    """The module: ``record`` lists what was called and set, such as ``set_flag FP16``."""

    def __init__(self, surface: Any, **answers: Any) -> None:
        self.record: list[str] = []
        self.__version__ = surface.version
        self._answers = {**ANSWERS, **answers}
        for name, members in surface.enums.items():
            if "." not in name:
                setattr(self, name, enum.IntEnum(name, members, start=0))
        for name in surface.classes:
            setattr(self, name, self._class(surface, name))

    def _class(self, surface: Any, name: str) -> type:
        fake, members = self, surface.classes[name]
        if name in SUBCLASSED:
            return type(name, (), {})

        def get(self: Any, attribute: str) -> Any:
            if attribute not in members:
                raise AttributeError(f"{surface.name}: {name} has no {attribute}")
            answer = fake._answers.get(f"{name}.{attribute}")
            signature = members[attribute]
            if not signature:
                return answer

            def called(*arguments: Any, **keywords: Any) -> Any:
                words = [_word(argument) for argument in (*arguments, *keywords.values())]
                fake.record.append(" ".join([attribute, *filter(None, words)]))
                if callable(answer):
                    return answer(fake)
                if answer is not None:
                    return answer
                result = signature.rpartition("-> ")[2]
                result = {"IEngineInspector": "EngineInspector"}.get(result, result)
                return getattr(fake, result)() if result in surface.classes else None

            return called

        def put(self: Any, attribute: str, value: Any) -> None:
            if members.get(attribute, "method"):
                raise AttributeError(f"{surface.name}: {name}.{attribute} cannot be set")
            fake.record.append(f"{attribute} = {_word(value) or type(value).__name__}")

        body = {"__init__": lambda _self, *_: None, "__getattr__": get, "__setattr__": put}
        return type(name, (), body)


def _word(value: Any) -> str:
    """Enum members by name, numbers and text as they are, anything else not at all."""
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, (int, bytes)) else ""


SUBCLASSED = ("ILogger", "IProgressMonitor", "IInt8EntropyCalibrator2")
ANSWERS: dict[str, Any] = {
    "INetworkDefinition.num_inputs": 1,
    "INetworkDefinition.num_layers": 2,
    "ITensor.name": "input",
    "ITensor.shape": (-1, 3, 64, 64),
    "ILayer.name": "layer",
    "ILayer.type": SimpleNamespace(name="SHUFFLE"),
    "Builder.num_DLA_cores": 2,
    "Builder.build_serialized_network": b"plan",
    "IBuilderConfig.add_optimization_profile": 0,
    "IBuilderConfig.set_timing_cache": True,
    "IBuilderConfig.set_compute_capability": True,
    "IBuilderConfig.can_run_on_DLA": True,
    "ITimingCache.serialize": b"timings",
    "OnnxParser.parse_from_file": True,
    "Runtime.deserialize_cuda_engine": lambda fake: fake.ICudaEngine(),
    "EngineInspector.get_engine_information": LAYERS,
    "ICudaEngine.create_execution_context": lambda fake: fake.IExecutionContext(),
    "IRuntimeConfig.set_runtime_cache": True,
    "IRuntimeCache.deserialize": True,
    "IRuntimeCache.serialize": b"kernels",
}
