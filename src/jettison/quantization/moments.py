"""Second moments of a layer's inputs, with what chance put into them taken out.

Moments of some hundred pictures hold noise, and a fit to them makes the calibration inputs right and others wrong: a
classifier of 1,280 inputs fits 256 pictures exactly. What stands off the diagonal is therefore shrunk (Ledoit and Wolf,
2004; Schäfer and Strimmer, 2005). We depart in one place: the noise is estimated from the scatter between groups of
whole inputs, since the positions of one picture are no samples of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jettison.quantization.replay import Layer
from jettison.quantization.weights import choose_every, count_groups, cut_batch, fold_outputs, unfold

PART = 8
"""Inputs in one part; the scatter of the moments between parts is their noise."""
POSITIONS = 2**16
"""Columns of unfolded input from one layer that enter its moments, evenly over the batches."""


@dataclass(frozen=True)
class Moments:
    """Second moments about the mean of a layer's inputs, each `(groups, inputs, inputs)`, and the means.

    `own` is of the quantized inputs with themselves, `cross` of the float inputs (rows) with the quantized ones.
    `missing` `(groups, rows, inputs)` and `missing_mean` are of what the tensor added to the output lacks against the
    float one.
    """

    own: Tensor
    cross: Tensor
    mean: Tensor
    float_mean: Tensor
    missing: Tensor | None = None
    missing_mean: Tensor | None = None


@dataclass
class Sums:
    """Sums over parts of the inputs: of each tensor, of its products with the first, and of those squared."""

    products: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    count: int = 0
    count_squares: int = 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Count a part, tensors `(groups, rows, positions)`."""
        count = tensors[0].shape[-1]
        for place, x in enumerate(tensors):
            product, total = (x @ tensors[0].mT).double(), x.sum(-1, dtype=torch.float64)
            if place == len(self.products):
                self.products.append(torch.zeros_like(product))
                self.squares.append(torch.zeros_like(product))
                self.totals.append(torch.zeros_like(total))
            self.products[place] += product
            self.squares[place].addcmul_(product, product, value=1 / count)
            self.totals[place] += total
        self.count += count
        self.count_squares += count**2

    def read(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the means, and the shrunk moments about them, of each tensor with the first."""
        means = [total / self.count for total in self.totals]
        parts = self.count**2 / self.count_squares  # as many as there would be, were they all of one size
        moments = []
        for product, square, mean in zip(self.products, self.squares, means, strict=True):
            product = product / self.count
            noise = (square / self.count - product.square()).clamp(min=0) / max(parts - 1, 1)
            moments.append(shrink(product - mean.unsqueeze(2) * means[0].unsqueeze(1), noise))
        return means, moments


def shrink(moments: Tensor, noise: Tensor) -> Tensor:
    """Return moments `(groups, rows, inputs)` without the share of what stands off the diagonal that is noise.

    `noise` is each entry's variance. Where rows are not inputs there is no diagonal, and all is shrunk.
    """
    kept = torch.zeros(moments.shape[-2:], dtype=torch.bool, device=moments.device)
    if moments.shape[-1] == moments.shape[-2]:
        kept.fill_diagonal_(True)
    chance, power = (x.masked_fill(kept, 0).sum() for x in (noise, moments.square()))
    share = (chance / power.clamp(min=torch.finfo(power.dtype).tiny)).clamp(max=1)
    return torch.where(kept, moments, moments * (1 - share))


def measure_moments(layer: Layer, shape: torch.Size, *, dtype: torch.dtype = torch.float32) -> Moments:
    """Return the shrunk moments of a layer's inputs over all batches, summed in float64 and given as `dtype`.

    `shape` is the weight's.
    """
    groups, every = count_groups(layer.node), 0
    sums, shifts = Sums(), list[Tensor]()
    for tensors in layer.tensors():
        for part in cut_batch(tensors, shape, PART):
            if every == 0:
                positions = unfold(part[0][:1], layer.node, shape).shape[-1] * layer.count
                every = choose_every(positions, POSITIONS)
            given, exact = (unfold(x, layer.node, shape, every) for x in part[:2])
            seen = [given, exact - given, *(fold_outputs(y, layer.node, groups, every) for y in part[2:])]
            # Nearly centred: products of large means would drown the variance, and its noise.
            shifts = shifts or [x.mean(-1, keepdim=True) for x in seen]
            sums.add([x - shift for x, shift in zip(seen, shifts, strict=True)])
    means, moments = sums.read()
    means = [(mean + shift.squeeze(-1)).to(dtype) for mean, shift in zip(means, shifts, strict=True)]
    moments = [x.to(dtype) for x in moments]
    rest = (moments[2], means[2]) if len(moments) > 2 else (None, None)
    return Moments(moments[0], moments[0] + moments[1], means[0], means[0] + means[1], *rest)
