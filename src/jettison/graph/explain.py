"""A graph in plain data: its layers in order, its groups with all their members, and what each is worth.

The one source of what the terminal, the JSON and the drawn page say about a traced network.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from jettison.core.record import FrozenPart
from jettison.graph.analyse import Member, list_terms
from jettison.graph.axes import Atom, Keeps, Term, iterate_atoms
from jettison.graph.shares import Quantity, list_calls, list_quantities, sum_quantities
from jettison.graph.trace import find_attribute, source_line

if TYPE_CHECKING:
    from jettison.graph.groups import Graph, Group


@dataclass(frozen=True)
class Shares:
    """Shares of the network's MACs and of its parameters, each 0 to 1."""

    macs: float
    parameters: float


@dataclass(frozen=True)
class Worth:
    """What groups are worth.

    `touched`: the share that depends on their sizes. `half` and `one`: the share that goes when each of them keeps half
    of its positions (rounded up), or a single one, and all other groups keep theirs.
    """

    touched: Shares
    half: Shares
    one: Shares


@dataclass(frozen=True)
class Coupled:
    """A prune group: `size` positions, every dimension of every tensor that shrinks with it, and its worth."""

    name: str
    size: int
    exact: bool
    layers: tuple[str, ...]
    members: tuple[Member, ...]
    worth: Worth


@dataclass(frozen=True)
class Mark:
    """A layer's tie to a group (its place in `Explanation.groups`): it "makes", "reads" or "keeps" its positions."""

    group: int
    role: str


@dataclass(frozen=True)
class Side:
    """A dimension of a layer's largest tensor: the groups its positions belong to, or why it is frozen."""

    size: int
    groups: tuple[int, ...]
    frozen: str


@dataclass(frozen=True)
class Row:
    """A layer where it runs: what it is, what it is tied to, and what half of every group would leave of it.

    `along` names what runs with it on the same positions, such as its norm. `opaque` is the reason where an operator
    has no rule, and empty otherwise.
    """

    name: str
    operator: str
    where: str
    sides: tuple[Side, ...]
    marks: tuple[Mark, ...]
    along: tuple[str, ...]
    opaque: str
    macs: int
    macs_at_half: int
    parameters: int
    parameters_at_half: int


@dataclass(frozen=True)
class Unknown:
    """An operator without a rule at one of the user's lines; `count` is how often it is called there."""

    operator: str
    where: str
    reason: str
    count: int


@dataclass(frozen=True)
class Explanation:
    """All there is to say about a traced network; `macs` and `parameters` are its totals, MACs for one sample.

    `batch` is the only batch it takes, or None where that is free. `shapes` are the shapes it was traced with.
    """

    macs: int
    parameters: int
    batch: int | None
    shapes: Mapping[str, tuple[int, ...]]
    worth: Worth
    groups: tuple[Coupled, ...]
    rows: tuple[Row, ...]
    frozen: tuple[FrozenPart, ...]
    opaque: tuple[Unknown, ...]


def explain(graph: Graph) -> Explanation:
    """Return what can be said of `graph` as plain data."""
    quantities = list_quantities(graph)
    totals = {kind: sum_quantities(quantities, kind, {}) for kind in ("macs", "parameters")}
    traced = graph.traced
    return Explanation(
        totals["macs"],
        totals["parameters"],
        None if traced.dynamic_batch else len(traced.example[0]),
        {name: tuple(x.shape) for name, x in zip(traced.input_names, traced.example, strict=True)},
        _find_worth(graph.groups, quantities, totals),
        _describe_groups(graph.groups, quantities, totals),
        _fold_rows(_list_rows(graph, quantities)),
        graph.frozen,
        _list_unknown(graph),
    )


