"""Cross-layer equalisation (Nagel et al., 2019): channels of one tensor take scales that serve both layers alike.

With r1 a channel's largest weight where it is written and r2 where it is read, its scale is sqrt(r1 / r2), so that both
become sqrt(r1 r2). The paper pairs single layers; here several may read, and the largest weight among them counts.
Absorbing high biases is left out: measured ranges, which we always have, make up for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from jettison.quantization.fold import copy_graph, name_operator, read_attribute
from jettison.quantization.links import WEIGHTED, Link, find_links, measure_reach, scale_channels
from jettison.quantization.replay import Batches
from jettison.targets.integer import IntegerScheme

SWEEPS = 50
"""Passes over all pairs; a chain of layers needs several, since each layer stands in two pairs."""
CLOSE = 1e-3
"""Factors this near to 1 end the passes."""
LARGEST = 1e4
"""A factor stays within this and its inverse: a channel whose weights are almost nothing needs no more."""


def equalise(
    folded: GraphModule, batches: Batches = (), scheme: IntegerScheme | None = None, *, seed: int = 0
) -> GraphModule:
    """Return the network with equalised weights, its function as it was; reads no inputs and draws nothing.

    Only tensors that a convolution or linear layer writes, through activations that keep positive factors (ReLU,
    PReLU), and that such layers alone read.
    """
    copied = copy_graph(folded)
    links = [link for link in find_links(copied) if name_operator(link.writer) in WEIGHTED]
    for _ in range(SWEEPS):
        furthest = 1.0
        for link in links:
            factors = choose_factors(copied, link)
            scale_channels(copied, link, factors)
            furthest = max(furthest, float(factors.max()), float(1 / factors.min()))
        if furthest < 1 + CLOSE:
            break
    return copied


def choose_factors(module: GraphModule, link: Link) -> Tensor:
    """Return each channel's factor; a channel without weights on one side keeps its scale."""
    written = read_attribute(module, link.parameters[0]).flatten(1).abs().amax(1)
    read = measure_reach(module, link)
    factors = torch.sqrt(written / read).clamp(1 / LARGEST, LARGEST)
    return torch.where((written > 0) & (read > 0), factors, torch.ones_like(factors))
