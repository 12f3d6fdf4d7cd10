"""The one training loop: a student graph learns to answer as the original does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from jettison.core.errors import NonFiniteError
from jettison.distill.losses import measure_divergence, measure_feature_distance
from jettison.graph.trace import Batch, run_nodes
from jettison.progress import track

Batches = Callable[[int], Iterator[Batch]]
"""Gives the batches of an epoch by its number."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `steps` of AdamW with a short warm-up and a cosine down to zero.

    `features` weighs the feature loss against the output loss; `half` computes in bfloat16 where autocast
    allows (weights stay as they are).
    """

    steps: int
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    temperature: float = 2.0
    features: float = 0.0
    half: bool = False


def distil(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    batches: Batches,
    schedule: Schedule,
    *,
    points: Mapping[str, Tensor] | None = None,
    seed: int,
) -> tuple[fx.GraphModule, list[float]]:
    """Return a trained copy of `student` and the loss of each step.

    `points` names nodes whose features are compared, each with the teacher's channels that the student
    kept. Both graphs stay in eval mode: BatchNorm keeps its statistics, its scale and shift learn. Raises
    NonFiniteError when the loss is no longer a number.
    """
    student = copy.deepcopy(student)
    parameters = _free_parameters(student)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    decline = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, schedule.steps))
    losses: list[float] = []
    torch.manual_seed(seed)
    for batch in track(_take(batches, schedule.steps), "Distilling", total=schedule.steps):
        loss = _compute_loss(student, teacher, batch, schedule, points or {})
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"The distillation loss became {loss.item()} at step {len(losses)}. "
                f"Lower the learning rate (now {schedule.learning_rate})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decline.step()
        losses.append(float(loss.detach()))
    for parameter in parameters:
        parameter.grad = None
        parameter.data = parameter.data.contiguous()
    return student, losses


def _free_parameters(student: fx.GraphModule) -> list[nn.Parameter]:
    parameters = [p for p in student.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return parameters


def _pace(step: int, steps: int) -> float:
    warm = max(1, min(50, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _take(batches: Batches, steps: int) -> Iterator[Batch]:
    """Yield exactly `steps` batches, epoch after epoch."""
    taken, epoch = 0, 0
    while taken < steps:
        before = taken
        for batch in batches(epoch):
            yield batch
            taken += 1
            if taken == steps:
                return
        if taken == before:
            return
        epoch += 1


def _compute_loss(
    student: fx.GraphModule, teacher: fx.GraphModule, batch: Batch, schedule: Schedule, points: Mapping[str, Tensor]
) -> Tensor:
    device = batch[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=schedule.half):
        with torch.no_grad():
            expected, theirs = _run(teacher, batch, points if schedule.features else {})
        found, mine = _run(student, batch, points if schedule.features else {})
    loss = measure_divergence(found, expected, temperature=schedule.temperature).mean()
    for name, value in mine.items():
        distance = measure_feature_distance(value, theirs[name], points[name].to(value.device))
        loss = loss + schedule.features / len(mine) * distance
    return loss


def _run(
    module: fx.GraphModule, batch: Batch, points: Mapping[str, Tensor]
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    if not points:
        return module(*batch), {}
    features: dict[str, Tensor] = {}
    output: Sequence[Tensor] = ()
    for node, value, _ in run_nodes(module, batch):
        if node.name in points:
            features[node.name] = value
        if node.op == "output":
            output = value
    return output, features
