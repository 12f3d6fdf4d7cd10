"""How far a student's outputs are from its teacher's: per sample, in nats for class scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def measure_divergence(student: Sequence[Tensor], teacher: Sequence[Tensor], *, temperature: float = 1.0) -> Tensor:
    """Return one divergence per sample, shape `(batch,)`, summed over the outputs.

    A float output of shape `(batch, classes)` with more than one class is taken as logits: KL(teacher ‖ student)
    at `temperature`, times temperature² so that gradients keep their size. Any other float output gives the
    squared error over the teacher's mean square. Outputs that are integers, or no tensors, are not compared.
    """
    first = next(t for t in teacher if isinstance(t, Tensor))
    total = torch.zeros(len(first), device=first.device)
    for s, t in zip(student, teacher, strict=True):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            continue
        s, t = s.float(), t.float()
        if t.dim() == 2 and t.shape[1] > 1:
            log_s = F.log_softmax(s / temperature, 1)
            log_t = F.log_softmax(t / temperature, 1)
            total = total + (log_t.exp() * (log_t - log_s)).sum(1) * temperature**2
        else:
            error = (s - t).flatten(1).pow(2).mean(1) if t.dim() > 1 else (s - t).pow(2)
            total = total + error / t.pow(2).mean().clamp(min=1e-12)
    return total


def measure_feature_distance(student: Tensor, teacher: Tensor, channels: Tensor) -> Tensor:
    """Return the squared distance between features over the teacher's variance, at the teacher's `channels` only.

    Both are `(batch, channels, ...)`; the student has just the kept channels, so no regressor is needed.
    """
    target = teacher.index_select(1, channels).detach()
    error = (student.float() - target.float()).pow(2).mean()
    return error / target.float().var().clamp(min=1e-12)
