"""Depth: residual blocks, `y = x + f(x)`, and the network without some of them.

A block is found in the graph, whatever its class: a sum of two tensors of one shape of which one is computed from the
other, through parameters, by operators whose results nobody else reads. Dropping it puts `x` in the place of the sum;
that is the original network with `f`'s last tensor multiplied by zero.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import InputError, JettisonError, UnknownName
from jettison.graph.groups import Graph, build_graph
from jettison.graph.rewrite import slice_graph
from jettison.graph.trace import find_attribute, shape_of, trace_module

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """A residual block: its name, the modules and tensors of its branch, and where it stands in the graph.

    `name` is the path of the module that holds the branch; where one module holds several, of that in it which holds
    most of the branch's parameters. `tensors` are the parameters and buffers that go with it. `sum`, `start` and `end`
    name the nodes of y, x and f(x).
    """

    name: str
    modules: tuple[str, ...]
    tensors: tuple[str, ...]
    sum: str = field(repr=False)
    start: str = field(repr=False)
    end: str = field(repr=False)
    nodes: tuple[str, ...] = field(repr=False)


def find_blocks(graph: Graph) -> tuple[Block, ...]:
    """Return the residual blocks that can be dropped, in the order they run, each under a name of its own."""
    found = [b for n in graph.module.graph.nodes if n.target == aten.add.Tensor for b in _read_sum(graph, n)]
    bases = [_common_path(b.modules) for b in found]
    names: list[str] = []
    for block, base in zip(found, bases, strict=True):
        name = base if base and bases.count(base) == 1 else _find_largest(graph, block, base)
        names.append(f"{name}#{names.count(name) + 1}" if name in names else name)
    return tuple(dataclasses.replace(b, name=n) for b, n in zip(found, names, strict=True))


def _read_sum(graph: Graph, node: fx.Node) -> list[Block]:
    """Return the block of which `node` is the sum, or nothing."""
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return []
    for start, end in (node.args, node.args[::-1]):
        if not isinstance(start, fx.Node) or not isinstance(end, fx.Node) or start is end:
            continue
        gone = _find_unread(node, end)
        outside = {a for n in gone for a in n.all_input_nodes} - gone.keys()
        if shape_of(start) != shape_of(end) or start not in outside:
            continue
        followers = _find_followers(start)
        if not outside.isdisjoint(followers):
            continue  # something on the way from x to f(x) is read elsewhere
        tensors = tuple(str(n.target) for n in reversed(gone) if n.op == "get_attr")
        nodes = [n for n in reversed(gone) if n.op == "call_function"]
        paths = [_find_module(n) for n in nodes if n in followers]  # what only prepares a mask says nothing
        modules = tuple(dict.fromkeys(path for path in paths if path is not None))
        if any(_count_elements(graph, t) for t in tensors):
            names = tuple(n.name for n in nodes)
            return [Block("", modules, tuple(dict.fromkeys(tensors)), node.name, start.name, end.name, names)]
    return []


def _find_unread(total: fx.Node, end: fx.Node) -> dict[fx.Node, None]:
    """Return the nodes that nobody would read if `total` did not read `end`, the last first."""
    gone: dict[fx.Node, None] = {}
    node = total.prev
    while node.op != "root":
        # A call without readers only checks its input, and goes with it.
        readers = [u for u in node.users if u.users or u.op != "call_function"]
        is_free = all(u in gone or (u is total and node is end) for u in readers)
        if is_free and readers and node.op in ("call_function", "get_attr"):
            gone[node] = None
        node = node.prev
    return gone


def _find_followers(start: fx.Node) -> set[fx.Node]:
    """Return all nodes that depend on `start`."""
    waiting, found = [start], set[fx.Node]()
    while waiting:
        new = [user for user in waiting.pop().users if user not in found]
        found.update(new)
        waiting += new
    return found


def _find_module(node: fx.Node) -> str | None:
    """Return the path of the module whose forward made a call; None where the trace does not know."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else None
    return None if path is None or path.startswith("_empty_nn_module_stack") else path


def _common_path(paths: Sequence[str]) -> str:
    """Return the innermost module around all these modules."""
    parts = [p.split(".") for p in paths]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in same)


def _find_largest(graph: Graph, block: Block, base: str) -> str:
    """Return the part of the module `base` that holds most of the block's parameters."""
    depth = len(base.split(".")) if base else 0
    sizes: dict[str, int] = {}
    for name in block.tensors:
        if base and not name.startswith(f"{base}."):
            continue
        child = ".".join(name.split(".")[: depth + 1])
        sizes[child] = sizes.get(child, 0) + _count_elements(graph, name)
    return max(sizes, key=lambda child: sizes[child], default=base or block.sum)


def _count_elements(graph: Graph, name: str) -> int:
    tensor = find_attribute(graph.module, name)
    return tensor.numel() if isinstance(tensor, nn.Parameter) else 0