def _make_keeps(groups: Iterable[Group], *, half: bool) -> dict[Atom, Tensor]:
    return {g.atom: torch.arange(g.size) < ((g.size + 1) // 2 if half else 1) for g in groups}


def _find_worth(groups: Iterable[Group], quantities: Iterable[Quantity], totals: Mapping[str, int]) -> Worth:
    """`quantities` may leave out what the groups do not touch."""
    groups = tuple(groups)
    atoms = {g.atom for g in groups}
    touched = [q for q in quantities if not atoms.isdisjoint(q.atoms)]
    full = {kind: sum_quantities(touched, kind, {}) for kind in totals}

    def lose(keeps: Keeps) -> Shares:
        return _share({kind: full[kind] - sum_quantities(touched, kind, keeps) for kind in totals}, totals)

    half, one = (_make_keeps(groups, half=h) for h in (True, False))
    return Worth(_share(full, totals), lose(half), lose(one))


def _share(part: Mapping[str, int], totals: Mapping[str, int]) -> Shares:
    shares = {kind: part[kind] / total if total else 0.0 for kind, total in totals.items()}
    return Shares(shares["macs"], shares["parameters"])


def _describe_groups(
    groups: tuple[Group, ...], quantities: tuple[Quantity, ...], totals: Mapping[str, int]
) -> tuple[Coupled, ...]:
    touched: dict[Atom, list[Quantity]] = {g.atom: [] for g in groups}
    for quantity in quantities:
        for atom in quantity.atoms:
            if atom in touched:
                touched[atom].append(quantity)
    return tuple(
        Coupled(
            g.name,
            g.size,
            g.exact,
            g.layers,
            g.members,
            _find_worth([g], touched[g.atom], totals),
        )
        for g in groups
    )


def _list_rows(graph: Graph, quantities: tuple[Quantity, ...]) -> list[Row]:
    """Return a row for each call that reads weights, multiplies, or has no rule."""
    owned: dict[fx.Node, list[Quantity]] = {}
    for quantity in quantities:
        owned.setdefault(quantity.node, []).append(quantity)
    half = _make_keeps(graph.groups, half=True)
    places = {g.atom: i for i, g in enumerate(graph.groups)}
    rows = []
    for node, read in list_calls(graph):
        tensors = [name for name in read if _matters(graph, name, places)]
        mine = owned.get(node, [])
        unknown = graph.axes.opaque.get(node)
        if not (tensors or mine or unknown):
            continue
        counts = [sum_quantities(mine, kind, k) for kind in ("macs", "parameters") for k in ({}, half)]
        largest = max(tensors, key=lambda n: math.prod(t.size for t in graph.axes.tensors[n]), default=None)
        sides = () if largest is None else tuple(_describe_side(t, places) for t in graph.axes.tensors[largest])
        atoms = {a: None for n in tensors for t in graph.axes.tensors[n] for a in iterate_atoms(t)}
        atoms |= {a: None for q in mine if q.kind == "macs" for t in q.terms for a in iterate_atoms(t)}
        marks = tuple(Mark(places[a], _find_role(a, node, graph)) for a in atoms if a in places)
        text = unknown.text if unknown else ""
        name = _name_row(node, largest)
        operator = "parameter" if name == largest and not (text or counts[0]) else _name_operator(node)
        rows.append(Row(name, operator, source_line(node), sides, marks, (), text, *counts))
    return rows


def _matters(graph: Graph, name: str, places: Mapping[Atom, int]) -> bool:
    """Tell whether a tensor is a parameter, or a buffer that a group owns positions of."""
    tensor = find_attribute(graph.module, name)
    if isinstance(tensor, nn.Parameter):
        return True
    return tensor.is_floating_point() and any(a in places for t in graph.axes.tensors[name] for a in iterate_atoms(t))


def _describe_side(term: Term, places: Mapping[Atom, int]) -> Side:
    atoms = dict.fromkeys(iterate_atoms(term))
    reasons = [a.frozen for a in atoms if a.frozen and a.frozen.text != "spatial size"]
    frozen = f"{reasons[0].text}{f' at {reasons[0].where}' if reasons[0].where else ''}" if reasons else ""
    return Side(term.size, tuple(places[a] for a in atoms if a in places), frozen)


def _find_role(atom: Atom, node: fx.Node, graph: Graph) -> str:
    """Say whether a call makes the positions of an axis, reads them, or has them on both sides."""
    reads = any(
        atom in iterate_atoms(term)
        for argument in node.all_input_nodes
        if argument.op != "get_attr"
        for term in list_terms(graph.axes.terms.get(argument))
    )
    makes = any(atom in iterate_atoms(term) for term in list_terms(graph.axes.terms.get(node)))
    return "keeps" if reads == makes else "reads" if reads else "makes"


def _name_row(node: fx.Node, tensor: str | None) -> str:
    """Return the module that owns the tensor, or the innermost one that makes the call."""
    if tensor is not None:
        return tensor.rpartition(".")[0] or tensor
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix(".") or node.name


def _name_operator(node: fx.Node) -> str:
    """Return `conv2d` for `aten.conv2d.default`; operators that are not of PyTorch keep their namespace."""
    return str(node.target).removeprefix("aten.").removesuffix(".default")


def _fold_rows(rows: list[Row]) -> tuple[Row, ...]:
    """Put into one row what one module does in a row, and a norm or scale with the layer beside it."""
    out: list[Row] = []
    for row in rows:
        last = out[-1] if out else None
        if last is not None and not (row.opaque or last.opaque) and _belongs(row, last):
            known = {m.group for m in last.marks}
            leaf = row.name.rpartition(".")[2]
            out[-1] = replace(
                last,
                along=last.along if row.name == last.name else (*last.along, leaf),
                marks=(*last.marks, *(m for m in row.marks if m.group not in known)),
                macs=last.macs + row.macs,
                macs_at_half=last.macs_at_half + row.macs_at_half,
                parameters=last.parameters + row.parameters,
                parameters_at_half=last.parameters_at_half + row.parameters_at_half,
            )
        else:
            out.append(row)
    return tuple(out)


def _belongs(row: Row, last: Row) -> bool:
    if row.name == last.name:
        return row.operator == last.operator or not (row.macs and last.macs)
    same_parent = row.name.rpartition(".")[0] == last.name.rpartition(".")[0]
    known = {m.group for m in last.marks}
    return same_parent and not row.macs and last.macs > 0 and all(m.group in known for m in row.marks)


def _list_unknown(graph: Graph) -> tuple[Unknown, ...]:
    found = Counter((r.operator, r.where, r.text) for r in graph.axes.opaque.values())
    return tuple(Unknown(*key, count) for key, count in found.items())


__all__ = ["Coupled", "Explanation", "Mark", "Row", "Shares", "Side", "Unknown", "Worth", "explain"]
