"""Prune groups: an axis of the network together with every parameter slice its positions own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from jettison.core.errors import InputError, UnknownName
from jettison.core.record import FrozenPart
from jettison.graph.analyse import Axes, Member, analyse
from jettison.graph.axes import Atom, iterate_atoms
from jettison.graph.draw import draw_graph
from jettison.graph.rules import RULES, elementwise
from jettison.graph.subgraphs import walk_nodes
from jettison.graph.trace import Traced, find_attribute, get_tensor, trace_module


@dataclass(frozen=True)
class Group:
    """Positions that live or die one by one: `size` of them, and all that must be sliced when one goes.

    `exact` is False where a normalisation or a mean takes its statistics over this axis, so that removing a position
    changes what the others become.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    exact: bool
    atom: Atom = field(repr=False, compare=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that own the members, in the order they run."""
        return tuple(dict.fromkeys(m.tensor.rpartition(".")[0] or m.tensor for m in self.members))


@dataclass(frozen=True)
class Graph:
    """A traced network and its axes: what `jt.trace` returns and every other stage reads.

    `groups` can be pruned; `frozen` cannot, each with a reason and the user's line; `opaque` counts the
    operators that have no rule.
    """

    traced: Traced
    axes: Axes = field(repr=False)
    groups: tuple[Group, ...]
    frozen: tuple[FrozenPart, ...]

    @property
    def module(self) -> fx.GraphModule:
        """The flat graph: takes the flat inputs, returns a tuple of tensors."""
        return self.traced.module

    @property
    def opaque(self) -> tuple[str, ...]:
        """The operators without a rule, by name."""
        return tuple(sorted({r.operator for r in self.axes.opaque.values()}))

    def find(self, name: str) -> Group:
        """Return the group of that name; raises UnknownName with the nearest names."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UnknownName("prune group", name, (g.name for g in self.groups))

    def keeps(self, kept: Mapping[str, Iterable[int]]) -> dict[Atom, Tensor]:
        """Turn kept positions per group name into boolean vectors per axis; checks ranges."""
        vectors: dict[Atom, Tensor] = {}
        for name, positions in kept.items():
            group = self.find(name)
            index = sorted(set(positions))
            if not index or index[0] < 0 or index[-1] >= group.size:
                raise InputError(
                    f"Group {name!r} has positions 0..{group.size - 1}, cannot keep {index[:1]}..{index[-1:]}. "
                    "Keep at least one position, all in range."
                )
            vector = torch.zeros(group.size, dtype=torch.bool)
            vector[index] = True
            vectors[group.atom] = vector
        return vectors

    def __str__(self) -> str:
        """Draw the groups and what is frozen as a table."""
        return draw_graph(self)


def trace(
    model: nn.Module,
    inputs: Any,
    kwinputs: Mapping[str, Any] | None = None,
    *,
    free_outputs: bool | Sequence[int] = False,
) -> Graph:
    """Return the graph of `model` with its prune groups; the model is not changed.

    `inputs` is a tensor or a tuple of tensors as the network is called, or a dict of its keyword inputs; `kwinputs`
    are keyword inputs beside positional ones. `free_outputs` (all, or those of these numbers) may lose channels, as a
    feature extractor's can where what reads them is made anew; batch and space stay. Raises ShapeError,
    NonFiniteError or TraceError (see `jettison.core.errors`), InputError for an output that is none.
    """
    if isinstance(inputs, Mapping):
        traced = trace_module(model, (), {**inputs, **(kwinputs or {})})
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        traced = trace_module(model, args, kwinputs)
    return build_graph(dataclasses.replace(traced, free_outputs=_number_outputs(traced, free_outputs)))


def _number_outputs(traced: Traced, free: bool | Sequence[int]) -> tuple[int, ...]:
    count = traced.out_spec.num_leaves
    if isinstance(free, bool):
        return tuple(range(count)) if free else ()
    if isinstance(free, (str, int)) or any(isinstance(i, bool) or not 0 <= i < count for i in free):
        raise InputError(f"free_outputs={free!r} must be True or numbers of outputs: there are {count}, from 0.")
    return tuple(free)


def build_graph(traced: Traced) -> Graph:
    """Analyse a traced network and collect its groups."""
    axes = analyse(traced.module, RULES, elementwise, traced.free_outputs)
    members: dict[Atom, list[Member]] = {}
    frozen: dict[tuple[str, str], FrozenPart] = {}
    for tensor in _tensors_in_order(traced.module):
        for dim, term in enumerate(axes.tensors[tensor]):
            for atom in dict.fromkeys(iterate_atoms(term)):
                if atom.frozen is None:
                    members.setdefault(atom, []).append(Member(tensor, dim))
                elif atom.frozen.text != "spatial size":
                    what = f"{tensor} (dimension {dim})"
                    key = (what, atom.frozen.text)
                    frozen.setdefault(key, FrozenPart(what, atom.frozen.text, atom.frozen.where))
    groups = [_make_group(traced.module, atom, found) for atom, found in members.items() if atom.size > 1]
    return Graph(traced, axes, _unique_names(groups), tuple(frozen.values()))


def _tensors_in_order(module: fx.GraphModule) -> list[str]:
    """Name the parameters and float buffers in the order their layers run."""
    names: list[str] = []
    for prefix, node in walk_nodes(module):
        if node.op == "call_function":
            names += [f"{prefix}{n.target}" for n in node.all_input_nodes if n.op == "get_attr"]
    found = {name: find_attribute(module, name) for name in dict.fromkeys(names)}
    first: dict[int, str] = {}  # a tied tensor goes by the name it is met with first
    for name, tensor in found.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            first.setdefault(id(tensor), name)
    return list(first.values())


def _make_group(module: fx.GraphModule, atom: Atom, members: list[Member]) -> Group:
    producer = next((m for m in members if m.dim == 0 and get_tensor(module, m.tensor).dim() > 1), members[0])
    name = producer.tensor.rpartition(".")[0] or producer.tensor
    return Group(name, atom.size, tuple(members), not atom.flags & {"normalised", "reduced"}, atom)


def _unique_names(groups: list[Group]) -> tuple[Group, ...]:
    seen: dict[str, int] = {}
    out: list[Group] = []
    for group in groups:
        count = seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if count == 1 else f"{group.name}#{count}"
        out.append(Group(name, group.size, group.members, group.exact, group.atom))
    return tuple(out)
