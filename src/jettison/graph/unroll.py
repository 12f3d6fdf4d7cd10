"""A view of a network in which the positions of every slab are told apart, so that a criterion can rank them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from jettison.graph.analyse import Dims, Member
from jettison.graph.axes import Atom, Cat, Prod, Term, iterate_atoms, make_axis, resolve
from jettison.graph.groups import Graph, Group
from jettison.graph.slabs import Slabs, along, locate, number_slabs
from jettison.graph.trace import get_tensor


def unroll(graph: Graph, slabs: Slabs, module: fx.GraphModule) -> tuple[Graph, tuple[Group, ...]]:
    """Return the view, and the groups that stand for the slabs: one for all, slab after slab, or else one for each.

    One it is where each slab's positions lie side by side. Where a dimension's term cannot say which slab it is
    (another dimension numbers them), a tensor of the same numbers, one row for each position of each slab, takes its
    place among the members. `module` is a copy of the graph's (`slice_graph(graph, {})`), which receives such tensors.
    """
    group, count = slabs.group, slabs.count
    old = {m: graph.axes.tensors[m.tensor][m.dim] for m in group.members}
    fine: tuple[Atom, ...] = (Atom(count * group.size),)
    terms = {m: _join_term(term, slabs, fine[0]) for m, term in old.items()}
    each = tuple(Atom(group.size) for _ in range(count))
    apart = {m: _part_term(term, slabs, each, {}) for m, term in old.items()}
    if any(apart[m] is not None and terms[m] is None for m in old):
        fine, terms = each, apart
    tensors = dict(graph.axes.tensors)
    members: list[Member] = []
    for member, term in terms.items():
        if term is not None:
            dims = list(tensors[member.tensor])
            dims[member.dim] = term
            tensors[member.tensor] = tuple(dims)
            members.append(member)
            continue
        name = f"{group.name}_{member.tensor}_{member.dim}_by_slab".replace(".", "_").replace("#", "_")
        value = _gather_rows(get_tensor(graph.module, member.tensor), graph.axes.tensors[member.tensor], member, slabs)
        module.register_buffer(name, value)
        tensors[name] = (Cat(fine), *(make_axis(s) for s in value.shape[1:]))
        members.append(Member(name, 0))
    known = {node.name: found for node, found in graph.axes.terms.items()}
    axes = dataclasses.replace(
        graph.axes, tensors=tensors, terms={n: known[n.name] for n in module.graph.nodes if n.name in known}
    )
    groups = tuple(
        Group(f"{group.name}[{i}]", atom.size, tuple(members), group.exact, atom) for i, atom in enumerate(fine)
    )
    traced = dataclasses.replace(graph.traced, module=module)
    return dataclasses.replace(graph, traced=traced, axes=axes, groups=(*graph.groups, *groups)), groups


def _join_term(term: Term, slabs: Slabs, fine: Atom) -> Term | None:
    """Write the slab axes followed by the group's as one axis; None where they do not stand side by side."""
    term = resolve(term)
    atom = slabs.group.atom
    if term is atom:
        return None
    if isinstance(term, Atom) or atom not in iterate_atoms(term):
        return term
    if isinstance(term, Prod):
        wanted = (*slabs.atoms, atom)
        for i in range(len(term.factors) - len(slabs.atoms)):
            if all(x is y for x, y in zip(term.factors[i : i + len(wanted)], wanted, strict=True)):
                return Prod((*term.factors[:i], fine, *term.factors[i + len(wanted) :]))
    inner = [_join_term(t, slabs, fine) for t in (term.factors if isinstance(term, Prod) else term.parts)]
    return _rebuild(term, inner)


def _part_term(term: Term, slabs: Slabs, fine: Sequence[Atom], at: Mapping[Atom, int]) -> Term | None:
    """Write a product of slab axes and the group's as a sum over slabs; None where a slab axis is not before it."""
    term = resolve(term)
    atom = slabs.group.atom
    if term is atom:
        if len(at) < len(slabs.atoms):
            return None
        number = 0
        for slab in slabs.atoms:
            number = number * slab.size + at[slab]
        return fine[number]
    if isinstance(term, Atom) or atom not in iterate_atoms(term):
        return term
    if isinstance(term, Prod):
        for i, factor in enumerate(term.factors):
            rest = Prod(term.factors[i + 1 :])
            if isinstance(factor, Atom) and factor in slabs.atoms and atom in iterate_atoms(rest):
                runs = [_part_term(rest, slabs, fine, {**at, factor: s}) for s in range(factor.size)]
                joined = _rebuild(Cat(()), runs)
                return None if joined is None else Prod((*term.factors[:i], joined))
    inner = [_part_term(t, slabs, fine, at) for t in (term.factors if isinstance(term, Prod) else term.parts)]
    return _rebuild(term, inner)


def _rebuild(term: Prod | Cat, inner: Sequence[Term | None]) -> Term | None:
    found = tuple(t for t in inner if t is not None)
    if len(found) < len(inner):
        return None
    return Prod(found) if isinstance(term, Prod) else Cat(found)


def _gather_rows(tensor: Tensor, dims: Dims, member: Member, slabs: Slabs) -> Tensor:
    """Return the elements of a member as one row for each position of each slab."""
    position, _ = locate(dims[member.dim], slabs.group.atom)
    here = along(position, member.dim, len(dims))
    number = torch.where(here >= 0, number_slabs(dims, slabs) * slabs.group.size + here, -1)
    owner = number.expand(tensor.shape).flatten()
    order = owner.argsort(stable=True)[int((owner < 0).sum()) :]
    rows = tensor.detach().flatten()[order.to(tensor.device)]
    return rows if tensor.dim() == 1 else rows.reshape(slabs.count * slabs.group.size, -1)


__all__ = ["unroll"]
