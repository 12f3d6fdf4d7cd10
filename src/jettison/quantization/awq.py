"""AWQ (Lin et al., 2024): input channels that carry large activations get finer steps for their weights.

A channel's weights are multiplied by s = mean|x|^a before rounding and the tensor before divided by it; `a` is searched
by the error of the outputs, with float activations. Of the paper's search for a clip of the weights nothing is left to
do: the scales of `convert` are already those of least error, and GPTQ's are weighed by the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from jettison.quantization.fold import copy_graph, find_weight, name_operator, read_attribute
from jettison.quantization.links import Link, find_links, scale_channels
from jettison.quantization.ranges import choose_weight_scale
from jettison.quantization.replay import Batches
from jettison.quantization.smooth import observe
from jettison.targets.integer import IntegerScheme, fake_quantize

POWERS = tuple(0.05 * i for i in range(1, 21))
"""Exponents that are tried besides 0."""


def scale_for_weights(folded: GraphModule, batches: Batches, scheme: IntegerScheme, *, seed: int = 0) -> GraphModule:
    """Return the network with scaled input channels of its linear layers, its function as it was; draws nothing."""
    copied = copy_graph(folded)
    links = [
        link for link in find_links(copied) if all(name_operator(r) == "aten.linear.default" for r in link.readers)
    ]
    for link, rows, _ in list(observe(copied, links, batches)):
        factors = choose_factors(copied, link, rows, scheme)
        if factors is not None:
            scale_channels(copied, link, factors)
    return copied


def choose_factors(module: GraphModule, link: Link, rows: Tensor, scheme: IntegerScheme) -> Tensor | None:
    """Return the factors of the exponent with the least error of the readers' outputs; None if none helps."""
    weights = [read_attribute(module, str(find_weight(r).target)) for r in link.readers]  # type: ignore[union-attr]
    gram = rows.mT @ rows / len(rows)
    typical = rows.abs().mean(0)
    typical = typical.clamp(min=max(float(typical.max()) * 1e-4, 1e-30))
    least, best = sum(measure_error(w, torch.ones_like(typical), gram, scheme) for w in weights), None
    for power in POWERS:
        factors = typical.pow(power)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = sum(measure_error(w, factors, gram, scheme) for w in weights)
        if error < least:
            least, best = error, factors
    return best


def measure_error(weight: Tensor, factors: Tensor, gram: Tensor, scheme: IntegerScheme) -> float:
    """Return the mean squared error of the outputs with `weight * factors` rounded, inputs' second moments `gram`."""
    scaled = weight * factors
    step = choose_weight_scale(scaled, 0, scheme.weight)
    gap = fake_quantize(scaled, step.unsqueeze(1), 0, scheme.weight) / factors - weight
    return float((gap @ gram).mul_(gap).sum())