def choose_blocks(graph: Graph, names: Sequence[str]) -> tuple[Block, ...]:
    """Return the blocks of these names; the name of a module, or a pattern, stands for all blocks inside it.

    Raises UnknownName with the nearest names.
    """
    blocks = find_blocks(graph)
    chosen: set[str] = set()
    for name in names:
        found = {
            b.name
            for b in blocks
            if fnmatchcase(b.name, name) or all(fnmatchcase(m, name) or fnmatchcase(m, f"{name}.*") for m in b.modules)
        }
        if not found:
            raise UnknownName("residual block", name, (b.name for b in blocks))
        chosen |= found
    return tuple(b for b in blocks if b.name in chosen)


def drop_blocks(graph: Graph, names: Sequence[str]) -> Graph:
    """Return the network with each of these blocks replaced by its input, analysed anew; tensors are shared.

    Raises UnknownName for a block that is none (`find_blocks` lists them).
    """
    if isinstance(names, str):
        raise InputError(f"drop_blocks={names!r} must be a tuple of names: ({names!r},).")
    blocks = choose_blocks(graph, names)
    module = slice_graph(graph, {})
    nodes = {n.name: n for n in module.graph.nodes}
    branches = {nodes[name] for block in blocks for name in block.nodes}
    # Checks have no readers; those outside the blocks stay.
    checks = {n for n in nodes.values() if not n.users and branches.isdisjoint(n.all_input_nodes)}
    for block in blocks:
        total = nodes[block.sum]
        # The input of a block may be the sum of one before it, which has gone: what the sum reads now counts.
        first = next(a for a in total.all_input_nodes if a is not nodes[block.end])
        total.replace_all_uses_with(first)
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or n in checks)
    return build_graph(dataclasses.replace(graph.traced, module=fx.GraphModule(module, module.graph, "Pruned")))


# The caller's own class without a block


def bypass_modules(model: nn.Module, graph: Graph, blocks: Sequence[Block]) -> nn.Module | None:
    """Return a copy of `model` in which the modules that held these blocks pass their input on; None where none did.

    A module qualifies where it is called with one tensor, all its calls belong to the blocks and what it returns is
    then its input, or the ReLU of it. Whether the copy computes what the graph without the blocks does is for the
    caller to prove.
    """
    by_module = _list_calls(graph)
    sums = {b.sum for b in blocks}
    gone = {n for b in blocks for n in b.nodes} | sums
    chosen: dict[str, type[nn.Module]] = {}
    for block in blocks:
        around = [p for p in by_module if p and {*block.nodes, block.sum} <= by_module[p].keys()]
        fitting = {p: kind for p in around if (kind := _find_stand_in(by_module[p], gone))}
        if not fitting:
            return None
        widest = min(fitting, key=len)
        chosen[widest] = fitting[widest]
    try:
        result = copy.deepcopy(model)
        for path, kind in chosen.items():
            result.set_submodule(path, kind().train(model.get_submodule(path).training))
    except Exception:  # noqa: BLE001 - a model that cannot be copied, or holds its module elsewhere, has a graph result
        return None
    return result


def _list_calls(graph: Graph) -> dict[str, dict[str, fx.Node]]:
    """Return the calls made inside each module, by the module's path."""
    calls: dict[str, dict[str, fx.Node]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_function":
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                calls.setdefault(str(path), {})[node.name] = node
    return calls


_MOVES = {
    getattr(aten, name)
    for name in ("sym_size", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous", "clone")
}
"""What may be left of a module that passes its input on: whether it ends where it began is proven by running it."""


def _find_stand_in(calls: Mapping[str, fx.Node], gone: set[str]) -> type[nn.Module] | None:
    """Return what a module comes to when the calls in `gone` pass their input on: an identity, or a ReLU at its end."""
    results = [n for n in calls.values() if any(u.name not in calls for u in n.users)]
    rest = [n for n in calls.values() if n.name not in gone and getattr(n.target, "overloadpacket", None) not in _MOVES]
    if len(results) != 1:
        return None
    if not rest:
        return nn.Identity
    only_relu = len(rest) == 1 and rest[0] is results[0] and rest[0].target == aten.relu.default
    return nn.ReLU if only_relu else None


def drop(model: nn.Module, graph: Graph, names: Sequence[str]) -> tuple[Graph, nn.Module | None]:
    """Return the network without these blocks, and the caller's own class without them where that is as exact.

    The second is None where a block is not a module of its own; it computes the same bits as the first on the traced
    inputs.
    """
    small = drop_blocks(graph, names)
    bypassed = bypass_modules(model, graph, choose_blocks(graph, names))
    if bypassed is None:
        return small, None
    args, kwargs = pytree.tree_unflatten(list(graph.traced.example), graph.traced.in_spec)
    try:
        again = trace_module(bypassed, args, kwargs)
    except JettisonError:
        return small, None  # its source asks more of the module than to be called with one tensor
    with torch.no_grad():
        mine, theirs = again.module(*graph.traced.example), small.module(*graph.traced.example)
    pairs = zip(mine, theirs, strict=True)
    if len(mine) == len(theirs) and all(not isinstance(a, Tensor) or torch.equal(a, b) for a, b in pairs):
        return build_graph(dataclasses.replace(again, free_outputs=graph.traced.free_outputs)), bypassed
    return small, None


__all__ = ["Block", "choose_blocks", "drop", "drop_blocks", "find_blocks"]
