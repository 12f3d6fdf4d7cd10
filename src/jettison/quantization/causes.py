"""Why a tensor suffers from rounding: numbers that are measured on it, and rules that turn them into words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOUD = 20.0
"""A channel whose range is this many times the median channel's leaves the others too few steps."""
TAIL = 4.0
"""A largest value this many times the 99.9th percentile spends most of the range on almost no values."""
KURTOSIS = 50.0
SHIFTED = 0.3
"""Share of the squared error that is a constant offset: a bias can take that much away."""
CLIPPED = 0.01
"""Share of the values outside the range."""
UNUSED = 4.0
"""A range this many times the values seen wastes two of eight bits."""
LOW_DB = 15.0
"""Below this, noise has more than 3 % of the tensor's power (algorithms.md 4.3)."""
INFINITY = float("inf")
FEWEST = 4
"""Channels below which none is called loud."""
ENOUGH = 2000
"""Values below which a 99.9th percentile says nothing."""
SAMPLED = 2**17
"""Values of one tensor and batch that percentiles are taken from, evenly spaced."""


@dataclass(frozen=True)
class Cause:
    """Why a tensor suffers, with the numbers that say so; the rung that mends it, and how."""

    name: str
    words: str
    rung: str
    remedy: str


@dataclass(frozen=True)
class Facts:
    """What was measured on one tensor. Shares lie in 0..1; a ratio that was not measured is 0.

    `channel_ratio` is the loudest channel's range over the median of those that share a scale, `input_ratio`
    the median over the weights that read a loud input channel, `range_ratio` the range over the values seen. `side`
    says of a weight whether its "input" or "output" channels were compared.
    """

    kind: str
    local_db: float | None
    channel_ratio: float
    loud_channel: int
    input_ratio: float
    tail_ratio: float
    kurtosis: float
    mean_share: float
    clipped_share: float
    range_ratio: float
    gate: str
    linear: bool
    side: str
    layers: tuple[str, ...]


