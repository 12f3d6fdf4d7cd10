"""AdaRound (Nagel et al., 2020): learn for each weight whether to round up or down, by the layer's output.

`W' = s clamp(floor(W / s) + h(V))` with `h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)`, the following clamp included in
the output, and `1 - |2 h - 1|^beta` driving h to 0 or 1 while beta falls from 20 to 2. We depart in five places: the
error is counted in units of what the integers at the start give, so that one weight of the second term serves every
layer, and that weight grows; outputs are drawn from unfolded positions, so that a large picture costs no more; at
the end single weights are flipped as long as that helps; and a channel whose result is no better keeps what it had.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from jettison.progress import track
from jettison.quantization.bits import read_levels
from jettison.quantization.clamps import find_clamp
from jettison.quantization.fold import copy_graph
from jettison.quantization.replay import Batches, Layer, walk_layers
from jettison.quantization.weights import (
    choose_every,
    count_groups,
    cut_batch,
    read_weight,
    split_rows,
    unfold,
    write_weight,
)
from jettison.targets.integer import IntegerScheme, Levels

STEPS = 1000
COLUMNS = 512
"""Output positions that one step looks at."""
POSITIONS = 16_384
"""Output positions of a layer that are kept, evenly over the batches."""
TRAVEL = 10.0
"""Learning rate times steps: however few steps there are, V can cross from one side to the other."""
FASTEST = 0.1
WARM_UP = 0.2
"""Share of the steps before h is driven to its ends."""
BETAS = (20.0, 2.0)
DRIVES = (0.1, 100.0)
"""Weight of the second term, averaged over weights, at the start and at the end; the error counts in units of what it
was at the start. With 0.1 throughout, half of all weights were still undecided after 400 steps."""
FLIPPED = 1024
"""Output positions by which single flips are judged at the end."""
SWEEPS = 3
PAIRED = 16
"""Inputs of a row up to which pairs are flipped too: a depthwise convolution has nine."""
STRETCH = 1.2
SHIFT = -0.1

Ends = tuple[float, float]


def start_rounding(whole: Tensor, exact: Tensor, way: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the lower integers and V of weights `exact = W / s` whose integers are now `whole`.

    An integer that is not the nearest, because a rung before chose so, is where V starts all the same. `way` is how far
    from there towards the weight.
    """
    near = whole + way * (exact - whole).clamp(-0.49, 0.49)
    low = near.floor()
    share = (near - low).clamp(0.01, 0.99)
    return low, torch.logit((share - SHIFT) / STRETCH)


def choose_rate(steps: int) -> float:
    """Return the learning rate of V."""
    return min(FASTEST, TRAVEL / max(steps, 1))


def soften(v: Tensor) -> Tensor:
    """Return h(V), between 0 (down) and 1 (up)."""
    return (torch.sigmoid(v) * STRETCH + SHIFT).clamp(0, 1)


def measure_doubt(v: Tensor, progress: float) -> Tensor:
    """Return the weighted mean of 1 - |2 h - 1|^beta, 0 where all is decided; `progress` runs from 0 to 1."""
    if progress < WARM_UP:
        return v.new_zeros(())
    beta = BETAS[0] + (BETAS[1] - BETAS[0]) * (progress - WARM_UP) / (1 - WARM_UP)
    weight: float = DRIVES[0] * (DRIVES[1] / DRIVES[0]) ** progress
    doubt: Tensor = 1 - (2 * soften(v) - 1).abs().pow(beta).mean()
    return weight * doubt


