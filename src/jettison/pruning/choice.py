"""What may be kept: multiples, smallest widths, protection, ties, and which positions of each slab.

`read_widths` says for every group which counts it may keep; `prune`, `compress` and `sensitivity` all ask it.
`balance` ranks positions inside each slab separately, where that leaves the network's function as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from jettison.core.errors import InputError, UnknownName
from jettison.core.recipe import Recipe
from jettison.graph.axes import Atom, Cat, Term, resolve
from jettison.graph.groups import Graph, Group
from jettison.graph.rewrite import slice_graph
from jettison.graph.slabs import Slabs, check_slabs, find_slabs, permute_slabs
from jettison.graph.unroll import unroll
from jettison.pruning.criteria import Criterion
from jettison.pruning.moments import Moments

aten = torch.ops.aten

Keep = float | Mapping[str, int | float]
"""A share of every group, or a share or count for each named one."""


@dataclass(frozen=True)
class Width:
    """The counts a group of `size` positions may keep: all of them, or a multiple of `step` not below `least`."""

    size: int
    step: int
    least: int

    def round_share(self, share: float) -> int:
        """Return the count nearest to a share of the positions; of two as near, the multiple."""
        wanted = self.size * share
        count = min(self.size, max(self.least, round(wanted / self.step) * self.step))
        return self.size if abs(self.size - wanted) < abs(count - wanted) else count

    def list_counts(self, shares: Iterable[float]) -> tuple[int, ...]:
        """Return all positions and the counts nearest to each share, falling."""
        return tuple(sorted({self.size, *map(self.round_share, shares)}, reverse=True))


def make_width(size: int, step: int, recipe: Recipe) -> Width:
    """Return the width of a group whose counts are multiples of `step`; groups no wider than that have any count."""
    step = step if size > step else 1
    least = max(1, math.ceil(recipe.least * size), min(recipe.minimum, size))
    return Width(size, step, min(size, -(-least // step) * step))


def read_widths(graph: Graph, recipe: Recipe) -> dict[str, Width]:
    """Return which counts each group may keep; protected groups keep all, tied groups have one width.

    Raises UnknownName for a name in `protect` or `tie` that nothing answers to, InputError for ties of unequal sizes.
    """
    weights = _find_weights(graph)
    protected = find_protected(graph, recipe)
    widths = {}
    for group in graph.groups:
        width = make_width(group.size, _find_step(graph, group, weights, recipe.multiple), recipe)
        widths[group.name] = Width(width.size, 1, width.size) if group.name in protected else width
    for names in find_ties(graph, recipe):
        step = math.lcm(*(widths[n].step for n in names))
        whole = any(n in protected for n in names)
        size = widths[names[0]].size
        width = Width(size, 1, size) if whole else make_width(size, step, recipe)
        widths |= dict.fromkeys(names, width)
    return widths


def _find_weights(graph: Graph) -> set[str]:
    """Name the tensors that convolutions and matrix products read as they are."""
    names = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm einsum"
    packets = {getattr(aten, name) for name in names.split()}
    return {
        str(node.target)
        for node in graph.module.graph.nodes
        if node.op == "get_attr" and any(getattr(u.target, "overloadpacket", None) in packets for u in node.users)
    }


def _find_step(graph: Graph, group: Group, weights: set[str], multiple: int) -> int:
    """Return the step of a group's counts that keeps each dimension it is part of a multiple of `multiple`.

    A channel counts for one, a head for all positions of its head_dim: of 64 each, any number of heads will do.
    Vectors and tables beside the weights (one bias for each head) ask for nothing.
    """
    members = [m for m in group.members if m.tensor in weights] or list(group.members)
    inner = {n for m in members for n in _inner_sizes(graph.axes.tensors[m.tensor][m.dim], group.atom)}
    return math.lcm(*(multiple // math.gcd(n, multiple) for n in inner))


def _inner_sizes(term: Term, atom: Atom) -> Iterator[int]:
    """Yield, for each occurrence of `atom`, how many positions of the dimension one of its own spans."""
    term = resolve(term)
    if isinstance(term, Atom):
        yield from [1] if term is atom else []
    elif isinstance(term, Cat):
        for part in term.parts:
            yield from _inner_sizes(part, atom)
    else:
        for index, factor in enumerate(term.factors):
            faster = math.prod(f.size for f in term.factors[index + 1 :])
            yield from (n * faster for n in _inner_sizes(factor, atom))


# Names


def find_protected(graph: Graph, recipe: Recipe) -> frozenset[str]:
    """Name the groups that `recipe.protect` keeps whole.

    A group's own name protects that group alone; any other name or pattern protects every group that has a member in
    a module, or among the tensors, that it matches. Raises UnknownName with the nearest names.
    """
    names = {g.name for g in graph.groups}
    return frozenset(
        name for pattern in recipe.protect for name in ([pattern] if pattern in names else match_groups(graph, pattern))
    )


def match_groups(graph: Graph, pattern: str) -> tuple[str, ...]:
    """Name the groups whose own name, or a module or tensor of whose members, matches a name or pattern (`*`, `?`).

    None for a module without any; raises UnknownName with the nearest names where nothing is called so.
    """
    found = tuple(
        g.name
        for g in graph.groups
        if fnmatchcase(g.name, pattern) or any(fnmatchcase(n, pattern) for m in g.members for n in _paths(m.tensor))
    )
    known = {g.name for g in graph.groups} | {n for t in graph.axes.tensors for n in _paths(t)} | _module_paths(graph)
    if not found and not any(fnmatchcase(name, pattern) for name in known):
        raise UnknownName("module or prune group", pattern, known)
    return found


def find_ties(graph: Graph, recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """Name the groups of each tie in `recipe.tie`; those that share a group become one.

    A pattern stands for the groups whose names it matches, or else for those with members in modules it matches.
    Raises UnknownName, and InputError where the sizes of tied groups differ.
    """
    ties: list[set[str]] = []
    for patterns in recipe.tie:
        tied: set[str] = set()
        for pattern in patterns:
            by_name = {g.name for g in graph.groups if fnmatchcase(g.name, pattern)}
            tied |= by_name or set(match_groups(graph, pattern))
        apart = [t for t in ties if t.isdisjoint(tied)]
        ties = [*apart, tied.union(*(t for t in ties if not t.isdisjoint(tied)))]
    for tied in ties:
        sizes = {g.name: g.size for g in graph.groups if g.name in tied}
        if len(set(sizes.values())) > 1:
            raise InputError(
                f"Groups of unequal sizes cannot keep the same count: {sizes}. They are tied by the recipe's "
                "tie=. Tie only groups of one size; a pattern with the group's own name matches no others."
            )
    return tuple(tuple(g.name for g in graph.groups if g.name in tied) for tied in ties if len(tied) > 1)


def _paths(tensor: str) -> list[str]:
    """Return a tensor's name and the path of every module around it."""
    parts = tensor.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _module_paths(graph: Graph) -> set[str]:
    stacks = (node.meta.get("nn_module_stack") or {} for node in graph.module.graph.nodes)
    return {str(path) for stack in stacks for path, _ in stack.values() if path}


