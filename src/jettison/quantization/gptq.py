"""GPTQ (Frantar et al., 2023): round a weight column by column, each column's error made up for by the later ones.

We depart from the paper in six places. Second moments are taken about the mean, and the bias takes the mean's error,
which is the least-squares optimum over both; what chance put into them is taken out (see `moments`). Before rounding,
the weight is refitted so that on the *quantized* inputs it gives what the float layer gave on float inputs; a layer
whose output is added to another tensor also makes up for what that one lacks, as far as its own inputs tell. Scales are
searched with the diagonal of the Hessian as importance, and around the best a few more are tried with a whole pass.
Then columns are revisited with all others fixed (QuantEase, Behdin et al., 2023), which never raises the error.
Convolutions are unfolded; each group has its own Hessian, and all groups are done at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from jettison.quantization.bits import read_levels
from jettison.quantization.fold import copy_graph
from jettison.quantization.moments import Moments, measure_moments
from jettison.quantization.ranges import GRID_POINTS, SMALLEST_SHARE
from jettison.quantization.replay import Batches, walk_layers
from jettison.quantization.weights import count_groups, find_smallest_scale, read_weight, split_rows, write_weight
from jettison.targets.integer import IntegerScheme, Levels

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it."""
SHARES = (1.0, 0.82, 0.9, 1.1, 1.2)
"""Scales that a pass is made with, in units of the one with the least error of rounding to nearest: where later columns
make up for earlier ones, another may serve better."""
ROUNDS, SWEEPS = 2, 2
"""How often scales are fitted to the integers, and how often then all columns are revisited."""
BLOCK = 128


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
    weight: Tensor, moments: Moments, smallest: Tensor, levels: Levels, *, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Return integers and scales for a refitted weight: the best of a pass with each of a few scales, then revised."""
    hessian = damp(moments.own, damping)
    first = search_scale(weight, moments.own.diagonal(dim1=-2, dim2=-1), levels, smallest)
    integers, scale = torch.zeros_like(weight), first
    least = torch.full_like(first, float("inf"))
    for share in SHARES:
        tried = torch.maximum(first * share, smallest)
        found = round_gptq(weight, moments.own, tried, levels, damping=damping)
        error = measure_error(weight, found, hessian, tried)
        better = error < least
        integers, scale = torch.where(better.unsqueeze(-1), found, integers), torch.where(better, tried, scale)
        least = torch.minimum(error, least)
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
        integers, scale = solve_layer(target, moments, smallest, read_levels(layer.node), damping=damping)
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
