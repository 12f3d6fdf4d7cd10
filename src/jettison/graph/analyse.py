"""Walk a traced graph once and give every dimension of every tensor its term."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.axes import ONE, Atom, Reason, Term, freeze, make_axis, unify
from jettison.graph.subgraphs import Region, list_regions
from jettison.graph.trace import find_attribute, hint, shape_of, source_line

Dims = tuple[Term, ...]
"""The terms of a tensor's dimensions."""


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter or buffer whose size depends on a group."""

    tensor: str
    dim: int


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


def analyse(
    module: fx.GraphModule, rules: Mapping[Any, Rule], pointwise: Rule, free_outputs: Sequence[int] = ()
) -> Axes:
    """Give every dimension in the graph its term; operators without a rule freeze what they touch.

    Of the outputs numbered in `free_outputs` only the batch is frozen, beside what their operators freeze.
    """
    whole = _Scope(module, "", Axes(), {}, rules, pointwise)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            whole.axes.terms[node] = _fixed_dims(node, "an input of the network")
        elif node.op == "output":
            _freeze_outputs(node, whole.axes, free_outputs)
        else:
            _analyse_node(whole, node)
    return whole.axes


@dataclass(frozen=True)
class _Scope:
    """A graph under analysis: the network's own, or a sub-graph whose attributes' paths begin with `prefix`."""

    module: fx.GraphModule
    prefix: str
    axes: Axes
    known: dict[int, Dims]
    rules: Mapping[Any, Rule]
    pointwise: Rule


def _analyse_node(scope: _Scope, node: fx.Node) -> None:
    axes = scope.axes
    regions = list_regions(scope.module, node)
    if node.op == "get_attr":
        axes.terms[node] = _tensor_dims(scope, str(node.target))
    elif not regions:
        axes.terms[node] = _apply_rule(node, axes, scope.rules, scope.pointwise)
    else:
        outputs, *others = [_analyse_region(scope, region) for region in regions]
        for other in others:  # whichever branch runs, what comes after it reads the same positions
            for mine, theirs in zip(outputs, other, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    Walk(node, axes).same(a, b, "the two branches give different positions")
        axes.terms[node] = outputs


def _analyse_region(scope: _Scope, region: Region) -> tuple[Dims, ...]:
    """Walk a sub-graph, whose placeholders are the node's operands; returns the terms of its outputs."""
    inner = replace(scope, module=region.module, prefix=f"{scope.prefix}{region.name}.")
    terms = scope.axes.terms
    nodes = list(region.module.graph.nodes)
    is_known = any(n in terms for n in nodes)  # run by another node too: one graph, so the same axes at each place
    for placeholder, operand in zip(region.placeholders, region.operands, strict=True):
        given = terms[operand] if isinstance(operand, fx.Node) else ()
        for a, b in zip(terms.setdefault(placeholder, given), given, strict=True):
            Walk(placeholder, scope.axes).same(a, b, "one sub-graph is run on different positions")
    for node in nodes:
        if node.op not in ("placeholder", "output") and not is_known:
            _analyse_node(inner, node)
    return tuple(terms[output] if isinstance(output, fx.Node) else () for output in region.outputs)


def _tensor_dims(scope: _Scope, name: str) -> Dims:
    """Return the terms of a parameter or buffer: the same ones for every name it goes by."""
    tensor = find_attribute(scope.module, name)
    if not isinstance(tensor, Tensor):
        return ()  # a sub-graph
    tensors = scope.axes.tensors
    name = scope.prefix + name
    if name not in tensors:
        tensors[name] = scope.known.setdefault(id(tensor), tuple(make_axis(s) for s in tensor.shape))
    return tensors[name]


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
    rule = rules.get(packet) or rules.get(str(packet))
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
        for term in list_terms(axes.terms.get(argument)):
            freeze(term, reason)


def _freeze_outputs(node: fx.Node, axes: Axes, free: Sequence[int]) -> None:
    for number, output in enumerate(node.args[0]):  # type: ignore[arg-type]
        for term in axes.terms.get(output, ())[: 1 if number in free else None]:
            freeze(term, Reason("an output of the network"))


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


def list_terms(found: Any) -> list[Term]:
    """Return the terms of all that a node yields, one output or several; none for a node without terms."""
    return [term for dims in iterate_dims(found or ()) for term in dims]


__all__ = ["Atom", "Axes", "Dims", "Member", "Rule", "Walk", "analyse", "iterate_dims", "list_terms"]
