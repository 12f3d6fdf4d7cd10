"""Where things stand on a plot, in percent of its width and height. The templates only draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jettison.core.record import GroupRecord, Record, TimeShare, Variant
from jettison.report.findings import find_variant
from jettison.report.numbers import (
    format_bytes,
    format_count,
    format_interval,
    format_macs,
    format_ms,
    format_number,
    format_tick,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: position in percent and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from `low` to `high`."""

    low: float
    high: float
    log: bool
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Bar:
    """A bar of `share` percent; `low` and `high` are the ends of its whisker, if it has one."""

    label: str
    role: str
    value: float
    text: str
    share: float
    low: float | None = None
    high: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Chart:
    """Bars of one quantity on one scale; `missing` names what has no value."""

    title: str
    note: str
    bars: tuple[Bar, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Dot:
    """A point of a plot: percent from the left and from the top."""

    x: float
    y: float
    title: str
    chosen: bool


@dataclass(frozen=True)
class FrontPlot:
    """The Pareto front: dots joined in order of cost, two axes, and where the original stands."""

    quantity: str
    x: Axis
    y: Axis
    dots: tuple[Dot, ...]
    original: Tick | None
    label: tuple[str, str]


@dataclass(frozen=True)
class GroupPlot:
    """Loss against keep of one group; `chosen_text` says what was chosen and what it is predicted to cost."""

    name: str
    before: int
    after: int
    dots: tuple[Dot, ...]
    chosen_x: float
    chosen_text: str


@dataclass(frozen=True)
class Pair:
    """A quantity before and after, as two bars on one scale."""

    label: str
    before: float
    after: float
    before_share: float
    after_share: float
    count: int


def place(axis: Axis, value: float) -> float:
    """Position of `value` in percent, clamped to the axis."""
    low, high = axis.low, axis.high
    if axis.log:
        low, high, value = math.log10(low), math.log10(high), math.log10(max(value, axis.low))
    share = (value - low) / (high - low) if high > low else 0.5
    return round(100 * min(1.0, max(0.0, share)), 2)


def make_axis(values: Iterable[float], text: Callable[[float], str], *, log: bool = False, count: int = 5) -> Axis:
    """A scale with round ticks that holds all finite `values`; linear ones begin at zero."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if log and known:
        low, high = min(known), max(known)
        low, high = (low, high) if high > 1.01 * low else (low / 2, high * 2)
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        marks: list[float] = []
        for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            marks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
            marks = [m for m in marks if 0.99 * low <= m <= 1.01 * high]
            if len(marks) >= min(3, count):
                break
        every = max(1, math.ceil(len(marks) / (count + 1)))
        marks = marks[::every]
    else:
        low, high = min([0.0, *known]), max([0.0, *known]) or 1.0
        step = find_step((high - low) / count)
        marks = [step * k for k in range(math.ceil(low / step), math.floor(high / step * 1.0001) + 1)]
    bare = Axis(low, high, log and bool(known), ())
    return Axis(bare.low, bare.high, bare.log, tuple(Tick(place(bare, m), text(m)) for m in marks))


def find_step(rough: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) at or above `rough`."""
    base = 10.0 ** math.floor(math.log10(rough))
    return next(s * base for s in (1.0, 2.0, 5.0, 10.0) if s * base >= rough * 0.999)


def find_role(record: Record, name: str) -> str:
    """The colour of a variant: the original, the compressed one, or neither."""
    return "compressed" if name == record.compressed else "original" if name == record.baseline else "other"


def plot_variants(record: Record) -> tuple[Chart, ...]:
    """Latency with its 10–90 % range, file size and MACs of all variants."""
    return (
        plot_quantity(
            record, "Latency", "median, line from 10 to 90 %", lambda v: v.latency_ms.value, format_ms, whiskers=True
        ),
        plot_quantity(record, "File size", "bytes on disk", lambda v: v.size_bytes, format_bytes),
        plot_quantity(record, "Arithmetic", "multiply-accumulates of one inference", lambda v: v.macs, format_count),
    )


def plot_quantity(
    record: Record,
    title: str,
    note: str,
    read: Callable[[Variant], float | None],
    text: Callable[[float], str],
    *,
    whiskers: bool = False,
) -> Chart:
    """One bar for each variant that has the quantity, all from zero on one scale."""
    values = [(v, read(v)) for v in record.variants]
    known = [(v, x) for v, x in values if x is not None]
    # Whiskers may be far longer than bars on a busy machine; beyond 1.3 times the longest bar they are cut off.
    longest = max((x for _, x in known), default=0.0)
    reach = max((v.latency_ms.high for v, _ in known), default=0.0) if whiskers else longest
    axis = make_axis([min(max(reach, longest), 1.3 * longest)], format_number)
    bars = []
    for variant, value in known:
        span, unit = variant.latency_ms, "\u00a0ms"
        shown = format_interval(span, unit)[0] if whiskers else text(value)
        bars.append(
            Bar(
                label=variant.name,
                role=find_role(record, variant.name),
                value=value,
                text=shown,
                share=place(axis, value),
                low=place(axis, span.low) if whiskers else None,
                high=place(axis, span.high) if whiskers else None,
                detail=f"10 to 90 %: {format_interval(span)[1]} ms" if whiskers else "",
            )
        )
    return Chart(title, note, tuple(bars), tuple(v.name for v, x in values if x is None))


def plot_front(record: Record) -> FrontPlot | None:
    """Predicted loss against predicted latency where all plans have one, else against MACs; None without plans."""
    if not record.front:
        return None
    timed = all(p.latency_ms is not None for p in record.front)
    points = sorted(record.front, key=lambda p: (p.latency_ms or 0.0, p.macs) if timed else (p.macs, 0))
    costs = [p.latency_ms or 0.0 if timed else float(p.macs) for p in points]
    text = format_ms if timed else format_count
    marked = (lambda v: f"{format_tick(v)} ms") if timed else format_mark
    losses = [p.loss for p in points]
    baseline = find_variant(record, record.baseline)
    mark = (baseline.latency_ms.value if timed else float(baseline.macs)) if baseline else None
    x = make_axis([*costs, *([mark] if mark else [])], marked, count=5)
    # Losses of a long front span orders of magnitude; on a linear scale the good plans would lie on each other.
    log = min(losses) > 0 and max(losses) > 30 * min(losses)
    y = make_axis([0.8 * min(losses), 1.2 * max(losses)], format_tick, log=log, count=4)
    told = [
        (text(c) if timed else format_macs(c), f"loss {format_number(p.loss, 2)}")
        for c, p in zip(costs, points, strict=True)
    ]
    dots = tuple(
        Dot(place(x, c), round(100 - place(y, p.loss), 2), ", ".join(words), p.chosen)
        for c, p, words in zip(costs, points, told, strict=True)
    )
    # As short as the original's mark: beside a dot there may be only half a phone's width.
    label = next(
        ((text(c), f"predicted {words[1]}") for p, c, words in zip(points, costs, told, strict=True) if p.chosen),
        ("", ""),
    )
    original = Tick(place(x, mark), text(mark)) if mark else None
    return FrontPlot("latency" if timed else "MACs", x, y, dots, original, label)


def format_mark(value: float) -> str:
    """A round count for an axis: 20 M, not 20.0 M."""
    number, _, unit = format_count(value).partition("\u00a0")
    return f"{float(number):g}\u00a0{unit}".rstrip()


def plot_groups(record: Record) -> tuple[tuple[GroupPlot, ...], Axis]:
    """Loss against keep for each group that has options, all on one logarithmic scale of three decades at most."""
    losses = [o.loss for g in record.groups for o in g.options if o.loss > 0 and math.isfinite(o.loss)]
    top = max(losses, default=1.0)
    axis = make_axis([max(min(losses, default=0.1), top / 1000), top], format_tick, log=True, count=2)
    return tuple(plot_group(g, axis) for g in record.groups if g.options), axis


def plot_group(group: GroupRecord, axis: Axis) -> GroupPlot:
    """One group's curve; a loss of zero lies on the floor."""
    options = sorted(group.options, key=lambda o: o.keep)
    dots = tuple(
        Dot(
            place_keep(o.keep, group.before),
            round(100 - place(axis, o.loss), 2),
            f"keep {o.keep} of {group.before}: loss {format_number(o.loss, 2)}",
            o.keep == group.after,
        )
        for o in options
    )
    loss = next((o.loss for o in options if o.keep == group.after), None)
    cost = f", loss {format_number(loss, 2)}" if loss is not None else ", loss not predicted"
    if group.after == group.before:
        cost = ", kept whole"
    chosen_x = place_keep(group.after, group.before)
    return GroupPlot(group.name, group.before, group.after, dots, chosen_x, f"{group.after} of {group.before}{cost}")


def place_keep(keep: int, before: int) -> float:
    """Percent of the width that is kept."""
    return round(100 * keep / before, 2) if before else 0.0


def make_pairs(rows: Sequence[tuple[str, float, float, int]]) -> tuple[Pair, ...]:
    """Rows of label, before, after, count as bars on one scale."""
    most = max((max(b, a) for _, b, a, _ in rows), default=0.0) or 1.0
    return tuple(Pair(label, b, a, round(100 * b / most, 2), round(100 * a / most, 2), n) for label, b, a, n in rows)


def plot_operators(record: Record, limit: int = 10) -> tuple[Pair, ...]:
    """Time by operator before and after, the sum first, then the longest; all beyond `limit` in one last row."""
    sums: dict[str, list[float]] = {}
    for side, shares in enumerate((record.time_before, record.time_after)):
        for share in shares:
            sums.setdefault(share.operator, [0.0, 0.0])[side] += share.ms
    rows = sorted(((name, b, a, 1) for name, (b, a) in sums.items()), key=lambda r: -max(r[1], r[2]))
    if len(rows) > limit:
        rest = rows[limit - 1 :]
        others = (f"{len(rest)} other operators", sum(r[1] for r in rest), sum(r[2] for r in rest), len(rest))
        rows = [*rows[: limit - 1], others]
    if not rows:
        return ()
    total = ("All operators", sum(s.ms for s in record.time_before), sum(s.ms for s in record.time_after), len(sums))
    return make_pairs([total, *rows])


def list_slowest(shares: Sequence[TimeShare], limit: int = 8) -> tuple[tuple[TimeShare, ...], int, float]:
    """The `limit` slowest nodes, and the number and milliseconds of the others."""
    order = sorted(shares, key=lambda s: -s.ms)
    return tuple(order[:limit]), len(order[limit:]), sum(s.ms for s in order[limit:])


def pick_largest(items: Sequence[T], limit: int, weight: Callable[[T], float]) -> tuple[T, ...]:
    """The `limit` items of greatest weight, in the order they came."""
    kept = sorted(sorted(range(len(items)), key=lambda i: -weight(items[i]))[:limit])
    return tuple(items[i] for i in kept)
