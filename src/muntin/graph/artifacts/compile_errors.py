"""Products that an engine cannot compile in integers, found by the names in its message.

OpenVINO 2026.4 moves the scales of an integer product over the operations behind it, and fails where a shape does not allow that. Its
message names the operation, and sometimes the product.
"""

from __future__ import annotations

import re

import onnx

from muntin.graph.onnx_graph import Graph
from muntin.graph.products import COMPUTE


def products_in_message(model: onnx.ModelProto, message: str) -> list[str]:
    """Return the names of the products that a message names, else of those whose results reach an operation that it names first."""
    graph = Graph(model)
    words = set(re.split(r"[\s\[\](),;]+", message))
    words |= {word.rpartition("/")[0] for word in words}
    named = [node for node in graph.nodes if node.name and node.name in words]
    if products := [node.name for node in named if node.op_type in COMPUTE]:
        return products
    return sorted({name for node in named for name in _sources(graph, node)})


def _sources(graph: Graph, node: onnx.NodeProto) -> set[str]:
    """Return the nearest products before a node."""
    waiting, seen, sources = list(node.input), set(), set()
    while waiting:
        maker = graph.makers.get(waiting.pop())
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if maker.op_type in COMPUTE:
            sources.add(maker.name)
        else:
            waiting.extend(maker.input)
    return sources
