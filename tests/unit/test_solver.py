"""The exact solver and the planner: planted problems, infeasible ones, bad input and speed."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from jettison.core.errors import InputError
from jettison.search import plan_widths, solve, solve_front, solve_many
from jettison.search import planner as planner_module
from jettison.search import solver as solver_module

SPEED_LIMIT_S = 0.5
"""Alone it takes under 0.1 s; the tests share two cores with others."""
PLAN_LOSS = 1.05
"""The planner is a heuristic: within 5 % of the optimum on small instances."""


def test_planted() -> None:
    # Unit 0 buys 3 for 1 of loss, unit 1 buys 3 for 5: at a limit of 5 only unit 0 should give way.
    solution = solve([[0, 1], [0, 5]], [[4, 1], [4, 1]], 5)
    assert solution.choice == (1, 0) and solution.cost == (5.0,) and solution.loss == 1 and solution.feasible


def test_negative_costs_are_savings() -> None:
    solution = solve([[0.0, 1.0], [0.0, 5.0]], [[0, -3], [0, -3]], -3)
    assert solution.choice == (1, 0) and solution.feasible
    assert not solve([[0.0, 1.0]], [[0, -3]], -4).feasible


def test_lagrangian_solution_of_quadratic_losses() -> None:
    """d = a_u·s² against cost −s has its optimum where a_u·s_u is the same for all units."""
    slopes = [1.0, 2.0, 4.0]
    grid = np.arange(0, 101) / 100
    solution = solve([a * grid**2 for a in slopes], [list(-grid) for _ in slopes], -0.7)
    chosen = [grid[o] for o in solution.choice]
    assert chosen == pytest.approx([0.4, 0.2, 0.1], abs=0.011)


def test_infeasible_returns_the_cheapest() -> None:
    solution = solve([[0, 1, 2], [0, 3]], [[9, 4, 4], [8, 5]], 8.9)
    assert not solution.feasible and solution.choice == (1, 1) and solution.cost == (9.0,)
    many = solve_many([[0, 1], [0, 3]], [[[9, 4], [8, 5]], [[1, 1], [1, 1]]], [8, 1])
    assert not many.feasible and many.choice == (1, 1) and many.gap == 0


def test_edges() -> None:
    assert solve([], [], 0).feasible
    assert solve([[1.0]], [[2.0]], 2.0).choice == (0,)
    assert solve([[0, 1], [0, 1]], [[2, 1], [2, 1]], 2.0).choice == (1, 1), "exactly the floor"
    assert solve([[0, 1], [0, 1]], [[2, 1], [2, 1]], 1e18).choice == (0, 0), "a limit far off costs no precision"
    assert solve([[3, 1, 2]], [[1, 1, 1]], 1).choice == (1,), "equal costs: the least loss"
    # 0.1 + 0.2 > 0.3 in floats; nobody means that
    assert solve([[0, 9], [0, 9]], [[0.1, 0], [0.2, 0]], 0.3).choice == (0, 0)
    assert solve_many([], [[], []], [0, 0]).feasible


@pytest.mark.parametrize(
    ("losses", "costs", "limit"),
    [
        ([[0, 1]], [[0]], 1),
        ([[]], [[]], 1),
        ([[0.0]], [[math.nan]], 1),
        ([[math.inf]], [[0.0]], 1),
        ([[0.0]], [[0.0]], math.inf),
    ],
)
def test_bad_input(losses: list[list[float]], costs: list[list[float]], limit: float) -> None:
    with pytest.raises(InputError):
        solve(losses, costs, limit)


def test_speed() -> None:
    rng = np.random.default_rng(0)
    losses, costs = rng.random((60, 12)), rng.random((60, 12))
    start = time.perf_counter()
    assert solve(losses.tolist(), costs.tolist(), 15.0).feasible
    assert time.perf_counter() - start < SPEED_LIMIT_S


def test_several_budgets_at_real_size() -> None:
    """60 units, latency and size and MACs: near the optimum, and honest about the gap."""
    rng = np.random.default_rng(1)
    keep = np.linspace(1, 0.1, 12)
    losses = (rng.random((60, 1)) * (1 - keep) ** 2).tolist()
    budgets = [(rng.random((60, 1)) * keep).tolist() for _ in range(3)]
    limits = [0.5 * sum(row[0] for row in b) for b in budgets]
    start = time.perf_counter()
    solution = solve_many(losses, budgets, limits)
    assert time.perf_counter() - start < 10, "bounded by the number of branches"
    assert solution.feasible and all(c <= limit for c, limit in zip(solution.cost, limits, strict=True))
    assert solution.gap <= 0.02 * solution.loss


def test_gap_is_reported_when_cut_short() -> None:
    rng = np.random.default_rng(2)
    losses, a, b = (rng.random((8, 5)).tolist() for _ in range(3))
    short, full = (solve_many(losses, [a, b], [2.0, 2.5], nodes=n) for n in (1, 10**6))
    assert short.gap > 0 and full.gap == 0
    assert short.loss - short.gap <= full.loss <= short.loss


# ---------------------------------------------------------------- the planner

KEEP = (1.0, 0.75, 0.5, 0.25)


def chain(units: int, seed: int) -> tuple[list[list[float]], list[float]]:
    """Losses that grow with the square of the cut, and the cost of each layer at full widths."""
    rng = np.random.default_rng(seed)
    losses = [[float(w * (1 - k) ** 2) for k in KEEP] for w in rng.uniform(0.2, 2.0, units)]
    return losses, rng.uniform(0.5, 2.0, units + 1).tolist()


def chain_cost(scale: list[float], choice: tuple[int, ...]) -> float:
    """A chain of layers: each costs the product of the widths on its two sides."""
    keep = [1.0, *(KEEP[o] for o in choice), 1.0]
    return sum(s * a * b for s, a, b in zip(scale, keep[:-1], keep[1:], strict=True))


def brute_force(losses: list[list[float]], scale: list[float], limit: float) -> float:
    return min(
        sum(row[o] for row, o in zip(losses, x, strict=True))
        for x in itertools.product(range(4), repeat=len(losses))
        if chain_cost(scale, x) <= limit
    )


@pytest.mark.parametrize("share", [0.75, 0.5, 0.35, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_products_of_widths(seed: int, share: float) -> None:
    losses, scale = chain(6, seed)
    limit = share * sum(scale)
    plan = plan_widths(losses, lambda x: (chain_cost(scale, x),), [limit])
    assert plan.feasible and plan.costs[0] <= limit and chain_cost(scale, plan.choice) == plan.costs[0]
    assert plan.loss <= PLAN_LOSS * brute_force(losses, scale, limit)


def test_naive_linearisation_breaks_the_limit_here() -> None:
    """The planted difficulty: savings at full width add up to more than what both bring together."""
    losses, scale = chain(6, 0)
    limit = 0.35 * sum(scale)
    full = (0,) * 6
    there = chain_cost(scale, full)
    costs = [[chain_cost(scale, (*full[:u], o, *full[u + 1 :])) - there for o in range(4)] for u in range(6)]
    naive = solve(losses, costs, limit - there)
    assert naive.feasible and chain_cost(scale, naive.choice) > limit
    assert plan_widths(losses, lambda x: (chain_cost(scale, x),), [limit]).costs[0] <= limit


def test_the_planner_needs_its_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can fail: with one round and no repair the plan breaks the limit."""
    losses, scale = chain(6, 0)
    limit = 0.35 * sum(scale)
    for name in ("repair", "fill", "exchange"):
        monkeypatch.setattr(planner_module, name, lambda ground, x: x)
    monkeypatch.setattr(planner_module, "_starts", lambda ground: [ground.least_loss()])
    assert plan_widths(losses, lambda x: (chain_cost(scale, x),), [limit], rounds=1).costs[0] > limit


