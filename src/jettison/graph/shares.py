"""What a choice of widths leaves of the MACs and parameters, counted from the terms alone.

The conventions are those of `cost.macs`: convolutions, matrix products and attention count, for one sample; everything
else counts no MACs. Here each factor is a term instead of a number, so that the count of any choice follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from jettison.graph.analyse import Axes, Dims
from jettison.graph.axes import Atom, Keeps, Term, count_kept, iterate_atoms
from jettison.graph.layers import count_positions, find_layers
from jettison.graph.subgraphs import bind_operands, runs_graphs, walk_nodes
from jettison.graph.trace import find_attribute

if TYPE_CHECKING:
    from jettison.graph.groups import Graph


@dataclass(frozen=True)
class Quantity:
    """Something counted: `factor` times the sizes of all `terms`, divided by `divisor`.

    `kind` is "macs" or "parameters"; `node` is the call that does it, or the first that reads it.
    """

    kind: str
    node: fx.Node = field(repr=False)
    terms: Dims = field(repr=False)
    factor: int = 1
    divisor: int = 1

    def count(self, keeps: Keeps) -> int:
        """Return how many are left when the atoms keep what `keeps` says."""
        total = self.factor
        for term in self.terms:
            total *= count_kept(term, keeps)
        return total // self.divisor

    @property
    def atoms(self) -> frozenset[Atom]:
        """The axes it depends on."""
        return frozenset(atom for term in self.terms for atom in iterate_atoms(term))


def list_quantities(graph: Graph) -> tuple[Quantity, ...]:
    """Return all MACs and parameters of a graph in the order they run; a tensor that goes by two names once."""
    samples = len(graph.traced.example[0])
    found: list[Quantity] = []
    layers = {layer.node: layer for layer in find_layers(graph.module)}
    seen: set[int] = set()
    for node, tensors in list_calls(graph):
        if node in layers and node not in graph.axes.opaque:
            terms = graph.axes.tensors[layers[node].weight]
            found.append(Quantity("macs", node, terms, count_positions(layers[node], samples)))
        else:
            for terms in _list_products(node, graph.axes):
                found.append(Quantity("macs", node, terms, divisor=samples))
        for name in tensors:
            tensor = find_attribute(graph.module, name)
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(Quantity("parameters", node, graph.axes.tensors[name]))
    return tuple(found)


def list_calls(graph: Graph) -> Iterator[tuple[fx.Node, list[str]]]:
    """Yield every call with the parameters, buffers and constants it reads; of one that runs a graph, those inside."""
    operands = bind_operands(graph.module)
    for prefix, node in walk_nodes(graph.module):
        if node.op == "call_function" and not runs_graphs(node):
            names = [_name_tensor(n, prefix, operands) for n in node.all_input_nodes]
            yield node, [name for name in names if name in graph.axes.tensors]


def _name_tensor(node: Any, prefix: str, operands: Mapping[fx.Node, Any]) -> str:
    """Name the tensor of the module a node stands for, "" where it is computed; sub-graphs get theirs as operands."""
    while node in operands:
        node, prefix = operands[node], ""
    return f"{prefix}{node.target}" if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def sum_quantities(quantities: Iterable[Quantity], kind: str, keeps: Mapping[Atom, Any]) -> int:
    """Return the MACs or parameters that are left of `quantities`."""
    return sum(q.count(keeps) for q in quantities if q.kind == kind)


Formula = Callable[[Axes, fx.Node], Iterator[Dims]]
"""Gives, for a call, the terms whose sizes multiply to its MACs; several where MACs add up."""


def _list_products(node: fx.Node, axes: Axes) -> list[Dims]:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    formula = FORMULAS.get(name)
    return [] if formula is None else list(formula(axes, node))


def _dims(axes: Axes, node: Any) -> Dims:
    found = axes.terms[node]
    assert isinstance(found, tuple)
    return found


def _convolution(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    yield (*_dims(axes, node), *_dims(axes, node.args[1])[1:])


def _transposed(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    yield (*_dims(axes, node.args[0]), *_dims(axes, node.args[1])[1:])


def _product(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    yield (*_dims(axes, node), _dims(axes, node.args[0])[-1])


def _added_product(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    yield (*_dims(axes, node), _dims(axes, node.args[1])[-1])


def _attention(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    query, key, value = (_dims(axes, a) for a in node.args[:3])
    yield (*query, key[-2])
    yield (*query[:-1], key[-2], value[-1])


def _recurrent(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    """Every step of every sequence meets each matrix once; packed sequences are left out, as in `cost.macs`."""
    weights = node.args[2]
    if str(node.target).endswith(".input") and isinstance(weights, (list, tuple)):
        yield from _meet_matrices(axes, _dims(axes, node.args[0])[:2], weights)


def _recurrent_step(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    yield from _meet_matrices(axes, _dims(axes, node.args[0])[:1], node.args[2:4])


def _meet_matrices(axes: Axes, steps: Dims, weights: Iterable[Any]) -> Iterator[Dims]:
    for weight in weights:
        dims = _dims(axes, weight)
        if len(dims) == 2:
            yield (*steps, *dims)


def _einsum(axes: Axes, node: fx.Node) -> Iterator[Dims]:
    """Two factors: every index once."""
    equation, factors = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(factors, (list, tuple)) or len(factors) != 2 or "." in equation:
        return
    extent: dict[str, Term] = {}
    letters = equation.replace(" ", "").partition("->")[0].split(",")
    for word, factor in zip(letters, factors, strict=True):
        for letter, term in zip(word, _dims(axes, factor), strict=True):
            if letter not in extent or term.size > extent[letter].size:
                extent[letter] = term
    yield tuple(extent.values())


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    **dict.fromkeys(("linear", "mm", "bmm", "mv", "dot", "matmul"), _product),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), _added_product),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_step),
}
"""ATen operator (without overload) to the terms of its MACs."""


__all__ = ["FORMULAS", "Quantity", "list_calls", "list_quantities", "sum_quantities"]