def learn_rounding(
    weight: Tensor,
    whole: Tensor,
    scale: Tensor,
    bias: Tensor,
    columns: Tensor,
    wanted: Tensor,
    levels: Levels,
    *,
    ends: Ends,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Return integers, none further than one from `weight / scale`, whose outputs are nearest to `wanted`.

    `weight` and `whole` (the integers to start from) are `(groups, rows, inputs)`, `scale` and `bias`
    `(groups, rows)`, `columns` `(groups, inputs, positions)`, `wanted` `(groups, rows, positions)` clamped to `ends`.
    A row keeps `whole` where learning did not lower its error. Needs gradients switched on.
    """
    generator = torch.Generator(device=columns.device).manual_seed(seed)
    step_size, offset = scale.unsqueeze(-1), bias.unsqueeze(-1)

    def run(integers: Tensor, chosen: Tensor, clamped: bool = True) -> Tensor:
        output = integers * step_size @ chosen + offset
        return output.clamp(*ends) if clamped else output

    def measure(integers: Tensor) -> Tensor:
        return (run(integers, columns) - wanted).square().mean(-1)

    low, v = start_rounding(whole, weight / step_size)
    with torch.no_grad():
        before = measure(whole)
    unit = before.sum().clamp(min=1e-12)
    v.requires_grad_(True)
    optimizer = torch.optim.Adam([v], lr=choose_rate(steps))
    total = columns.shape[-1]
    for step in range(steps):
        pick = torch.randint(total, (min(COLUMNS, total),), generator=generator, device=columns.device)
        integers = (low + soften(v)).clamp(levels.q_min, levels.q_max)
        error = (run(integers, columns[..., pick]) - wanted[..., pick]).square().mean(-1).sum() / unit
        loss = error + measure_doubt(v, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = (low + (soften(v) >= 0.5)).clamp(levels.q_min, levels.q_max)
        stride = max(1, total // FLIPPED)
        few = columns[..., ::stride], wanted[..., ::stride]
        learned = flip(learned, low, step_size, run(learned, few[0], clamped=False), *few, levels, ends)
        return torch.where((measure(learned) < before).unsqueeze(-1), learned, whole)


def flip(
    integers: Tensor,
    low: Tensor,
    step_size: Tensor,
    output: Tensor,
    columns: Tensor,
    wanted: Tensor,
    levels: Levels,
    ends: Ends,
) -> Tensor:
    """Round single weights, in small layers also pairs, the other way as long as that lowers their row's error.

    `output` is what `integers` give before the clamp; sizes are those of `learn_rounding`.
    """
    count = integers.shape[-1]
    moves = [[k] for k in range(count)]
    if count <= PAIRED:
        moves += [[j, k] for k in range(count) for j in range(k)]
    integers, output = integers.clone(), output.clone()
    least = (output.clamp(*ends) - wanted).square().mean(-1)
    for _ in range(SWEEPS):
        flipped = False
        for move in moves:
            old = integers[..., move]
            other = (2 * low[..., move] + 1 - old).clamp(levels.q_min, levels.q_max)
            moved = output + (other - old) * step_size @ columns[:, move]
            error = (moved.clamp(*ends) - wanted).square().mean(-1)
            better = error < least
            if bool(better.any()):
                flipped = True
                least = torch.where(better, error, least)
                output = torch.where(better.unsqueeze(-1), moved, output)
                integers[..., move] = torch.where(better.unsqueeze(-1), other, old)
        if not flipped:
            break
    return integers


def apply_adaround(
    folded: GraphModule,
    converted: GraphModule,
    batches: Batches,
    scheme: IntegerScheme,
    *,
    seed: int = 0,
    steps: int = STEPS,
) -> GraphModule:
    """Return a converted graph whose layers' roundings are learned one after the other; scales and biases stay."""
    converted = copy_graph(converted)
    for layer in track(walk_layers(folded, converted, batches), "AdaRound"):
        found = read_weight(converted, layer.node)
        shape, groups = found.integers.shape, count_groups(layer.node)
        bias = layer.bias
        ends = find_clamp(layer.original)
        columns, floats = sample_columns(layer, shape)
        rows = split_rows(layer.weight.float(), groups)
        offset = torch.zeros_like(found.scale) if bias is None else bias.float()
        wanted = (rows @ floats + offset.view(groups, -1, 1)).clamp(*ends)
        own = torch.zeros_like(found.scale) if found.bias is None else found.bias
        with torch.inference_mode(False), torch.enable_grad():
            integers = learn_rounding(
                rows,
                split_rows(found.integers, groups),
                found.scale.view(groups, -1),
                own.view(groups, -1),
                columns,
                wanted,
                read_levels(layer.node),
                ends=ends,
                steps=steps,
                seed=seed,
            )
        write_weight(converted, layer.node, replace(found, integers=integers.reshape(shape)))
    return converted


def sample_columns(layer: Layer, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return positions `(groups, inputs, positions)` of the layer's unfolded quantized and float inputs."""
    parts: list[tuple[Tensor, ...]] = []
    every = 0
    for given, wanted in layer.inputs():
        for part in cut_batch((given, wanted), shape):
            if every == 0:
                positions = unfold(given[:1], layer.node, shape).shape[-1] * layer.count
                every = choose_every(positions, POSITIONS)
            parts.append(tuple(unfold(x, layer.node, shape, every) for x in part))
    columns, floats = (torch.cat(kind, -1) for kind in zip(*parts, strict=True))
    return columns, floats