def test_two_limits() -> None:
    losses, scale = chain(6, 3)
    other = scale[::-1]

    def costs(x: tuple[int, ...]) -> tuple[float, float]:
        return chain_cost(scale, x), chain_cost(other, x)

    limits = (0.5 * sum(scale), 0.45 * sum(scale))
    plan = plan_widths(losses, costs, limits)
    best = min(
        sum(row[o] for row, o in zip(losses, x, strict=True))
        for x in itertools.product(range(4), repeat=6)
        if all(c <= limit for c, limit in zip(costs(x), limits, strict=True))
    )
    assert plan.feasible and plan.loss <= PLAN_LOSS * best


def test_unreachable_limit_gives_the_cheapest() -> None:
    losses, scale = chain(4, 0)
    plan = plan_widths(losses, lambda x: (chain_cost(scale, x),), [0.01 * sum(scale)])
    assert not plan.feasible and plan.choice == (3, 3, 3, 3)


def test_only_the_cheapest_fits() -> None:
    losses, scale = chain(4, 0)
    limit = chain_cost(scale, (3, 3, 3, 3))
    plan = plan_widths(losses, lambda x: (chain_cost(scale, x),), [limit])
    assert plan.feasible and plan.choice == (3, 3, 3, 3)


def test_a_loose_limit_costs_nothing() -> None:
    losses, scale = chain(4, 0)
    plan = plan_widths(losses, lambda x: (chain_cost(scale, x),), [sum(scale)])
    assert plan.choice == (0, 0, 0, 0) and plan.loss == 0


def test_plan_is_deterministic_and_its_front_is_one() -> None:
    losses, scale = chain(6, 1)
    plans = [plan_widths(losses, lambda x: (chain_cost(scale, x),), [0.4 * sum(scale)]) for _ in range(2)]
    assert plans[0] == plans[1]
    front = plans[0].front
    assert all(a.loss < b.loss and a.costs[0] > b.costs[0] for a, b in itertools.pairwise(front))
    assert any(e.choice == plans[0].choice for e in front)


def test_planner_bad_input() -> None:
    with pytest.raises(InputError, match="one finite cost"):
        plan_widths([[0, 1]], lambda x: (1.0, 2.0), [1.0])
    with pytest.raises(InputError, match="at least one option"):
        plan_widths([[]], lambda x: (1.0,), [1.0])
    assert plan_widths([], lambda x: (1.0,), [2.0]).feasible


def test_front_of_one_unit() -> None:
    assert solve_front([[0, 1, 1, 5]], [[9, 5, 4, 4]]) == [(4.0, 1.0, (2,)), (9.0, 0.0, (0,))]


def test_the_brute_force_oracle_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake: middle options are lost before the table is filled."""
    losses, costs = [[0.0, 1.0, 5.0]] * 3, [[4.0, 2.0, 0.0]] * 3
    best = min(
        sum(losses[u][o] for u, o in enumerate(x))
        for x in itertools.product(range(3), repeat=3)
        if sum(costs[u][o] for u, o in enumerate(x)) <= 4
    )
    assert solve(losses, costs, 4).loss == best
    monkeypatch.setattr(solver_module, "_undominated", lambda d, c: [len(d) - 1, 0])
    monkeypatch.setattr(solver_module, "_spend", lambda d, c, limit, choice: choice)
    assert solve(losses, costs, 4).loss > best
