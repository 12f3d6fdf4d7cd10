"""Runs a network with each of its quantized tensors left in float in turn, and measures on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from jettison.progress import track
from jettison.quantization.causes import Measure
from jettison.quantization.fold import name_operator
from jettison.quantization.switches import Spot, Switched, find_same_range, is_rounding

Divergence = Callable[[Sequence[Any], Sequence[Any]], Tensor]
"""From outputs and float outputs to one divergence per sample."""


@dataclass
class Score:
    """How far outputs are from the float network's, over batches."""

    loss: float = 0.0
    samples: int = 0
    signal: float = 0.0
    noise: float = 0.0
    agreeing: int = 0
    scored: int = 0

    def add(self, given: Sequence[Any], wanted: Sequence[Any], divergence: Divergence) -> None:
        """Take in one batch of outputs."""
        each = divergence(given, wanted)
        self.loss, self.samples = self.loss + float(each.double().sum()), self.samples + len(each)
        pairs = [(g, w) for g, w in zip(given, wanted, strict=True) if isinstance(w, Tensor) and w.is_floating_point()]
        for g, w in pairs:
            # What all samples have in common is no signal: an output that hardly moves drowns in little noise.
            varying = w.double() - w.double().mean(0) if len(each) > 1 and w.dim() > 0 else w.double()
            self.signal += float(varying.square().sum())
            self.noise += float((g.double() - w.double()).square().sum())
        first = pairs[0] if pairs else None
        if first is not None and first[1].dim() == 2 and first[1].shape[1] > 1:
            self.agreeing += int((first[0].argmax(1) == first[1].argmax(1)).sum())
            self.scored += len(first[1])

    @property
    def mean(self) -> float:
        """The divergence per sample."""
        return self.loss / max(1, self.samples)

    @property
    def agreement(self) -> float | None:
        """The share of samples with the same largest score, None where there are no scores."""
        return self.agreeing / self.scored if self.scored else None


@dataclass
class Bench:
    """A network under test: what is counted for each tensor while batches go through."""

    net: Switched
    divergence: Divergence
    whole: Score = field(default_factory=Score)
    without: dict[str, Score] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    inputs: dict[str, Measure] = field(default_factory=dict)


class _Run:
    """One batch on its way through: the float values and the rounded ones, always up to the same step."""

    def __init__(self, bench: Bench, batch: tuple[Tensor, ...]) -> None:
        self.bench, self.net, self.at = bench, bench.net, 0
        self.wanted = self.net.run(self.net.begin(batch), 0, self.net.everything)
        bench.whole.add(self.net.run(self.net.begin(batch), 0, ()), self.wanted, bench.divergence)
        self.exact, self.rounded = self.net.begin(batch), self.net.begin(batch)
        self.weights = {self.net.order[s.start]: s for s in self.net.spots if s.kind == "weight"}

    def advance(self, end: int) -> None:
        """Take both up to step `end`, measuring on the way."""
        for node in self.net.order[self.at : end]:
            exact = self.net.step(node, self.exact, self.net.everything)
            rounded = self.net.step(node, self.rounded, ())
            if node in self.weights:
                self._measure_weight(node, self.weights[node], exact, rounded)
            elif is_rounding(node) and not find_same_range(node):
                self._measure_activation(node, exact, rounded)
            self.exact[node], self.rounded[node] = exact, rounded
            self.net.forget(node, self.exact)
            self.net.forget(node, self.rounded)
        self.at = end

    def leave_out(self, spot: Spot) -> None:
        """Finish a copy of the rounded run with this tensor in float."""
        outputs = self.net.run(dict(self.rounded), spot.start, (spot.name,))
        self.bench.without[spot.name].add(outputs, self.wanted, self.bench.divergence)

    def _measure_weight(self, node: Node, spot: Spot, exact: Tensor, rounded: Tensor) -> None:
        measure, axis = self.bench.measures[spot.name], _find_axis(node, exact)
        alone = self.net.step(node, self.exact, self.net.everything - {spot.name})
        measure.add_error(exact, alone, axis)
        measure.add_cumulative(exact, rounded)
        if not measure.peaks:
            weight = self.net.constants[spot.nodes[0]][1]
            axis = self._find_weight_axis(node, spot)
            measure.side = "output" if axis == ("transpose" in name_operator(node)) else "input"
            measure.add_values(weight, axis)
        source = node.args[0]
        x = self.exact.get(source) if isinstance(source, Node) else None
        if isinstance(x, Tensor) and x.is_floating_point():
            self.bench.inputs.setdefault(spot.name, Measure()).add_values(x, _find_axis(node, x))

    def _find_weight_axis(self, node: Node, spot: Spot) -> int:
        """Return the axis whose channels share a scale: the output's where all share one, else the input's."""
        transposed = "transpose" in name_operator(node)
        scale = spot.nodes[0].args[1]
        steps = self.net.constants[scale][0] if isinstance(scale, Node) else None
        shared = not isinstance(steps, Tensor) or (steps.numel() > 1 and bool((steps == steps.flatten()[0]).all()))
        return int(transposed) if shared else int(not transposed)

    def _measure_activation(self, node: Node, exact: Tensor, rounded: Tensor) -> None:
        net, name = self.net, self.net.spot_of[node]
        measure, source = self.bench.measures[name], node.args[0]
        assert isinstance(source, Node)
        spot = next(s for s in net.spots if s.name == name)
        part = spot.nodes.index(node)
        reader = next((n for n, layer in net.layers.items() if layer in (*spot.readers, spot.source)), node)
        axis = _find_axis(reader, exact)
        measure.add_error(exact, net.round(node, self.exact[source]), axis, part)
        measure.add_cumulative(exact, rounded)
        low, high, step = read_range(node)
        # The zero point is a whole number, so that an end may lie up to half a step inside: that is not clipping.
        measure.add_values(exact, axis, (low - step, high + step), part)


def _find_axis(node: Node, x: Tensor) -> int:
    """Return where the channels of a tensor lie that `node` reads or gives."""
    return x.dim() - 1 if name_operator(node) == "aten.linear.default" else min(1, x.dim() - 1)


def read_range(node: Node) -> tuple[float, float, float]:
    """Return the smallest and the largest number that a rounding can give, and the step between two."""
    scale, zero_point, low, high = node.args[1:5]
    return (low - zero_point) * scale, (high - zero_point) * scale, scale  # type: ignore[operator, return-value]


def run_bench(net: Switched, batches: Sequence[tuple[Tensor, ...]], divergence: Divergence) -> Bench:
    """Return what all batches say about each tensor; costs about half a run per tensor and batch."""
    bench = Bench(net, divergence)
    for name in net.everything:
        bench.without[name], bench.measures[name] = Score(), Measure()
    rounds: list[tuple[tuple[Tensor, ...], Spot | None]]
    rounds = [(batch, spot) for batch in batches for spot in (*net.spots, None)]
    state: _Run | None = None
    for batch, spot in track(rounds, "Leaving one tensor out at a time"):
        state = state or _Run(bench, batch)
        state.advance(spot.start if spot is not None else len(net.order))
        if spot is None:
            state = None
        else:
            state.leave_out(spot)
    return bench
