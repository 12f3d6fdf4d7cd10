"""Operators that run a graph of their own: `torch.cond`, and regions under autocast or another gradient mode.

Such a node names its sub-graphs by `get_attr` nodes and hands each the operands of its placeholders, parameters
included. Everything that walks a network walks them too; `trace` sees to it that no two nodes share a name.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

Context = Callable[[], contextlib.AbstractContextManager[Any]]

BRANCHING = "cond"
_WRAPPERS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
"""Where each wrapper has its sub-graph among its arguments; before it comes what it sets, after it the operands."""
OPERATORS = frozenset({BRANCHING, *_WRAPPERS})
"""The operators whose sub-graphs are walked; others with sub-graphs are opaque."""


@dataclass(frozen=True)
class Region:
    """A sub-graph that a node runs: the attribute it hangs under, and one operand per placeholder."""

    name: str
    module: fx.GraphModule
    operands: tuple[Any, ...]
    context: Context

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs of the sub-graph."""
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What the sub-graph returns."""
        value = next(n for n in reversed(self.module.graph.nodes) if n.op == "output").args[0]
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def list_regions(owner: nn.Module, node: fx.Node) -> tuple[Region, ...]:
    """Return the sub-graphs a node of `owner` runs: two for a branch, true first; none for a plain operator."""
    if not runs_graphs(node):
        return ()
    name, args = node.target.name(), node.args  # type: ignore[union-attr]
    if name == BRANCHING:
        operands = tuple(args[3]) if len(args) > 3 else tuple(node.kwargs.get("operands", ()))  # type: ignore[arg-type]
        return tuple(_make_region(owner, args[i], operands, contextlib.nullcontext) for i in (1, 2))
    at = _WRAPPERS[name]
    context: Context = lambda: torch.set_grad_enabled(bool(args[0]))  # noqa: E731
    if name == "wrap_with_autocast":
        device, dtype, enabled, cache = args[:4]
        context = lambda: torch.autocast(device, dtype, bool(enabled), cache)  # type: ignore[arg-type]  # noqa: E731
    return (_make_region(owner, args[at], tuple(args[at + 1 :]), context),)


def runs_graphs(node: fx.Node) -> bool:
    """Tell whether a node runs sub-graphs that are walked."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in OPERATORS


def _make_region(owner: nn.Module, attribute: Any, operands: tuple[Any, ...], context: Context) -> Region:
    name = str(attribute.target)
    return Region(name, owner.get_submodule(name), operands, context)  # type: ignore[arg-type]


def inline_regions(module: fx.GraphModule) -> None:
    """Write what runs under a mode that changes no number here into the graph around it, in place.

    Those are gradient modes, and autocast that is switched off or for a device that the network is not on. Whoever
    trains the graph afterwards trains what stood without gradients, too.
    """
    devices = {t.device.type for t in (*module.parameters(), *module.buffers())}
    for node in list(module.graph.nodes):
        for region in list_regions(module, node):
            inline_regions(region.module)
        if not runs_graphs(node) or _changes_numbers(node, devices):
            continue
        (region,) = list_regions(module, node)
        for inner in region.module.graph.nodes:  # graphs inside the region hang under it
            if inner.op == "get_attr":
                name = f"{region.name}_{inner.target}".replace(".", "_")
                setattr(module, name, getattr(region.module, str(inner.target)))
                inner.target = name
        with module.graph.inserting_before(node):
            known = dict(zip(region.placeholders, region.operands, strict=True))
            returned = module.graph.graph_copy(region.module.graph, known)
        values = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(values[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _changes_numbers(node: fx.Node, devices: set[str]) -> bool:
    name = node.target.name()  # type: ignore[union-attr]
    return name == BRANCHING or (name == "wrap_with_autocast" and bool(node.args[2]) and node.args[0] in devices)


def find_operator(name: str) -> Any:
    """Return the operator of one of the names in `OPERATORS`."""
    import torch._higher_order_ops  # registers them

    return getattr(torch.ops.higher_order, name)


def choose_region(node: fx.Node, regions: Sequence[Region], values: Mapping[fx.Node, Any]) -> Region:
    """Return the region that runs, by the value of the branch's condition."""
    if len(regions) == 1:
        return regions[0]
    condition = node.args[0]
    return regions[0 if bool(values[condition] if isinstance(condition, fx.Node) else condition) else 1]


def walk_nodes(module: fx.GraphModule, prefix: str = "") -> Iterator[tuple[str, fx.Node]]:
    """Yield every node, those of sub-graphs before the node that runs them, with the path its attributes begin with."""
    for node in module.graph.nodes:
        for region in list_regions(module, node):
            yield from walk_nodes(region.module, f"{prefix}{region.name}.")
        yield prefix, node


def iterate_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield every node, those of sub-graphs before the node that runs them."""
    return (node for _, node in walk_nodes(module))


def iterate_regions(module: fx.GraphModule) -> Iterator[Region]:
    """Yield every sub-graph, inner ones first."""
    for node in module.graph.nodes:
        for region in list_regions(module, node):
            yield from iterate_regions(region.module)
            yield region


def bind_operands(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Return, for every placeholder of a sub-graph, the operand it stands for, which may itself be a placeholder."""
    return {p: o for r in iterate_regions(module) for p, o in zip(r.placeholders, r.operands, strict=True)}


def list_tensors_used(module: fx.GraphModule) -> list[str]:
    """Name the tensors that any node reads from the module, in the order of their first use."""
    named = [f"{prefix}{n.target}" for prefix, n in walk_nodes(module) if n.op == "get_attr"]
    return [name for name in dict.fromkeys(named) if isinstance(_find(module, name), Tensor)]


def _find(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def count_branch_levels(module: fx.GraphModule) -> int:
    """Return how deep branches stand in one another: 0 where the network has none."""
    deepest = 0
    for node in module.graph.nodes:
        regions = list_regions(module, node)
        inner = max((count_branch_levels(r.module) for r in regions), default=0)
        deepest = max(deepest, inner + (len(regions) > 1))
    return deepest


def name_apart(module: fx.GraphModule) -> None:
    """Give the nodes of sub-graphs names that no other node of the network has."""
    taken = {n.name for n in module.graph.nodes}
    for path, graph in list(_graphs_below(module, "")):
        for node in graph.graph.nodes:
            name = wanted = f"{path}_{node.name}"
            count = 0
            while name in taken:
                count += 1
                name = f"{wanted}_{count}"
            node._rename(name)
            taken.add(node.name)
        graph.recompile()


def _graphs_below(module: fx.GraphModule, path: str) -> Iterator[tuple[str, fx.GraphModule]]:
    for node in module.graph.nodes:
        for region in list_regions(module, node):
            below = f"{path}_{region.name}" if path else region.name
            yield below, region.module
            yield from _graphs_below(region.module, below)


__all__ = [
    "OPERATORS",
    "Region",
    "bind_operands",
    "choose_region",
    "count_branch_levels",
    "find_operator",
    "inline_regions",
    "iterate_nodes",
    "iterate_regions",
    "list_regions",
    "list_tensors_used",
    "name_apart",
    "runs_graphs",
    "walk_nodes",
]
