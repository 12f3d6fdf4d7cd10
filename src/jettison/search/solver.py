"""Multiple choice under a budget: one option for each unit, least total loss, total cost within a limit.

The one-budget problem is solved by dynamic programming over the cost cut into bins. Costs are rounded up, so a solution
never exceeds the limit (but for float rounding, 1e-9 of the range), and the choice is exact for the rounded costs: it
is no worse than the optimum of a limit tighter by `units / bins` of the spendable range. Costs that are whole
multiples of a bin are not rounded at all. Where several budgets must hold, `solve_many` searches by branch and bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jettison.core.errors import InputError
from jettison.search.several import SLACK, cheapest_choice, search_choice

Floats = npt.NDArray[np.float64]
NODES = 50_000


@dataclass(frozen=True)
class Solution:
    """A choice of one option index for each unit, with its totals.

    Where `feasible` is False no choice keeps the limits, and this is a cheapest one. `gap` bounds how far `loss` may
    lie above the optimum of the problem as solved: 0.0 unless a search was cut short.
    """

    choice: tuple[int, ...]
    loss: float
    cost: tuple[float, ...]
    feasible: bool
    gap: float = 0.0


@dataclass(frozen=True)
class _Table:
    """Least loss of all units within each number of bins, and the option each unit takes to get there."""

    best: Floats
    taken: list[npt.NDArray[np.int16]]
    steps: list[npt.NDArray[np.int64]]
    kept: list[list[int]]


def solve(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float, *, bins: int = 4000
) -> Solution:
    """Choose one option for each unit with least total loss and total cost at most `limit`.

    `losses[u][o]` and `costs[u][o]` are finite numbers of any sign. Raises InputError where they are not, where the
    two differ in shape, or where a unit has no option.
    """
    _check(losses, [costs], [limit], bins)
    cheapest = tuple(_cheapest(d, c) for d, c in zip(losses, costs, strict=True))
    floor, ceiling = _add(costs, cheapest), sum(max(c) for c in costs)
    slack = SLACK * max(abs(floor), abs(ceiling), ceiling - floor)
    if floor > limit + slack:
        return Solution(cheapest, _add(losses, cheapest), (floor,), False)
    table = _fill(losses, costs, min(limit, ceiling) - floor, bins)
    choice = _spend(losses, costs, limit + slack, _read(table, len(table.best) - 1))
    return Solution(choice, _add(losses, choice), (_add(costs, choice),), True)


def solve_front(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], *, bins: int = 4000
) -> list[tuple[float, float, tuple[int, ...]]]:
    """Return the Pareto front as (cost, loss, choice), cost rising and loss falling strictly.

    One table answers for every limit. Raises InputError as `solve` does.
    """
    _check(losses, [costs], [0.0], bins)
    floor = sum(min(c) for c in costs)
    table = _fill(losses, costs, sum(max(c) for c in costs) - floor, bins)
    found = []
    for end in np.flatnonzero(np.diff(table.best, prepend=np.inf) < 0):
        choice = _read(table, int(end))
        found.append((_add(costs, choice), _add(losses, choice), choice))
    # Rounding up may have hidden the end where cost does not matter.
    choice = tuple(min(range(len(d)), key=lambda o: (d[o], c[o])) for d, c in zip(losses, costs, strict=True))
    found.append((_add(costs, choice), _add(losses, choice), choice))
    front: list[tuple[float, float, tuple[int, ...]]] = []
    for point in sorted(found):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def solve_many(
    losses: Sequence[Sequence[float]],
    costs_by_budget: Sequence[Sequence[Sequence[float]]],
    limits: Sequence[float],
    *,
    bins: int = 4000,
    nodes: int = NODES,
) -> Solution:
    """Choose one option for each unit with least total loss and every total cost within its limit.

    `costs_by_budget[k][u][o]` belongs to `limits[k]`. One budget is given to `solve`. Several are solved exactly and
    without bins; if `nodes` branches do not suffice, the best found is returned and `gap` bounds what is lost
    (infinite where nothing feasible was found, which then proves nothing). Raises InputError as `solve` does.
    """
    _check(losses, costs_by_budget, limits, bins)
    if len(limits) == 1:
        return solve(losses, costs_by_budget[0], limits[0], bins=bins)
    if not losses:
        return Solution((), 0.0, (0.0,) * len(limits), min(limits) >= 0)
    state = search_choice(losses, costs_by_budget, limits, nodes)
    choice = cheapest_choice(state) if state.best is None else state.best
    gap = 0.0 if state.complete else max(0.0, state.best_loss - state.bound)
    cost = tuple(_add(costs, choice) for costs in costs_by_budget)
    return Solution(choice, _add(losses, choice), cost, state.best is not None, gap)


def _check(
    losses: Sequence[Sequence[float]],
    budgets: Sequence[Sequence[Sequence[float]]],
    limits: Sequence[float],
    bins: int,
) -> None:
    """Refuse what has no meaning as a problem."""
    if bins < 1 or not np.all(np.isfinite(limits)) or len(budgets) != len(limits) or not budgets:
        raise InputError(
            f"The solver was given limits={list(limits)} for {len(budgets)} kinds of cost and bins={bins}. "
            f"Give one finite limit for each kind of cost and at least one bin."
        )
    for costs in budgets:
        shapes = [[len(row) for row in losses], [len(row) for row in costs]]
        if shapes[0] != shapes[1] or 0 in shapes[0]:
            raise InputError(
                f"Losses have {shapes[0]} options for each unit, costs have {shapes[1]}. "
                f"Give every unit at least one option, with one loss and one cost each."
            )
    for unit, rows in enumerate(zip(losses, *budgets, strict=True)):
        if not np.all(np.isfinite(rows)):
            raise InputError(
                f"Unit {unit} has a loss or cost that is not finite: {rows}. "
                f"Leave the option out, or give it a large finite loss."
            )


def _add(values: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """Return the total of the chosen entries."""
    return float(sum(row[o] for row, o in zip(values, choice, strict=True)))


def _cheapest(losses: Sequence[float], costs: Sequence[float]) -> int:
    """Return the option of least cost, of least loss among those."""
    return min(range(len(costs)), key=lambda o: (costs[o], losses[o], o))


def _undominated(losses: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Return the options that no other matches in cost and beats in loss, cheapest first."""
    kept: list[int] = []
    for option in sorted(range(len(costs)), key=lambda o: (costs[o], losses[o], o)):
        if not kept or losses[option] < losses[kept[-1]]:
            kept.append(option)
    return kept


