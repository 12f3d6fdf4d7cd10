"""Products with a stored matrix, as some networks spell their linear layers (GPT-2's are `addmm`), written as such.

Integer kernels, and everything here that looks for layers, know a weight with its outputs first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from jettison.quantization.fold import name_operator, read_attribute, set_buffer

_PLACES = {"aten.addmm.default": (1, 2, 0), "aten.mm.default": (0, 1, None), "aten.matmul.default": (0, 1, None)}
"""Where a product has its input, its matrix and what is added to it."""


def write_linear(module: GraphModule) -> int:
    """Write each product of an activation with a stored matrix as a linear layer, in place; returns how many.

    The matrix is stored transposed under its own name, or under one of its own where something else reads it too.
    """
    import torch

    found = {node: matrix for node in module.graph.nodes if (matrix := _find_matrix(module, node)) is not None}
    done: dict[str, str] = {}
    for node, matrix in found.items():
        name = str(matrix.target)
        if name not in done:
            value = read_attribute(module, name).detach().t().contiguous()
            done[name] = name if _only_these_read(module, name, found) else _name_transposed(name)
            set_buffer(module, done[name], value)
        source, _, added = _PLACES[name_operator(node)]
        with module.graph.inserting_before(node):
            weight = module.graph.get_attr(done[name])
        held = matrix.meta.get("val")
        weight.meta = {**matrix.meta, "val": held.t()} if isinstance(held, Tensor) else dict(matrix.meta)
        node.args = (node.args[source], weight, None if added is None else node.args[added])
        node.target = torch.ops.aten.linear.default
    if found:
        module.graph.eliminate_dead_code()
        module.recompile()
    return len(found)


def _find_matrix(module: GraphModule, node: Node) -> Node | None:
    """Return the stored matrix that a product is a linear layer with; None where it is none."""
    places = _PLACES.get(name_operator(node))
    if places is None or node.kwargs:
        return None
    source, matrix = node.args[places[0]], node.args[places[1]]
    value = _read_stored(module, matrix)
    if value is None or value.ndim != 2 or not value.is_floating_point():
        return None
    if not isinstance(source, Node) or source.op == "get_attr":
        return None
    if places[2] is not None:
        added = _read_stored(module, node.args[places[2]])
        if added is None or added.shape != value.shape[1:]:
            return None
    assert isinstance(matrix, Node)
    return matrix


def _read_stored(module: GraphModule, value: Any) -> Tensor | None:
    return read_attribute(module, str(value.target)) if isinstance(value, Node) and value.op == "get_attr" else None


def _only_these_read(module: GraphModule, name: str, found: dict[Node, Node]) -> bool:
    readers = [u for n in module.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users]
    return all(user in found and str(found[user].target) == name and name not in _list_others(user) for user in readers)


def _list_others(node: Node) -> list[str]:
    """Name what a product reads beside its matrix."""
    place = _PLACES[name_operator(node)][1]
    return [str(a.target) for i, a in enumerate(node.args) if i != place and isinstance(a, Node) and a.op == "get_attr"]


def _name_transposed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}@transposed.{last}" if stem else f"{last}@transposed"
