"""Weights that a network computes from its parameters at every call, computed once."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from jettison.graph.subgraphs import list_tensors_used
from jettison.quantization.fold import FOLDABLE, name_operator, number_name, read_attribute, read_from, set_buffer

READERS = FOLDABLE | {"aten.linear.default"}
"""Operators with a weight and a bias."""


def fold_constants(module: GraphModule) -> None:
    """Compute each weight, bias and layer that hangs on parameters alone once and for all, in place.

    Standardised weights, parametrisations, biases put together from parts, layers applied to a position table: what is
    deployed is their value.
    """
    held = set(list_tensors_used(module))
    done: dict[Node, str] = {}
    for node in [n for n in module.graph.nodes if name_operator(n) in READERS]:
        if _list_parts(module, node) is not None:
            name = f"{node.name}.constant"
            set_buffer(module, name, _compute(module, node))
            held.add(name)
            node.replace_all_uses_with(read_from(module, node, name, node))
            continue
        for index, last in ((1, "weight"), (2, "bias")):
            source = node.args[index] if len(node.args) > index else None
            if not isinstance(source, Node) or source.op == "get_attr":
                continue
            parts = None if source in done else _list_parts(module, source)
            if parts is not None:
                weight = node.args[1]
                layer = str(weight.target).rpartition(".")[0] if index == 2 and isinstance(weight, Node) else None
                stem = _find_stem(parts) if layer is None else layer
                name = _choose_name(module, stem, last, parts, held)
                set_buffer(module, name, _compute(module, source).contiguous())
                held.add(name)
                done[source] = name
            if source in done:
                node.update_arg(index, read_from(module, node, done[source], source))
    module.graph.eliminate_dead_code()
    module.recompile()


def _list_parts(module: GraphModule, value: Node) -> dict[Node, str] | None:
    """Return the nodes a value comes from with their tensors' names; None where an input or a branch has a part."""
    found: dict[Node, str] = {}
    todo = [value]
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found[node] = ""
        if node.op == "get_attr" and isinstance(attrgetter(str(node.target))(module), Tensor):
            found[node] = str(node.target)
        elif node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        todo += node.all_input_nodes
    return found if any(found.values()) else None


def _choose_name(module: GraphModule, stem: str, last: str, parts: Mapping[Node, str], held: Collection[str]) -> str:
    """Return "conv.weight" where no other reader would be surprised, else "conv@2.weight"."""
    name, count = f"{stem}.{last}".removeprefix("."), 1
    readers = [n for n in module.graph.nodes if n.op == "get_attr" and n.target == name]
    if name not in held or all(n in parts and all(u in parts for u in n.users) for n in readers):
        return name
    free = name
    while free in held:
        count += 1
        free = number_name(name, count)
    return free


def _find_stem(parts: Mapping[Node, str]) -> str:
    """Return the module that several tensors are of: "conv" for "conv.weight" and "conv.gain"."""
    names = [name for name in parts.values() if name]
    paths = [name.split(".parametrizations.")[0].split(".") for name in names]
    paths = [p if ".parametrizations." in name else p[:-1] for p, name in zip(paths, names, strict=True)]
    return ".".join(part[0] for part in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False)))


def _compute(module: GraphModule, value: Node) -> Tensor:
    with torch.no_grad():
        found: Tensor = evaluate(module, value, {})
        return found.detach().clone()


def evaluate(module: GraphModule, value: Node, known: dict[Node, Any]) -> Any:
    """Return the value of a node that hangs on parameters alone, as they are now; `known` holds what has been found."""
    if value not in known:
        if value.op == "get_attr":
            known[value] = read_attribute(module, str(value.target))
        else:
            assert callable(value.target)
            args, kwargs = map_arg((value.args, value.kwargs), lambda n: evaluate(module, n, known))
            known[value] = value.target(*args, **kwargs)
    return known[value]
