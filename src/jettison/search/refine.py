"""Improving one choice under its true cost: make it feasible, spend what is left, exchange pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from jettison.core.errors import InputError

Choice = tuple[int, ...]
Floats = npt.NDArray[np.float64]
EXCHANGE_ROUNDS = 50
PAIRS_A_ROUND = 200
"""Pairs tried under the true cost in one round, the most promising by the additive estimate first."""
OPTIMISM = 0.02
"""Share of a limit by which a pair may exceed it by estimate and still be tried."""


class Ground:
    """The problem with the true cost of every choice seen so far: losses, limits, and `known` costs."""

    def __init__(
        self,
        losses: Sequence[Sequence[float]],
        evaluate_cost: Callable[[Choice], Sequence[float]],
        limits: Sequence[float],
    ) -> None:
        """Remember the problem; nothing is evaluated yet."""
        self.losses = losses
        self.limits = tuple(float(limit) for limit in limits)
        self.known: dict[Choice, tuple[float, ...]] = {}
        self._evaluate = evaluate_cost
        self._scale = [abs(limit) or 1.0 for limit in self.limits]

    def cost(self, choice: Choice) -> tuple[float, ...]:
        """Return the true costs; raises InputError where the caller's function gives none that can be used."""
        if choice not in self.known:
            costs = tuple(float(c) for c in self._evaluate(choice))
            if len(costs) != len(self.limits) or not np.all(np.isfinite(costs)):
                raise InputError(
                    f"evaluate_cost returned {costs} for the choice {choice}, with {len(self.limits)} limits. "
                    f"Return one finite cost for each limit."
                )
            self.known[choice] = costs
        return self.known[choice]

    def loss(self, choice: Choice) -> float:
        """Return the total loss."""
        return float(sum(row[o] for row, o in zip(self.losses, choice, strict=True)))

    def excess(self, choice: Choice) -> float:
        """Return by how much limits are broken, as a sum of shares of each; 0 where the choice is feasible."""
        return sum(
            max(0.0, cost - limit) / scale
            for cost, limit, scale in zip(self.cost(choice), self.limits, self._scale, strict=True)
        )

    def pressure(self, choice: Choice) -> tuple[float, float]:
        """Return the excess, then the total relative cost, to order choices from easy to hard on the limits."""
        relative = sum(c / s for c, s in zip(self.cost(choice), self._scale, strict=True))
        return self.excess(choice), relative

    def options(self, choice: Choice, unit: int) -> list[Choice]:
        """Return the choice with `unit` at each of its options."""
        return [(*choice[:unit], o, *choice[unit + 1 :]) for o in range(len(self.losses[unit]))]

    def moves(self, choice: Choice, unit: int) -> list[Choice]:
        """Return the choice with `unit` at each of its other options."""
        return [x for x in self.options(choice, unit) if x != choice]

    def least_loss(self) -> Choice:
        """Return the choice of least loss, whatever it costs."""
        return tuple(int(np.argmin(row)) for row in self.losses)

    def better(self, a: Choice | None, b: Choice) -> Choice:
        """Return the feasible choice of less loss; of equal ones the cheaper."""
        if a is None:
            return b
        return min(a, b, key=lambda x: (self.loss(x), self.pressure(x), x))


def repair(ground: Ground, choice: Choice) -> Choice | None:
    """Move single units, least loss for the excess removed first, until all limits hold; None where none helps."""
    while (excess := ground.excess(choice)) > 0:
        loss = ground.loss(choice)
        ranked = []
        for unit in range(len(choice)):
            for x in ground.moves(choice, unit):
                gain = excess - ground.excess(x)
                if gain > 0:
                    ranked.append((max(0.0, ground.loss(x) - loss) / gain, -gain, x))
        if not ranked:
            return None
        choice = min(ranked)[2]
    return choice


def fill(ground: Ground, choice: Choice) -> Choice:
    """Spend what the limits leave: move single units to options of less loss, most loss saved first."""
    while True:
        loss = ground.loss(choice)
        moves = [x for u in range(len(choice)) for x in ground.moves(choice, u) if ground.loss(x) < loss]
        moves = [x for x in sorted(moves, key=lambda x: (ground.loss(x), x)) if ground.excess(x) <= 0]
        if not moves:
            return choice
        choice = moves[0]


def exchange(ground: Ground, choice: Choice) -> Choice:
    """Move two units at a time while that saves loss within the limits; the additive estimate says what to try."""
    for _ in range(EXCHANGE_ROUNDS):
        found = next((x for x in _pairs(ground, choice) if ground.excess(x) <= 0), None)
        if found is None:
            return choice
        choice = fill(ground, found)
    return choice


def _pairs(ground: Ground, choice: Choice) -> list[Choice]:
    """Return moves of two units that save loss and may fit by estimate, most loss saved first."""
    here = np.array(ground.cost(choice))
    slack = OPTIMISM * np.abs(ground.limits) + np.array(ground.limits) - here
    steps = [(u, o) for u, row in enumerate(ground.losses) for o in range(len(row)) if o != choice[u]]
    if not steps:
        return []
    moved = [(*choice[:u], o, *choice[u + 1 :]) for u, o in steps]
    rise: Floats = np.array([ground.cost(x) for x in moved]) - here
    extra = np.array([ground.losses[u][o] - ground.losses[u][choice[u]] for u, o in steps])
    units = np.array([u for u, _ in steps])
    total = extra[:, None] + extra[None, :]
    allowed = (units[:, None] < units[None, :]) & (total < 0)
    for k in range(len(here)):
        allowed &= rise[:, k][:, None] + rise[:, k][None, :] <= slack[k]
    first, second = np.nonzero(allowed)
    best = np.argsort(total[first, second], kind="stable")[:PAIRS_A_ROUND]
    found = []
    for a, b in zip(first[best], second[best], strict=True):
        x = list(choice)
        for u, o in (steps[a], steps[b]):
            x[u] = o
        found.append(tuple(x))
    return found
