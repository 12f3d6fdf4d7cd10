"""One self-contained HTML page that draws a traced network: its layers, its prune groups, and what cannot go and why.

All is drawn here; the page's script only highlights, searches and sorts, and the page asks nobody for anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jettison.core.plain import write_bytes
from jettison.core.record import FrozenPart
from jettison.graph.explain import Coupled, Explanation, Row
from jettison.report import numbers
from jettison.report.html import HERE, make_environment

COLOURS = 12
"""Groups that overlap get different colours as long as these last."""
LANE_PX, LANES_PX = 14, 266
"""How far lanes lie apart, and how much room all of them take at most."""


@dataclass(frozen=True)
class Stop:
    """A layer of a group: the row, where that lies across the page in percent, and what the layer does with it."""

    row: int
    at: float
    role: str


@dataclass(frozen=True)
class Lane:
    """A group as a line from the first of its layers to the last, beside the lines that run at the same time."""

    group: int
    lane: int
    colour: int
    stops: tuple[Stop, ...]


@dataclass(frozen=True)
class Bar:
    """A row's MACs and what is left at half width, in percent of the largest row's; where it lies, in percent."""

    before: float
    after: float
    left: float
    width: float


@dataclass(frozen=True)
class Held:
    """All that one reason freezes."""

    reason: str
    where: str
    what: tuple[str, ...]


def render_graph(found: Explanation, name: str = "") -> str:
    """Draw the page; `name` is the network's. Strings are escaped, control characters replaced."""
    style = "".join((HERE / file).read_text(encoding="utf-8") for file in ("page.css", "graph_page.css"))
    script = (HERE / "graph_page.js").read_text(encoding="utf-8")
    lanes = place_lanes(found)
    count = max((lane.lane for lane in lanes), default=-1) + 1
    view: dict[str, Any] = {
        "found": found,
        "name": name,
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "sentence": _say(found),
        "lanes": lanes,
        "lane_count": count,
        "lane_px": round(min(LANE_PX, LANES_PX / max(count, 1)), 2),
        "colours": {lane.group: lane.colour for lane in lanes},
        "bars": _list_bars(found.rows),
        "wires": _start_wires(found, lanes, count),
        "held": group_frozen(found.frozen),
        "heaviest": max((g.worth.half.macs for g in found.groups), default=0.0) or 1.0,
    }
    environment = make_environment()
    environment.filters.update(share=format_share, split=split_name, part=name_part, summary=summarise)
    return str(environment.get_template("graph_page.html.jinja").render(view))


def write_graph(found: Explanation, path: Path, name: str = "") -> Path:
    """Write the page in one step and return its path; raises StorageError where it cannot be written."""
    write_bytes(render_graph(found, name).encode("utf-8", "replace"), path)
    return path


def place_lanes(found: Explanation) -> tuple[Lane, ...]:
    """Give each group a lane that is free from its first layer to its last; the longest lie outermost."""
    stops: list[list[Stop]] = [[] for _ in found.groups]
    for row, layer in enumerate(found.rows):
        for mark in layer.marks:
            stops[mark.group].append(Stop(row, round(100 * (row + 0.5) / len(found.rows), 3), mark.role))
    drawn = [index for index, where in enumerate(stops) if where]
    order = sorted(drawn, key=lambda i: (stops[i][0].row - stops[i][-1].row, stops[i][0].row))
    taken: list[list[tuple[int, int]]] = []
    places: dict[int, int] = {}
    for index in order:
        first, last = stops[index][0].row, stops[index][-1].row
        lane = next(
            (i for i, held in enumerate(taken) if all(last < low or high < first for low, high in held)), len(taken)
        )
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, last))
        places[index] = lane
    return tuple(Lane(i, places[i], n % COLOURS, tuple(stops[i])) for n, i in enumerate(drawn))


def group_frozen(frozen: Sequence[FrozenPart]) -> tuple[Held, ...]:
    """Say each reason once, with all that it holds."""
    held: dict[tuple[str, str], list[str]] = {}
    for part in frozen:
        held.setdefault((part.reason, part.where), []).append(part.what)
    return tuple(Held(reason, where, tuple(what)) for (reason, where), what in held.items())


def format_share(share: float) -> str:
    """A share in percent with three digits; "< 0.1" and "> 99.9" where rounding would claim nothing or all."""
    if 0 < share < 0.001:
        return f"<{numbers.SPACE}0.1{numbers.SPACE}%"
    if 0.999 < share < 1:
        return f">{numbers.SPACE}99.9{numbers.SPACE}%"
    decimals = 0 if share in (0, 1) else 1
    return f"{numbers.format_fixed(100 * share, decimals)}{numbers.SPACE}%"


def split_name(name: str) -> tuple[str, str]:
    """Return the path of a module up to its last dot, and the rest."""
    path, dot, leaf = name.rpartition(".")
    return path + dot, leaf


def name_part(tensor: str, dim: int) -> str:
    """Return how a member is written: the tensor and which of its dimensions."""
    return f"{tensor}:{dim}"


def summarise(group: Coupled) -> str:
    """Say in a line what a group is and what it is worth."""
    worth, many = group.worth, len(group.layers)
    return (
        f"{group.size} positions, {len(group.members)} members in {many} layer{'s' if many != 1 else ''}. "
        f"It touches {format_share(worth.touched.macs)} of the MACs; halving it alone takes away "
        f"{format_share(worth.half.macs)} of the MACs and {format_share(worth.half.parameters)} of the parameters."
    )


def _say(found: Explanation) -> str:
    if not found.groups:
        return "Nothing in this network can be pruned."
    one, share = len(found.groups) == 1, format_share(found.worth.touched.macs)
    start = "1 prune group reaches" if one else f"{len(found.groups)} prune groups reach"
    reach = "all of the arithmetic" if found.worth.touched.macs == 1 else f"{share} of the arithmetic"
    if found.opaque:
        many = len({u.operator for u in found.opaque})
        return f"{start} {reach}; {many} operator{'s have' if many != 1 else ' has'} no rule."
    return f"{start} {reach}."


def _list_bars(rows: Sequence[Row]) -> tuple[Bar, ...]:
    most = max((row.macs for row in rows), default=0) or 1
    step = 100 / max(len(rows), 1)
    return tuple(
        Bar(
            round(100 * row.macs / most, 2),
            round(100 * row.macs_at_half / most, 2),
            round(step * index, 3),
            round(step * 0.72, 3),
        )
        for index, row in enumerate(rows)
    )


def _start_wires(found: Explanation, lanes: Sequence[Lane], count: int) -> list[float | None]:
    """Return where, in percent, each row's line to its lanes begins: at the outermost; None for a row without."""
    places = {lane.group: round((lane.lane + 0.5) * 100 / count, 3) for lane in lanes}
    return [min((places[m.group] for m in row.marks), default=None) for row in found.rows]


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


__all__ = ["Bar", "Held", "Lane", "Stop", "format_share", "group_frozen", "place_lanes", "render_graph", "write_graph"]
