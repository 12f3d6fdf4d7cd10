"""The measuring protocol's statistics on planted samples, and its clockwork on a fake clock."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from jettison.core.errors import InputError, UnknownName
from jettison.targets.timing import bootstrap_median, compare_samples, sample_interleaved, time_interleaved


def planted(ratio: float, rounds: int = 60, drift: float = 3.0) -> dict[str, list[float]]:
    """A variant `ratio` times faster than the baseline, on a machine that slows down `drift`-fold meanwhile."""
    draw = random.Random(0)
    slow = [1 + drift * i / rounds for i in range(rounds)]
    base = [10 * s * draw.gauss(1, 0.01) for s in slow]
    fast = [10 / ratio * s * draw.gauss(1, 0.01) for s in slow]
    return {"base": base, "fast": fast}


def test_planted_ratio_is_recovered_under_drift() -> None:
    timing = compare_samples(planted(2.0), baseline="base", seed=1)["fast"]
    assert timing.speedup.low <= 2.0 <= timing.speedup.high
    assert timing.speedup.high - timing.speedup.low < 0.03  # noise of 1 % per sample, 60 rounds


def test_medians_taken_apart_would_be_wrong_where_pairs_are_not() -> None:
    """Half of the rounds are slowed, but noise puts the variants' medians on different sides: pairs do not care."""
    slow = [1.0] * 30 + [3.0] * 31
    base, fast = [10 * s for s in slow], [5 * s for s in slow]
    base[-2:] = [10.0, 10.0]  # two rounds in which only the baseline escaped the load
    apart = statistics.median(base) / statistics.median(fast)
    assert abs(apart - 2) > 0.5
    assert compare_samples({"base": base, "fast": fast}, baseline="base")["fast"].speedup.value == pytest.approx(2.0)


def test_breaking_the_pairs_is_noticed() -> None:
    samples = planted(2.0)
    samples["fast"] = samples["fast"][::-1]
    speedup = compare_samples(samples, baseline="base", seed=1)["fast"].speedup
    assert speedup.high - speedup.low > 0.1


def test_statistics_are_a_function_of_samples_and_seed() -> None:
    samples = planted(1.3)
    assert compare_samples(samples, baseline="base", seed=5) == compare_samples(samples, baseline="base", seed=5)
    base = compare_samples(samples, baseline="base", seed=5)["base"]
    assert (base.speedup.low, base.speedup.value, base.speedup.high) == (1.0, 1.0, 1.0)


def test_percentiles_and_median() -> None:
    timing = compare_samples({"a": [float(i) for i in range(1, 12)]}, baseline="a")["a"]
    assert (timing.latency_ms.low, timing.latency_ms.value, timing.latency_ms.high) == (2.0, 6.0, 10.0)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(3)
    hits = 0
    for trial in range(60):
        interval = bootstrap_median([draw.gauss(2, 0.3) for _ in range(40)], seed=trial)
        hits += interval.low <= 2 <= interval.high
    assert hits >= 51  # 95 % of 60 is 57; fewer than 51 has probability under 0.005


def test_fast_callables_are_repeated_and_all_run_equally_often_per_round() -> None:
    now = [0.0]
    calls: list[str] = []

    def make(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    samples = sample_interleaved({"a": make("a", 1e-4), "b": make("b", 5e-2)}, rounds=10, seed=0, clock=lambda: now[0])
    assert samples["a"] == pytest.approx([0.1] * 10) and samples["b"] == pytest.approx([50.0] * 10)
    first = [calls[i] for i in range(1, len(calls)) if calls[i] != calls[i - 1]]
    assert math.isclose(first.count("a"), first.count("b"), abs_tol=6)
    assert calls.count("a") >= 10 * 20  # 0.1 ms a call, 2 ms a sample


def test_runs_for_real_and_refuses_bad_questions() -> None:
    loads = {"x": lambda: lambda: sum(range(200)), "y": lambda: lambda: sum(range(4000))}
    result = time_interleaved(loads, baseline="y", rounds=5)
    assert result["x"].speedup.value > 2
    with pytest.raises(UnknownName, match="timed variant"):
        compare_samples({"x": [1.0, 2.0]}, baseline="z")
    with pytest.raises(InputError, match="rounds"):
        time_interleaved(loads, baseline="x", rounds=1)
    with pytest.raises(UnknownName, match="timed variant"):
        time_interleaved(loads, baseline="z", rounds=5)
    with pytest.raises(InputError, match="round by round"):
        compare_samples({"x": [1.0, 2.0], "y": [1.0]}, baseline="x")


@pytest.mark.parametrize(("rounds", "sittings", "each"), [(60, 5, 12), (7, 5, 3), (2, 5, 2), (11, 2, 6)])
def test_every_sitting_loads_anew_and_lets_go(rounds: int, sittings: int, each: int) -> None:
    """At least two rounds a sitting, and never two of the same network in memory."""
    alive: set[int] = set()
    most, loaded = 0, 0

    class Loaded:
        def __init__(self) -> None:
            nonlocal most, loaded
            alive.add(id(self))
            loaded, most = loaded + 1, max(most, len(alive))

        def __call__(self) -> int:
            return sum(range(2000))

        def __del__(self) -> None:
            alive.discard(id(self))

    timing = time_interleaved({"a": Loaded, "b": Loaded}, baseline="a", rounds=rounds, sittings=sittings)["b"]
    assert (loaded, most) == (2 * timing.sittings, 2)
    assert len(timing.samples_ms) == each * timing.sittings >= rounds


def test_the_interval_holds_what_loading_changes() -> None:
    """A file that is 14 % slower in some sittings: rounds of one say nothing of the others, and all together do."""
    draw = random.Random(0)
    base = [4.0 * draw.gauss(1, 0.02) for _ in range(60)]
    twice = [b / (2.14 if i // 12 == 0 else 2.43) * draw.gauss(1, 0.02) for i, b in enumerate(base)]
    alone = compare_samples({"base": base[:12], "this": twice[:12]}, baseline="base")["this"].speedup
    assert alone.high < 2.25
    samples = {"base": base, "this": twice}
    together = compare_samples(samples, baseline="base", sittings=5)["this"].speedup
    assert together.low < 2.25 and together.high > 2.4
    unaware = compare_samples(samples, baseline="base")["this"].speedup
    assert unaware.low > 2.3


def test_sittings_that_agree_widen_nothing_much() -> None:
    pooled, blocks = (
        compare_samples(planted(2.0, drift=0.0), baseline="base", sittings=n)["fast"].speedup for n in (1, 5)
    )
    assert blocks.value == pooled.value
    assert blocks.high - blocks.low < 2 * (pooled.high - pooled.low)
