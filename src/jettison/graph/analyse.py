"""Walk a traced graph once and give every dimension of every tensor its term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.axes import ONE, Atom, Reason, Term, freeze, make_axis, unify
from jettison.graph.trace import find_attribute, hint, shape_of, source_line

Dims = tuple[Term, ...]
"""The terms of a tensor's dimensions."""


@dataclass
class Axes:
    """What the analysis knows: terms per node and per parameter, and which operators had no rule.

    `terms[node]` is `Dims`, or a tuple of `Dims` for a node with several outputs. `group_axes` holds, for a
    convolution or group norm, the axis that counts its groups.
    """

    terms: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[str, Dims] = field(default_factory=dict)
    group_axes: dict[fx.Node, Term] = field(default_factory=dict)
    opaque: dict[fx.Node, Reason] = field(default_factory=dict)


Rule = Callable[["Walk"], Any]
"""Gives the terms of a node's output; None says that the rule does not apply."""


@dataclass(frozen=True)
class Walk:
    """One node under analysis, as its rule sees it."""

    node: fx.Node
    axes: Axes

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments as the operator's schema types them; rules know which is what."""
        return tuple(self.node.args)

    def dims(self, argument: Any) -> Dims:
        """Return the terms of an argument's dimensions."""
        found = self.axes.terms[argument]
        assert isinstance(found, tuple)
        return found

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or by name."""
        if len(self.node.args) > index:
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the node's output."""
        shape = shape_of(self.node)
        assert shape is not None, self.node
        return shape

    def reason(self, text: str) -> Reason:
        """Return a reason that names this operator and the user's line."""
        return Reason(text, str(self.node.target), source_line(self.node))

    def fix(self, *terms: Term, because: str) -> None:
        """Freeze terms for a reason that lies in this operator."""
        for term in terms:
            freeze(term, self.reason(because))

    def fixed(self, size: int, because: str = "spatial size") -> Term:
        """Return a fresh axis that cannot be pruned."""
        return make_axis(size, self.reason(because))

    def same(self, a: Term, b: Term, because: str = "the two sizes cannot be refined to a common one") -> None:
        """State that two terms are the same positions."""
        unify(a, b, self.reason(because))

    def broadcast(self, operands: list[Dims]) -> Dims:
        """Align dimensions from the right, uniting those that are not of size one."""
        out: list[Term] = []
        for position in range(1, max(map(len, operands), default=0) + 1):
            present = [dims[-position] for dims in operands if len(dims) >= position]
            wide = [t for t in present if t.size != 1]
            for other in wide[1:]:
                self.same(wide[0], other)
            out.append(wide[0] if wide else ONE)
        return tuple(reversed(out))


def analyse(module: fx.GraphModule, rules: Mapping[Any, Rule], pointwise: Rule) -> Axes:
    """Give every dimension in the graph its term; operators without a rule freeze what they touch."""
    axes = Axes()
    known: dict[int, Dims] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            axes.terms[node] = _fixed_dims(node, "an input of the network")
        elif node.op == "get_attr":
            axes.terms[node] = _tensor_dims(module, str(node.target), axes, known)
        elif node.op == "output":
            _freeze_all(node, axes, Reason("an output of the network"))
        else:
            axes.terms[node] = _apply_rule(node, axes, rules, pointwise)
    return axes


def _tensor_dims(module: fx.GraphModule, name: str, axes: Axes, known: dict[int, Dims]) -> Dims:
    """Return the terms of a parameter or buffer: the same ones for every name it goes by."""
    tensor = find_attribute(module, name)
    if not isinstance(tensor, Tensor):
        return ()  # a sub-graph
    if name not in axes.tensors:
        axes.tensors[name] = known.setdefault(id(tensor), tuple(make_axis(s) for s in tensor.shape))
    return axes.tensors[name]


def _agrees(terms: Any, node: fx.Node) -> bool:
    """Tell whether the terms a rule gave have the sizes that were traced."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(t.size for t in terms) == tuple(map(hint, value.shape))
    if isinstance(value, (tuple, list)):
        return len(value) == len(terms) and all(
            not isinstance(v, Tensor) or tuple(t.size for t in d) == tuple(map(hint, v.shape))
            for v, d in zip(value, terms, strict=True)
        )
    return True


def _apply_rule(node: fx.Node, axes: Axes, rules: Mapping[Any, Rule], pointwise: Rule) -> Any:
    packet = getattr(node.target, "overloadpacket", node.target)
    rule = rules.get(packet)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = pointwise
    terms = None
    if rule is not None:
        terms = rule(Walk(node, axes))
    elif not _touches_tensors(node, axes):
        return ()  # arithmetic on sizes
    if terms is None or not _agrees(terms, node):
        text = "an operator without a rule" if rule is None else "a form of this operator without a rule"
        reason = Reason(f"{text}: {node.target}", str(node.target), source_line(node))
        axes.opaque[node] = reason
        _freeze_all(node, axes, reason)
        return _opaque_output(node, reason)
    return terms


def _touches_tensors(node: fx.Node, axes: Axes) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list)) or any(
        isinstance(n.meta.get("val"), Tensor) and str(node.target) != "aten.sym_size.int" for n in node.all_input_nodes
    )


def _freeze_all(node: fx.Node, axes: Axes, reason: Reason) -> None:
    for argument in node.all_input_nodes:
        found = axes.terms.get(argument, ())
        for dims in found if found and isinstance(found[0], tuple) else (found,):
            for term in dims:
                freeze(term, reason)


def _opaque_output(node: fx.Node, reason: Reason) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(make_axis(hint(s), reason) for s in value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(tuple(make_axis(hint(s), reason) for s in v.shape) if isinstance(v, Tensor) else () for v in value)
    return ()


def _fixed_dims(node: fx.Node, text: str) -> Dims:
    shape = shape_of(node) or ()
    return tuple(make_axis(s, Reason(f"{text} ({node.name})")) for s in shape)


def iterate_dims(found: Any) -> list[Dims]:
    """Return the dims of each output of a node, one or several."""
    return list(found) if found and isinstance(found[0], tuple) else [found]


__all__ = ["Atom", "Axes", "Dims", "Rule", "Walk", "analyse", "iterate_dims"]
