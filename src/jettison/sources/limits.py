"""Budgets, numbers and shapes as people write them on a command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jettison.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dimension:
    """Something a budget limits: its two fields of Budget, units as multiples of the absolute one's, and an example."""

    relative: str
    absolute: str
    units: dict[str, float]
    example: str


LATENCY = Dimension("latency", "latency_ms", {"us": 1e-3, "ms": 1.0, "s": 1e3}, "4ms")
SIZE = Dimension(
    "size", "size_mb", {"kb": 1e-3, "mb": 1.0, "gb": 1e3, "kib": 1.024e-3, "mib": 1.048576, "gib": 1.073741824e3}, "2MB"
)
MACS = Dimension("macs", "mmacs", {"k": 1e-3, "m": 1.0, "g": 1e3}, "30M")


def read_limit(text: str, dimension: Dimension) -> tuple[str, float]:
    """Return the Budget field and value of `0.5`, `50%` (shares of the original) or `4ms` (absolute).

    Raises InputError where the text is neither, and says how to write both.
    """
    ways = f"Write a share of the original in (0, 1], like 0.5 or 50%, or an absolute limit, like {dimension.example}."
    match = re.fullmatch(r"\s*([-+.\d]+(?:e[-+]?\d+)?)\s*([a-z%]*)\s*", text.lower())
    try:
        amount = float(match[1]) if match else math.nan
    except ValueError:
        amount = math.nan
    if match is None or not math.isfinite(amount):
        raise InputError(f"{text!r} is not a number with a unit. {ways}")
    unit = match[2]
    if unit in dimension.units:
        if amount <= 0:
            raise InputError(f"{text!r} must be positive. {ways}")
        return dimension.absolute, amount * dimension.units[unit]
    if unit not in ("", "%"):
        raise InputError(f"{text!r} has the unknown unit {unit!r}; known are {', '.join(dimension.units)}. {ways}")
    share = amount / 100 if unit else amount
    if not 0 < share <= 1:
        raise InputError(f"{text!r} is not a share in (0, 1]. {ways}")
    return dimension.relative, share


def read_numbers(text: str) -> tuple[float, ...]:
    """Return the finite numbers between the commas of `0.485,0.456,0.406`; raises InputError."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{text!r} is no list of numbers. Write them between commas, like 0.485,0.456,0.406.")
    return numbers


def read_picture_size(text: str) -> tuple[int, int]:
    """Return `(height, width)` of `224` or `256,192`; raises InputError."""
    sizes = _read_sizes(text)
    if len(sizes) > 2:
        raise InputError(f"{text!r} has {len(sizes)} numbers. Give one side, like 224, or height and width: 256,192.")
    return sizes[0], sizes[-1]


def make_input(text: str) -> Tensor:
    """Return an input of shape `1,3,224,224` (seeded normal numbers) or `1,128:int64` (zeros); raises InputError."""
    import torch

    shape_text, _, kind = text.partition(":")
    shape = _read_sizes(shape_text)
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{kind!r} in the shape {text!r} is no dtype of torch. Write for example 1,128:int64.")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _read_sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{text!r} is no list of sizes. Write whole numbers of at least 1 between commas.")
    return tuple(map(int, parts))
