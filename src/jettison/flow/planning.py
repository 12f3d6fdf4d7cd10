"""Deciding: from sensitivities, costs and limits to a Plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jettison.core.budget import Budget
from jettison.core.errors import CheckpointError
from jettison.core.plan import FORMAT, Cost, Plan, PlanPoint
from jettison.flow.costs import CostModel
from jettison.flow.sensitivity import GroupOptions, Sensitivity
from jettison.search.planner import plan_widths


def read_limits(budget: Budget, original: Cost) -> dict[str, float]:
    """Turn a budget's costs into absolute limits; of a share of `original` and an absolute value the tighter holds."""
    rows = (
        ("latency_ms", budget.latency, original.latency_ms or 0.0, budget.latency_ms, 1.0),
        ("size_bytes", budget.size, original.size_bytes, budget.size_mb, 1e6),
        ("macs", budget.macs, original.macs, budget.mmacs, 1e6),
    )
    limits: dict[str, float] = {}
    for kind, share, whole, absolute, unit in rows:
        bounds = [share * whole] if share is not None else []
        bounds += [absolute * unit] if absolute is not None else []
        if bounds:
            limits[kind] = min(bounds)
    return limits


def make_plan(sensitivity: Sensitivity, costs: CostModel, limits: Mapping[str, float]) -> Plan:
    """Return the plan of least predicted loss whose predicted costs keep `limits`.

    `limits` has any of "latency_ms", "size_bytes", "macs". Where no plan keeps them, the nearest is
    returned with `feasible` False. Tied groups keep one count, and their losses add up.
    """
    groups = sensitivity.groups
    units = _join_tied(sensitivity)
    kinds = sorted(limits)

    def counts_of(choice: Sequence[int]) -> dict[str, int]:
        chosen = {g.group: g.counts[i] for unit, i in zip(units, choice, strict=True) for g in unit}
        return {g.group: chosen[g.group] for g in groups}

    def evaluate(choice: tuple[int, ...]) -> tuple[float, ...]:
        cost = costs.predict(counts_of(choice))
        return tuple(float(getattr(cost, kind) or 0.0) for kind in kinds) if kinds else (float(cost.macs),)

    bounds = [limits[kind] for kind in kinds] or [float(costs.predict({}).macs)]
    losses = [[sum(each) for each in zip(*(g.losses for g in unit), strict=True)] for unit in units]
    if not units:
        cost = costs.predict({})
        feasible = all((getattr(cost, kind) or 0.0) <= limits[kind] for kind in kinds)
        return Plan(FORMAT, {}, costs.bits, 0.0, cost, feasible, (PlanPoint({}, 0.0, cost),))
    found = plan_widths(losses, evaluate, bounds)
    counts = counts_of(found.choice)
    orders = {g.group: g.order for g in groups}
    front = tuple(_point(counts_of(e.choice), e.loss, costs) for e in found.front)
    return Plan(
        FORMAT,
        {name: tuple(sorted(orders[name][:count])) for name, count in counts.items() if count < len(orders[name])},
        costs.bits,
        found.loss,
        costs.predict(counts),
        found.feasible,
        front,
    )


def _join_tied(sensitivity: Sensitivity) -> list[list[GroupOptions]]:
    """Return the groups that are chosen together, tied ones as one; raises CheckpointError where options differ."""
    tie_of = {name: names[0] for names in sensitivity.ties for name in names}
    units: dict[str, list[GroupOptions]] = {}
    for group in sensitivity.groups:
        unit = units.setdefault(tie_of.get(group.group, group.group), [])
        unit.append(group)
        if group.counts != unit[0].counts:
            raise CheckpointError(
                f"The tied groups {unit[0].group!r} and {group.group!r} have other counts to choose from. "
                "They were measured under another recipe. Measure the sensitivity anew."
            )
    return list(units.values())


def _point(counts: dict[str, int], loss: float, costs: CostModel) -> PlanPoint:
    return PlanPoint(counts, loss, costs.predict(counts))
