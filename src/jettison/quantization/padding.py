"""Zero padding that stands before a convolution, taken into it: one operator less in every target's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from jettison.quantization.clamps import keeps_values
from jettison.quantization.fold import name_operator

PADS = ("aten.pad.default", "aten.constant_pad_nd.default")
RANKS = {"aten.conv1d.default": 1, "aten.conv2d.default": 2, "aten.conv3d.default": 3}


def merge_padding(module: GraphModule) -> None:
    """Let convolutions pad what they alone read padded, in place, where both ends of each axis get as much."""
    for node in list(module.graph.nodes):
        readers = list(node.users)
        widths = _read_widths(node) if readers else None
        if widths is None or not all(_can_pad(reader, node, len(widths)) for reader in readers):
            continue
        for reader in readers:
            own = _spread(reader.args[4] if len(reader.args) > 4 else 0, len(widths))
            both = [a + b for a, b in zip(own, widths, strict=True)]
            defaults = (None, None, None, [1] * len(widths))
            reader.args = (*reader.args[:4], *defaults[len(reader.args) :], both, *reader.args[5:])
            reader.replace_input_with(node, node.args[0])
        module.graph.erase_node(node)
    module.recompile()


def _read_widths(node: Node) -> list[int] | None:
    """Return how much a zero padding adds to either end of each picture axis, first axis first; None for any other."""
    if name_operator(node) not in PADS or not keeps_values(node) or node.kwargs:
        return None
    pads: Any = node.args[1]
    if not all(isinstance(width, int) and width >= 0 for width in pads) or pads[0::2] != pads[1::2]:
        return None
    return list(pads[0::2])[::-1]


def _can_pad(reader: Node, padded: Node, rank: int) -> bool:
    operator = name_operator(reader)
    return RANKS.get(operator) == rank and reader.args[0] is padded and padded not in reader.args[1:]


def _spread(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return values * rank if len(values) == 1 else values