def _fill(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], spendable: float, bins: int) -> _Table:
    """Fill the table for all totals from the floor (bin 0) to `spendable` above it (the last bin)."""
    kept = [_undominated(d, c) for d, c in zip(losses, costs, strict=True)]
    rises = [np.array([c[o] for o in options]) - c[options[0]] for c, options in zip(costs, kept, strict=True)]
    largest = max((float(r[-1]) for r in rises), default=0.0)
    spendable = max(spendable, 0.0)
    width = spendable / bins
    if width <= SLACK * SLACK * largest:
        bins, width = 0, 0.0
    best = np.zeros(bins + 1)
    taken, steps = [], []
    for unit, options in enumerate(kept):
        if width > 0:
            # A cost within rounding of a whole number of bins is that number, not one more.
            step = np.ceil(np.minimum(rises[unit] / width, bins + 1.0) - SLACK).astype(np.int64)
        else:
            step = (rises[unit] > 0).astype(np.int64)
        step = np.maximum(step, 0)
        new = np.full(bins + 1, np.inf)
        took = np.zeros(bins + 1, np.int16)
        for index, option in enumerate(options):
            move = int(step[index])
            if move > bins:
                continue
            reached = best[: bins + 1 - move] + losses[unit][option]
            better = reached < new[move:]
            new[move:][better] = reached[better]
            took[move:][better] = index
        best = new
        taken.append(took)
        steps.append(step)
    return _Table(best, taken, steps, kept)


def _spend(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], limit: float, choice: tuple[int, ...]
) -> tuple[int, ...]:
    """Spend what rounding up has left over: single moves to less loss, the largest first, under the exact costs."""
    while True:
        spare = limit - _add(costs, choice)
        moves = [
            (row[o] - row[taken], u, o)
            for u, (row, cost, taken) in enumerate(zip(losses, costs, choice, strict=True))
            for o in range(len(row))
            if row[o] < row[taken] and cost[o] - cost[taken] <= spare
        ]
        if not moves:
            return choice
        _, unit, option = min(moves)
        choice = (*choice[:unit], option, *choice[unit + 1 :])


def _read(table: _Table, end: int) -> tuple[int, ...]:
    """Follow the table back from a bin to the choice that made it."""
    choice = []
    for took, step, options in zip(reversed(table.taken), reversed(table.steps), reversed(table.kept), strict=True):
        index = int(took[end])
        choice.append(options[index])
        end -= int(step[index])
    return tuple(reversed(choice))