# Counts


def choose_counts(graph: Graph, keep: Keep, recipe: Recipe) -> dict[str, int]:
    """Return how many positions of each group stay.

    A share is rounded to the nearest count that the group's width allows; a count is taken as it is. Of tied groups
    one may be named for all. Raises InputError for numbers out of range and for ties named with different counts,
    UnknownName for groups that are none.
    """
    widths = read_widths(graph, recipe)
    protected = find_protected(graph, recipe)
    named = keep if isinstance(keep, Mapping) else dict.fromkeys(widths, keep)
    for name in named:
        graph.find(name)
        if isinstance(keep, Mapping) and name in protected:
            raise InputError(
                f"Group {name!r} is named in keep= and protected by the recipe. Take it out of one of them."
            )
    counts = {name: _count(name, widths[name], value, keep) for name, value in named.items() if name not in protected}
    for names in find_ties(graph, recipe):
        given = {n: counts[n] for n in names if n in counts}
        if len(set(given.values())) > 1:
            raise InputError(
                f"Tied groups were given different counts: {given}. Name one of them, or give all the same."
            )
        if given and protected.isdisjoint(names):
            counts |= dict.fromkeys(names, next(iter(given.values())))
        else:
            counts = {n: c for n, c in counts.items() if n not in names}
    return {g.name: counts.get(g.name, g.size) for g in graph.groups}


def _count(name: str, width: Width, value: int | float, keep: Keep) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"keep={value!r} for group {name!r} is no number. Give a share or a count.")
    if isinstance(value, int) and isinstance(keep, Mapping):
        if not 1 <= value <= width.size:
            raise InputError(f"Group {name!r} has {width.size} positions and cannot keep {value}.")
        return value
    if not 0 < value <= 1:
        raise InputError(f"keep={value} must be a share in (0, 1], or a mapping from group names to counts.")
    return width.round_share(value)


# Positions of each slab


def balance(
    graph: Graph, names: Sequence[str], ranker: Criterion, moments: Mapping[fx.Node, Moments], seed: int
) -> tuple[Graph, frozenset[str]]:
    """Return the same network with the best positions of each slab in front, and the groups that this was done for.

    Of those groups the first positions are the ones to keep; the others of `names` have one order for all slabs. The
    network's function stays: proven on the traced inputs in float64, or VerificationError is raised.
    """
    chosen: dict[str, Slabs] = {}
    for name in names:
        slabs = find_slabs(graph, graph.find(name))
        numbering = {a for s in chosen.values() for a in s.atoms}
        ordered = {s.group.atom for s in chosen.values()}
        # Of two axes that number each other's slabs, one can be put in order.
        if slabs.atoms and slabs.group.atom not in numbering and ordered.isdisjoint(slabs.atoms):
            chosen[name] = slabs
    if not chosen:
        return graph, frozenset()
    copy = slice_graph(graph, {})
    orders = {name: rank_slabs(graph, slabs, ranker, moments, seed, copy) for name, slabs in chosen.items()}
    permuted = permute_slabs(graph, orders)
    check_slabs(graph, permuted, graph.traced.example)
    return permuted, frozenset(chosen)


def rank_slabs(
    graph: Graph,
    slabs: Slabs,
    ranker: Criterion,
    moments: Mapping[fx.Node, Moments],
    seed: int,
    copy: fx.GraphModule | None = None,
) -> Tensor:
    """Return the positions of each slab, most important first: one row for each slab.

    `copy` is a copy of the graph's module that may receive tensors; one is made where none is given.
    """
    view, groups = unroll(graph, slabs, slice_graph(graph, {}) if copy is None else copy)
    known = {node.name: found for node, found in moments.items()}
    seen = {node: known[node.name] for node in view.module.graph.nodes if node.name in known}
    orders = [ranker(view, group, seen, seed + i) for i, group in enumerate(groups)]
    if len(groups) == slabs.count:
        return torch.stack(orders)
    size = slabs.group.size  # all slabs in one order, which holds each slab's own
    return torch.stack([orders[0][orders[0] // size == i] % size for i in range(slabs.count)])


__all__ = [
    "Width",
    "balance",
    "choose_counts",
    "find_protected",
    "find_ties",
    "make_width",
    "match_groups",
    "rank_slabs",
    "read_widths",
]
