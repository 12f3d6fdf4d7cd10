"""The solver against brute force on random instances."""

from __future__ import annotations

import itertools

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jettison.search import plan_widths, solve, solve_front, solve_many

ROUNDING = 1e-9
"""Sums of floats in another order."""
Rows = list[list[float]]


@st.composite
def problems(draw: st.DrawFn, kinds: int = 1, whole: bool = True) -> tuple[Rows, list[Rows], list[float]]:
    """Up to 5 units of up to 4 options with small whole costs (so that no bin rounds), and limits."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    number = st.integers(-9, 9).map(float) if whole else st.floats(-9, 9, width=32)
    rows = (
        [[draw(number) for _ in range(n)] for n in sizes],
        [[[draw(number) for _ in range(n)] for n in sizes] for _ in range(kinds)],
    )
    limits = [float(draw(st.integers(-30, 30))) for _ in range(kinds)]
    return rows[0], rows[1], limits


def total(rows: Rows, choice: tuple[int, ...]) -> float:
    return sum(row[o] for row, o in zip(rows, choice, strict=True))


def feasible(losses: Rows, budgets: list[Rows], limits: list[float]) -> list[tuple[int, ...]]:
    every = itertools.product(*(range(len(row)) for row in losses))
    return [x for x in every if all(total(b, x) <= limit for b, limit in zip(budgets, limits, strict=True))]


@settings(deadline=None, max_examples=150)
@given(problems())
def test_equals_brute_force(problem: tuple[Rows, list[Rows], list[float]]) -> None:
    losses, (costs,), (limit,) = problem
    found = feasible(losses, [costs], [limit])
    # As many bins as the spendable range has units: then whole costs are exact.
    floor = sum(map(min, costs))
    bins = max(1, int(min(limit, sum(map(max, costs))) - floor))
    solution = solve(losses, costs, limit, bins=bins)
    assert solution.feasible == bool(found)
    assert solution.cost == (total(costs, solution.choice),)
    if found:
        assert abs(solution.loss - min(total(losses, x) for x in found)) < ROUNDING
        assert solution.cost[0] <= limit
    else:
        assert solution.cost[0] == floor


@settings(deadline=None, max_examples=100)
@given(problems(whole=False))
def test_never_over_the_limit_and_near_the_optimum(problem: tuple[Rows, list[Rows], list[float]]) -> None:
    losses, (costs,), (limit,) = problem
    found = feasible(losses, [costs], [limit])
    solution = solve(losses, costs, limit)
    if solution.feasible:
        assert total(costs, solution.choice) <= limit + ROUNDING * 100
    if found:
        assert solution.feasible
        # Rounding up spends at most one bin a unit, so it does no worse than the optimum of so much tighter a limit.
        floor = sum(map(min, costs))
        tighter = limit - len(costs) * (min(limit, sum(map(max, costs))) - floor) / 4000 - ROUNDING
        inside = feasible(losses, [costs], [tighter])
        if inside:
            assert solution.loss <= min(total(losses, x) for x in inside) + ROUNDING


@settings(deadline=None, max_examples=60)
@given(problems())
def test_front_is_monotone_and_answers_every_limit(problem: tuple[Rows, list[Rows], list[float]]) -> None:
    losses, (costs,), _ = problem
    bins = max(1, int(sum(map(max, costs)) - sum(map(min, costs))))
    front = solve_front(losses, costs, bins=bins)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
    for cost, loss, choice in front:
        assert (cost, loss) == (total(costs, choice), total(losses, choice))
        assert loss == min(total(losses, x) for x in feasible(losses, [costs], [cost]))
    assert front[-1][1] == sum(map(min, losses))


@settings(deadline=None, max_examples=100)
@given(problems(kinds=3))
def test_several_budgets_equal_brute_force(problem: tuple[Rows, list[Rows], list[float]]) -> None:
    losses, budgets, limits = problem
    found = feasible(losses, budgets, limits)
    solution = solve_many(losses, budgets, limits)
    assert solution.feasible == bool(found) and solution.gap == 0
    assert solution.cost == tuple(total(b, solution.choice) for b in budgets)
    if found:
        assert abs(solution.loss - min(total(losses, x) for x in found)) < ROUNDING
        assert all(c <= limit for c, limit in zip(solution.cost, limits, strict=True))


@settings(deadline=None, max_examples=60)
@given(problems(kinds=2))
def test_the_planner_keeps_limits_and_finds_a_way(problem: tuple[Rows, list[Rows], list[float]]) -> None:
    """On additive costs the linearisation is exact, and so is the plan."""
    losses, budgets, limits = problem
    found = feasible(losses, budgets, limits)
    assume(found)
    plan = plan_widths(losses, lambda x: tuple(total(b, x) for b in budgets), limits)
    assert plan.feasible
    assert all(c <= limit for c, limit in zip(plan.costs, limits, strict=True))
    assert plan.loss <= min(total(losses, x) for x in found) + ROUNDING
