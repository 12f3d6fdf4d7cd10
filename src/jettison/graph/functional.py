"""Operators that write into their argument become those that return a new tensor, where that is plainly the same.

torch.export's own functionalisation retraces the whole network, which takes longer than all else here. Most networks
need it only for element-wise activations in place, whose argument nobody else holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.subgraphs import iterate_nodes

aten = torch.ops.aten

_PASS_THROUGH = (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
"""In eval mode these return their argument itself, which their schema does not say."""


def mutates(node: fx.Node) -> bool:
    """Tell whether a node writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    # detach_ changes no number; tracing makes it of a constant written in forward, and replaces it later.
    writes = node.op == "call_function" and schema is not None and bool(schema.is_mutable)
    return writes and node.target is not aten.detach_.default


def replace_writes(module: fx.GraphModule) -> bool:
    """Replace element-wise operators in place; returns False, and changes nothing, where one is not that simple."""
    graph = module.graph
    writes = [n for n in iterate_nodes(module) if mutates(n)]
    if any(n.graph is not graph for n in writes):
        return False  # inside a branch or region
    found = [_find_replacement(n) for n in writes]
    if any(f is None for f in found):
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node, target in zip(writes, found, strict=True):
        held = _list_holders(node.args[0])
        node.target = target
        # Whoever reads the argument afterwards, under whatever name, reads what was written.
        for holder in held:
            holder.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])  # type: ignore[misc]
    return True


def _list_holders(node: Any) -> list[fx.Node]:
    """Return the nodes whose result is the very tensor of `node`, before and after operators that pass it through."""
    while _passes_through(node):
        node = node.args[0]
    held = [node]
    for holder in held:
        held += [user for user in holder.users if _passes_through(user)]
    return held


def _passes_through(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _PASS_THROUGH


def _find_replacement(node: fx.Node) -> Any:
    """Return the operator that does the same without writing; None where someone else may hold the argument."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node):
        return None
    held = _list_holders(written)
    if held[0].op != "call_function" or _shares_memory(held[0]):
        return None
    if any(_shares_memory(user) for holder in held for user in holder.users if user not in (node, *held)):
        return None
    own = written.meta.get("val")
    others = [n.meta.get("val") for n in node.all_input_nodes]
    if not all(isinstance(v, Tensor) and isinstance(own, Tensor) and v.dtype == own.dtype for v in others):
        return None  # the result would take another type
    space, name, overload = *str(node.target).split(".")[:2], node.target._overloadname  # type: ignore[union-attr]
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None) if name.endswith("_") else None
    found = getattr(packet, overload, None)
    return found if found is not None and torch.Tag.pointwise in found.tags else None


def _shares_memory(node: fx.Node) -> bool:
    """Tell whether a node's result may lie in the memory of its argument."""
    if mutates(node):
        return False  # replaced in its turn, or the whole is given up
    if not hasattr(node.target, "_schema"):
        return True
    return any(r.alias_info is not None for r in node.target._schema.returns)
