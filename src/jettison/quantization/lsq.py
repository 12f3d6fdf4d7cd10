"""Rounding that learns: step sizes and offsets get gradients, weights and activations pass theirs straight through.

Learned step size quantization (LSQ, Esser et al., 2020) with the learned offset of LSQ+ (Bhalgat et al., 2020). What
the forward gives is bit for bit what the converted graph gives. We depart from the papers in three places. The
parameter is the logarithm of the step over its first value: the step stays positive, and Adam, whose moves have one
length, changes steps of any size alike. The offset is rounded to a whole zero point, because integer kernels have no
other. Ternary weights (Li et al., 2016) and binary ones (Rastegari et al., 2016) have one scale per output channel, and
their gradient passes unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jettison.quantization.convert import BIAS_LIMIT

TERNARY_THRESHOLD = 0.7
"""Weights below this share of the channel's mean magnitude become 0 (Li et al., 2016)."""


class _LearnedRounding(torch.autograd.Function):
    """Fake quantization with the gradients of LSQ+; `offset` is the number that the zero point stands for, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, q_min: int, q_max: int, gain: float
    ) -> Tensor:
        zero = None if offset is None else find_zero_point(offset, step, q_min, q_max)
        shift = 0.0 if zero is None else float(zero)
        low, high = q_min - shift, q_max - shift
        ctx.save_for_backward(x, step)
        ctx.levels = (low, high, gain, None if zero is None else shift)
        rounded: Tensor = (x.float() / step).round_().clamp_(low, high).mul_(step)
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        low, high, gain, zero = ctx.levels
        grad = grads[0].float()
        scaled = x.float() / step
        # This operator is 1 strictly between its ends and 0 elsewhere, times its first argument, in one pass.
        cut_off = torch.ops.aten.hardtanh_backward
        passed, within = cut_off(grad, scaled, low, high), cut_off(scaled, scaled, low, high)
        # The ends are integers, so that rounding before or after the cut gives the same.
        slope = scaled.round_().clamp_(low, high).sub_(within)
        grad_step = _sum_like(slope.mul_(grad), step)
        grad_offset = None
        if zero is not None:
            cut = _sum_like(grad, step) - _sum_like(passed, step)
            # The step's own slope outside is q_min or q_max, counted from the offset; the offset's is 1.
            grad_step, grad_offset = grad_step + zero * cut, gain * cut
        return passed.to(x.dtype), gain * grad_step, grad_offset, None, None, None


def _sum_like(values: Tensor, like: Tensor) -> Tensor:
    return values.sum().view(like.shape) if like.numel() == 1 else values.sum_to_size(like.shape)


def round_learned(
    x: Tensor, step: Tensor, q_min: int, q_max: int, *, offset: Tensor | None = None, gain: float = 1.0
) -> Tensor:
    """Return `x` on the grid of `step`, which broadcasts against it; `gain` scales the gradients of step and offset.

    Inside the ends the step's gradient is round(x/s) - x/s, at and beyond them q_min or q_max. `offset` is the number
    that falls on integer 0; the zero point is its negative over the step, rounded.
    """
    found: Tensor = _LearnedRounding.apply(x, step, offset, q_min, q_max, gain)  # type: ignore[no-untyped-call]
    return found


def find_zero_point(offset: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """Return the integer (as float32) that stands for zero."""
    return torch.round(-offset.detach() / step.detach()).clamp(q_min, q_max)


def find_step(first: Tensor, growth: Tensor) -> Tensor:
    """Return a step from its first value and the logarithm of how much it has grown."""
    return first * torch.exp(growth)


def find_offset(first: Tensor, place: Tensor, q_min: int, q_max: int) -> Tensor:
    """Return an offset, learned as a share of the first range so that its moves are as relative as the step's."""
    return first * (q_max - q_min) * place


def round_activation(x: Tensor, step: Tensor, offset: Tensor | None, q_min: int, q_max: int) -> Tensor:
    """Round an activation of shape (batch, ...); the gain is 1 / sqrt(N q_max), N the numbers of one sample."""
    count = x.numel() / max(1, len(x))
    return round_learned(x, step, q_min, q_max, offset=offset, gain=1 / math.sqrt(max(1.0, count * q_max)))


def round_weight(weight: Tensor, step: Tensor, axis: int, q_min: int, q_max: int) -> Tensor:
    """Round a weight, one step per channel of `axis`; the gain is 1 / sqrt(N q_max), N the numbers of one channel."""
    gain = 1 / math.sqrt(weight.numel() / step.numel() * q_max)
    return round_learned(weight, _spread(step, weight, axis), q_min, q_max, gain=gain)


def find_integers(weight: Tensor, step: Tensor, axis: int, q_min: int, q_max: int) -> Tensor:
    """Return the integers (as float32) that `round_weight` stands for."""
    return torch.round(weight.detach() / _spread(step.detach(), weight, axis)).clamp_(q_min, q_max)


def find_ternary(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return -1, 0 or 1 for each weight, and one scale per channel: the mean magnitude of those that are not 0."""
    weight = weight.detach()
    others = [a for a in range(weight.ndim) if a != axis]
    size = weight.abs()
    kept = size > TERNARY_THRESHOLD * size.mean(others, keepdim=True)
    scale = (size * kept).sum(others) / kept.sum(others).clamp(min=1)
    return torch.sign(weight) * kept, _keep_positive(scale)


def find_binary(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return -1 or 1 for each weight, 1 for zero, and one scale per channel: the mean magnitude."""
    weight = weight.detach()
    scale = weight.abs().mean([a for a in range(weight.ndim) if a != axis])
    return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype), _keep_positive(scale)


COARSE = {"ternary": find_ternary, "binary": find_binary}


def find_coarse_step(weight: Tensor, axis: int, form: str) -> Tensor:
    """Return the scales of ternary or binary weights."""
    return COARSE[form](weight, axis)[1]


def round_coarse(weight: Tensor, axis: int, form: str) -> Tensor:
    """Round a weight to ternary or binary; its gradient passes unchanged."""
    signs, scale = COARSE[form](weight, axis)
    return _pass_through(weight, signs * _spread(scale, weight, axis))


def round_bias(bias: Tensor, input_step: Tensor, weight_step: Tensor) -> Tensor:
    """Round a bias to the step of the sum it is added to; its gradient passes unchanged."""
    step = input_step.detach().float() * weight_step.detach().float()
    whole = torch.round(bias.detach().double() / step.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)
    return _pass_through(bias, whole.float() * step)


class _Straight(torch.autograd.Function):
    """Gives the second argument forward and the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _pass_through(x: Tensor, value: Tensor) -> Tensor:
    found: Tensor = _Straight.apply(x, value)  # type: ignore[no-untyped-call]
    return found


def _keep_positive(scale: Tensor) -> Tensor:
    """Give a channel of zeros a scale of 1: any serves."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def _spread(step: Tensor, weight: Tensor, axis: int) -> Tensor:
    return step.view([-1 if a == axis else 1 for a in range(weight.ndim)])
