"""The layers of a graph: calls of a convolution or linear operator with a weight of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from jettison.graph.axes import Atom, Cat, Term, resolve
from jettison.graph.recurrent import GATES
from jettison.graph.subgraphs import bind_operands, walk_nodes
from jettison.graph.trace import hint, shape_of

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding}


@dataclass(frozen=True)
class Layer:
    """One call of a weighted operator; `name` is the path of the module that owns the weight."""

    name: str
    operator: str
    weight: str
    bias: str | None
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    node: fx.Node = field(repr=False, compare=False)


def find_layers(module: fx.GraphModule) -> tuple[Layer, ...]:
    """Return the convolution and linear calls in the order they run; a weight used twice gives two layers."""
    layers = []
    operands = bind_operands(module)
    for prefix, node in walk_nodes(module):
        is_conv = node.target in _CONVOLUTIONS
        if not is_conv and node.target != aten.linear.default:
            continue
        weight = _name_tensor(node.args[1], prefix, operands)  # type: ignore[arg-type]
        if weight is None:
            continue
        name = weight.rpartition(".")[0] or weight
        bias = _arg(node, 2, "bias", None)
        rank = len(node.args[1].meta["val"].shape) - 2  # type: ignore[union-attr]
        layers.append(
            Layer(
                name,
                "conv" if is_conv else "linear",
                weight,
                _name_tensor(bias, prefix, operands) if isinstance(bias, fx.Node) else None,
                int(_arg(node, 6, "groups", 1)) if is_conv else 1,
                _sizes(_arg(node, 3, "stride", 1), rank) if is_conv else (),
                _padding(node, rank) if is_conv else (),
                _sizes(_arg(node, 5, "dilation", 1), rank) if is_conv else (),
                node,
            )
        )
    return tuple(layers)


@dataclass(frozen=True)
class Recurrence:
    """One call of a recurrent operator: the steps a sample takes, and the matrices that meet it at each."""

    steps: int
    matrices: tuple[str, ...]


def find_recurrences(module: fx.GraphModule, samples: int) -> tuple[Recurrence, ...]:
    """Return the calls of recurrent operators in the order they run; `samples` is the batch the graph was traced with.

    Left out are packed sequences, and weights that are computed.
    """
    operands = bind_operands(module)
    found = []
    for prefix, node in walk_nodes(module):
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in GATES or getattr(node.target, "_overloadname", "") == "data":
            continue
        is_step = str(packet).endswith("_cell")
        weights: Any = node.args[2:4] if is_step else node.args[2]
        names = [_name_tensor(w, prefix, operands) for w in weights if len(w.meta["val"].shape) == 2]
        if None not in names:
            shape: Any = shape_of(node.args[0])  # type: ignore[arg-type]
            steps = math.prod(shape[:1] if is_step else shape[:2]) // samples
            found.append(Recurrence(steps, tuple(n for n in names if n is not None)))
    return tuple(found)


def _name_tensor(node: fx.Node, prefix: str, operands: Mapping[fx.Node, Any]) -> str | None:
    """Name the tensor of the module that a node stands for; a sub-graph is handed its tensors as operands."""
    if node.op == "get_attr":
        return f"{prefix}{node.target}"
    while node in operands:
        node = operands[node]
    return str(node.target) if node.op == "get_attr" else None


def unfold_patches(layer: Layer, x: Tensor) -> Tensor | None:
    """Return the layer's input as `(positions, groups, columns)`, so that the layer is a product with its weight.

    Columns run as the flattened weight does. None for 3-d convolutions.
    """
    if layer.operator == "linear":
        return x.reshape(-1, 1, x.shape[-1])
    if len(layer.stride) == 3:
        return None
    kernel = layer.node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    if len(layer.stride) == 1:
        x, kernel = x.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    columns = F.unfold(x, tuple(int(k) for k in kernel), dilation, padding, stride)
    return columns.transpose(1, 2).reshape(-1, layer.groups, columns.shape[1] // layer.groups)


def flatten_outputs(layer: Layer, y: Tensor) -> Tensor:
    """Return the layer's output as `(positions, groups, channels)`, rows as in `unfold_patches`."""
    if layer.operator == "conv":
        y = y.flatten(2).transpose(1, 2)
    return y.reshape(-1, layer.groups, y.shape[-1] // layer.groups)


def find_owners(term: Term, atom: Atom) -> Tensor:
    """Return, for each position of `term`, which position of `atom` owns it, or -1."""
    term = resolve(term)
    if isinstance(term, Atom):
        return torch.arange(term.size) if term is atom else torch.full((term.size,), -1)
    if isinstance(term, Cat):
        return torch.cat([find_owners(p, atom) for p in term.parts])
    owner = torch.full((1,), -1)
    for factor in term.factors:
        mine = find_owners(factor, atom)
        owner = torch.maximum(owner[:, None], mine[None, :]).flatten()
    return owner


def following_batch_norm(node: fx.Node) -> fx.Node | None:
    """Return the BatchNorm that alone uses this node's output, if there is one."""
    users = list(node.users)
    if len(users) != 1 or users[0].target != aten.batch_norm.default:
        return None
    # After a linear layer over tokens, dimension 1 (which BatchNorm scales) is not the layer's channels.
    is_linear_over_tokens = node.target == aten.linear.default and len(shape_of(node) or ()) != 2
    return None if is_linear_over_tokens else users[0]


def count_positions(layer: Layer, samples: int) -> int:
    """Return how often one sample meets the layer's weight: its pixels or tokens, wherever the batch stands.

    `samples` is the batch the graph was traced with.
    """
    elements = math.prod(shape_of(layer.node) or ())
    weight = layer.node.args[1]
    assert isinstance(weight, fx.Node)
    return elements // (hint(weight.meta["val"].shape[0]) * samples)


def _arg(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _sizes(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))


def _padding(node: fx.Node, rank: int) -> tuple[int, ...]:
    """Return the padding per dimension; "same" is only symmetric, and so expressible, for odd kernels."""
    value = _arg(node, 4, "padding", 0)
    if value == "valid":
        return (0,) * rank
    if value == "same":
        kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
        dilation = _sizes(_arg(node, 5, "dilation", 1), rank)
        return tuple(d * (int(k) - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return _sizes(value, rank)
