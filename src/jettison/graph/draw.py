"""A graph as plain text in 100 columns: what can be pruned and what that is worth, what cannot and why."""

from __future__ import annotations

import itertools
import math
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jettison.core.record import FrozenPart
from jettison.graph.analyse import Member
from jettison.graph.explain import Coupled, Explanation, Unknown, explain

if TYPE_CHECKING:
    from jettison.graph.groups import Graph

WIDTH = 100
LINES_SHOWN = 40
"""Lines of groups shown before the rest is only counted."""
FROZEN_SHOWN = 24
"""Reasons shown before the rest is only counted."""
NAME = 38
"""Columns a group's name may take."""


@dataclass(frozen=True)
class Line:
    """Groups that differ in nothing but the numbers in their names: one line for all of them."""

    name: str
    groups: tuple[Coupled, ...]


def draw_graph(graph: Graph, *, every: bool = False) -> str:
    """Return what `print(graph)` shows: totals, the prune groups, and what is frozen, why and where.

    With `every`, no groups are put together and each is followed by all its members.
    """
    return draw_explanation(explain(graph), every=every)


def draw_explanation(found: Explanation, *, every: bool = False) -> str:
    """Return the text for what `explain` found, see `draw_graph`."""
    parts = [
        _draw_totals(found),
        _draw_every_group(found.groups) if every else _draw_groups(found.groups),
        _draw_frozen(found.frozen, every=every),
        _draw_unknown(found.opaque),
    ]
    return "\n\n".join(part for part in parts if part)


def _draw_totals(found: Explanation) -> str:
    many, opaque = len(found.groups), sum(u.count for u in found.opaque)
    batch = "batch free" if found.batch is None else f"batch fixed at {found.batch}"
    head = (
        f"{many or 'no'} prune group{'' if many == 1 else 's'}; "
        f"{opaque or 'no'} opaque operator{'' if opaque == 1 else 's'}; {batch}"
    )
    if not many:
        return f"{head}\nNothing can be pruned."
    worth = found.worth
    rows = [
        ("share of the network", "MACs", "parameters"),
        ("touched by a group", _percent(worth.touched.macs), _percent(worth.touched.parameters)),
        ("gone if every group keeps half", _percent(worth.half.macs), _percent(worth.half.parameters)),
        ("gone if every group keeps one", _percent(worth.one.macs), _percent(worth.one.parameters)),
    ]
    lines = [f"{what:<30}  {macs:>6}  {parameters:>10}" for what, macs, parameters in rows]
    return "\n".join([head, "", *lines, f"of {found.macs:,} MACs for one sample and {found.parameters:,} parameters"])


