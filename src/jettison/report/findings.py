"""What a Record says, in words: the headline, the budget, the alarms. The page and the terminal share these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jettison.core.record import Check, Drop, Interval, Record, Variant
from jettison.report.numbers import (
    SPACE,
    UNKNOWN,
    format_bound,
    format_bytes,
    format_fixed,
    format_interval,
    format_macs,
    format_ms,
    format_number,
    format_points,
    format_ratio,
)


@dataclass(frozen=True)
class Figure:
    """A big number: its text and exact value (None: not measured), what it counts, and how sure it is."""

    kind: str
    label: str
    value: float | None
    text: str
    unit: str
    detail: str


@dataclass(frozen=True)
class Limit:
    """One limit of the budget and what was reached; `over` is None where that is unknown."""

    label: str
    limit: float
    limit_text: str
    reached: float | None
    reached_text: str
    over: bool | None

    @property
    def share(self) -> float:
        """What was reached, in percent of the limit, within 0..100."""
        if self.reached is None or not self.limit:
            return 100.0 if self.over else 0.0
        return round(min(100.0, max(0.0, 100 * self.reached / self.limit)), 2)


def find_variant(record: Record, name: str) -> Variant | None:
    """The variant of that name, or None where the record has none."""
    return next((v for v in record.variants if v.name == name), None)


def compare_sizes(record: Record) -> float | None:
    """How many times smaller the compressed file is, or None where a size is missing."""
    before, after = find_variant(record, record.baseline), find_variant(record, record.compressed)
    if before is None or after is None or not before.size_bytes or not after.size_bytes:
        return None
    return before.size_bytes / after.size_bytes


def describe_bound(drop: Drop) -> str:
    """How sure the drop is: the bound, its confidence and the samples, or why there is none."""
    samples = f"on {format_fixed(drop.n, 0)} samples" if drop.n is not None else "on an unknown number of samples"
    if drop.bound_points is None:
        return f"measured {samples}; no bound, because there is no outcome per sample"
    confidence = f"{100 * drop.confidence:g}{SPACE}% confidence"
    return f"at most {format_bound(drop.bound_points, drop.n)} points with {confidence}, {samples}"


def list_figures(record: Record) -> tuple[Figure, Figure, Figure]:
    """The three big numbers: speed-up, size ratio, points lost."""
    after, ratio, drop = find_variant(record, record.compressed), compare_sizes(record), record.drop
    before = find_variant(record, record.baseline)
    if after is None:
        speed = Figure("speed", "Speed-up", None, UNKNOWN, "", "not measured")
    else:
        text, ends = format_interval(after.speedup)
        speed = Figure("speed", "Speed-up", after.speedup.value, text, "×", f"95{SPACE}% confidence interval {ends}")
    if ratio is None or before is None or after is None:
        size = Figure("size", "Smaller file", None, UNKNOWN, "", "not measured")
    else:
        sizes = f"{format_bytes(before.size_bytes or 0)} before, {format_bytes(after.size_bytes or 0)} now"
        label, ratio = ("Smaller file", ratio) if ratio >= 1 else ("Larger file", 1 / ratio)
        size = Figure("size", label, ratio, format_number(ratio), "×", sizes)
    label = f"Points of {name_metric(drop.metric)} {'gained' if drop.points < 0 else 'lost'}"
    lost = Figure("drop", label, abs(drop.points), format_points(abs(drop.points), drop.n), "", describe_bound(drop))
    return speed, size, lost


def name_metric(metric: str) -> str:
    """The metric in a sentence; the caller's own `evaluate` function has no other name than score."""
    return "score" if metric == "evaluate" else metric


def describe_speed(speedup: Interval) -> str:
    """The speed-up as the end of "it …"."""
    text = format_interval(speedup)[0]
    if speedup.low > 1:
        return f"runs {text}× faster"
    if speedup.high < 1:
        return f"runs slower, at {text}× the speed"
    return "runs about as fast as before"


