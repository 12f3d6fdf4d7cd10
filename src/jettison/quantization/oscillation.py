"""Weights that swing between two integers: counted in a running mean, and frozen where they swing often.

Nagel et al., 2022 ("Overcoming oscillations in quantization-aware training"): a weight near the border of two integers
is pulled over it and back without end. A weight whose frequency of turning back exceeds a limit is set to the integer
it was at most, and stays. The limit falls along a cosine, so that only the worst are frozen early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from jettison.quantization.fold import read_attribute
from jettison.quantization.qat import Spot, read_integers

MOMENTUM = 0.01
FIRST_LIMIT, LAST_LIMIT = 0.04, 0.011
"""Turns per step: above the running mean's own noise of one turn (0.01), as in the paper."""

AfterStep = Callable[[GraphModule, dict[str, Tensor], int], None]


def damp_oscillations(spots: Mapping[str, Spot], steps: int) -> AfterStep:
    """Return what `distil` shall call after each of `steps` steps; ternary and binary weights are left to swing."""
    watched = {name: spot for name, spot in spots.items() if spot.form == "step"}

    def after_step(student: GraphModule, kept: dict[str, Tensor], step: int) -> None:
        limit = LAST_LIMIT + (FIRST_LIMIT - LAST_LIMIT) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
        for name, spot in watched.items():
            weight = read_attribute(student, spot.weight)
            integers, scale = read_integers(student, spot)
            follow(name, integers, kept)
            freeze(name, limit, kept)
            grid = kept[f"{name}/mean"].round() * scale.view([-1 if a == spot.axis else 1 for a in range(weight.ndim)])
            weight.copy_(torch.where(kept[f"{name}/frozen"], grid, weight))

    return after_step


def follow(name: str, integers: Tensor, kept: dict[str, Tensor]) -> None:
    """Update a layer's counts with the integers its weights round to now."""
    if f"{name}/last" not in kept:
        kept[f"{name}/last"] = integers.clone()
        kept[f"{name}/mean"] = integers.clone()
        kept[f"{name}/direction"] = torch.zeros_like(integers)
        kept[f"{name}/frequency"] = torch.zeros_like(integers)
        kept[f"{name}/frozen"] = torch.zeros_like(integers, dtype=torch.bool)
        return
    direction = torch.sign(integers - kept[f"{name}/last"])
    moved = direction != 0
    turned = moved & (direction == -kept[f"{name}/direction"])
    kept[f"{name}/frequency"].lerp_(turned.float(), MOMENTUM)
    held = kept[f"{name}/frozen"]
    kept[f"{name}/mean"] = torch.where(held, kept[f"{name}/mean"], kept[f"{name}/mean"].lerp(integers, MOMENTUM))
    kept[f"{name}/direction"] = torch.where(moved, direction, kept[f"{name}/direction"])
    kept[f"{name}/last"] = integers.clone()


def freeze(name: str, limit: float, kept: dict[str, Tensor]) -> None:
    """Freeze the weights of a layer that turn back more often than `limit` times per step."""
    kept[f"{name}/frozen"] |= kept[f"{name}/frequency"] > limit


def count_frozen(kept: Mapping[str, Tensor]) -> int:
    """Return how many weights are frozen."""
    return sum(int(value.sum()) for name, value in kept.items() if name.endswith("/frozen"))
