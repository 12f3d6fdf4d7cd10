"""Rewrites of a flat graph that runtimes other than ONNX Runtime need, always on a copy; and fingerprints of weights.

A graph made by `quantize` divides in its own operator and holds int32 biases. PT2E's readers know the operators of
`quantized_decomposed` only and derive the bias's integers themselves, so both are spelled as they expect.
"""

from __future__ import annotations

import hashlib
from operator import attrgetter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from jettison.core.errors import InputError
from jettison.targets.integer import quantize_operator

WEIGHTED = frozenset(
    f"aten.{name}"
    for name in ("conv1d.default", "conv1d.padding", "conv2d.default", "conv2d.padding", "conv3d.default")
) | {"aten.conv3d.padding", "aten.linear.default", "aten.conv_transpose1d.default", "aten.conv_transpose2d.input"}
"""Operators with a weight as second and a bias as third argument."""
PRODUCTS = frozenset({"aten.matmul.default", "aten.bmm.default", "aten.mm.default"})
ROUNDINGS = ("jettison.quantize_per_tensor.default", "quantized_decomposed.quantize_per_tensor.default")
DEQUANTIZE_WEIGHT = "quantized_decomposed.dequantize_per_channel.default"


def copy_flat(module: GraphModule) -> GraphModule:
    """Copy a graph and the tensors it reads; the caller's module is left alone."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    found = {str(n.target): attrgetter(str(n.target))(module) for n in graph.nodes if n.op == "get_attr"}
    copied = GraphModule({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}, graph)
    return copied.eval().requires_grad_(False)


def is_converted(module: GraphModule) -> bool:
    """Say if the graph computes on integers anywhere, as those made by `quantize` do."""
    return any(str(node.target).startswith(("quantized_decomposed.", "jettison.")) for node in module.graph.nodes)


def spell_for_pt2e(module: GraphModule, *, weights_as_pairs: bool) -> GraphModule:
    """Return a copy in PT2E's own operators, biases as float parameters, flattenings as views with one free size.

    With `weights_as_pairs` a weight is a float constant that is quantized and dequantized (LiteRT's converter reads
    scales off the first of the two); without, it stays an int8 constant (XNNPACK). Raises nothing.
    """
    result = copy_flat(module)
    for node in list(result.graph.nodes):
        name = str(node.target)
        if node.target is quantize_operator():
            node.target = torch.ops.quantized_decomposed.quantize_per_tensor.default
        elif name == DEQUANTIZE_WEIGHT:
            _respell_constant(result, node, weights_as_pairs)
        elif name == "aten.flatten.using_ints":
            _view_instead(result, node)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def find_coarse(module: GraphModule) -> list[Node]:
    """Return the roundings of activations to a grid coarser than their type's: fewer than 8 bits."""
    found = []
    for node in module.graph.nodes:
        # By name: PT2E's operators exist only once something has quantized in this process.
        if str(node.target) in ROUNDINGS:
            ends = torch.iinfo(node.args[5])
            if node.args[3:5] != (ends.min, ends.max):
                found.append(node)
    return found


def refuse_coarse(module: GraphModule, runtime: str) -> None:
    """Raise InputError where activations have fewer than 8 bits: the runtime's converter reads their type only."""
    if coarse := find_coarse(module):
        low, high = coarse[0].args[3:5]
        raise InputError(
            f"{len(coarse)} activations are rounded to {low} to {high}, first {coarse[0].args[0]}. "
            f"A file for {runtime} would round them to the whole 8 bits and compute something else. Quantize "
            "activations to 8 bits (weights may have fewer), or export for onnxruntime, openvino or inductor."
        )


def cut_before_rounding(module: GraphModule) -> None:
    """Write a rounding to a coarser grid as a clamp and one to the whole type, in place: the numbers are the same."""
    for node in find_coarse(module):
        source, scale, zero_point, low, high, kind = cast(tuple[Node, float, int, int, int, torch.dtype], node.args)
        ends = torch.iinfo(kind)
        with module.graph.inserting_before(node):
            cut = module.graph.call_function(
                torch.ops.aten.clamp.default, (source, (low - zero_point) * scale, (high - zero_point) * scale)
            )
        node.args = (cut, scale, zero_point, ends.min, ends.max, kind)
    module.recompile()


