"""Apply a choice of kept positions: slice every tensor and put every size in the graph right."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from jettison.core.errors import TraceError
from jettison.graph.analyse import Axes, Dims, iterate_dims, list_terms
from jettison.graph.axes import Keeps, Term, count_kept, evaluate_mask, is_touched, resolve
from jettison.graph.groups import Graph, build_graph
from jettison.graph.movement import resolve_dim, resolve_start
from jettison.graph.subgraphs import iterate_nodes
from jettison.graph.trace import find_attribute, get_tensor, shape_of

aten = torch.ops.aten


def slice_graph(graph: Graph, keeps: Keeps) -> fx.GraphModule:
    """Return a new flat module without the dropped positions; tensors it shares with `graph` are not copied.

    Node names stay, so that a node can be compared with its original. Shapes in the nodes' metadata are the
    original's; `refresh` recomputes them.
    """
    return _slice_module(graph.module, "", graph.axes, keeps, {})


def _slice_module(
    module: fx.GraphModule, prefix: str, axes: Axes, keeps: Keeps, made: dict[int, Tensor]
) -> fx.GraphModule:
    """Slice one graph: the network's own, or a sub-graph whose tensors' names begin with `prefix`."""
    owner = _slice_tensors(module, prefix, axes, keeps, made)
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copy = new.node_copy(node, lambda n: copies[n])
        copies[node] = copy
        if node.op == "call_function":
            _rewrite_node(node, copy, axes, keeps)
    return fx.GraphModule(owner, new, class_name="Pruned")


def prune_graph(graph: Graph, kept: Mapping[str, Any]) -> Graph:
    """Return the graph with only `kept` positions of the named groups, analysed anew; weights are copies."""
    keeps = graph.keeps(kept)
    module = slice_graph(graph, keeps)
    shared = {id(t) for t in graph.module.state_dict(keep_vars=True).values()}
    own: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in shared:
            continue  # sliced, and so a copy already
        if id(tensor) not in own:
            copied = tensor.detach().clone()
            own[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if _is_parameter(tensor) else copied
        _assign(module, name, own[id(tensor)])
    refresh(module, graph, keeps)
    return build_graph(dataclasses.replace(graph.traced, module=module))


def refresh(module: fx.GraphModule, graph: Graph, keeps: Keeps) -> None:
    """Put the sizes that slicing gave into the metadata of every node; a free batch stays free."""
    originals = {n.name: n for n in iterate_nodes(graph.module)}
    made: dict[Any, Tensor] = {}
    for node in iterate_nodes(module):
        original = originals.get(node.name)
        if original is not None and "val" in original.meta:
            node.meta["val"] = _resize(original.meta["val"], graph.axes.terms.get(original, ()), keeps, made)


def _resize(value: Any, dims: Any, keeps: Keeps, made: dict[Any, Tensor]) -> Any:
    """Return what stands for a node's value, with the sizes that slicing gives it.

    `made` holds those already made, by what they were made from: a network has few shapes, and making one is slow.
    """
    if isinstance(value, (tuple, list)):
        inner = iterate_dims(dims) if dims else [()] * len(value)
        return type(value)(_resize(v, d, keeps, made) for v, d in zip(value, inner, strict=True))
    if not isinstance(value, Tensor) or not any(is_touched(t, keeps) for t in dims):
        return value
    sizes = []
    for size, term in zip(value.shape, dims, strict=True):
        if is_touched(term, keeps):
            # A free batch folded into this dimension keeps its symbol.
            total, kept = resolve(term).size, count_kept(term, keeps)
            size = kept if isinstance(size, int) else size * kept // total
        sizes.append(size)
    key = (value.dtype, value.device, *(s if isinstance(s, int) else str(s.node.expr) for s in sizes))
    if key not in made:
        made[key] = value.new_empty(sizes)
    return made[key]


def kept_of(graph: Graph, node: fx.Node, dim: int, keeps: Keeps) -> Tensor:
    """Return the kept positions (indices) of one dimension of a node's output."""
    term = graph.axes.terms[node][dim]
    return evaluate_mask(term, keeps).nonzero().flatten()


