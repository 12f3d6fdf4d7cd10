"""Second moments of a layer's inputs (and outputs): all that the closed-form methods need to know of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from jettison.graph.layers import Layer, flatten_outputs, unfold_patches
from jettison.graph.trace import Batch, run_nodes
from jettison.progress import track

WIDEST_GRAM = 8192
"""Columns above which no Gram matrix is kept: at float64 it would take more than half a gigabyte."""
SPARE = 8
"""Positions to draw from, as a multiple of those drawn."""
CHUNK = 2048
"""Positions whose products are summed before they are added to the float64 totals."""


@dataclass
class Moments:
    """Sums over `count` positions, per group of the convolution, in float64.

    Shapes: `xx` (groups, in, in), `yx` (groups, out, in), `x` (groups, in), `y` and `yy` (groups, out); `yy`
    is the sum of squares of each output.
    """

    count: int
    xx: Tensor
    yx: Tensor
    x: Tensor
    y: Tensor
    yy: Tensor

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add positions: `inputs` (n, groups, in) and `outputs` (n, groups, out).

        Products of up to `CHUNK` positions are summed in float32 (or wider, as given), then added in float64:
        twice as fast as float64 throughout, and the error stays far below the ridge.
        """
        for x, y in zip(inputs.split(CHUNK), outputs.split(CHUNK), strict=True):
            a, b = x.transpose(0, 1), y.transpose(0, 1)
            a, b = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (a, b))
            self.count += a.shape[1]
            self.xx += (a.transpose(1, 2) @ a).double()
            self.yx += (b.transpose(1, 2) @ a).double()
            self.x += a.sum(1, dtype=torch.float64)
            self.y += b.sum(1, dtype=torch.float64)
            self.yy += (b * b).sum(1, dtype=torch.float64)

    def centre(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return covariances `xx`, `yx` and variances `yy`, all divided by the count."""
        n = max(self.count, 1)
        mx, my = self.x / n, self.y / n
        xx = self.xx / n - mx[:, :, None] * mx[:, None, :]
        yx = self.yx / n - my[:, :, None] * mx[:, None, :]
        return xx, yx, self.yy / n - my * my


def make_moments(groups: int, inputs: int, outputs: int, device: torch.device) -> Moments:
    """Return moments of nothing yet."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return Moments(
        0,
        zeros(groups, inputs, inputs),
        zeros(groups, outputs, inputs),
        zeros(groups, inputs),
        zeros(groups, outputs),
        zeros(groups, outputs),
    )


def collect_moments(
    module: fx.GraphModule, layers: Sequence[Layer], batches: Sequence[Batch], *, positions: int, seed: int
) -> dict[fx.Node, Moments]:
    """Run the batches once and return the moments of each layer's inputs and outputs.

    At most about `positions` positions are taken per layer, drawn at random with `seed`. Layers whose Gram
    matrix would be wider than `WIDEST_GRAM`, and 3-d convolutions, are left out.
    """
    by_node = {layer.node: layer for layer in layers}
    found: dict[fx.Node, Moments] = {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for batch in track(batches, "Collecting statistics"):
            for node, value, values in run_nodes(module, batch):
                layer = by_node.get(node)
                if layer is None:
                    continue
                source = node.args[0]
                assert isinstance(source, fx.Node)
                pair = sample_positions(layer, values[source], value, positions // len(batches) + 1, generator)
                if pair is not None:
                    if node not in found:
                        x, y = pair
                        found[node] = make_moments(x.shape[1], x.shape[2], y.shape[2], x.device)
                    found[node].add(*pair)
    return found


def sample_positions(
    layer: Layer, x: Tensor, y: Tensor, limit: int, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """Return up to `limit` positions of a layer's unfolded input and output; None where that is too wide."""
    weight = layer.node.args[1].meta["val"]  # type: ignore[union-attr]
    if weight[0].numel() > WIDEST_GRAM:
        return None
    enough = -(-SPARE * limit // max(1, math.prod(y.shape[2:])))
    if layer.operator == "conv" and enough < len(x):
        # Unfolding is the dear part: large pictures give more than enough positions from a few samples.
        chosen = torch.randperm(len(x), generator=generator)[:enough].to(x.device)
        x, y = x[chosen], y[chosen]
    patches = unfold_patches(layer, x)
    if patches is None:
        return None
    outputs = flatten_outputs(layer, y)
    if len(patches) > limit:
        index = torch.randperm(len(patches), generator=generator)[:limit].to(patches.device)
        patches, outputs = patches[index], outputs[index]
    return patches, outputs
