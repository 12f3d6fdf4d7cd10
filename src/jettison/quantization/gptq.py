"""GPTQ (Frantar et al., 2023): round a weight column by column, each column's error made up for by the later ones.

We depart from the paper in five places. Second moments are taken about the mean, and the bias takes the mean's error,
which is the least-squares optimum over both. Before rounding, the weight is refitted so that on the *quantized* inputs
it gives what the float layer gave on float inputs; a layer whose output is added to another tensor also makes up for
what that one lacks, as far as its own inputs tell. Scales are searched with the diagonal of the Hessian as importance.
After the one pass, columns are revisited with all others fixed (QuantEase, Behdin et al., 2023), which never raises the
error. Convolutions are unfolded; each group has its own Hessian, and all groups are done at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from jettison.quantization.bits import read_levels
from jettison.quantization.fold import copy_graph
from jettison.quantization.ranges import GRID_POINTS, SMALLEST_SHARE
from jettison.quantization.replay import Batches, Layer, walk_layers
from jettison.quantization.weights import (
    choose_every,
    count_groups,
    cut_batch,
    find_smallest_scale,
    fold_outputs,
    read_weight,
    split_rows,
    unfold,
    write_weight,
)
from jettison.targets.integer import IntegerScheme, Levels

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it."""
ROUNDS, SWEEPS = 2, 2
"""How often scales are fitted to the integers, and how often then all columns are revisited."""
BLOCK = 128
POSITIONS = 2**18
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


def measure_moments(layer: Layer, shape: torch.Size, *, dtype: torch.dtype = torch.float32) -> Moments:
    """Return the moments of a layer's inputs over all batches, summed in float64 and given as `dtype`."""
    sums: list[Tensor] = []
    groups, count, every = count_groups(layer.node), 0, 0
    for tensors in layer.tensors():
        for part in cut_batch(tensors, shape):
            if every == 0:
                positions = unfold(part[0][:1], layer.node, shape).shape[-1] * layer.count
                every = choose_every(positions, POSITIONS)
            columns, floats = (unfold(x, layer.node, shape, every) for x in part[:2])
            gaps = [fold_outputs(y, layer.node, groups, every) for y in part[2:]]
            found = [columns @ columns.mT, columns.sum(-1)]
            for other in (floats, *gaps):
                found += [other @ columns.mT, other.sum(-1)]
            sums = [a + b.double() for a, b in zip(sums, found, strict=True)] if sums else [b.double() for b in found]
            count += columns.shape[-1]
    products, means = [x / count for x in sums[::2]], [x / count for x in sums[1::2]]
    centred = [p - m.unsqueeze(2) * means[0].unsqueeze(1) for p, m in zip(products, means, strict=True)]
    centred, means = [x.to(dtype) for x in centred], [x.to(dtype) for x in means]
    rest = (centred[2], means[2]) if len(centred) > 2 else (None, None)
    return Moments(centred[0], centred[1], means[0], means[1], *rest)


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Add a share of the mean diagonal to the diagonal; inputs that never vary get a step of size 1."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    extra = damping * diagonal.mean(-1, keepdim=True).expand_as(diagonal)
    extra = torch.where(extra > 0, extra, torch.ones_like(extra))
    return hessian + torch.diag_embed(extra)


