"""The one training loop: a student graph learns to answer as the original does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from jettison.core.errors import NonFiniteError
from jettison.distill.losses import measure_divergence, measure_feature_distance
from jettison.distill.state import Memory, load_state, save_state
from jettison.graph.trace import Batch, run_nodes
from jettison.progress import track

Batches = Callable[[int], Iterator[Batch]]
"""Gives the batches of an epoch by its number."""
AfterStep = Callable[[fx.GraphModule, dict[str, Tensor], int], None]
"""Called with the student, what it kept so far (its own to fill) and the number of the step just made."""
SAVE_EVERY = 100
"""Steps between two saved states: what a run that is cut off loses at most."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `steps` of AdamW with a short warm-up and a cosine down to zero.

    `features` weighs the feature loss against the output loss; `half` computes in bfloat16 where autocast
    allows (weights stay as they are). With `average` above 0 the result is the running mean of the parameters, each
    step keeping that share of the mean.
    """

    steps: int
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    temperature: float = 2.0
    features: float = 0.0
    half: bool = False
    average: float = 0.0


def distil(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    batches: Batches,
    schedule: Schedule,
    *,
    points: Mapping[str, Tensor] | None = None,
    undecayed: Collection[str] = (),
    after_step: AfterStep | None = None,
    state: Path | None = None,
    save_every: int = SAVE_EVERY,
    seed: int,
) -> tuple[fx.GraphModule, list[float]]:
    """Return a trained copy of `student` and the loss of each step.

    `points` names nodes whose features are compared, each with the teacher's channels that the student
    kept. Both graphs stay in eval mode: BatchNorm keeps its statistics, its scale and shift learn. Weight decay leaves
    the parameters named in `undecayed` alone. `state` is a file the run is saved to after every `save_every` steps;
    where it is there already, the run goes on from it and ends with the same bits, given the same arguments and
    batches. Raises NonFiniteError when the loss is no longer a number, CheckpointError for a state of another network.
    """
    student = copy.deepcopy(student)
    parameters = _free_parameters(student)
    optimizer = _make_optimizer(student, schedule, undecayed)
    memory, random = Memory(), None
    if state is not None and state.exists():
        memory, random = load_state(student, optimizer, state)
    torch.manual_seed(seed)
    done = len(memory.losses)
    for batch in track(_take(batches, schedule.steps, done, random), "Distilling", total=schedule.steps - done):
        loss = _compute_loss(student, teacher, batch, schedule, points or {})
        step = len(memory.losses)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"The distillation loss became {loss.item()} at step {step}. "
                f"Lower the learning rate (now {schedule.learning_rate})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _pace(step, schedule.steps)
        optimizer.step()
        if after_step is not None:
            with torch.no_grad():
                after_step(student, memory.kept, step)
        _average(student, memory.averages, schedule.average)
        memory.losses.append(float(loss.detach()))
        if state is not None and ((step + 1) % save_every == 0 or step + 1 == schedule.steps):
            save_state(student, optimizer, memory, state)
    _finish(student, memory.averages)
    return student, memory.losses


def _make_optimizer(student: fx.GraphModule, schedule: Schedule, undecayed: Collection[str]) -> torch.optim.AdamW:
    named = [(n, p) for n, p in student.named_parameters() if p.is_floating_point()]
    groups = [
        {"params": [p for n, p in named if n not in undecayed], "weight_decay": schedule.weight_decay},
        {"params": [p for n, p in named if n in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.learning_rate)


def _average(student: fx.GraphModule, averages: dict[str, Tensor], share: float) -> None:
    """Move the running mean of each parameter; nothing where none is wanted."""
    if share == 0.0:
        return
    for name, parameter in student.named_parameters():
        if not parameter.is_floating_point():
            continue
        mean = averages.setdefault(name, parameter.detach().clone())
        mean.lerp_(parameter.detach(), 1 - share)


def _finish(student: fx.GraphModule, averages: Mapping[str, Tensor]) -> None:
    for name, parameter in student.named_parameters():
        parameter.grad = None
        parameter.data = averages.get(name, parameter.data).contiguous()


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


def _take(batches: Batches, steps: int, done: int, random: Tensor | None) -> Iterator[Batch]:
    """Yield exactly `steps` batches, epoch after epoch, but for the first `done`, after which `random` is the state."""
    taken, epoch = 0, 0
    while taken < steps:
        before = taken
        for batch in batches(epoch):
            if taken >= done:
                yield batch
            taken += 1
            if taken == done and random is not None:
                torch.set_rng_state(random)
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
