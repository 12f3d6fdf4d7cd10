"""Multiple choice under several budgets at once, by branch and bound on a Lagrangian bound.

Prices on the budgets turn the problem into units that choose alone; the best prices give a lower bound on the loss.
Options whose own bound is no better than a known solution are struck out, and the rest is searched depth first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PRICE_STEPS = 200
REPAIR_EVERY = 10
SLACK = 1e-9
"""Relative to the range of a cost: totals of floats that differ by less are equal."""


@dataclass
class Search:
    """The state of one search.

    `losses[u]` is `(options,)`, `costs[u]` `(options, budgets)`, divided by each budget's range so that all weigh
    alike; `limits` likewise. `best` is the best feasible choice so far; `bound` lies below every feasible loss.
    """

    losses: list[Floats]
    costs: list[Floats]
    limits: Floats
    best: tuple[int, ...] | None = None
    best_loss: float = float("inf")
    bound: float = float("-inf")
    complete: bool = False

    @cached_property
    def padded(self) -> tuple[Floats, Floats]:
        """Losses `(units, options)` and costs `(units, options, budgets)`; what is no option has infinite loss."""
        most = max(len(d) for d in self.losses)
        losses = np.full((len(self.losses), most), np.inf)
        costs = np.zeros((len(self.losses), most, len(self.limits)))
        for u, (d, c) in enumerate(zip(self.losses, self.costs, strict=True)):
            losses[u, : len(d)], costs[u, : len(d)] = d, c
        return losses, costs


def search_choice(
    losses: Sequence[Sequence[float]],
    budgets: Sequence[Sequence[Sequence[float]]],
    limits: Sequence[float],
    nodes: int,
) -> Search:
    """Search for the choice of least loss within all limits, through at most `nodes` branches of checked arguments."""
    rows = [np.array([b[u] for b in budgets], float).T for u in range(len(losses))]
    low = np.sum([r.min(0) for r in rows], axis=0)
    span = np.sum([r.max(0) for r in rows], axis=0) - low
    span = np.where(span > 0, span, np.maximum(1.0, np.abs(low)))
    state = Search([np.array(d, float) for d in losses], [r / span for r in rows], np.array(limits, float) / span)
    prices = _price(state)
    _descend(state, prices, nodes)
    return state


def cheapest_choice(state: Search) -> tuple[int, ...]:
    """Return the choice of least summed relative cost over the budgets that cannot all be met."""
    return tuple(int(np.lexsort((d, c.sum(1)))[0]) for d, c in zip(state.losses, state.costs, strict=True))


def _price(state: Search) -> Floats:
    """Find prices that raise the bound, by subgradient steps, and note feasible choices met on the way."""
    prices = np.zeros(len(state.limits))
    best_prices = prices
    spread = sum(float(np.ptp(d)) for d in state.losses) or 1.0
    for step in range(PRICE_STEPS):
        chosen = [int(np.argmin(d + c @ prices)) for d, c in zip(state.losses, state.costs, strict=True)]
        loss = sum(float(d[o]) for d, o in zip(state.losses, chosen, strict=True))
        excess = np.sum([c[o] for c, o in zip(state.costs, chosen, strict=True)], axis=0) - state.limits
        value = loss + float(prices @ excess)
        if value > state.bound or step % REPAIR_EVERY == 0:
            _note(state, _repair(state, chosen))
        if value > state.bound:
            state.bound, best_prices = value, prices
        norm = float(excess @ excess)
        if norm == 0 or state.best_loss <= state.bound:
            break
        goal = state.best_loss if np.isfinite(state.best_loss) else state.bound + spread
        scale = 1.5 / (1 + step / 25)
        prices = np.maximum(0.0, prices + scale * max(goal - value, 1e-12) / norm * excess)
    return best_prices


def _repair(state: Search, chosen: Sequence[int]) -> list[int]:
    """Move units to cheaper options until all limits hold or nothing helps; then spend what is left."""
    choice = np.array(chosen)
    units = np.arange(len(choice))
    losses, costs = state.padded
    for _ in range(4 * len(choice)):
        here = costs[units, choice]
        spare = state.limits + SLACK - here.sum(0)
        extra = losses - losses[units, choice][:, None]
        over = np.maximum(0.0, costs - here[:, None] - spare).sum(2)
        excess = float(np.maximum(0.0, -spare).sum())
        if excess > 0:
            gain = excess - over
            rank = np.where(gain > 0, np.maximum(extra, 0.0) / np.maximum(gain, 1e-300), np.inf)
        else:
            rank = np.where((over <= 0) & (extra < 0), extra, np.inf)
        u, o = divmod(int(np.argmin(rank)), rank.shape[1])
        if not np.isfinite(rank[u, o]):
            break
        choice[u] = o
    return [int(o) for o in choice]


def _note(state: Search, choice: Sequence[int]) -> None:
    """Keep a choice if it is feasible and the best so far."""
    used = np.sum([c[o] for c, o in zip(state.costs, choice, strict=True)], axis=0)
    loss = sum(float(d[o]) for d, o in zip(state.losses, choice, strict=True))
    if np.all(used <= state.limits + SLACK) and loss < state.best_loss:
        state.best, state.best_loss = tuple(int(o) for o in choice), loss


def _descend(state: Search, prices: Floats, nodes: int) -> None:
    """Search all choices that the bound does not rule out, depth first, with a stack of our own."""
    units = len(state.losses)
    reduced = [d + c @ prices for d, c in zip(state.losses, state.costs, strict=True)]
    lows = [float(r.min()) for r in reduced]
    # Units whose options differ most go first: their branches are ruled out soonest.
    order = sorted(range(units), key=lambda u: -float(np.ptp(reduced[u])))
    ranked = [[int(o) for o in np.argsort(-r, kind="stable")] for r in reduced]
    offset = float(prices @ state.limits)
    ahead = [sum(lows[u] for u in order[i:]) for i in range(units + 1)]
    floor = [
        np.sum([state.costs[u].min(0) for u in order[i:]], axis=0) if i < units else np.zeros_like(state.limits)
        for i in range(units + 1)
    ]
    tolerance = 1e-12 * max(1.0, abs(state.bound))
    stack: list[tuple[int, float, float, Floats, tuple[int, ...]]] = [(0, 0.0, 0.0, np.zeros_like(state.limits), ())]
    visited = 0
    while stack:
        depth, priced, loss, used, path = stack.pop()
        if priced + ahead[depth] - offset >= state.best_loss - tolerance:
            continue
        if depth == units:
            if loss < state.best_loss:
                state.best_loss = loss
                state.best = tuple(path[order.index(u)] for u in range(units))
            continue
        visited += 1
        if visited > nodes:
            return
        u = order[depth]
        totals = used + state.costs[u]
        fits = np.all(totals + floor[depth + 1] <= state.limits + SLACK, axis=1)
        fits &= priced + reduced[u] + (ahead[depth + 1] - offset) < state.best_loss - tolerance
        for o in ranked[u]:
            if fits[o]:
                entry = (depth + 1, priced + float(reduced[u][o]), loss + float(state.losses[u][o]), totals[o])
                stack.append((*entry, (*path, o)))
    state.complete = True
