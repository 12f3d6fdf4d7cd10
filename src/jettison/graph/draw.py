"""A graph as plain text: what can be pruned, what cannot and why, in 100 columns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from jettison.core.record import FrozenPart
from jettison.graph.axes import Atom, iterate_atoms
from jettison.graph.layers import Layer, count_positions, find_layers
from jettison.graph.trace import find_attribute

if TYPE_CHECKING:
    from jettison.graph.groups import Graph, Group

WIDTH = 100
FROZEN_SHOWN = 24
"""Reasons shown before the rest is only counted."""


def draw_graph(graph: Graph) -> str:
    """Return what `print(graph)` shows: totals, the prune groups, and what is frozen, why and where."""
    parts = [_draw_totals(graph), _draw_groups(graph.groups), _draw_frozen(graph.frozen), _draw_opaque(graph)]
    return "\n\n".join(part for part in parts if part)


def _draw_totals(graph: Graph) -> str:
    batch = "batch free" if graph.traced.dynamic_batch else f"batch fixed at {len(graph.traced.example[0])}"
    opaque = len(graph.axes.opaque)
    count = len(graph.groups)
    return (
        f"{count} prune {'group touches' if count == 1 else 'groups touch'} "
        f"{_share_of_macs(graph):.0%} of the MACs and "
        f"{_share_of_parameters(graph):.0%} of the parameters; "
        f"{opaque or 'no'} opaque operator{'' if opaque == 1 else 's'}; {batch}"
    )


def _draw_groups(groups: Sequence[Group]) -> str:
    if not groups:
        return "Nothing can be pruned."
    rows = [("group", "size", "exact", "layers", "")]
    for group in groups:
        rows.append((
            _shorten(group.name, 36),
            str(group.size),
            "yes" if group.exact else "no",
            str(len(group.layers)),
            _list_layers(group.layers, 34),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, size, exact, count, layers in rows:
        line = f"{name:<{widths[0]}}  {size:>{widths[1]}}  {exact:<{widths[2]}}  {count:>{widths[3]}}  {layers}"
        lines.append(line.rstrip()[:WIDTH])
    if any(not g.exact for g in groups):
        lines.append("exact: no = a norm takes its statistics over the group, over what is kept once it is pruned")
    return "\n".join(lines)


def _draw_frozen(frozen: Sequence[FrozenPart]) -> str:
    """Say once for each reason and line what it holds, the first names and how many more."""
    if not frozen:
        return ""
    found: dict[tuple[str, str], list[str]] = {}
    for part in frozen:
        found.setdefault((part.reason, part.where), []).append(part.what)
    lines = [f"frozen: {len(frozen)} dimensions of parameters"]
    for (reason, where), names in list(found.items())[:FROZEN_SHOWN]:
        place = f" at {_shorten_path(where)}" if where else ""
        lines.append(_shorten(f"  {reason}{place}", WIDTH))
        lines.append(_shorten(f"    {_list_names(names, WIDTH - 4)}", WIDTH))
    if len(found) > FROZEN_SHOWN:
        lines.append(f"  and {len(found) - FROZEN_SHOWN} more reasons")
    return "\n".join(lines)


def _draw_opaque(graph: Graph) -> str:
    if not graph.opaque:
        return ""
    return _shorten(f"operators without a rule: {', '.join(graph.opaque)}", WIDTH)


def _share_of_macs(graph: Graph) -> float:
    total = touched = 0
    atoms = {g.atom for g in graph.groups}
    for layer in find_layers(graph.module):
        macs = _count_macs(graph, layer)
        total += macs
        touched += macs * _is_member(graph, layer.weight, atoms)
    return touched / total if total else 0.0


def _count_macs(graph: Graph, layer: Layer) -> int:
    weight = find_attribute(graph.module, layer.weight)
    assert isinstance(weight, Tensor)
    return weight.numel() * count_positions(layer, len(graph.traced.example[0]))


def _share_of_parameters(graph: Graph) -> float:
    total = touched = 0
    atoms = {g.atom for g in graph.groups}
    seen: set[int] = set()
    for name in graph.axes.tensors:
        tensor = find_attribute(graph.module, name)
        if id(tensor) in seen or not tensor.is_floating_point():
            continue
        seen.add(id(tensor))
        total += tensor.numel()
        touched += tensor.numel() * _is_member(graph, name, atoms)
    return touched / total if total else 0.0


def _is_member(graph: Graph, tensor: str, atoms: Iterable[Atom]) -> bool:
    return any(atom in atoms for term in graph.axes.tensors[tensor] for atom in iterate_atoms(term))


def _list_names(names: Sequence[str], width: int) -> str:
    """Join names with commas as far as they fit, then count the rest."""
    for count in range(len(names), 0, -1):
        rest = len(names) - count
        text = ", ".join(names[:count]) + (f" and {rest} more" if rest else "")
        if len(text) <= width or count == 1:
            return _shorten(text, width)
    return ""


def _list_layers(layers: Sequence[str], width: int) -> str:
    return _list_names([_shorten(name, width) for name in layers], width)


def _shorten(text: str, width: int) -> str:
    """Cut the middle out of what is too long: both ends of a path tell more than its middle."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _shorten_path(where: str) -> str:
    relative = os.path.relpath(where)
    return relative if len(relative) < len(where) else where


__all__ = ["draw_graph"]
