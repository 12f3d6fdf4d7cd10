"""Graph changes before quantization that leave the function as it is: fold BatchNorm, un-share, drop dead ends."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from jettison.graph.subgraphs import inline_regions
from jettison.graph.trace import hint

CONVOLUTIONS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding")
TRANSPOSED = ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
FOLDABLE = frozenset({*CONVOLUTIONS, *TRANSPOSED, "aten.conv1d.padding", "aten.conv3d.default", "aten.conv3d.padding"})
"""What a BatchNorm folds into, integer or not."""
BATCH_NORM = "aten.batch_norm.default"
IDENTITIES = ("aten.dropout.default", "aten.feature_dropout.default", "aten.alias.default")
NEUTRAL = {"aten.add.Tensor": 0, "aten.sub.Tensor": 0, "aten.mul.Tensor": 1, "aten.div.Tensor": 1}
"""Numbers that change nothing: `sum` of Python starts with a zero."""
COPIES = ("aten.clone.default", "aten.contiguous.default", "aten.to.dtype", "aten._to_copy.default")
"""What gives the same numbers in memory of its own, where it keeps their type."""
SLICES = ("aten.slice.Tensor", "aten.narrow.default")
"""What gives all of its input where the sizes say so: GhostNet cuts to a width that it has."""
ASSERTION = "aten._assert_tensor_metadata.default"
"""The tracer's guard of a cast: a reader that would hold its tensor in float."""


def name_operator(node: Node) -> str:
    """Return the ATen name ("aten.relu.default") of a call, "" for other nodes; in-place forms give the plain name."""
    if node.op != "call_function":
        return ""
    return str(node.target).replace("_.", ".") if str(node.target).startswith("aten.") else str(node.target)