def describe_result(record: Record) -> str:
    """What happened, in one sentence."""
    after, ratio, drop = find_variant(record, record.compressed), compare_sizes(record), record.drop
    if after is None:
        return "Nothing was measured on the compressed network."
    parts = [describe_speed(after.speedup)]
    if ratio is not None:
        text = format_number(max(ratio, 1 / ratio))
        times = f"{text}× {'less' if ratio > 1 else 'more'}" if text != "1.00" else "the same"
        parts.append(f"takes {times} space")
    points = format_points(abs(drop.points), drop.n)
    if not points.strip("0."):
        parts.append(f"keeps its {name_metric(drop.metric)}")
    else:
        parts.append(f"{'loses' if drop.points > 0 else 'gains'} {points} points of {name_metric(drop.metric)}")
    return f"The compressed network {', '.join(parts[:-1])} and {parts[-1]}."


def describe_verdict(record: Record) -> str:
    """Whether the budget was met."""
    if not record.met:
        return "The budget was missed."
    if any(limit.over for limit in list_limits(record)):
        return "The record calls the budget met, but a limit was passed."
    return "The budget was met." if record.budget else "No budget was set."


def describe_checks(record: Record) -> str:
    """How many checks passed, and what a failure means."""
    failed = list_failed(record)
    if not record.checks:
        return "No check was run, so nothing here is verified."
    if failed:
        return f"{len(failed)} of {len(record.checks)} checks failed. Do not deploy this network."
    return "The one check passed." if len(record.checks) == 1 else f"All {len(record.checks)} checks passed."


def list_failed(record: Record) -> tuple[Check, ...]:
    """The checks that did not pass."""
    return tuple(c for c in record.checks if not c.passed)


def list_limits(record: Record) -> tuple[Limit, ...]:
    """The budget's limits in their order, each with what was reached."""
    return tuple(compare_limit(record, name, limit) for name, limit in record.budget.items())


def compare_limit(record: Record, name: str, limit: float) -> Limit:
    """One limit beside what was reached; the units follow Budget's fields."""
    before, after = find_variant(record, record.baseline), find_variant(record, record.compressed)
    size = compare_sizes(record)
    text: Callable[[float], str] = format_number
    label, reached = name, None
    if name == "latency":
        label, text = "Latency, of the original's", format_ratio
        if before and after and after.speedup.value:
            # From the paired rounds, as the run judged it: the ratio of two medians is less steady.
            reached = 1 / after.speedup.value
    elif name == "size":
        label, text, reached = "Size, of the original's", format_ratio, 1 / size if size else None
    elif name == "macs":
        label, text = "MACs, of the original's", format_ratio
        reached = after.macs / before.macs if before and after and before.macs else None
    elif name == "latency_ms":
        label, text, reached = "Latency", format_ms, after.latency_ms.value if after else None
    elif name == "size_mb":
        label, text = "Size", lambda v: format_bytes(1e6 * v)
        reached = after.size_bytes / 1e6 if after and after.size_bytes is not None else None
    elif name == "mmacs":
        label, text, reached = "Arithmetic", lambda v: format_macs(1e6 * v), after.macs / 1e6 if after else None
    elif name == "drop":
        label, text = f"Loss of {name_metric(record.drop.metric)}", lambda v: format_points(v, record.drop.n)
        reached = record.drop.points
    over = None if reached is None or not math.isfinite(reached) else reached > limit * (1 + 1e-9)
    # A limit is typed by a person: show it as typed, not with the digits of the measurement.
    limit_text = f"{limit:g} point{'s' if limit != 1 else ''}" if name == "drop" else text(limit)
    if name in ("latency", "size", "macs"):
        limit_text = f"{100 * limit:g}{SPACE}%"
    return Limit(label, limit, limit_text, reached, text(reached) if reached is not None else "not measured", over)
