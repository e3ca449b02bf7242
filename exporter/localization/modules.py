"""Which module a graph leaves, where the last good stage is the torch network itself.

The exporter names nodes after modules: ``stage1.0.conv`` and ``stage1.0.relu`` come from the module
``stage1.0``, whose result is what the last of them computes. Hooks give the modules' results, and
the graph gets them as its tensors (:func:`exporter.localization.probe.forced`): what a module's
nodes make of what the modules before it returned is compared with what the module returned.

A module that is used twice, or returns no single tensor, is looked into by its neighbours only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from exporter.errors import ExporterError
from exporter.localization.probe import Noise, Probe, float_tensors, places, steps
from exporter.network import Interface, flatten
from exporter.parity.deviation import Localization, OperationError
from exporter.running.onnx_runner import Batch, FloatArray

EXPLAINED_DB, LIMIT_DB = 144.0, 100.0
"""Those of float32 in :mod:`exporter.localization.graphs`."""

RULE = f"A module deviates where the graph's result is less than {LIMIT_DB:g} dB from its own."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModulePair:
    """A network in eval mode and the float graph that was exported from it."""

    module: nn.Module
    interface: Interface
    graph: onnx.ModelProto

    def localize(self, stage: str, batch: Batch) -> Localization | None:
        """Every module held against its nodes; None where that cannot be done."""
        tensors = self._tensors()
        parts = [(part, self._trace(part, tensors)) for part in steps(batch)]
        seen = [name for name in tensors if all(name in found for _, found in parts)]
        at = [place for place in places(seen, self.graph) if place.data_type == TensorProto.FLOAT]
        if not at:
            return None
        noises = {place.tensor: Noise() for place in at}
        try:
            cut = Probe(self.graph, at, given=True)
            for part, exact in parts:
                found = cut.run(part, exact)
                for name, noise in noises.items():
                    noise.add(exact[name], found[name])
        except ExporterError:
            return None
        rows = tuple(
            OperationError(
                name=tensors[name] or name,
                operator=type(self.module.get_submodule(tensors[name])).__name__,
                sqnr_db=noise.sqnr_db,
                explained_db=EXPLAINED_DB,
                limit_db=LIMIT_DB,
            )
            for name, noise in noises.items()
            if noise.signal > 0
        )
        return Localization(
            stage=stage, reference="torch", images=len(batch[0]), rule=RULE, rows=rows
        )

    def _tensors(self) -> dict[str, str]:
        """Tensors of the graph in order, and the modules that return them; the last is the root."""
        paths = {name for name, _ in self.module.named_modules() if name}
        last: dict[str, str] = {}
        for node in self.graph.graph.node:
            for path in (node.name, node.name.rpartition(".")[0]):
                if path in paths:
                    last[path] = node.output[0]
                    break
        computed = float_tensors(self.graph)
        ends = {port.name: "" for port in self.interface.outputs if port.name in computed}
        found = {tensor: path for path, tensor in last.items() if tensor not in ends}
        ordered = [name for name in computed if name in found]
        return {name: found[name] for name in ordered} | ends

    def _trace(self, batch: Batch, tensors: Mapping[str, str]) -> dict[str, FloatArray]:
        """What the modules return, by the graph's names."""
        returned: dict[str, list[Tensor]] = {}

        def remember(name: str) -> object:
            def hook(_module: nn.Module, _inputs: object, output: object) -> None:
                returned.setdefault(name, []).append(output)  # type: ignore[arg-type]

            return hook

        handles = [
            self.module.get_submodule(path).register_forward_hook(remember(name))  # type: ignore[arg-type]
            for name, path in tensors.items()
            if path
        ]
        try:
            with torch.no_grad():
                result = self.module(*map(torch.from_numpy, batch))
        finally:
            for handle in handles:
                handle.remove()
        found = {
            name: values[0].numpy()
            for name, values in returned.items()
            if len(values) == 1 and isinstance(values[0], Tensor)
        }
        ports = zip(self.interface.outputs, flatten(result), strict=True)
        return found | {port.name: tensor.numpy() for port, (_, tensor) in ports}
