"""The protocol's one statistic: the smallest of the medians of consecutive blocks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

BLOCKS = 5
"""Rounds are cut into so many blocks; the smallest of their medians counts, so a busy spell elsewhere does not."""


def min_of_medians(times: Sequence[float]) -> float:
    """Return the smallest of the medians of 5 consecutive blocks.

    Grouped medians, because the profile knows whole microseconds only, and small layers take few of them.
    """
    size = len(times) // BLOCKS
    blocks = [times[i * size : (i + 1) * size] for i in range(BLOCKS)]
    return min(statistics.median_grouped(block, interval=1) for block in blocks)
