"""Linear layers with small weights, as torch operators: what they compute, and what the runtimes make of it.

Weights lie as `(inputs, outputs)`, because the runtimes fuse only that order. Sums here are float32 sums of what the
integers stand for, so that a runtime differs by the order of summation and by nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jettison.targets.integer import Levels, fake_quantize

if TYPE_CHECKING:
    from torch import Tensor

SEVEN_BITS = 127.0


@dataclass(frozen=True)
class GroupKernels:
    """How a runtime multiplies with weights in groups.

    `whole`: it takes only layers whose width is a multiple of the group. It rounds activations to 8 bits in groups of
    `rounding` inputs where that divides the weights' group, else not at all; None means in the weights' own groups.
    """

    whole: bool
    rounding: int | None


GROUP_KERNELS = {"onnxruntime": GroupKernels(False, None), "openvino": GroupKernels(True, 32)}
"""Measured: module and runtime agree to 1e-6 with these, and differ by 3e-3 with any other choice."""


def expand_groups(values: Tensor, group: int, size: int) -> Tensor:
    """Repeat one row for each group of `group` inputs, the last of which may be smaller; gives `size` rows."""
    return values.repeat_interleave(group, 0)[:size]


def dequantize_groups(weight: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    """Return the numbers that grouped integers `(inputs, outputs)` stand for, as float32."""
    import torch

    shifted = weight.to(torch.float32)
    if zero_point is not None:
        shifted = shifted - expand_groups(zero_point.to(torch.float32), group, weight.shape[0])
    return shifted * expand_groups(scale, group, weight.shape[0])


def round_groups(x: Tensor, group: int) -> Tensor:
    """Round each group of inputs of each row to 255 steps around zero, as the 4-bit kernels do before they multiply.

    ONNX Runtime (accuracy level 4, its default) and OpenVINO both multiply integers with integers; both take the
    largest size in the group over 127 as the step. A value within 1e-7 of the middle between two integers may go to the
    other one there, which happens to about one in 200,000.
    """
    import torch

    size = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -size % group)).unflatten(-1, (-1, group))
    step = padded.abs().amax(-1, keepdim=True) / SEVEN_BITS
    step = torch.where(step > 0, step, torch.ones_like(step))
    rounded: Tensor = torch.round(padded / step) * step
    return rounded.flatten(-2)[..., :size]


@functools.cache
def groups_operator() -> Any:
    """Return `jettison::linear_groups(x, weight, scale, zero_point?, bias?, group, bits, rounding)`.

    `weight` (inputs, outputs) is int8, or uint8 beside a zero point; `scale` and `zero_point` are (groups, outputs).
    `bits` (4 or 8) is what the exported file stores; `rounding` the size of the groups of inputs in which the runtime
    rounds activations, 0 where it does not.
    """
    import torch

    def compute(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        group: int,
        bits: int,
        rounding: int,
    ) -> Tensor:
        y = (round_groups(x, rounding) if rounding else x) @ dequantize_groups(weight, scale, zero_point, group)
        return y if bias is None else y + bias

    _define(
        "linear_groups",
        "(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int group, int bits, int rounding)",
        compute,
    )
    return torch.ops.jettison.linear_groups.default


def choose_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return step and zero point (0 to 255) for all values of `x`, as ONNX's DynamicQuantizeLinear defines them."""
    import torch

    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    step = (high - low) / 255.0
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, torch.round(torch.clamp(-low / step, 0.0, 255.0))


@functools.cache
def dynamic_operator() -> Any:
    """Return `jettison::linear_dynamic(x, weight, scale, bias?)`: activations get their range from each call's input.

    `weight` (inputs, outputs) is int8 and `scale` (outputs,). The range is that of the whole tensor, as ONNX's
    DynamicQuantizeLinear takes it: what one row gives depends, a little, on the rows beside it.
    """
    import torch

    def compute(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        step, zero_point = choose_dynamic(x)
        y = fake_quantize(x, step, zero_point, Levels(0, 255, False)) @ (weight.to(torch.float32) * scale)
        return y if bias is None else y + bias

    _define("linear_dynamic", "(Tensor x, Tensor weight, Tensor scale, Tensor? bias)", compute)
    return torch.ops.jettison.linear_dynamic.default


@functools.cache
def product_operator() -> Any:
    """Return `jettison::matmul_dynamic(a, b)`: a product of two activations, each with one range."""
    import torch

    def round_whole(x: Tensor) -> Tensor:
        return fake_quantize(x, *choose_dynamic(x), Levels(0, 255, False))

    torch.library.define("jettison::matmul_dynamic", "(Tensor a, Tensor b) -> Tensor")
    torch.library.impl(
        "jettison::matmul_dynamic", "CompositeExplicitAutograd", lambda a, b: round_whole(a) @ round_whole(b)
    )
    torch.library.register_fake("jettison::matmul_dynamic", lambda a, b: torch.matmul(a, b))
    return torch.ops.jettison.matmul_dynamic.default


def _define(name: str, arguments: str, compute: Any) -> None:
    import torch

    def describe(x: Tensor, weight: Tensor, *_: object) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=torch.float32)

    torch.library.define(f"jettison::{name}", f"{arguments} -> Tensor")
    torch.library.impl(f"jettison::{name}", "CompositeExplicitAutograd", compute)
    torch.library.register_fake(f"jettison::{name}", describe)
