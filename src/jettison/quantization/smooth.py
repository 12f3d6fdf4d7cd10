"""SmoothQuant (Xiao et al., 2023): outliers of an activation's channels move into the weights that read it.

A channel is divided by s = max|x|^a / max|w|^(1-a), and its weights multiplied. We choose `a` for each tensor by the
error of the readers' outputs with both rounded, 0 (nothing moves) included, and move s into whatever writes the tensor:
a normalisation, as in the paper, or a linear layer or convolution, also through a ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from jettison.quantization.fold import copy_graph, name_operator, read_attribute
from jettison.quantization.links import Link, find_links, measure_reach, scale_channels
from jettison.quantization.ranges import choose_scale, choose_weight_scale
from jettison.quantization.replay import Batches, Replay
from jettison.targets.integer import IntegerScheme, fake_quantize

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ROWS = 4096
"""Rows of a tensor that are kept to judge by, evenly spaced."""
SMALLEST = 1e-5
"""Largest values below this share of the tensor's own count as this."""


def smooth(folded: GraphModule, batches: Batches, scheme: IntegerScheme, *, seed: int = 0) -> GraphModule:
    """Return the network with smoothed tensors before its linear layers, its function as it was; draws nothing."""
    copied = copy_graph(folded)
    links = [link for link in find_links(copied) if _is_linear(link)]
    # Factors of one link leave what the others read as it is, so that one run serves them all.
    for link, rows, most in list(observe(copied, links, batches)):
        factors = choose_factors(copied, link, rows, most, scheme)
        if factors is not None:
            scale_channels(copied, link, factors)
    return copied


def _is_linear(link: Link) -> bool:
    return all(name_operator(reader) == "aten.linear.default" for reader in link.readers)


def observe(module: GraphModule, links: Sequence[Link], batches: Batches) -> Sequence[tuple[Link, Tensor, Tensor]]:
    """Return for each link some rows `(rows, channels)` of its tensor and each channel's largest absolute value."""
    found, replay = [], Replay(module, batches)
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    with torch.no_grad():
        for link in sorted(links, key=lambda link: min(order[r] for r in link.readers)):
            replay.run_to(min(link.readers, key=order.__getitem__))
            tensors = [x.reshape(-1, x.shape[-1]) for x in replay.read_all(link.source)]
            total = sum(map(len, tensors))
            step = max(1, total // ROWS) | 1
            most = torch.stack([x.abs().amax(0) for x in tensors]).amax(0)
            found.append((link, torch.cat(tensors)[::step].clone(), most))
    return found


def choose_factors(module: GraphModule, link: Link, rows: Tensor, most: Tensor, scheme: IntegerScheme) -> Tensor | None:
    """Return the factors of the exponent with the least error of the readers' rounded outputs; None if none helps."""
    weights = [read_attribute(module, str(_weight(reader).target)) for reader in link.readers]
    reach = measure_reach(module, link)
    least, best = measure_error(rows, weights, torch.ones_like(most), scheme), None
    for alpha in ALPHAS:
        factors = _balance(most, alpha) / _balance(reach, 1 - alpha)
        factors = factors / factors.log().mean().exp()
        error = measure_error(rows, weights, factors, scheme)
        if error < least:
            least, best = error, factors
    return best


def _balance(values: Tensor, power: float) -> Tensor:
    return values.clamp(min=max(float(values.max()) * SMALLEST, 1e-30)).pow(power)


def measure_error(rows: Tensor, weights: Sequence[Tensor], factors: Tensor, scheme: IntegerScheme) -> float:
    """Return the squared error of what the readers give for `rows / factors` with weights times `factors`, rounded."""
    x = rows / factors
    low, high = x.aminmax()
    scale, zero_point = choose_scale(low, high, scheme.activation)
    x = fake_quantize(x, scale, zero_point, scheme.activation)
    error = 0.0
    for weight in weights:
        scaled = weight * factors
        step = choose_weight_scale(scaled, 0, scheme.weight)
        rounded = fake_quantize(scaled, step.unsqueeze(1), 0, scheme.weight)
        error += float((F.linear(x, rounded) - F.linear(rows, weight)).square().mean())
    return error


def _weight(reader: Node) -> Node:
    weight = reader.args[1]
    assert isinstance(weight, Node)
    return weight