def refit(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """Return the weight that gives on quantized inputs, by least squares, what `weight` gives on float ones.

    Directions without variance in the calibration inputs are held to `weight` by the damping.
    """
    damped = damp(moments.own, damping)
    held = damped - moments.own
    wanted = weight @ (moments.cross + held)
    if moments.missing is not None:
        wanted = wanted + moments.missing
    solved: Tensor = torch.linalg.solve(damped, wanted, left=False)
    return solved


def search_scale(weight: Tensor, importance: Tensor, levels: Levels, smallest: Tensor) -> Tensor:
    """Return for each row the scale with the least rounding error, inputs weighed by `importance`.

    `weight` is `(groups, rows, inputs)`, `importance` `(groups, inputs)`, `smallest` and the result `(groups, rows)`.
    """
    most = (weight.abs().amax(-1) / levels.q_max).clamp(min=1e-30)
    best, least = most.clone(), torch.full_like(most, float("inf"))
    weighed = importance.unsqueeze(1)
    for share in torch.linspace(1.0, SMALLEST_SHARE, GRID_POINTS, dtype=most.dtype):
        scale = (most * share).unsqueeze(-1)
        error = (round_to(weight, scale, levels) * scale - weight).square().mul_(weighed).sum(-1)
        best, least = torch.where(error < least, most * share, best), torch.minimum(error, least)
    return torch.maximum(best.clamp(min=float(best.max()) * 2.0**-12), smallest)


def round_to(weight: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Return the nearest integers."""
    return torch.round(weight / scale).clamp_(levels.q_min, levels.q_max)


def round_gptq(weight: Tensor, hessian: Tensor, scale: Tensor, levels: Levels, *, damping: float = DAMPING) -> Tensor:
    """Return the integers of one GPTQ pass, columns of largest Hessian diagonal first.

    `weight` `(groups, rows, inputs)`, `hessian` `(groups, inputs, inputs)`, `scale` `(groups, rows)`.
    With a diagonal Hessian this is rounding to nearest.
    """
    hessian = damp(hessian, damping)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    hessian = _take(_take(hessian, order, 2), order, 1)
    # Inputs first, so that what one step touches lies together.
    left, scale = _take(weight, order, 2).mT.contiguous(), scale.unsqueeze(1)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    integers = torch.empty_like(left)
    count = left.shape[1]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        block, within = left[:, start:end], upper[:, start:end, start:end]
        errors = torch.empty_like(block)
        for k in range(end - start):
            column = block[:, k : k + 1]
            chosen = round_to(column, scale, levels)
            integers[:, start + k : start + k + 1] = chosen
            error = (column - chosen * scale) / within[:, k, k].view(-1, 1, 1)
            block[:, k + 1 :] -= within[:, k, k + 1 :].unsqueeze(-1) * error
            errors[:, k : k + 1] = error
        left[:, end:] -= upper[:, start:end, end:].mT @ errors
    back = torch.empty_like(integers).scatter_(1, order.unsqueeze(2).expand_as(integers), integers)
    return back.mT.contiguous()


def _take(matrix: Tensor, order: Tensor, axis: int) -> Tensor:
    index = order.unsqueeze(3 - axis).expand_as(matrix)
    return matrix.gather(axis, index)


def revisit(
    weight: Tensor, integers: Tensor, hessian: Tensor, scale: Tensor, levels: Levels, *, sweeps: int = SWEEPS
) -> Tensor:
    """Return integers of no greater error: each column in turn takes its best value with the others fixed."""
    count, row_scale = weight.shape[-1], scale.unsqueeze(1)
    whole, exact = integers.mT.contiguous(), weight.mT.contiguous()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30)
    gap = exact - whole * row_scale
    pull = hessian @ gap
    for _ in range(sweeps):
        changed = False
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            near, within = pull[:, start:end].clone(), hessian[:, start:end, start:end]
            steps = torch.empty_like(near)
            for k in range(end - start):
                at = slice(start + k, start + k + 1)
                best = exact[:, at] + near[:, k : k + 1] / diagonal[:, at].unsqueeze(-1) - gap[:, at]
                chosen = round_to(best, row_scale, levels)
                steps[:, k : k + 1] = (whole[:, at] - chosen) * row_scale
                whole[:, at] = chosen
                near += within[:, :, k : k + 1] * steps[:, k : k + 1]
            gap[:, start:end] += steps
            pull += hessian[:, :, start:end] @ steps
            changed = changed or bool(steps.any())
        if not changed:
            break
    return whole.mT.contiguous()


def fit_scale(weight: Tensor, integers: Tensor, hessian: Tensor, scale: Tensor, smallest: Tensor) -> Tensor:
    """Return the scale of least error for given integers; rows without integers keep theirs."""
    pulled = integers @ hessian
    norm, agreement = (pulled * integers).sum(-1), (pulled * weight).sum(-1)
    found = agreement / norm
    return torch.where((norm > 0) & (found > smallest), found, scale)


def measure_error(weight: Tensor, integers: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """Return for each row the mean squared error of the output, means left out."""
    gap = weight - integers * scale.unsqueeze(-1)
    return (gap @ hessian).mul_(gap).sum(-1)


def solve_layer(
    weight: Tensor, moments: Moments, scale: Tensor, smallest: Tensor, levels: Levels, *, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Return integers and scales for a refitted weight: search, one pass, then revisits and scales in turn."""
    hessian = damp(moments.own, damping)
    scale = search_scale(weight, moments.own.diagonal(dim1=-2, dim2=-1), levels, smallest)
    integers = round_gptq(weight, moments.own, scale, levels, damping=damping)
    for _ in range(ROUNDS):
        scale = fit_scale(weight, integers, hessian, scale, smallest)
        integers = revisit(weight, integers, hessian, scale, levels, sweeps=SWEEPS)
    return integers, scale


def apply_gptq(
    folded: GraphModule,
    converted: GraphModule,
    batches: Batches,
    scheme: IntegerScheme,
    *,
    seed: int = 0,
    damping: float = DAMPING,
    dtype: torch.dtype = torch.float32,
) -> GraphModule:
    """Return a converted graph whose layers are rounded one after the other by GPTQ; nothing is drawn."""
    converted = copy_graph(converted)
    for layer in walk_layers(folded, converted, batches):
        found = read_weight(converted, layer.node)
        shape, groups = found.integers.shape, count_groups(layer.node)
        rows = split_rows(layer.weight.to(dtype), groups)
        moments = measure_moments(layer, shape, dtype=dtype)
        smallest = find_smallest_scale(found).to(dtype).view(groups, -1)
        target = refit(rows, moments, damping)
        integers, scale = solve_layer(
            target, moments, found.scale.to(dtype).view(groups, -1), smallest, read_levels(layer.node), damping=damping
        )
        bias, own = found.bias, layer.bias
        if bias is not None and own is not None:
            rounded = integers * scale.unsqueeze(-1)
            means = rows @ moments.float_mean.unsqueeze(-1) - rounded @ moments.mean.unsqueeze(-1)
            if moments.missing_mean is not None:
                means = means + moments.missing_mean.unsqueeze(-1)
            bias = own.float() + means.flatten().float()
        write_weight(
            converted,
            layer.node,
            replace(found, integers=integers.float().reshape(shape), scale=scale.float().flatten(), bias=bias),
        )
    return converted
