"""Channels whose scale is free: what writes a tensor divides by a factor, what reads it multiplies, the function stays.

Equalisation, SmoothQuant and AWQ choose factors; this file finds where they may and carries them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.quantization.fold import CONVOLUTIONS, IDENTITIES, find_weight, name_operator, read_attribute, set_buffer

HOMOGENEOUS = frozenset({"aten.relu.default", "aten.leaky_relu.default", "aten.prelu.default", "aten.abs.default"})
"""f(s x) = s f(x) for every s > 0, channel by channel. ReLU6 is none: its cap would move."""
NORMS = frozenset({"aten.layer_norm.default", "aten.rms_norm.default"})
WEIGHTED = frozenset({*CONVOLUTIONS, "aten.linear.default"})


@dataclass(frozen=True)
class Link:
    """A tensor with free channel scales: `writer` gives it, maybe through activations, `readers` alone read it.

    `parameters` are the dotted names divided by the factors along their first axis. `source` is the tensor the readers
    read.
    """

    writer: Node
    parameters: tuple[str, ...]
    source: Node
    readers: tuple[Node, ...]
    channels: int


def find_links(module: GraphModule) -> Iterator[Link]:
    """Give every tensor whose channels can be scaled, in the order of the graph."""
    for writer in module.graph.nodes:
        parameters = _find_parameters(writer)
        if not parameters or any(_count_readers(module, name) != 1 for name in parameters):
            continue
        source = writer
        while len(source.users) == 1 and _passes(following := next(iter(source.users)), source):
            source = following
        readers = tuple(source.users)
        if not readers or not all(_reads_channels(module, reader, source) for reader in readers):
            continue
        if {_reads_last(reader) for reader in readers} != {_writes_last(writer)}:
            continue
        channels = len(read_attribute(module, parameters[0]))
        yield Link(writer, parameters, source, readers, channels)


def _find_parameters(node: Node) -> tuple[str, ...]:
    """Return what must be divided to divide a tensor's channels: a layer's or a norm's weight and bias."""
    operator = name_operator(node)
    if operator in WEIGHTED and find_weight(node) is not None:
        places: tuple[int, ...] = (1, 2)
    elif operator in NORMS and len(node.args[1]) == 1:  # type: ignore[arg-type]
        places = (2, 3) if operator == "aten.layer_norm.default" else (2,)
    elif operator == "aten.mul.Tensor" and _is_gain(node.args[0]) != _is_gain(node.args[1]):
        places = (0,) if _is_gain(node.args[0]) else (1,)
    else:
        return ()
    names = []
    for place in places:
        value = node.args[place] if len(node.args) > place else None
        if isinstance(value, Node):
            if value.op != "get_attr":
                return ()
            names.append(str(value.target))
        elif place == places[0]:
            return ()
    return tuple(names)


def _is_gain(value: object) -> bool:
    """Say if a factor is a parameter with one number for each entry of the last axis, as hand-written norms end."""
    if not isinstance(value, Node) or value.op != "get_attr":
        return False
    held = value.meta.get("val")
    return isinstance(held, Tensor) and held.ndim == 1 and len(held) > 1


def _count_readers(module: GraphModule, name: str) -> int:
    return sum(len(node.users) for node in module.graph.nodes if node.op == "get_attr" and node.target == name)


def _passes(node: Node, source: Node) -> bool:
    operator = name_operator(node)
    return (operator in HOMOGENEOUS or operator in IDENTITIES) and node.args[0] is source


def _reads_channels(module: GraphModule, reader: Node, source: Node) -> bool:
    if name_operator(reader) not in WEIGHTED or reader.args[0] is not source or source in reader.args[1:]:
        return False
    weight = find_weight(reader)
    return weight is not None and _count_readers(module, str(weight.target)) == 1


def _reads_last(reader: Node) -> bool:
    return name_operator(reader) == "aten.linear.default"


def _writes_last(writer: Node) -> bool:
    return name_operator(writer) not in CONVOLUTIONS


def read_columns(module: GraphModule, reader: Node, channels: int) -> Tensor:
    """Return a reader's weight as `(channels, rest)`: all that each input channel is multiplied with."""
    weight = read_attribute(module, str(find_weight(reader).target))  # type: ignore[union-attr]
    groups = channels // weight.shape[1]
    grouped = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.permute(0, 2, 1, 3).reshape(channels, -1)


def scale_channels(module: GraphModule, link: Link, factors: Tensor) -> None:
    """Divide what writes by `factors` and multiply what reads, in place; the network's function stays."""
    for name in link.parameters:
        value = read_attribute(module, name)
        set_buffer(module, name, (value.double() / factors.double().view(-1, *[1] * (value.ndim - 1))).to(value.dtype))
    for reader in link.readers:
        scale_reader(module, reader, factors)


def scale_reader(module: GraphModule, reader: Node, factors: Tensor) -> None:
    """Multiply the input channels of one reader's weight, in place."""
    name = str(find_weight(reader).target)  # type: ignore[union-attr]
    weight = read_attribute(module, name)
    groups = len(factors) // weight.shape[1]
    grouped = weight.double().view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    scaled = grouped * factors.double().view(groups, 1, weight.shape[1], 1)
    set_buffer(module, name, scaled.reshape(weight.shape).to(weight.dtype))


def measure_reach(module: GraphModule, link: Link) -> Tensor:
    """Return the largest weight each channel is multiplied with, over all readers."""
    return torch.stack([read_columns(module, r, link.channels).abs().amax(1) for r in link.readers]).amax(0)