def _slice_tensors(module: fx.GraphModule, prefix: str, axes: Axes, keeps: Keeps, made: dict[int, Tensor]) -> nn.Module:
    """Build a bare module tree that holds the sliced parameters, buffers and sub-graphs under their old names."""
    root = nn.Module()
    named = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in sorted(named):
        tensor = find_attribute(module, name)
        if not isinstance(tensor, Tensor):
            # In a sub-graph of an opaque operator everything is frozen, so that slicing leaves it as it is.
            root.add_module(name, _slice_module(tensor, f"{prefix}{name}.", axes, keeps, made))
            continue
        for dim, term in enumerate(axes.tensors.get(prefix + name, ())):
            if is_touched(term, keeps):
                index = evaluate_mask(term, keeps).nonzero().flatten().to(tensor.device)
                tensor = tensor.detach().index_select(dim, index)
        old = get_tensor(module, name)
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        _assign(root, name, made.setdefault(id(old), tensor))  # tied tensors stay tied
    return root


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        child = getattr(owner, part)
        assert isinstance(child, nn.Module)
        owner = child
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    elif leaf in owner._parameters:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        owner.register_buffer(leaf, tensor)


Fix = Callable[[fx.Node, fx.Node, Axes, Keeps], None]


def _rewrite_node(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    packet = getattr(node.target, "overloadpacket", None)
    fix = _FIXES.get(packet)
    if fix is not None and _is_near(node, axes, keeps):
        fix(node, copy, axes, keeps)


def _is_near(node: fx.Node, axes: Axes, keeps: Keeps) -> bool:
    """Tell whether an input or output of this node changes size."""
    near = (node, *node.all_input_nodes)
    return any(is_touched(t, keeps) for other in near for t in list_terms(axes.terms.get(other)))


def _set(copy: fx.Node, index: int, name: str, value: Any) -> None:
    if len(copy.args) > index:
        copy.update_arg(index, value)
    else:
        copy.update_kwarg(name, value)


def _fix_groups(index: int) -> Fix:
    def fix(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
        if node in axes.group_axes:
            _set(copy, index, "groups", count_kept(axes.group_axes[node], keeps))

    return fix


def _fix_sizes(index: int, target: Any = None) -> Fix:
    """Literal sizes become those of the output's own terms; -1 and free sizes adapt by themselves."""

    def fix(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
        sizes = list(copy.args[index])  # type: ignore[arg-type]
        dims: Dims = axes.terms[node]
        offset = 0
        if node.target == aten.unflatten.int:
            assert isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int)
            offset = resolve_dim(node.args[1], len(axes.terms[node.args[0]]))
        for i, size in enumerate(sizes):
            term = dims[i + offset]
            if size != -1 and is_touched(term, keeps):
                kept = count_kept(term, keeps)
                sizes[i] = kept if isinstance(size, int) else _scale_size(copy, size, kept, term.size)
        copy.update_arg(index, sizes)
        if target is not None:
            copy.target = target

    return fix


def _scale_size(copy: fx.Node, size: fx.Node, kept: int, total: int) -> fx.Node:
    """A size that multiplies the free batch with a pruned axis shrinks by the axis's own share."""
    common = math.gcd(kept, total)
    with copy.graph.inserting_before(copy):
        product = copy.graph.call_function(operator.mul, (size, kept // common))
        return copy.graph.call_function(operator.floordiv, (product, total // common))


def _fix_split(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    parts = axes.terms[node]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    dim = resolve_dim(dim, len(parts[0]))
    if not any(is_touched(p[dim], keeps) for p in parts):
        return
    copy.target = aten.split_with_sizes.default
    copy.args = (copy.args[0], [count_kept(p[dim], keeps) for p in parts], dim)
    copy.kwargs = {}


def _count_before(term: Term, start: int, keeps: Keeps) -> int:
    """Return how many positions stay before `start`, which may be counted from the end."""
    return int(evaluate_mask(term, keeps)[: resolve_start(start, term.size)].sum())


def _fix_slice(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    assert isinstance(node.args[0], fx.Node)
    source: Dims = axes.terms[node.args[0]]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    dim = resolve_dim(dim, len(source))
    if not is_touched(source[dim], keeps):
        return
    out: Term = axes.terms[node][dim]
    start = node.args[2] if len(node.args) > 2 else node.kwargs.get("start", 0)
    before = _count_before(source[dim], start if isinstance(start, int) else 0, keeps)
    _set(copy, 2, "start", before)
    _set(copy, 3, "end", before + count_kept(out, keeps))


def _fix_scatter(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    assert isinstance(node.args[1], fx.Node)
    target, source = axes.terms[node], axes.terms[node.args[1]]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    start = node.args[3] if len(node.args) > 3 else node.kwargs.get("start", 0)
    assert isinstance(dim, int)
    dim = resolve_dim(dim, len(target))
    if not is_touched(target[dim], keeps):
        return
    before = _count_before(target[dim], start if isinstance(start, int) else 0, keeps)
    _set(copy, 3, "start", before)
    _set(copy, 4, "end", before + count_kept(source[dim], keeps))


def _fix_narrow(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    assert isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int) and isinstance(node.args[2], int)
    source: Dims = axes.terms[node.args[0]]
    dim = resolve_dim(node.args[1], len(source))
    copy.update_arg(2, _count_before(source[dim], node.args[2], keeps))
    copy.update_arg(3, count_kept(axes.terms[node][dim], keeps))


def _fix_squeeze(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    """An axis pruned down to one position is not to vanish with those that always had one."""
    assert isinstance(node.args[0], fx.Node)
    source: Dims = axes.terms[node.args[0]]
    if node.target == aten.squeeze.default:
        copy.target = aten.squeeze.dims
        copy.args = (copy.args[0], [i for i, t in enumerate(source) if t.size == 1])
    elif node.target == aten.squeeze.dims:
        named = [resolve_dim(d, len(source)) for d in node.args[1]]  # type: ignore[union-attr,arg-type]
        copy.update_arg(1, [d for d in named if source[d].size == 1])
    elif source[resolve_dim(node.args[1], len(source))].size != 1:  # type: ignore[arg-type]
        copy.target = aten.squeeze.dims
        copy.args = (copy.args[0], [])


def _fix_layer_norm(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    dims: Dims = axes.terms[node]
    count = len(node.args[1])  # type: ignore[arg-type]
    copy.update_arg(1, [count_kept(t, keeps) for t in dims[-count:]])


def _fix_group_norm(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    copy.update_arg(1, count_kept(axes.group_axes[node], keeps))


def _fix_attention(node: fx.Node, copy: fx.Node, axes: Axes, keeps: Keeps) -> None:
    """The default scale is 1/sqrt(size of q's last axis): keep the original's."""
    if node.kwargs.get("scale") is None:
        assert isinstance(node.args[0], fx.Node)
        shape = shape_of(node.args[0])
        if shape is None:
            raise TraceError(f"Attention {node.name} has no traced shape.")
        copy.update_kwarg("scale", shape[-1] ** -0.5)


_FIXES: dict[Any, Fix] = {
    aten.conv1d: _fix_groups(6),
    aten.conv2d: _fix_groups(6),
    aten.conv3d: _fix_groups(6),
    aten.conv_transpose1d: _fix_groups(6),
    aten.conv_transpose2d: _fix_groups(6),
    aten.conv_transpose3d: _fix_groups(6),
    # The strides of a sliced tensor may no longer allow a view.
    aten.view: _fix_sizes(1, aten.reshape.default),
    aten._unsafe_view: _fix_sizes(1, aten.reshape.default),
    aten.reshape: _fix_sizes(1),
    aten.unflatten: _fix_sizes(2),
    aten.expand: _fix_sizes(1),
    aten.zeros: _fix_sizes(0),
    aten.ones: _fix_sizes(0),
    aten.full: _fix_sizes(0),
    aten.empty: _fix_sizes(0),
    aten.new_zeros: _fix_sizes(1),
    aten.new_ones: _fix_sizes(1),
    aten.new_full: _fix_sizes(1),
    aten.new_empty: _fix_sizes(1),
    aten.split: _fix_split,
    aten.split_with_sizes: _fix_split,
    aten.chunk: _fix_split,
    aten.tensor_split: _fix_split,
    aten.slice: _fix_slice,
    aten.narrow: _fix_narrow,
    aten.slice_scatter: _fix_scatter,
    aten.squeeze: _fix_squeeze,
    aten.layer_norm: _fix_layer_norm,
    aten.rms_norm: _fix_layer_norm,
    aten.group_norm: _fix_group_norm,
    aten.scaled_dot_product_attention: _fix_attention,
}
"""What must be rewritten in the arguments of an operator; all others adapt by themselves."""

__all__ = ["kept_of", "prune_graph", "refresh", "slice_graph"]