def is_identity(node: Node) -> bool:
    """Say if a call of a graph without in-place calls gives the very numbers it is given."""
    name = name_operator(node)
    if name in IDENTITIES:
        return True
    source = node.args[0] if node.args else None
    before, after = (n.meta.get("val") if isinstance(n, Node) else None for n in (source, node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.dtype != after.dtype or before.device != after.device:
        return False
    if tuple(map(hint, before.stride())) != tuple(map(hint, after.stride())):
        return False  # another order in memory is what a view may need
    if name in NEUTRAL:
        other = node.args[1]
        return isinstance(other, (int, float)) and other == NEUTRAL[name]
    if name in SLICES:
        return tuple(map(hint, before.shape)) == tuple(map(hint, after.shape))
    return name in COPIES


def read_attribute(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of that dotted name."""
    found: Tensor = attrgetter(name)(module)
    return found


def set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` at the dotted name as a buffer, replacing what stood there; missing parents are made."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if hasattr(module, last):
        delattr(module, last)
    module.register_buffer(last, value)


def find_layers(module: GraphModule, operators: frozenset[str] | set[str]) -> dict[str, Node]:
    """Return each node of these operators by its layer's name: the weight's dotted name without ".weight"."""
    layers: dict[str, Node] = {}
    for node in module.graph.nodes:
        if name_operator(node) not in operators:
            continue
        weight = find_weight(node)
        if weight is not None:
            layers[name_layer(str(weight.target), layers)] = node
    return layers


def find_weight(node: Node) -> Node | None:
    """Return the get_attr node of a call's weight, looking through a dequantization; None if it is computed."""
    weight = node.args[1] if len(node.args) > 1 else None
    if isinstance(weight, Node) and weight.op == "call_function" and "dequantize" in str(weight.target):
        weight = weight.args[0]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def name_layer(weight: str, taken: dict[str, Node]) -> str:
    """Return "conv" for "conv.weight"; a second call of one layer is "conv@2"."""
    name = weight.removesuffix(".weight")
    count, unique = 1, name
    while unique in taken:
        count += 1
        unique = f"{name}@{count}"
    return unique


def number_name(name: str, count: int) -> str:
    """Return "conv@2.weight" for the second of "conv.weight"."""
    stem, _, last = name.rpartition(".")
    return f"{stem}@{count}.{last}" if stem else f"{last}@{count}"


def read_from(module: GraphModule, before: Node, name: str, like: Node | None) -> Node:
    """Return a new node that reads the tensor of that name, placed before another, with what is known of `like`."""
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    if like is not None:
        node.meta = dict(like.meta)
    return node


def unshare(module: GraphModule, weighted: frozenset[str] | set[str]) -> None:
    """Give every weighted call its own weight and bias, in place: a shared bias would need several scales."""
    _keep_for_others(module, weighted)
    taken: set[str] = set()
    for node in list(module.graph.nodes):
        if name_operator(node) not in weighted:
            continue
        for index in (1, 2):
            source = node.args[index] if len(node.args) > index else None
            if not (isinstance(source, Node) and source.op == "get_attr"):
                continue
            name, count = str(source.target), 1
            while name in taken:
                count += 1
                name = number_name(str(source.target), count)
            if name != source.target:
                set_buffer(module, name, read_attribute(module, str(source.target)).detach().clone())
                node.update_arg(index, read_from(module, node, name, source))
            elif len(source.users) > 1:
                node.update_arg(index, read_from(module, node, name, source))
            taken.add(name)


def _keep_for_others(module: GraphModule, weighted: frozenset[str] | set[str]) -> None:
    """Give what else reads a weighted call's parameter (an embedding tied to the head) a copy that stays float."""

    def is_own(node: Node, source: Node) -> bool:
        return name_operator(node) in weighted and source in node.args[1:3]

    sources = [node for node in module.graph.nodes if node.op == "get_attr"]
    owned = {str(source.target) for source in sources if any(is_own(user, source) for user in source.users)}
    for source in sources:
        others = [user for user in source.users if not is_own(user, source)]
        if str(source.target) not in owned or not others:
            continue
        stem, _, last = str(source.target).rpartition(".")
        name = f"{stem}@float.{last}" if stem else f"{last}@float"
        set_buffer(module, name, read_attribute(module, str(source.target)).detach().clone())
        copied = read_from(module, source, name, source)
        for user in others:
            user.replace_input_with(source, copied)


def fold_batch_norm(module: GraphModule) -> int:
    """Fold each BatchNorm that alone reads a convolution into it, in place, and drop identities; returns how many.

    W' = W g / sqrt(v + eps), b' = beta + (b - m) g / sqrt(v + eps), computed in float64.
    """
    folded = 0
    for node in list(module.graph.nodes):
        if name_operator(node) == ASSERTION and not node.users:
            module.graph.erase_node(node)
            continue
        if is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            continue
        conv = node.args[0] if node.args else None
        if name_operator(node) != BATCH_NORM or not isinstance(conv, Node) or len(conv.users) != 1:
            continue
        if name_operator(conv) not in FOLDABLE or find_weight(conv) is None:
            continue
        _fold_one(module, conv, node)
        folded += 1
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return folded


def _fold_one(module: GraphModule, conv: Node, norm: Node) -> None:
    weight_node = find_weight(conv)
    assert weight_node is not None
    weight_name = str(weight_node.target)
    weight = read_attribute(module, weight_name).detach().double()
    groups = _count_groups(conv)
    channels = weight.shape[1] * groups if name_operator(conv) in TRANSPOSED else weight.shape[0]

    def read(node: object, default: float) -> Tensor:
        if isinstance(node, Node):
            return read_attribute(module, str(node.target)).detach().double()
        return torch.full((channels,), default, dtype=torch.float64, device=weight.device)

    gamma, beta = read(norm.args[1], 1.0), read(norm.args[2], 0.0)
    mean, variance = read(norm.args[3], 0.0), read(norm.args[4], 1.0)
    eps = norm.args[7]
    assert isinstance(eps, float)
    factor = gamma / torch.sqrt(variance + eps)
    bias = read(conv.args[2] if len(conv.args) > 2 else None, 0.0)
    bias_name = weight_name.removesuffix("weight") + "bias"
    if name_operator(conv) in TRANSPOSED:  # (inputs, outputs of a group, ...): the inputs lie group after group
        grouped = weight.unflatten(0, (groups, -1)) * factor.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = grouped.flatten(0, 1)
    else:
        scaled = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    set_buffer(module, weight_name, scaled.float())
    set_buffer(module, bias_name, (beta + (bias - mean) * factor).float())
    bias_node = read_from(module, conv, bias_name, norm.args[2] if isinstance(norm.args[2], Node) else None)
    conv.args = (conv.args[0], weight_node, bias_node, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    module.graph.erase_node(norm)


def _count_groups(conv: Node) -> int:
    groups = conv.args[6] if name_operator(conv) in TRANSPOSED and len(conv.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def add_biases(module: GraphModule, weighted: frozenset[str] | set[str]) -> None:
    """Give every weighted call without a bias one of zeros, in place, so that a rung can correct means."""
    for node in list(module.graph.nodes):
        weight = find_weight(node) if name_operator(node) in weighted else None
        if weight is None or (len(node.args) > 2 and node.args[2] is not None) or "transpose" in name_operator(node):
            continue
        value = read_attribute(module, str(weight.target))
        name = str(weight.target).removesuffix("weight") + "bias"
        zeros = value.new_zeros(value.shape[0])
        set_buffer(module, name, zeros)
        like = weight.meta.get("val")
        bias = read_from(module, node, name, None)
        if isinstance(like, Tensor):
            bias.meta["val"] = like.new_zeros(value.shape[0])
        node.args = (node.args[0], node.args[1], bias, *node.args[3:])
    module.recompile()


def copy_graph(module: GraphModule, *, share: bool = False) -> GraphModule:
    """Copy graph and tensors, in-place calls written as ordinary ones; the caller's module is left alone.

    With `share` the tensors are the module's own: for those who replace tensors and write into none. deepcopy would
    also take the tracer's leftovers, and warn about them.
    """
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    held: dict[str, Any] = {}
    for name in names:
        value = attrgetter(name)(module)
        if isinstance(value, GraphModule):  # a branch of torch.cond, or a region of autocast
            held[name] = copy_graph(value, share=share)
        else:
            held[name] = value.detach() if share else value.detach().clone()
    copied = GraphModule(held, graph).eval()
    if any(isinstance(value, GraphModule) for value in held.values()):
        inline_regions(copied)
    replace_in_place(copied)
    return copied


def replace_in_place(module: GraphModule) -> None:
    """Write in-place calls (`relu_`) as ordinary ones, in place: whoever read the changed tensor reads the new one."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if not name_operator(node).startswith("aten.") or "_." not in str(node.target):
            continue
        plain, _, overload = str(node.target).removeprefix("aten.").partition("_.")
        function = getattr(getattr(torch.ops.aten, plain, None), overload, None)
        changed = node.args[0]
        if function is None or not isinstance(changed, Node):
            continue
        node.target = function
        for user in list(changed.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(changed, node)
    module.recompile()


def keep_picture_axes(module: GraphModule) -> None:
    """Write a mean that leaves rows and channels only as one that keeps its axes, and a flatten.

    Integer kernels pool that way, and OpenVINO 2026.4 gets an integer mean over tokens without it wrong from row 38 on.
    """
    for node in list(module.graph.nodes):
        source = node.args[0] if name_operator(node) == "aten.mean.dim" else None
        value = source.meta.get("val") if isinstance(source, Node) else None
        if not isinstance(value, Tensor) or len(node.args) != 2 or node.kwargs:
            continue
        axes = sorted(axis % value.ndim for axis in node.args[1])
        if value.ndim - len(axes) != 2 or 0 in axes:
            continue
        with module.graph.inserting_after(node):
            flat = module.graph.call_function(torch.ops.aten.flatten.using_ints, (node, 1))
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
        node.args = (*node.args, True)
        flat.meta = dict(node.meta)
        if isinstance(node.meta.get("val"), Tensor):
            kept = flat.meta["val"]
            for axis in axes:
                kept = kept.unsqueeze(axis)
            node.meta["val"] = kept
    module.recompile()
