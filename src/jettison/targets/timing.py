"""The one measuring protocol: warm up, run the variants in turn in random order, compare them pair by pair.

A busy machine slows all variants of a round alike, so the ratio within a round is far steadier than the ratio
of two medians taken apart.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jettison.core.errors import InputError, UnknownName
from jettison.core.record import Interval

ROUNDS = 60
WARM_UP_ROUNDS = 3
SAMPLE_MS = 2.0
"""A sample lasts at least this long, so that the clock and one interrupt weigh little."""
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call as median with 10th and 90th percentile; `speedup` of the baseline over this variant.

    The ends of `speedup` hold the median of the rounds' ratios with 95 % confidence. `samples_ms` are the rounds.
    """

    latency_ms: Interval
    speedup: Interval
    samples_ms: tuple[float, ...]


def time_interleaved(
    runs: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int = ROUNDS, seed: int = 0
) -> dict[str, Timing]:
    """Time every callable `rounds` times, interleaved in an order drawn from `seed`, and compare with `baseline`.

    Raises UnknownName if `baseline` is not among `runs`, InputError for fewer than 2 rounds.
    """
    return compare_samples(sample_interleaved(runs, rounds=rounds, seed=seed), baseline=baseline, seed=seed)


def sample_interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return milliseconds per call, one sample per round; the i-th samples of all variants belong together."""
    if rounds < 2:
        raise InputError(f"{rounds} rounds give no interval. A median needs at least 2. Pass rounds=20 or more.")
    order, draw = list(runs), random.Random(seed)
    for _ in range(WARM_UP_ROUNDS - 1):
        for name in order:
            runs[name]()
    repeats = {name: _choose_repeats(runs[name], clock) for name in order}
    samples: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            samples[name].append(_time_ms(runs[name], repeats[name], clock))
    return samples


def _choose_repeats(run: Callable[[], object], clock: Callable[[], float]) -> int:
    repeats = 1
    while True:
        took_ms = _time_ms(run, repeats, clock) * repeats
        if took_ms >= SAMPLE_MS or repeats >= 10_000:
            return repeats
        repeats = min(10_000, max(2 * repeats, round(repeats * SAMPLE_MS / max(took_ms, 1e-3))))


def _time_ms(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) * 1000 / repeats


def compare_samples(samples: Mapping[str, Sequence[float]], *, baseline: str, seed: int = 0) -> dict[str, Timing]:
    """Turn rounds of milliseconds into medians and speed-ups; the same samples and seed give the same result."""
    if baseline not in samples:
        raise UnknownName("timed variant", baseline, samples)
    base = samples[baseline]
    result = {}
    for name, taken in samples.items():
        if len(taken) != len(base) or len(taken) < 2:
            raise InputError(
                f"{name!r} has {len(taken)} samples and {baseline!r} has {len(base)}. Ratios are taken round by round. "
                "Time the variants together, at least 2 rounds."
            )
        ratios = [b / t for b, t in zip(base, taken, strict=True)]
        result[name] = Timing(
            Interval(statistics.median(taken), _percentile(taken, 0.1), _percentile(taken, 0.9)),
            bootstrap_median(ratios, seed=seed),
            tuple(taken),
        )
    return result


def bootstrap_median(values: Sequence[float], *, seed: int) -> Interval:
    """Return the median and its 95 % percentile-bootstrap interval."""
    draw = random.Random(seed)
    count = len(values)
    medians = [statistics.median(draw.choices(values, k=count)) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    return Interval(statistics.median(values), _percentile(medians, tail), _percentile(medians, 1 - tail))


def _percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of them lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
