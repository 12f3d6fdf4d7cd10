"""The Record: what was done and what was measured, as plain data that a person can read and diff."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A measured value with the ends of its interval; what the ends mean stands with the field that holds it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """A metric on `n` samples, as a fraction in 0..1; `metric` names it ("accuracy", "agreement", "evaluate")."""

    metric: str
    value: float
    n: int | None


@dataclass(frozen=True)
class Variant:
    """One measured form of the network: a file in a runtime, or the user's module in PyTorch eager.

    `latency_ms` is the median of interleaved runs with the 10th and 90th percentile; `speedup` is the
    baseline's median over this one's, with a 95 % confidence interval from the paired rounds.
    Fields that could not be measured are None, never a guess.
    """

    name: str
    runtime: str
    precision: str
    file: str | None
    latency_ms: Interval
    speedup: Interval
    size_bytes: int | None
    macs: int
    parameters: int
    peak_memory_bytes: int | None
    score: Score | None


@dataclass(frozen=True)
class Drop:
    """What the deployed file loses against the deployed original, in points of `metric`.

    `bound_points` is the one-sided upper bound at `confidence`, from paired outcomes on `n` samples that no
    stage has used for choosing; None where the metric gives no outcome per sample.
    """

    metric: str
    points: float
    bound_points: float | None
    confidence: float
    n: int | None


@dataclass(frozen=True)
class Option:
    """One keep count of a prune group: what it is predicted to cost in loss, and to save."""

    keep: int
    loss: float
    macs: int
    latency_ms: float | None


@dataclass(frozen=True)
class GroupRecord:
    """A prune group: its width before and after, the layers that share it, and its sensitivity table."""

    name: str
    layers: tuple[str, ...]
    before: int
    after: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class FrontPoint:
    """A plan on the Pareto front: predicted loss (KL to the original, nats) against predicted cost."""

    macs: int
    latency_ms: float | None
    loss: float
    chosen: bool


@dataclass(frozen=True)
class LayerRecord:
    """A layer with weights: its arithmetic before and after; `integer` says if the runtime really runs integers."""

    name: str
    operator: str
    bits: int
    macs_before: int
    macs_after: int
    sqnr_db: float | None
    integer: bool | None


@dataclass(frozen=True)
class TimeShare:
    """Time one operator of the runtime's own graph takes in one inference."""

    name: str
    operator: str
    ms: float


@dataclass(frozen=True)
class Check:
    """One oracle: what was compared, the error found, and the largest that passes."""

    name: str
    passed: bool
    value: float
    tolerance: float
    detail: str


@dataclass(frozen=True)
class Stage:
    """A stage of the run and the seconds it took when it was computed."""

    name: str
    seconds: float


@dataclass(frozen=True)
class FrozenPart:
    """Something that could not be pruned: what, why, and the user's file and line if there is one."""

    what: str
    reason: str
    where: str


@dataclass(frozen=True)
class Tensor:
    """A model input or output: name, shape (None where free) and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Record:
    """Everything a report needs; `record.json` is this."""

    format: str
    version: str
    created: str
    command: str
    model: str
    target: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    seed: int
    budget: Mapping[str, float]
    met: bool
    unmet: tuple[str, ...]
    environment: Mapping[str, str]
    variants: tuple[Variant, ...]
    baseline: str
    compressed: str
    drop: Drop
    groups: tuple[GroupRecord, ...]
    front: tuple[FrontPoint, ...]
    layers: tuple[LayerRecord, ...]
    time_before: tuple[TimeShare, ...]
    time_after: tuple[TimeShare, ...]
    checks: tuple[Check, ...]
    frozen: tuple[FrozenPart, ...]
    notes: tuple[str, ...]
    stages: tuple[Stage, ...]
    load_example: str
