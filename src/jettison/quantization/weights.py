"""The integers of a layer as a matrix: read from a converted graph, written back, and its inputs unfolded to match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from jettison.quantization.convert import BIAS_LIMIT
from jettison.quantization.fold import name_operator, read_attribute, set_buffer

CHUNK = 2**25
"""Numbers of unfolded input held at a time."""


@dataclass(frozen=True)
class Weight:
    """A layer's weight: `integers` (outputs, ...) as float32, one `scale` for each output, `bias` in float32 or None.

    `input_scale` is the step of the layer's input: the bias has a step of `input_scale * scale`.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: float

    @property
    def values(self) -> Tensor:
        """The numbers the integers stand for."""
        return self.integers * self.scale.view(-1, *[1] * (self.integers.ndim - 1))


def _name_constant(node: Node, index: int, place: int) -> str | None:
    packed = node.args[index] if len(node.args) > index else None
    if not isinstance(packed, Node):
        return None
    source = packed.args[place]
    assert isinstance(source, Node) and source.op == "get_attr"
    return str(source.target)


def read_weight(converted: GraphModule, node: Node) -> Weight:
    """Return the integers, scales and bias of a weighted call of a converted graph."""
    name, scale = _name_constant(node, 1, 0), _name_constant(node, 1, 1)
    bias, bias_scale = _name_constant(node, 2, 0), _name_constant(node, 2, 1)
    assert name is not None and scale is not None and isinstance(node.args[0], Node)
    step = node.args[0].args[1]
    assert isinstance(step, float)
    floats = None
    if bias is not None and bias_scale is not None:
        floats = read_attribute(converted, bias).float() * read_attribute(converted, bias_scale)
    return Weight(read_attribute(converted, name).float(), read_attribute(converted, scale).clone(), floats, step)


def write_weight(converted: GraphModule, node: Node, weight: Weight) -> None:
    """Put integers, scales and bias into a converted graph, in place, with the bias on its own step."""
    name, scale = _name_constant(node, 1, 0), _name_constant(node, 1, 1)
    bias, bias_scale = _name_constant(node, 2, 0), _name_constant(node, 2, 1)
    assert name is not None and scale is not None
    set_buffer(converted, name, weight.integers.to(torch.int8))
    set_buffer(converted, scale, weight.scale.float())
    if bias is not None and bias_scale is not None:
        assert weight.bias is not None
        step = torch.tensor(weight.input_scale, dtype=torch.float32) * weight.scale.float()
        whole = torch.round(weight.bias.double() / step.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)
        set_buffer(converted, bias, whole.to(torch.int32))
        set_buffer(converted, bias_scale, step)


def find_smallest_scale(weight: Weight) -> Tensor:
    """Return the least scale of each channel with which its bias still fits into int32."""
    if weight.bias is None:
        return torch.zeros_like(weight.scale)
    return weight.bias.abs() / (weight.input_scale * BIAS_LIMIT)


def count_groups(node: Node) -> int:
    """Return the groups of a convolution; 1 for a linear layer."""
    if name_operator(node) == "aten.linear.default":
        return 1
    groups = node.args[6] if len(node.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def unfold(x: Tensor, node: Node, weight_shape: torch.Size, every: int = 1) -> Tensor:
    """Return the layer's input as `(groups, inputs, positions)`: a weight's row times a column is one output.

    With `every` only each so-many-th row and column of a picture is taken, and as great a share of anything else.
    """
    if name_operator(node) == "aten.linear.default":
        return x.reshape(-1, x.shape[-1])[:: every**2].mT.unsqueeze(0)
    rank, kernel = x.ndim - 2, list(weight_shape[2:])
    stride, padding, dilation = (_read_sizes(node, i, rank, default) for i, default in ((3, 1), (4, 0), (5, 1)))
    ends = [end for axis in reversed(range(rank)) for end in _read_ends(padding, axis, kernel[axis], dilation[axis])]
    if any(ends):
        x = F.pad(x, ends)
    for axis in range(rank):
        # A window on each axis, as a view: nothing is copied before the positions are chosen.
        window = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, window, stride[axis])[..., :: dilation[axis]]
    x = x[:, :, :: every**2] if rank == 1 else x[:, :, ::every, ::every]
    groups = count_groups(node)
    grouped = x.unflatten(1, (groups, -1))
    spatial, taps = [3 + axis for axis in range(rank)], [3 + rank + axis for axis in range(rank)]
    inputs = grouped.shape[2] * math.prod(kernel)
    columns: Tensor = grouped.permute(1, 2, *taps, 0, *spatial).reshape(groups, inputs, -1)
    return columns


def _read_ends(padding: tuple[int, ...] | str, axis: int, kernel: int, dilation: int) -> tuple[int, int]:
    """Return the zeros before and after along one axis; where "same" comes out odd, the end gets the one more."""
    if not isinstance(padding, str):
        return padding[axis], padding[axis]
    total = dilation * (kernel - 1) if padding == "same" else 0
    return total // 2, total - total // 2


def fold_outputs(y: Tensor, node: Node, groups: int, every: int) -> Tensor:
    """Return a tensor shaped as the layer's output as `(groups, rows, positions)`, in the order of `unfold`."""
    if name_operator(node) == "aten.linear.default":
        return y.flatten(0, -2)[:: every**2].mT.unsqueeze(0)
    y = y[:, :, :: every**2] if y.ndim == 3 else y[:, :, ::every, ::every]
    rows = y.shape[1] // groups
    return y.transpose(0, 1).reshape(groups, rows, -1)


def choose_every(layer_positions: int, wanted: int) -> int:
    """Return the odd step along both axes that leaves about so many positions; odd ones do not fall in with strides."""
    return math.isqrt(max(1, layer_positions // wanted)) | 1


def _read_sizes(node: Node, index: int, rank: int, default: int) -> Any:
    value = node.args[index] if len(node.args) > index else default
    if isinstance(value, str):
        return value  # "same" and "valid", for the caller
    if isinstance(value, int):
        return (value,) * rank
    assert isinstance(value, (list, tuple))
    sizes = tuple(int(v) for v in value)
    return sizes * rank if len(sizes) == 1 else sizes


def split_rows(weight: Tensor, groups: int) -> Tensor:
    """Return a weight as `(groups, outputs of a group, inputs of a group)`."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def name_axis(node: Node) -> int:
    """Return the channel axis of a weighted call's output."""
    return -1 if name_operator(node) == "aten.linear.default" else 1


def cut_batch(tensors: Sequence[Tensor], shape: torch.Size, most: int = CHUNK) -> list[tuple[Tensor, ...]]:
    """Cut a batch, its input first, so that the unfolded input for a weight of that shape stays small.

    No part has more than `most` items.
    """
    one = max(1, tensors[0][0].numel() * shape[2:].numel())
    size = min(most, max(1, CHUNK // one))
    return list(zip(*(x.split(size) for x in tensors), strict=True))
