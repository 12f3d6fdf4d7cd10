"""A converted graph with a switch at every quantized tensor: on, it is rounded as the runtime rounds it; off, float."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from jettison.core.errors import InputError
from jettison.quantization.clamps import read_clamp
from jettison.quantization.fold import CONVOLUTIONS, find_layers, name_operator, read_attribute

WEIGHTED = frozenset({*CONVOLUTIONS, "aten.linear.default", "aten.conv_transpose2d.input"})
Values = dict[Node, Any]


@dataclass(frozen=True)
class Spot:
    """A quantized tensor: a layer's weight with its bias, or an activation with all that shares its range.

    `nodes` are the roundings (of a weight: the dequantizations) that are switched together, `source` the layer that
    gives the tensor ("" if none), `readers` the layers that read it, `start` the first step that depends on it.
    """

    name: str
    kind: str
    nodes: tuple[Node, ...]
    source: str
    readers: tuple[str, ...]
    start: int


class Switched:
    """Runs a converted graph step by step, any of its tensors in float; knows the float values from `reference`.

    `reference` is the folded float network the graph was made from: same names of nodes and parameters.
    """

    def __init__(self, reference: GraphModule, quantized: GraphModule) -> None:
        self.module = quantized
        self.layers = {node: name for name, node in find_layers(quantized, WEIGHTED).items()}
        self.constants: dict[Node, tuple[Any, Any]] = {}
        self.weight_of: dict[Node, str] = {}
        self._read_constants(reference)
        graph = quantized.graph
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.order = [n for n in graph.nodes if n.op not in ("placeholder", "output") and n not in self.constants]
        self.place = {node: index for index, node in enumerate(self.order)}
        (self.output,) = (n for n in graph.nodes if n.op == "output")
        self.clamps = self._find_clamps(reference)
        self.spots = tuple(sorted((*self._list_weights(), *self._list_activations()), key=lambda s: s.start))
        self.spot_of = {node: spot.name for spot in self.spots if spot.kind == "activation" for node in spot.nodes}
        self.everything = frozenset(spot.name for spot in self.spots)
        self.dying = self._find_last_uses()

    def begin(self, batch: tuple[Tensor, ...]) -> Values:
        """Return the values before the first step."""
        return dict(zip(self.inputs, batch, strict=True))

    def run(self, values: Values, start: int, off: Collection[str]) -> tuple[Any, ...]:
        """Run from step `start` to the end with the tensors `off` in float; `values` are used up."""
        for node in self.order[start:]:
            values[node] = self.step(node, values, off)
            self.forget(node, values)
        outputs = map_arg(self.output.args[0], lambda n: self._read(n, values, off))
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def step(self, node: Node, values: Values, off: Collection[str]) -> Any:
        """Return what one node gives."""
        if is_rounding(node):
            source = node.args[0]
            assert isinstance(source, Node)
            x = self._read(source, values, off)
            return self.keep(node, x) if self.spot_of[node] in off else self.round(node, x)
        if is_restoring(node):
            # The rounding before it has given float numbers already.
            return values[node.args[0]]  # type: ignore[index]
        args = map_arg(node.args, lambda n: self._read(n, values, off))
        kwargs = map_arg(node.kwargs, lambda n: self._read(n, values, off))
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def round(self, node: Node, x: Tensor) -> Tensor:
        """Return `x` as the integers of a rounding stand for it."""
        assert callable(node.target)
        restoring = next(user for user in node.users if is_restoring(user))
        assert callable(restoring.target)
        result: Tensor = restoring.target(node.target(x, *node.args[1:]), *restoring.args[1:], **restoring.kwargs)
        return result

    def keep(self, node: Node, x: Tensor) -> Tensor:
        """Return `x` as it is without a rounding: with the activation that only the rounding's range stood for."""
        clamp = self.clamps.get(node)
        if clamp is None:
            return x
        assert callable(clamp.target)
        kept: Tensor = clamp.target(x, *clamp.args[1:])
        return kept

    def forget(self, node: Node, values: Values) -> None:
        """Drop what nobody reads after this node."""
        for dead in self.dying.get(node, ()):
            values.pop(dead, None)

    def _read(self, node: Node, values: Values, off: Collection[str]) -> Any:
        if node in self.constants:
            return self.constants[node][self.weight_of.get(node) in off]
        return values[node]

    def _read_constants(self, reference: GraphModule) -> None:
        """Compute once what depends on no input: as rounded, and in float."""
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value = attrgetter(str(node.target))(self.module)
                self.constants[node] = value, value
            sources = node.all_input_nodes
            if node.op != "call_function" or not sources or not all(n in self.constants for n in sources):
                continue
            rounded = _call(node, {n: self.constants[n][0] for n in sources})
            if is_restoring(node):
                stored = str(sources[0].target)
                self.weight_of[node] = f"{stored.removesuffix('.weight').removesuffix('.bias')}.weight"
                self.constants[node] = rounded, _find_float(reference, stored, rounded)
            else:
                owners = {self.weight_of[n] for n in sources if n in self.weight_of}
                if len(owners) == 1:
                    self.weight_of[node] = owners.pop()
                self.constants[node] = rounded, _call(node, {n: self.constants[n][1] for n in sources})

    def _find_clamps(self, reference: GraphModule) -> dict[Node, Node]:
        """Find the activations that were dropped because a rounding's range cuts off the same."""
        originals = {n.name: n for n in reference.graph.nodes}
        present = {n.name for n in self.module.graph.nodes}
        found = {}
        for node in self.order:
            if not is_rounding(node) or not isinstance(node.args[0], Node):
                continue
            original = originals.get(node.args[0].name)
            users = list(original.users) if original is not None else []
            if len(users) == 1 and users[0].name not in present and read_clamp(users[0]) is not None:
                found[node] = users[0]
        return found

    def _list_weights(self) -> Iterator[Spot]:
        for name in dict.fromkeys(self.weight_of.values()):
            mine = (n for n, owner in self.weight_of.items() if owner == name)
            nodes = tuple(sorted(mine, key=lambda n: str(n.all_input_nodes[0].target) != name))
            users = {user for node in nodes for user in node.users if user in self.place}
            if not users:
                continue
            start = min(self.place[user] for user in users)
            layer = self.layers.get(self.order[start], name.removesuffix(".weight"))
            yield Spot(name, "weight", nodes, layer, (layer,), start)

    def _list_activations(self) -> Iterator[Spot]:
        groups: list[set[Node]] = []
        for node in self.order:
            if not is_rounding(node):
                continue
            mine = {node, *find_same_range(node)}
            touching = [g for g in groups if g & mine]
            groups = [g for g in groups if not g & mine] + [mine.union(*touching)]
        for group in groups:
            nodes = tuple(sorted(group, key=self.place.__getitem__))
            source = nodes[0].args[0]
            assert isinstance(source, Node)
            while read_clamp(source) is not None and isinstance(source.args[0], Node):
                source = source.args[0]
            layer = self.layers.get(source, "")
            readers = tuple(self._list_readers(nodes))
            if layer:
                name = f"{layer} output"
            elif source.op == "placeholder":
                name = f"input {source.name}"
            else:
                name = f"{source.name} before {readers[0]}" if readers else f"{source.name} output"
            yield Spot(name, "activation", nodes, layer, readers, self.place[nodes[0]])

    def _list_readers(self, nodes: tuple[Node, ...]) -> list[str]:
        """Return the layers that read these tensors before they are rounded anew."""
        todo, seen, found = list(nodes), set(nodes), []
        while todo:
            for user in todo.pop(0).users:
                if user in seen or user not in self.place or (is_rounding(user) and user not in nodes):
                    continue
                seen.add(user)
                if user in self.layers:
                    found.append(self.layers[user])
                else:
                    todo.append(user)
        return found

    def _find_last_uses(self) -> dict[Node, list[Node]]:
        last: dict[Node, Node] = {}
        for node in (*self.order, self.output):
            for source in node.all_input_nodes:
                last[source] = node
        dying: dict[Node, list[Node]] = {}
        for node, user in last.items():
            if user is not self.output and node not in self.constants:
                dying.setdefault(user, []).append(node)
        return dying


