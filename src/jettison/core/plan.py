"""The Plan: what is to be done to a network, as plain data; deciding makes it, doing applies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORMAT = "jettison.plan/1"


@dataclass(frozen=True)
class Cost:
    """What a network costs on the target: MACs for one sample, bytes of the file, milliseconds (None: not asked)."""

    macs: int
    size_bytes: int
    latency_ms: float | None


@dataclass(frozen=True)
class PlanPoint:
    """One plan on the Pareto front: kept counts per group, predicted loss (nats) and predicted cost."""

    counts: Mapping[str, int]
    loss: float
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """Kept positions per prune group, the bits to compute with, and what was predicted when it was chosen.

    Groups that are not named keep all. `bits` is 8 for integer arithmetic, 32 for none. `feasible` says that the
    prediction keeps every limit.
    """

    format: str
    kept: Mapping[str, tuple[int, ...]]
    bits: int
    loss: float
    cost: Cost
    feasible: bool
    front: tuple[PlanPoint, ...]