@dataclass
class Measure:
    """Collects, over batches, what rounding does to one tensor; tensors that share a range are its `part`s."""

    signal: float = 0.0
    noise: float = 0.0
    cumulative_signal: float = 0.0
    cumulative_noise: float = 0.0
    offsets: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    peaks: dict[int, Tensor] = field(default_factory=dict)
    values: int = 0
    clipped: int = 0
    low: float = 0.0
    high: float = 0.0
    seen: list[Tensor] = field(default_factory=list)
    side: str = ""

    def add_error(self, wanted: Tensor, rounded: Tensor, axis: int, part: int = 0) -> None:
        """Take in what rounding this tensor alone does, at the tensor or at its layer's output."""
        error = (rounded - wanted).double()
        self.signal += float(wanted.double().square().sum())
        self.noise += float(error.square().sum())
        rows = _split_channels(error, axis)
        self.offsets[part] = self.offsets[part] + rows.sum(1) if part in self.offsets else rows.sum(1)
        self.counts[part] = self.counts.get(part, 0) + rows.shape[1]

    def add_cumulative(self, wanted: Tensor, given: Tensor) -> None:
        """Take in what all rounding so far has done."""
        self.cumulative_signal += float(wanted.double().square().sum())
        self.cumulative_noise += float((given.double() - wanted.double()).square().sum())

    def add_values(
        self, x: Tensor, axis: int, ends: tuple[float, float] = (-INFINITY, INFINITY), part: int = 0
    ) -> None:
        """Take in the float values and how many lie outside the range `ends`."""
        peaks = _split_channels(x.abs(), axis).amax(1)
        self.peaks[part] = torch.maximum(self.peaks[part], peaks) if part in self.peaks else peaks
        least, most = (float(v) for v in x.aminmax())
        self.low, self.high = min(self.low, least), max(self.high, most)
        self.values += x.numel()
        self.clipped += int(((x < ends[0]) | (x > ends[1])).sum())
        flat = x.flatten()
        self.seen.append(flat[:: max(1, flat.numel() // SAMPLED) | 1].float())

    def find_loud_channel(self) -> tuple[float, int]:
        """Return how many times the median channel's range the largest is, and which it is."""
        if not self.peaks:
            return 1.0, 0
        peaks = torch.cat(list(self.peaks.values()))
        alive = peaks[peaks > 0]
        if alive.numel() < FEWEST:
            return 1.0, 0
        return float(alive.max() / alive.median()), int(peaks.argmax())

    def find_tail(self) -> tuple[float, float]:
        """Return the largest size over the 99.9th percentile, and the kurtosis.

        Exact zeros are not counted: every range holds them exactly, so they cost nothing.
        """
        values = torch.cat(self.seen) if self.seen else torch.zeros(0)
        values = values[values != 0]
        if values.numel() < ENOUGH:
            return 1.0, 0.0
        sizes = values.abs().sort().values
        percentile = float(sizes[min(len(sizes) - 1, int(0.999 * len(sizes)))])
        centred = (values - values.mean()).double()
        variance = float(centred.square().mean())
        kurtosis = float(centred.pow(4).mean()) / variance**2 if variance > 0 else 0.0
        return max(self.high, -self.low) / percentile, kurtosis

    def find_mean_share(self) -> float:
        """Return the share of the squared error that is a constant per channel."""
        if self.noise <= 0.0:
            return 0.0
        constant = sum(float((self.offsets[p].square() / self.counts[p]).sum()) for p in self.offsets)
        return min(1.0, constant / self.noise)


def _split_channels(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.reshape(1, -1)


def find_causes(facts: Facts) -> tuple[Cause, ...]:
    """Return the causes that the numbers speak for, the most telling one first."""
    rules = [_explain_range, _explain_channel, _explain_tail, _explain_gate, _explain_mean, _explain_noise]
    if facts.local_db is not None and facts.local_db - 10 * math.log10(max(1e-9, 1 - facts.mean_share)) < LOW_DB:
        rules[-2:] = reversed(rules[-2:])  # taking the offset away would not be enough
    return tuple(cause for cause in (rule(facts) for rule in rules) if cause is not None)


def _keep_float(facts: Facts) -> str:
    return f"exclude={list(facts.layers)!r}" if facts.layers else "a target that runs this part in float"


def _explain_range(facts: Facts) -> Cause | None:
    again = 'quantize again with ranges="percentile" and inputs like the real ones'
    if facts.kind == "weight":
        if facts.local_db is None or facts.local_db >= 0.0:
            return None
        words = f"wrong weights: rounding puts its output off by more than the output itself ({facts.local_db:.1f} dB)"
        return Cause("wrong weights", words, "exclude", f"look at its scales; quantize again, or {_keep_float(facts)}")
    if facts.clipped_share > CLIPPED:
        words = f"range too narrow: {100 * facts.clipped_share:.1f} % of the values are cut off"
        return Cause("range too narrow", words, "ranges", f"{again}, or more of them")
    if facts.range_ratio > UNUSED:
        words = f"range too wide: it spans {facts.range_ratio:.0f} times the values seen"
        return Cause("range too wide", words, "ranges", again)
    return None


def _explain_channel(facts: Facts) -> Cause | None:
    rung = "smooth" if facts.linear else "equalise"
    remedy = f'rung "{rung}", or {_keep_float(facts)}'
    if facts.channel_ratio > LOUD:
        which = f"{facts.side} channel" if facts.kind == "weight" else "channel"
        words = f"outlier channel: {which} {facts.loud_channel} has {facts.channel_ratio:.0f} times the median range"
        return Cause("outlier channel", words, rung, remedy)
    if facts.input_ratio > LOUD:
        words = f"outlier channel in its input: the weights for it are {facts.input_ratio:.0f} times below the median"
        return Cause("outlier channel", words, rung, remedy)
    return None


def _explain_tail(facts: Facts) -> Cause | None:
    # A loud channel is a tail too, but cutting it off would not mend it.
    if facts.channel_ratio > LOUD or (facts.tail_ratio <= TAIL and facts.kurtosis <= KURTOSIS):
        return None
    if facts.tail_ratio > TAIL:
        words = f"clipped tail: the largest value is {facts.tail_ratio:.1f} times the 99.9th percentile"
    else:
        words = f"clipped tail: kurtosis {facts.kurtosis:.0f}, a few values far from all others"
    if facts.kind == "weight":
        return Cause("clipped tail", words, "adaround", f'rung "adaround", or {_keep_float(facts)}')
    if facts.clipped_share > 0.0:
        return Cause("clipped tail", words, "smooth" if facts.linear else "exclude", _keep_float(facts))
    return Cause(
        "clipped tail", words, "ranges", f'ranges="percentile", which cuts the tail off, or {_keep_float(facts)}'
    )


def _explain_gate(facts: Facts) -> Cause | None:
    if not facts.gate:
        return None
    words = f"sensitive gate: {facts.gate} multiplies a whole channel with it"
    return Cause("sensitive gate", words, "exclude", _keep_float(facts))


def _explain_mean(facts: Facts) -> Cause | None:
    if facts.mean_share <= SHIFTED:
        return None
    words = f"shifted mean: {100 * facts.mean_share:.0f} % of the squared error is a constant offset per channel"
    return Cause("shifted mean", words, "bias", 'rung "bias"')


def _explain_noise(facts: Facts) -> Cause | None:
    if facts.local_db is None or facts.local_db >= LOW_DB:
        return None
    words = f"too few bits: {facts.local_db:.1f} dB already where only this tensor is rounded"
    if facts.kind == "weight":
        return Cause("too few bits", words, "reconstruct", f'rung "reconstruct", or {_keep_float(facts)}')
    return Cause("too few bits", words, "exclude", _keep_float(facts))