def _respell_constant(module: GraphModule, node: Node, as_pair: bool) -> None:
    source, scale = node.args[0], node.args[1]
    assert isinstance(source, Node) and isinstance(scale, Node)
    stored: Tensor = attrgetter(str(source.target))(module)
    bias = stored.dtype == torch.int32
    if not bias and not as_pair:
        return
    value = _dequantize(stored, attrgetter(str(scale.target))(module), node)
    _set_tensor(module, str(source.target), value)
    if bias:
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return
    with module.graph.inserting_before(node):
        pair = module.graph.call_function(
            torch.ops.quantized_decomposed.quantize_per_channel.default, (source, *node.args[1:])
        )
    node.update_arg(0, pair)


def _dequantize(stored: Tensor, scale: Tensor, node: Node) -> Tensor:
    """Return what the integers stand for; in float64, so that the reader gets the very same integers back."""
    axis = node.args[3]
    shape = [-1 if i == axis else 1 for i in range(stored.ndim)]
    return (stored.double() * scale.double().view(shape)).float()


def _set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    delattr(owner, last)
    owner.register_buffer(last, value)


def _view_instead(module: GraphModule, node: Node) -> None:
    """Write `flatten` as `view(-1, ...)` where all sizes but the first are plain numbers: that stays one reshape."""
    value: Any = node.meta.get("val")
    sizes = list(value.shape[1:]) if isinstance(value, Tensor) and value.ndim else [None]
    if not all(isinstance(size, int) for size in sizes):
        return
    with module.graph.inserting_before(node):
        view = module.graph.call_function(torch.ops.aten.reshape.default, (node.args[0], [-1, *sizes]))
    view.meta = dict(node.meta)
    node.replace_all_uses_with(view)
    module.graph.erase_node(node)


def spell_in_bf16(module: GraphModule) -> GraphModule:
    """Return a copy whose convolutions, linear layers and matrix products read bfloat16.

    What lies between runs in the type it is handed; normalisations keep their float32 parameters, as under autocast.
    Outputs come in whatever type they are made in.
    """
    result = copy_flat(module)
    graph = result.graph
    halved: dict[Node, Node] = {}
    for node in list(graph.nodes):
        name = str(node.target)
        if name not in WEIGHTED | PRODUCTS:
            continue
        for place, argument in enumerate(node.args[: 3 if name in WEIGHTED else 2]):
            if isinstance(argument, Node):
                node.update_arg(place, halved.get(argument) or _halve(result, argument, halved))
    result.recompile()
    return result


def _halve(module: GraphModule, source: Node, halved: dict[Node, Node]) -> Node:
    """Return `source` in bfloat16: a constant is stored so, an activation is cast where it is made."""
    if source.op == "get_attr" and len(source.users) == 1:
        value: Tensor = attrgetter(str(source.target))(module)
        _set_tensor(module, str(source.target), value.to(torch.bfloat16))
        return source
    after = source
    while after.next.op in ("placeholder", "get_attr"):
        after = after.next
    with module.graph.inserting_after(after):
        halved[source] = module.graph.call_function(torch.ops.aten.to.dtype, (source, torch.bfloat16))
    return halved[source]


def list_fingerprints(module: GraphModule) -> dict[str, str]:
    """Return for each layer with integer weights a digest that no rearranging of the weights changes.

    Runtimes store weights in their own order and under their own names; the digest finds a layer again.
    """
    found: dict[str, str] = {}
    for node in module.graph.nodes:
        source = node.args[0] if str(node.target) == DEQUANTIZE_WEIGHT else None
        if isinstance(source, Node) and source.op == "get_attr":
            stored: Tensor = attrgetter(str(source.target))(module)
            if stored.dtype == torch.int8:
                found[str(source.target).removesuffix(".weight")] = fingerprint(stored.cpu().numpy())
    return found


def fingerprint(weights: np.ndarray[Any, Any]) -> str:
    """Return a digest of int8 numbers that does not depend on their order."""
    counts = np.bincount(weights.reshape(-1).view(np.uint8), minlength=256)
    return hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()[:32]
