"""TensorRT's own class names, for annotations.

The library brings no types, so to a type checker each of these is ``Any``. They are not
decoration: a test reads them to know which class of the bindings a value is, and then holds every
attribute that our source uses against the API of each TensorRT release. A value of TensorRT's that
is a parameter must therefore be annotated with one of them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Builder: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
IHostMemory: TypeAlias = Any
ILayer: TypeAlias = Any
ILogger: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IProgressMonitor: TypeAlias = Any
IRuntimeCache: TypeAlias = Any
ParserError: TypeAlias = Any
Runtime: TypeAlias = Any

LayerType: TypeAlias = Any
Severity: TypeAlias = Any
