"""What integer arithmetic a target has, as plain data, and the one rounding rule every room uses.

Contract: `q = clamp(round_half_even(x / s) + z, q_min, q_max)` and `x' = (q - z) * s`, in float32, by division.
Multiplying with a reciprocal differs rarely but not never, and ONNX's QuantizeLinear divides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The integers a tensor may take, ends included; symmetric ones have zero point 0."""

    q_min: int
    q_max: int
    symmetric: bool


LAYERS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default")
"""Operators with weights that every integer target runs, their output channels first."""
CLAMPS = frozenset({"aten.relu.default", "aten.relu6.default", "aten.hardtanh.default", "aten.clamp.default"})
"""Activations that a range covers."""
MOVES = frozenset(
    {
        "aten.constant_pad_nd.default",
        "aten.pad.default",
        "aten.max_pool2d.default",
        "aten.flatten.using_ints",
        "aten.view.default",
        "aten.reshape.default",
        "aten.permute.default",
        "aten.transpose.int",
    }
)
"""Operators whose output holds nothing but numbers of their input, or zero."""


@dataclass(frozen=True)
class IntegerScheme:
    """Which operators a target runs on integers, and how their tensors are stored.

    `weighted` maps an ATen operator to its weight's output-channel axis. An operator in `float_output` may give
    float32 straight from its integer kernel; the others must be followed by a quantized tensor. `fused` are
    activations that disappear into the range of the operator before them. `requantized` have their own output
    range, `shared` (concatenation) one range for all inputs and the output, `inherited` the range of their input.
    `summed` are weighted operators whose kernel adds another tensor before it rounds: where an addition is their only
    reader, they have no range of their own. All operator names are like "aten.conv2d.default". `bits` gives single
    layers, by name, fewer bits than the target's own: those of the weight and those of the tensor it multiplies. `cuts`
    says if the target's files keep a grid of activations that is coarser than 8 bits; where they do not, there is none.
    """

    target: str
    activation: Levels
    weight: Levels
    weighted: Mapping[str, int]
    float_output: frozenset[str]
    fused: frozenset[str]
    requantized: frozenset[str]
    shared: frozenset[str]
    inherited: frozenset[str]
    why: str
    bits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    summed: frozenset[str] = frozenset()
    cuts: bool = True

    @property
    def integer(self) -> frozenset[str]:
        """The operators that compute on integers, or move them."""
        return frozenset({*self.weighted, *self.requantized, *self.shared, *self.inherited})


def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor | int, levels: Levels) -> Tensor:
    """Return the integers of `x` as float32; `scale` and `zero_point` broadcast against `x`."""
    import torch

    return torch.clamp(torch.round(x / scale) + zero_point, levels.q_min, levels.q_max)


def dequantize_linear(q: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """Return the numbers that the integers `q` stand for, as float32."""
    import torch

    return (q.to(torch.float32) - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, levels: Levels) -> Tensor:
    """Round `x` to the grid of `levels` and come back: what the target's arithmetic leaves of it."""
    return dequantize_linear(quantize_linear(x, scale, zero_point, levels), scale, zero_point)


@functools.cache
def quantize_operator() -> Any:
    """Return the operator `jettison::quantize_per_tensor`, registered on first use.

    PT2E's own operator multiplies by a reciprocal; this one divides, as the runtimes do. Both take
    `(x, scale, zero_point, quant_min, quant_max, dtype)`.
    """
    import torch

    def divide(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
        # A tensor of one element, not a scalar: torch's CUDA division by a scalar multiplies with its reciprocal.
        step = torch.full((1,), scale, dtype=torch.float32, device=x.device)
        return quantize_linear(x, step, zero_point, Levels(quant_min, quant_max, False)).to(dtype)

    torch.library.define(
        "jettison::quantize_per_tensor",
        "(Tensor x, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype) -> Tensor",
    )
    torch.library.impl("jettison::quantize_per_tensor", "CompositeExplicitAutograd", divide)
    torch.library.register_fake(
        "jettison::quantize_per_tensor", lambda x, s, z, low, high, dtype: torch.empty_like(x, dtype=dtype)
    )
    return torch.ops.jettison.quantize_per_tensor.default