def _draw_groups(groups: Sequence[Coupled]) -> str:
    """Return a line for each group, like ones together."""
    if not groups:
        return ""
    lines = fold_groups(groups)
    rows = [("group", "", "size", "exact", "MACs", "params", "members")]
    for line in lines[:LINES_SHOWN]:
        first = line.groups[0]
        rows.append((
            _shorten(line.name, NAME),
            f"×{len(line.groups)}" if len(line.groups) > 1 else "",
            str(first.size),
            "yes" if first.exact else "no",
            _percent(sum(g.worth.half.macs for g in line.groups)),
            _percent(sum(g.worth.half.parameters for g in line.groups)),
            "",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    room = WIDTH - sum(widths) - 12
    out = []
    for row, text in zip(rows, ["members", *(_list_members(x.groups[0].members, room) for x in lines)], strict=False):
        name, *numbers = row[:6]
        cells = [f"{name:<{widths[0]}}", *(f"{n:>{w}}" for n, w in zip(numbers, widths[1:], strict=True)), text]
        out.append("  ".join(cells).rstrip())
    if len(lines) > LINES_SHOWN:
        rest = sum(len(x.groups) for x in lines[LINES_SHOWN:])
        out.append(f"and {rest} more groups: `jettison trace --all` shows every one, --json and --html too")
    out += ["", "MACs, params: what goes when this group alone keeps half its positions, rounded up"]
    if any(len(line.groups) > 1 for line in lines):
        out.append("×N: N groups alike; their MACs and params are the sum of each alone")
    out += ["members: tensor:dimension, without the path all of them share", *_explain_inexact(groups)]
    return "\n".join(out)


def _draw_every_group(groups: Sequence[Coupled]) -> str:
    blocks = []
    for g in groups:
        worth = g.worth
        head = (
            f"size {g.size}, exact: {'yes' if g.exact else 'no'}; touches {_percent(worth.touched.macs)} of the MACs, "
            f"{_percent(worth.touched.parameters)} of the parameters"
        )
        half = (
            f"gone at half: {_percent(worth.half.macs)} of the MACs, {_percent(worth.half.parameters)} of the "
            f"parameters; at one: {_percent(worth.one.macs)}, {_percent(worth.one.parameters)}"
        )
        members = ", ".join(_name_member(m) for m in g.members)
        wrapped = textwrap.wrap(members, WIDTH - 4, break_on_hyphens=False)
        blocks.append("\n".join([g.name, f"  {head}", f"  {half}", *(f"    {line}" for line in wrapped)]))
    notes = ["members: tensor:dimension", *_explain_inexact(groups)] if groups else []
    return "\n".join([*blocks, "", *notes]).rstrip()


def _explain_inexact(groups: Iterable[Coupled]) -> list[str]:
    if all(g.exact for g in groups):
        return []
    return ["exact: no = a norm takes its statistics over the group, over what is kept once it is pruned"]


def fold_groups(groups: Sequence[Coupled]) -> tuple[Line, ...]:
    """Put groups together whose names, sizes and members are the same but for numbers in the names."""
    found: dict[object, list[Coupled]] = {}
    for group in groups:
        members = tuple((re.sub(r"\d+", "0", m.tensor), m.dim) for m in group.members)
        found.setdefault((re.sub(r"\d+", "0", group.name), group.size, group.exact, members), []).append(group)
    lines = [line for alike in found.values() for line in _fold_alike(alike)]
    places = {group.name: place for place, group in enumerate(groups)}
    return tuple(sorted(lines, key=lambda line: places[line.groups[0].name]))


def _fold_alike(groups: Sequence[Coupled]) -> list[Line]:
    """Fold names that differ only in numbers: `blocks.{0-11}.fc1`, and only if that stands for just these names."""
    pieces = [re.split(r"(\d+)", group.name) for group in groups]
    varied = [sorted({int(p[i]) for p in pieces}) for i in range(1, len(pieces[0]), 2)]
    if math.prod(map(len, varied)) != len(groups):
        apart = next(i for i, values in enumerate(varied) if len(values) > 1)
        parts: dict[str, list[Coupled]] = {}
        for piece, group in zip(pieces, groups, strict=True):
            parts.setdefault(piece[2 * apart + 1], []).append(group)
        return [line for part in parts.values() for line in _fold_alike(part)]
    numbers = [_name_range(values) for values in varied]
    texts = pieces[0][::2]
    return [Line("".join(t + n for t, n in zip(texts, [*numbers, ""], strict=True)), tuple(groups))]


def _name_range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}-{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


def _list_members(members: Sequence[Member], width: int) -> str:
    """List members without the path that all of them share."""
    # The last two parts of a name, the layer's own and the tensor's, are always shown.
    paths = [m.tensor.split(".")[:-2] for m in members]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    skip = sum(len(parts[0]) + 1 for parts in shared)
    names = [_name_member(m)[skip:] for m in members]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return _list_names(names, width) if len(names[0] + more) <= width else f"{len(names)} members"


def _name_member(member: Member) -> str:
    return f"{member.tensor}:{member.dim}"


def _draw_frozen(frozen: Sequence[FrozenPart], *, every: bool) -> str:
    """Say once for each reason and line what it holds; names are cut and counted unless `every`."""
    if not frozen:
        return ""
    found: dict[tuple[str, str], list[str]] = {}
    for part in frozen:
        found.setdefault((part.reason, part.where), []).append(part.what)
    lines = [f"frozen: {len(frozen)} dimensions of parameters"]
    for (reason, where), names in list(found.items())[: len(found) if every else FROZEN_SHOWN]:
        place = f" at {_shorten_path(where)}" if where else ""
        if every:
            lines.append(f"  {reason}{place}")
            lines += [f"    {x}" for x in textwrap.wrap(", ".join(names), WIDTH - 4, break_on_hyphens=False)]
        else:
            # A reason may be cut, the user's line never: it is what one goes and looks at.
            lines.append(f"  {_shorten(reason, max(24, WIDTH - 2 - len(place)))}{place}")
            lines.append(f"    {_list_names(names, WIDTH - 4)}")
    if not every and len(found) > FROZEN_SHOWN:
        lines.append(f"  and {len(found) - FROZEN_SHOWN} more reasons")
    return "\n".join(lines)


def _draw_unknown(opaque: Sequence[Unknown]) -> str:
    if not opaque:
        return ""
    lines = [f"operators without a rule, which freeze what they touch: {len({u.operator for u in opaque})}"]
    for unknown in opaque:
        times = f" ×{unknown.count}" if unknown.count > 1 else ""
        place = f" at {_shorten_path(unknown.where)}" if unknown.where else ""
        lines.append(f"  {unknown.operator}{times}{place}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    """A share in percent; "<0.1%" and ">99.9%" where rounding would claim nothing or all."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _list_names(names: Sequence[str], width: int) -> str:
    """Join names with commas as far as they fit, then count the rest."""
    for count in range(len(names), 0, -1):
        rest = len(names) - count
        text = ", ".join(names[:count]) + (f" and {rest} more" if rest else "")
        if len(text) <= width:
            return text
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return _shorten(names[0], max(8, width - len(more))) + more if names else ""


def _shorten(text: str, width: int) -> str:
    """Cut the middle out of what is too long: both ends of a path tell more than its middle."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _shorten_path(where: str) -> str:
    relative = os.path.relpath(where)
    return relative if len(relative) < len(where) else where


__all__ = ["Line", "draw_explanation", "draw_graph", "fold_groups"]