def is_rounding(node: Node) -> bool:
    """Say if a node turns an activation into integers."""
    name = name_operator(node)
    return "quantize_per_tensor" in name and "dequantize" not in name


def is_restoring(node: Node) -> bool:
    """Say if a node turns integers back into numbers."""
    return ".dequantize_" in name_operator(node)


def find_same_range(node: Node) -> set[Node]:
    """Return the roundings whose integers `node` only passes on: rounding again on the same grid changes nothing."""
    source = node.args[0]
    if not isinstance(source, Node) or name_operator(source) in ("aten.add.Tensor", "aten.mul.Tensor", *WEIGHTED):
        return set()
    before = [n.args[0] for n in source.all_input_nodes if is_restoring(n) and isinstance(n.args[0], Node)]
    if len(before) != len(source.all_input_nodes) or any(n.args[1:3] != node.args[1:3] for n in before):
        return set()
    return set(before)


def _call(node: Node, values: Values) -> Any:
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__))


def _find_float(reference: GraphModule, name: str, like: Tensor) -> Tensor:
    try:
        value = read_attribute(reference, name).detach()
    except AttributeError:
        value = torch.empty(0)
    if value.shape != like.shape:
        raise InputError(
            f"The quantized network holds {name!r} of shape {tuple(like.shape)}, the float one does not. "
            "They are not two forms of one network. Give the network that was quantized."
        )
    return value
