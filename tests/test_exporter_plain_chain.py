"""A plain graph is read as a chain; anything else is none."""

from __future__ import annotations

import onnx
import pytest
import torch

from exporter.onnx_export import export_onnx
from exporter.plain_chain import read_chain
from models import RepVGG, Variant
from models.fusion import reparameterize

TINY = Variant(name="tiny", num_blocks=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    torch.manual_seed(0)
    return export_onnx(reparameterize(RepVGG(TINY, num_classes=6).eval()), (32, 32), {})


def test_a_plain_graph_is_a_chain_of_its_convolutions(model):
    """Names, shapes and boundaries are the graph's."""
    plain = read_chain(model)
    assert plain is not None
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name for node in convolutions] == [s.name for s in plain.chain.stages]
    assert (*(node.input[0] for node in convolutions), "stage4.0.output") == plain.boundaries


@pytest.mark.parametrize("change", ["relu", "head", "branch", "alpha"])
def test_anything_else_is_no_chain(model, change):
    """A missing ReLU, another head, a further node or a scaled classifier give None."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    nodes = list(other.graph.node)
    if change == "relu":
        nodes[2].input[0] = nodes[0].output[0]
        del other.graph.node[1]
    elif change == "head":
        nodes[-3].op_type = "GlobalMaxPool"
    elif change == "branch":
        other.graph.node.insert(
            2, onnx.helper.make_node("Identity", [nodes[1].output[0]], ["branch"])
        )
    else:
        nodes[-1].attribute.append(onnx.helper.make_attribute("alpha", 2.0))
    assert read_chain(other) is None
