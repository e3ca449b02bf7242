"""An ONNX file becomes a TensorRT network."""

from __future__ import annotations

import os
from pathlib import Path

from exporter.engine import build_log
from exporter.engine.capabilities import Api, Capability, needs
from exporter.engine.refusal import RefusedError
from exporter.engine.tensorrt_names import Builder, ILogger, INetworkDefinition, ParserError
from models.file_names import is_text


def create_network(api: Api, builder: Builder, *, strongly_typed: bool) -> INetworkDefinition:
    """An empty network; flags that a release no longer has are its only behaviour."""
    flags = 0
    if api.can(Capability.EXPLICIT_BATCH):
        flags |= _explicit_batch(api)
    if strongly_typed and api.can(Capability.STRONG_TYPING):
        flags |= _strongly_typed(api)
    return builder.create_network(flags)


@needs(Capability.EXPLICIT_BATCH)
def _explicit_batch(api: Api) -> int:
    return 1 << int(api.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


@needs(Capability.STRONG_TYPING)
def _strongly_typed(api: Api) -> int:
    return 1 << int(api.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def parse(api: Api, network: INetworkDefinition, logger: ILogger, path: Path) -> None:
    """Fill ``network`` from the file.

    Raises:
        RefusedError: with the parser's words, one for each error.
    """
    parser = api.trt.OnnxParser(network, logger)
    if not is_text(path):
        # The parser takes text alone. What the bundle calls its files is; this process is the
        # worker's own, so that it may stand where it likes.
        os.chdir(path.parent)
        path = Path(path.name)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    raise RefusedError(*(f"{_where(api, error)}: {_words(error)}" for error in errors))


def _words(error: ParserError) -> str:
    return build_log.without_noise(error.desc())


def _where(api: Api, error: ParserError) -> str:
    if api.can(Capability.PARSER_NODES):
        return _named_node(api, error)
    return f"node {error.node()} (ONNX)" if error.node() >= 0 else "model (ONNX)"


@needs(Capability.PARSER_NODES)
def _named_node(_api: Api, error: ParserError) -> str:
    return f"{error.node_name() or 'model'} ({error.node_operator() or 'ONNX'})"
