"""Ranges: how much of a tensor's tail to clip so that rounding the rest costs least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jettison.core.errors import NonFiniteError, UnknownName
from jettison.targets.integer import Levels, fake_quantize

HALF_BINS = 2048
"""Bins on each side of zero; at least eight of them fall into one of 255 steps."""
SAMPLED = 2**16
"""Values of one tensor that are counted in one call, evenly spaced; all are looked at for the ends."""
GRID_POINTS = 80
CHUNK = 2**16
"""Weights that are searched at a time, so that they stay in the processor's cache."""
WATCHED = 8
"""Largest weights of a channel that tell when clipping alone costs too much."""
ROUNDING_ROOM = 1.001
"""What a sum of squares in float32 may be off by, and more."""
SMALLEST_SHARE = 0.4
"""The grid of clip factors runs from here to 1 (algorithms.md 4.2)."""
CLIPPED_SHARE = 1e-4
SMALLEST_PROBABILITY = 1e-12
"""What a bin counts as that the integers say is empty, and is not."""


@dataclass
class Histogram:
    """Counts of a stream of values in bins aligned at zero; the bin width doubles when a value falls outside.

    Exact zeros are not counted: every range holds them exactly, so they cost nothing.
    """

    low: float = 0.0
    high: float = 0.0
    width: float = 0.0
    counts: Tensor | None = None
    seen: int = 0

    def add(self, x: Tensor, where: str) -> None:
        """Count the values of `x`; raises NonFiniteError naming `where` if one is NaN or infinite."""
        x = x.detach().to("cpu", torch.float32).flatten()
        if x.numel() == 0:
            return
        low, high = (float(v) for v in x.aminmax())
        if not (-float("inf") < low <= high < float("inf")):
            raise NonFiniteError(
                f"The calibration gives NaN or infinity at {where}. It came up while collecting ranges for int8. "
                "Check the weights and the calibration inputs with torch.isfinite."
            )
        self.seen += x.numel()
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if reach == 0.0:
            return
        if self.counts is None:
            self.width, self.counts = reach / HALF_BINS * 1.001, torch.zeros(2 * HALF_BINS, dtype=torch.float64)
        while reach >= self.width * HALF_BINS:
            merged = torch.zeros_like(self.counts)
            merged[HALF_BINS // 2 : HALF_BINS + HALF_BINS // 2] = self.counts.view(-1, 2).sum(1)
            self.width, self.counts = 2 * self.width, merged
        if x.numel() > SAMPLED:
            x = x[:: x.numel() // SAMPLED | 1]  # an odd stride does not fall in step with the layout
        index = (x / self.width).floor_().add_(HALF_BINS).clamp_(0, 2 * HALF_BINS - 1).to(torch.int32)
        self.counts += torch.bincount(index, minlength=2 * HALF_BINS)
        self.counts[HALF_BINS] -= x.numel() - int(x.count_nonzero())  # the bin that zeros fall into


Ranger = Callable[[Histogram, Levels], tuple[float, float]]
"""From a histogram to the range (low, high) that the integers shall span; low <= 0 <= high."""


def span_minmax(histogram: Histogram, levels: Levels) -> tuple[float, float]:
    """Clip nothing: the range is that of the values seen."""
    return histogram.low, histogram.high


def span_mse(histogram: Histogram, levels: Levels) -> tuple[float, float]:
    """Clip where the summed squared error of rounding and clipping is least; each end is searched on its own."""
    low, high = histogram.low, histogram.high
    if histogram.counts is None:
        return low, high
    used = histogram.counts.nonzero().flatten()
    counts = histogram.counts[used]
    centres = ((used - HALF_BINS + 0.5) * histogram.width).to(torch.float32)
    shares = torch.linspace(SMALLEST_SHARE, 1.0, GRID_POINTS)

    def best(lows: Tensor, highs: Tensor) -> tuple[float, float]:
        scale, zero_point = choose_scale(lows, highs, levels)
        rounded = fake_quantize(centres[None], scale[:, None], zero_point[:, None], levels)
        error = ((rounded - centres[None]).double() ** 2 * counts[None]).sum(1)
        # The last candidate is the widest; on a tie it wins, because clipping nothing needs no reason.
        index = GRID_POINTS - 1 - int(error.flip(0).argmin())
        return float(lows[index]), float(highs[index])

    low, high = best(low * shares, high * shares)
    low, high = best(torch.full_like(shares, low), _widened(high, histogram.high))
    return best(_widened(low, histogram.low), torch.full_like(shares, high))


def _widened(end: float, extreme: float) -> Tensor:
    return torch.linspace(SMALLEST_SHARE * end, extreme, GRID_POINTS)


def span_percentile(histogram: Histogram, levels: Levels) -> tuple[float, float]:
    """Clip the outermost 0.01 % of the values, half at each end; exact zeros are not among them."""
    if histogram.counts is None:
        return histogram.low, histogram.high
    summed = histogram.counts.cumsum(0)
    edges = (torch.arange(2 * HALF_BINS + 1) - HALF_BINS) * histogram.width
    cut = float(summed[-1]) * CLIPPED_SHARE / 2
    low = float(edges[int((summed <= cut).sum())])
    high = float(edges[int((summed < float(summed[-1]) - cut).sum()) + 1])
    return max(min(low, 0.0), histogram.low), min(max(high, 0.0), histogram.high)


def span_entropy(histogram: Histogram, levels: Levels) -> tuple[float, float]:
    """Clip where the rounded values' distribution is nearest, by KL divergence, to the clipped one's (Migacz, 2017).

    Both ends move together by the same factor. The clipped tail counts at the ends; a step's values are spread evenly
    over those of its bins that hold any.
    """
    if histogram.counts is None:
        return histogram.low, histogram.high
    centres = (torch.arange(2 * HALF_BINS) - HALF_BINS + 0.5) * histogram.width
    best, least = (histogram.low, histogram.high), float("inf")
    for share in torch.linspace(1.0, SMALLEST_SHARE, GRID_POINTS):
        low, high = histogram.low * float(share), histogram.high * float(share)
        scale, zero_point = choose_scale(torch.tensor([low]), torch.tensor([high]), levels)
        divergence = _diverge(histogram.counts, centres, scale, zero_point, levels)
        if divergence < least:
            best, least = (low, high), divergence
    return best


def _diverge(counts: Tensor, centres: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels) -> float:
    """Return KL between the clipped counts and what their integers say of them."""
    span = levels.q_max - levels.q_min + 1
    steps = (torch.round(centres / scale) + zero_point - levels.q_min).long()
    inside = (steps >= 0) & (steps < span)
    steps = steps.clamp(0, span - 1)
    held = torch.zeros(span, dtype=counts.dtype).index_add_(0, steps[inside], counts[inside])
    occupied = (counts > 0) & inside
    bins = torch.zeros(span, dtype=counts.dtype).index_add_(0, steps, occupied.to(counts.dtype))
    rebuilt = torch.where(occupied, (held / bins.clamp(min=1))[steps], torch.zeros_like(counts))
    clipped = torch.where(inside, counts, torch.zeros_like(counts))
    first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
    clipped[first] += counts[:first].sum()
    clipped[last] += counts[last + 1 :].sum()
    p, q = clipped / clipped.sum(), rebuilt / rebuilt.sum().clamp(min=1e-30)
    used = p > 0
    return float((p[used] * (p[used] / q[used].clamp(min=SMALLEST_PROBABILITY)).log()).sum())


def span_unit(histogram: Histogram, levels: Levels) -> tuple[float, float]:
    """Span 0 to 1 in steps of a power of two, as kernels expect of a softmax or sigmoid, whatever values were seen."""
    count = levels.q_max - levels.q_min + 1
    return (0.0, levels.q_max / (levels.q_max + 1)) if levels.symmetric else (0.0, (count - 1) / count)


RANGERS: dict[str, Ranger] = {
    "mse": span_mse,
    "minmax": span_minmax,
    "percentile": span_percentile,
    "entropy": span_entropy,
}


def find_ranger(ranges: str | Ranger) -> Ranger:
    """Return the function of that name, or the function itself; raises UnknownName."""
    if callable(ranges):
        return ranges
    if ranges not in RANGERS:
        raise UnknownName("range estimator", ranges, RANGERS)
    return RANGERS[ranges]


def choose_scale(low: Tensor, high: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (float32, integral) for ranges that hold zero; zero falls on an integer exactly."""
    low, high = low.clamp(max=0.0).float(), high.clamp(min=0.0).float()
    if levels.symmetric:
        scale, zero_point = torch.maximum(-low, high) / levels.q_max, torch.zeros_like(low)
    else:
        scale, zero_point = (high - low) / (levels.q_max - levels.q_min), None
    # A tensor that was always zero, or denormal: any step serves, one of size 1 keeps the numbers ordinary.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    if zero_point is None:
        zero_point = (levels.q_min + torch.round(-low / scale)).clamp(levels.q_min, levels.q_max)
    return scale, zero_point


def choose_weight_scale(weight: Tensor, axis: int, levels: Levels) -> Tensor:
    """Return one scale per channel of `axis`: the point of the grid with the least squared error.

    A channel far below the largest keeps at least 2^-12 of its scale: what it loses is below the output's own
    step, and its int32 bias, whose step is this scale times the input's, stays in range.
    """
    rows = weight.detach().float().movedim(axis, 0).flatten(1)
    most = rows.abs().amax(1) / levels.q_max
    largest = float(most.max())
    if largest == 0.0:
        return torch.ones_like(most)
    most = most.clamp(min=largest * 2.0**-12)
    some = max(1, CHUNK // max(64, rows.shape[1]))
    pairs = zip(rows.split(some), most.split(some), strict=True)
    return torch.cat([_search_grid(part, scale, levels) for part, scale in pairs]).clamp(min=largest * 2.0**-12)


def _search_grid(rows: Tensor, most: Tensor, levels: Levels) -> Tensor:
    """Return for each row the share of `most` with the least squared error; on a tie the largest.

    A row leaves the search once cutting off its largest values alone costs more than the best found: at smaller shares
    that only grows. It changes no result and leaves a fraction of the grid.
    """
    best, least = most.clone(), torch.full_like(most, float("inf"))
    shares = torch.linspace(1.0, SMALLEST_SHARE, GRID_POINTS, device=rows.device)
    tops = rows.abs().topk(min(WATCHED, rows.shape[1]), dim=1).values
    # The farther end, as that of -8 to 7: what only the nearer one cuts off may lie on the other side.
    ends = most[:, None] * shares * max(levels.q_max, -levels.q_min)
    floors = (tops[:, None] - ends[:, :, None]).clamp_(min=0).square_().sum(2)
    at, work = torch.arange(len(rows), device=rows.device), torch.empty_like(rows)
    for index, share in enumerate(shares):
        live = floors[at, index] <= least[at] * ROUNDING_ROOM
        count = int(live.count_nonzero())
        if count == 0:
            break
        if count <= 0.75 * len(at):
            at, rows = at[live], rows[live]
            work = work[: len(at)]
        scale = most[at] * share
        # What `fake_quantize` does at zero point 0, in one buffer.
        torch.div(rows, scale[:, None], out=work)
        work.round_().clamp_(levels.q_min, levels.q_max).mul_(scale[:, None]).sub_(rows)
        error = work.square_().sum(1)
        better = error < least[at]
        best[at], least[at] = torch.where(better, scale, best[at]), torch.where(better, error, least[at])
    return best
