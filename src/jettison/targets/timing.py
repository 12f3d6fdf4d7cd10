"""The one measuring protocol: load anew, warm up, run the variants in turn in random order, compare pair by pair.

A busy machine slows all variants of a round alike, so the ratio within a round is far steadier than the ratio
of two medians taken apart. And a network that is loaded twice does not run equally fast twice: where its memory came to
lie alone made one and the same file 14 % slower in OpenVINO. So the rounds are spread over several sittings, each with
everything loaded anew, and the interval holds what loading changes as well as what the rounds do.
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
SITTINGS = 5
WARM_UP_ROUNDS = 3
SAMPLE_MS = 2.0
"""A sample lasts at least this long, so that the clock and one interrupt weigh little."""
RESAMPLES = 2000
CONFIDENCE = 0.95
Run = Callable[[], object]
"""One call of a loaded network."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call as median with 10th and 90th percentile; `speedup` of the baseline over this variant.

    The ends of `speedup` hold the median of the rounds' ratios with 95 % confidence. `samples_ms` are the rounds, in
    `sittings` blocks of equal length.
    """

    latency_ms: Interval
    speedup: Interval
    samples_ms: tuple[float, ...]
    sittings: int = 1


def time_interleaved(
    loads: Mapping[str, Callable[[], Run]],
    *,
    baseline: str,
    rounds: int = ROUNDS,
    sittings: int = SITTINGS,
    seed: int = 0,
) -> dict[str, Timing]:
    """Load and time every variant in `sittings` sittings, `rounds` times in all or a few more, and compare them.

    Each of `loads` returns, ready to be timed, what it has loaded anew; it is dropped after its sitting. The orders of
    loading and of running are drawn from `seed`. Raises UnknownName if `baseline` is not among `loads`, InputError for
    fewer than 2 rounds.
    """
    _check_rounds(rounds)
    if baseline not in loads:
        raise UnknownName("timed variant", baseline, loads)
    sittings = min(sittings, rounds // 2)
    order, draw = list(loads), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(sittings):
        draw.shuffle(order)
        runs = {name: loads[name]() for name in order}
        for name, taken in sample_interleaved(runs, rounds=-(-rounds // sittings), seed=draw.randrange(2**32)).items():
            samples[name] += taken
        runs.clear()  # before the next are loaded: large networks need not fit twice
    return compare_samples(samples, baseline=baseline, sittings=sittings, seed=seed)


def sample_interleaved(
    runs: Mapping[str, Run],
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return milliseconds per call, one sample per round; the i-th samples of all variants belong together."""
    _check_rounds(rounds)
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


def _check_rounds(rounds: int) -> None:
    if rounds < 2:
        raise InputError(f"{rounds} rounds give no interval. A median needs at least 2. Pass rounds=20 or more.")


def _choose_repeats(run: Run, clock: Callable[[], float]) -> int:
    repeats = 1
    while True:
        took_ms = _time_ms(run, repeats, clock) * repeats
        if took_ms >= SAMPLE_MS or repeats >= 10_000:
            return repeats
        repeats = min(10_000, max(2 * repeats, round(repeats * SAMPLE_MS / max(took_ms, 1e-3))))


def _time_ms(run: Run, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) * 1000 / repeats


def compare_samples(
    samples: Mapping[str, Sequence[float]], *, baseline: str, sittings: int = 1, seed: int = 0
) -> dict[str, Timing]:
    """Turn rounds of milliseconds into medians and speed-ups; the same samples and seed give the same result.

    The rounds stand in `sittings` blocks of equal length.
    """
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
            bootstrap_median(ratios, sittings=sittings, seed=seed),
            tuple(taken),
            sittings,
        )
    return result


def bootstrap_median(values: Sequence[float], *, sittings: int = 1, seed: int) -> Interval:
    """Return the median and its 95 % percentile-bootstrap interval.

    With several sittings, blocks of equal length, sittings are drawn first and then rounds within each: rounds of one
    sitting share what its loading made of them, and are no independent witnesses of it.
    """
    draw = random.Random(seed)
    length = len(values) // sittings
    blocks = [values[i * length : (i + 1) * length] for i in range(sittings)]
    medians = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(blocks, k=sittings) if sittings > 1 else blocks
        medians.append(statistics.median(v for block in chosen for v in draw.choices(block, k=length)))
    tail = (1 - CONFIDENCE) / 2
    return Interval(statistics.median(values), _percentile(medians, tail), _percentile(medians, 1 - tail))


def _percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of them lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
