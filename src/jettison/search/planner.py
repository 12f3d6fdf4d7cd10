"""Choosing widths whose costs couple: a layer's time depends on the product of two units' widths.

Around a choice x the cost is taken as additive, c_u(o) = T(x with u at o) - T(x); the exact solver chooses under that,
and the next round is taken around its answer. Additive savings are over-estimated where widths multiply, so every
candidate is then repaired and improved under the true cost, and only that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jettison.core.errors import InputError
from jettison.search.refine import Choice, Ground, exchange, fill, repair
from jettison.search.solver import solve_many

ROUNDS = 8
NODES = 2000
"""Branches of the inner search: it only proposes, so a near-optimum is as good."""


@dataclass(frozen=True)
class FrontEntry:
    """A choice the planner visited that no other beats in loss and in every cost."""

    choice: Choice
    loss: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class WidthPlan:
    """The best choice found, and the front of what was visited on the way, by rising loss.

    Where `feasible` is False even the cheapest choice breaks a limit, and `choice` is the one that breaks them least.
    """

    choice: Choice
    loss: float
    costs: tuple[float, ...]
    feasible: bool
    front: tuple[FrontEntry, ...]


def plan_widths(
    losses: Sequence[Sequence[float]],
    evaluate_cost: Callable[[Choice], Sequence[float]],
    limits: Sequence[float],
    *,
    rounds: int = ROUNDS,
    bins: int = 4000,
) -> WidthPlan:
    """Choose one option for each unit with little total loss and every true cost within its limit.

    `losses[u][o]` add up. `evaluate_cost` maps a choice of option indices to one cost for each limit; it must be
    deterministic, and so is the plan. Not proven optimal: the costs may be any function. Raises InputError for
    units without options, values that are not finite, or a cost vector of the wrong length.
    """
    _check(losses, limits, rounds)
    ground = Ground(losses, evaluate_cost, limits)
    best: Choice | None = None
    for start in _starts(ground):
        visited = _walk(ground, start, rounds, bins)
        # One from inside the limits and the nearest from outside: repairing every one would find little more.
        inside = [x for x in visited if ground.excess(x) <= 0]
        outside = [x for x in visited if ground.excess(x) > 0]
        ends = [min(inside, key=lambda x: (ground.loss(x), x))] if inside else []
        ends += [min(outside, key=lambda x: (ground.excess(x), x))] if outside else []
        for end in ends:
            candidate = repair(ground, end)
            if candidate is not None:
                best = ground.better(best, fill(ground, candidate))
    if best is None:
        cheapest = _find_cheapest(ground)
        if ground.excess(cheapest) > 0:
            return WidthPlan(cheapest, ground.loss(cheapest), ground.cost(cheapest), False, _front(ground))
        best = fill(ground, cheapest)
    best = exchange(ground, best)
    return WidthPlan(best, ground.loss(best), ground.cost(best), True, _front(ground))


def _check(losses: Sequence[Sequence[float]], limits: Sequence[float], rounds: int) -> None:
    """Refuse what has no meaning as a problem."""
    finite = all(len(row) > 0 and np.all(np.isfinite(row)) for row in losses)
    if not finite or not limits or not np.all(np.isfinite(limits)) or rounds < 1:
        raise InputError(
            f"The planner was given {len(losses)} units, limits {list(limits)} and {rounds} rounds. "
            f"Every unit needs at least one option with a finite loss. Give at least one finite limit and one round."
        )


def _find_cheapest(ground: Ground) -> Choice:
    """Return a choice that breaks the limits least, by moves of single units from the most promising extreme."""
    best = min(_extremes(ground), key=lambda x: (ground.excess(x), ground.loss(x)))
    for _ in range(4):
        before = best
        for unit in range(len(ground.losses)):
            moves = [best, *ground.moves(best, unit)]
            best = min(moves, key=lambda x: (ground.pressure(x), ground.loss(x)))
        if best == before:
            break
    return best


def _extremes(ground: Ground) -> list[Choice]:
    """Return for every limit the choice whose units are, each alone, cheapest; and the choice of greatest loss."""
    full = ground.least_loss()
    rows = [[(o, ground.cost(x)) for o, x in enumerate(ground.options(full, u))] for u in range(len(ground.losses))]
    found = [tuple(min(row, key=lambda e: (e[1][k], e[0]))[0] for row in rows) for k in range(len(ground.limits))]
    return [*found, tuple(int(np.argmax(row)) for row in ground.losses)]


def _starts(ground: Ground) -> list[Choice]:
    """Return where to linearise first: the least loss, and the least uniform cut that keeps the limits."""
    ranked = [sorted(range(len(row)), key=lambda o: (row[o], o)) for row in ground.losses]
    longest = max((len(r) for r in ranked), default=1)
    starts = [ground.least_loss()]
    for level in range(longest):
        share = level / max(1, longest - 1)
        x = tuple(r[round(share * (len(r) - 1))] for r in ranked)
        if ground.excess(x) <= 0:
            starts.append(x)
            break
    return list(dict.fromkeys(starts))


def _walk(ground: Ground, start: Choice, rounds: int, bins: int) -> list[Choice]:
    """Linearise, solve and move, until nothing new is proposed; return the choices visited."""
    visited = [start]
    for _ in range(rounds):
        step = _damp(visited[-1], _propose(ground, visited[-1], bins), visited)
        if step is None:
            break
        visited.append(step)
    return visited


def _propose(ground: Ground, x: Choice, bins: int) -> Choice:
    """Solve the problem whose costs are additive around x."""
    here = ground.cost(x)
    changes = [
        [[ground.cost(y)[k] - here[k] for y in ground.options(x, u)] for u in range(len(x))] for k in range(len(here))
    ]
    room = [limit - cost for limit, cost in zip(ground.limits, here, strict=True)]
    return solve_many(ground.losses, changes, room, bins=bins, nodes=NODES).choice


def _damp(x: Choice, proposal: Choice, visited: Sequence[Choice]) -> Choice | None:
    """Return where to linearise next: the proposal, or half way to it where rounds would go in circles."""
    half = tuple((a + b) // 2 for a, b in zip(x, proposal, strict=True))
    for step in (proposal, half):
        if step not in visited:
            return step
    return None


def _front(ground: Ground) -> tuple[FrontEntry, ...]:
    """Return the visited choices that none beats, by rising loss."""
    front: list[FrontEntry] = []
    kept = np.empty((0, len(ground.limits)))
    for loss, costs, choice in sorted((ground.loss(x), c, x) for x, c in ground.known.items()):
        if not np.any(np.all(kept <= np.array(costs), axis=1)):
            front.append(FrontEntry(choice, loss, costs))
            kept = np.vstack([kept, costs])
    return tuple(front)
