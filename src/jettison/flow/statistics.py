"""How sure a measured drop is: one-sided bounds from paired outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jettison.core.record import Drop

CONFIDENCE = 0.95
_Z = 1.6448536269514722
"""The 95 % point of the standard normal distribution, one-sided."""


def bound_drop(original: Sequence[float], compressed: Sequence[float], metric: str) -> Drop:
    """Return the drop in points from scores of the same samples, with its one-sided 95 % upper bound.

    Scores of 0 and 1 get Tango's score bound (1998), or the exact Clopper-Pearson bound where only one of the
    two networks is ever wrong alone; other scores the normal bound of the mean paired difference.
    """
    n = len(original)
    differences = [a - b for a, b in zip(original, compressed, strict=True)]
    points = 100 * sum(differences) / n
    if set(original) | set(compressed) <= {0, 1}:
        lost = sum(d > 0 for d in differences)
        won = sum(d < 0 for d in differences)
        bound = 100 * (bound_proportion(lost, n) if won == 0 else bound_paired(lost, won, n))
    else:
        mean = sum(differences) / n
        deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(n - 1, 1))
        bound = 100 * (mean + _Z * deviation / math.sqrt(n))
    return Drop(metric, points, bound, CONFIDENCE, n)


def bound_proportion(hits: int, n: int) -> float:
    """Return the exact (Clopper-Pearson) one-sided 95 % upper bound of a proportion."""
    if hits >= n:
        return 1.0
    return _bisect(lambda p: _binomial_tail(hits, n, p) - (1 - CONFIDENCE), 0.0, 1.0)


def bound_paired(lost: int, won: int, n: int) -> float:
    """Return Tango's one-sided 95 % upper bound of (lost - won) / n for paired outcomes.

    `lost` counts samples only the first network has right, `won` those only the second has.
    """

    def excess(delta: float) -> float:
        b = -lost - won + (2 * n - lost + won) * delta
        c = -won * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        return (lost - won - n * delta) / math.sqrt(max(variance, 1e-12)) + _Z

    start = (lost - won) / n
    return _bisect(excess, start, 1.0 - 1e-9)


def _binomial_tail(k: int, n: int, p: float) -> float:
    """Return P(X <= k) for X binomial(n, p), summed in logarithms."""
    if p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    log_p, log_q = math.log(p), math.log1p(-p)
    terms = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q
        for i in range(k + 1)
    )
    return math.fsum(map(math.exp, terms))


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function crosses zero; `high` where it never does."""
    if falling(high) > 0:
        return high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high
