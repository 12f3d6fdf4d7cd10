"""Recovery after slicing: refit layer by layer, then distil from the original; each step must earn its place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from jettison.core.plan import Plan
from jettison.core.recipe import Recipe
from jettison.cost.macs import count
from jettison.distill.train import Batches, Schedule, distil
from jettison.flow.run import Run, split_samples
from jettison.flow.sensitivity import measure_loss
from jettison.graph.groups import Graph
from jettison.graph.layers import find_layers
from jettison.graph.rewrite import kept_of
from jettison.graph.store import load_tensors_into, save_tensors
from jettison.graph.trace import Batch
from jettison.pruning.recalibrate import recalibrate

REFIT_BYTES = 4 * 10**9
"""Activations that refitting may hold at once: it walks both networks over all its samples side by side."""


def refit(run: Run, plan: Plan) -> fx.GraphModule:
    """Return the planned network with every layer refitted by least squares."""

    def load(path: Path) -> fx.GraphModule:
        module = _own(run.slice(plan))
        load_tensors_into(module, path)
        return module

    def compute() -> fx.GraphModule:
        module = _own(run.slice(plan))
        if plan.kept:
            keeps = run.graph.keeps(plan.kept)
            batches = _limit_memory(run)
            recalibrate(run.graph, module, keeps, batches, positions=run.recipe.positions, seed=run.seed)
        return module

    return run.folder.do("recalibrate", "recalibrated.safetensors", load, compute, save_tensors)


def distil_from_original(run: Run, plan: Plan, student: fx.GraphModule) -> fx.GraphModule:
    """Return the student after distillation, or as it was where that did not bring it nearer to the original."""
    recipe = run.recipe
    if recipe.steps == 0 or not plan.kept:
        return student

    def load(path: Path) -> fx.GraphModule:
        module = copy_module(student)
        load_tensors_into(module, path)
        return module

    def compute() -> fx.GraphModule:
        schedule = make_schedule(recipe, run.calibration.device)
        return train_if_better(run.graph, plan, student, run.iterate_training, run.judges, schedule, seed=run.seed)

    return run.folder.do("distil", "distilled.safetensors", load, compute, save_tensors)


def make_schedule(recipe: Recipe, device: torch.device) -> Schedule:
    """Return the training schedule a recipe asks for on a device."""
    half = can_train_half(device) if recipe.half is None else recipe.half
    return Schedule(
        recipe.steps, recipe.learning_rate, temperature=recipe.temperature, features=recipe.features, half=half
    )


def train_if_better(
    graph: Graph,
    plan: Plan,
    student: fx.GraphModule,
    batches: Batches,
    judges: Sequence[Batch],
    schedule: Schedule,
    *,
    seed: int,
) -> fx.GraphModule:
    """Return the distilled student, or the student itself where distillation took it further from the original."""
    points = _feature_points(graph, plan) if schedule.features else {}
    with torch.enable_grad():
        trained, _ = distil(student, graph.module, batches, schedule, points=points, seed=seed)
    with torch.no_grad():
        targets = [graph.module(*batch) for batch in judges]
    before, after = (measure_loss(m, judges, targets) for m in (student, trained))
    return trained if after < before else student


def _limit_memory(run: Run) -> list[Batch]:
    """Return as many fitting batches as keep the activations of both networks within `REFIT_BYTES`."""
    per_sample = 2 * count(run.graph.module).peak_activation_bytes
    return split_samples(run.batches, max(1, REFIT_BYTES // max(1, per_sample)))[0]


def can_train_half(device: torch.device) -> bool:
    """Tell whether bfloat16 is computed by the processor itself, not by slow conversions."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type == "cpu":
        from jettison.targets.onnxruntime import read_cpu_flags

        return bool((read_cpu_flags() or frozenset()) & {"avx512_bf16", "amx_bf16"})
    return False


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy with tensors of its own."""
    return _own(fx.GraphModule(module, copy_graph(module.graph)))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _own(module: fx.GraphModule) -> fx.GraphModule:
    """Give a sliced module memory of its own, so that nothing of the caller's can change."""
    return copy.deepcopy(module)


def _feature_points(graph: Graph, plan: Plan) -> Mapping[str, Tensor]:
    """Name the outputs of all convolutions, each with the channels that were kept."""
    keeps = graph.keeps(plan.kept)
    return {
        layer.node.name: kept_of(graph, layer.node, 1, keeps)
        for layer in find_layers(graph.module)
        if layer.operator == "conv"
    }
