"""The nodes of a file: what they read, also from graphs inside them, and how they are renamed and exchanged.

Graphs inside nodes are the branches of an If and the body of a Loop or Scan. They read values of the graph around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def list_bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs that a node holds, without those inside them."""
    return [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]


def list_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of values that a node reads, itself or from inside its bodies."""
    yield from node.input
    for body in list_bodies(node):
        own = {v.name for v in (*body.input, *body.initializer)} | {
            name for inner in body.node for name in inner.output
        }
        reads = [output.name for output in body.output] + [name for inner in body.node for name in list_reads(inner)]
        yield from (name for name in reads if name not in own)


def rename_values(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    """Give the values that a node and its bodies read and make other names, in place."""
    node.input[:] = [renamed.get(value, value) for value in node.input]
    node.output[:] = [renamed.get(value, value) for value in node.output]
    for body in list_bodies(node):
        for output in body.output:
            output.name = renamed.get(output.name, output.name)
        for inner in body.node:
            rename_values(inner, renamed)


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Let a graph have these nodes, some of which may be its own, in this order."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
