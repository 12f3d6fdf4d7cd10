"""`prune`: pruning alone, in one call, for those who want just that."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jettison.core.errors import InputError
from jettison.core.recipe import Recipe
from jettison.flow.delivering import deliver_kept
from jettison.flow.reading import check_graph, read_calibration
from jettison.graph.groups import Graph, Group, trace
from jettison.graph.layers import find_layers
from jettison.graph.rewrite import prune_graph
from jettison.graph.trace import Batch
from jettison.progress import track
from jettison.pruning.criteria import Criterion, find_criterion
from jettison.pruning.moments import collect_moments
from jettison.pruning.recalibrate import recalibrate


def prune(
    model: nn.Module,
    inputs: Any,
    *,
    keep: float | Mapping[str, int | float],
    criterion: str | Criterion = "obs",
    calibration: Iterable[Any] | Tensor | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a smaller network that keeps the given share (or count) of each prune group; `model` is left as it is.

    `inputs` are example inputs: a tensor, a tuple of what the network takes, or a dict of its keyword inputs.
    `keep` is one share in (0, 1] for all groups, or a share or count for each named one. With `calibration` (a tensor,
    or a re-iterable of batches) positions are ranked by what they do on it and the rest is refitted; without it
    `criterion` must be "magnitude" or "random" and the weights stay as sliced. Kept counts are rounded to the
    recipe's multiple.
    The result is in eval mode and has the caller's own class. Where its source does not allow that it is a graph
    module, and a UserWarning says why. Raises InputError, UnknownName and what `trace` raises.
    """
    recipe = recipe or Recipe()
    ranker = find_criterion(criterion)
    # The caller may stand inside inference_mode; the result shall be trainable.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        graph = trace(model, (), inputs) if isinstance(inputs, Mapping) else trace(model, inputs)
        check_graph(graph)
        batches = _take(graph, calibration, criterion, recipe, seed)
        for name in (*recipe.protect, *(keep if isinstance(keep, Mapping) else ())):
            graph.find(name)
        moments = {}
        if batches:
            layers = find_layers(graph.module)
            moments = collect_moments(graph.module, layers, batches, positions=recipe.positions, seed=seed)
        counts = {g.name: _count(g, keep, recipe) for g in graph.groups if g.name not in recipe.protect}
        kept = {}
        for group in track(graph.groups, "Ranking"):
            if counts.get(group.name, group.size) < group.size:
                kept[group.name] = ranker(graph, group, moments, seed)[: counts[group.name]].tolist()
        small = prune_graph(graph, kept).module
        if batches and kept:
            recalibrate(graph, small, graph.keeps(kept), batches, positions=recipe.positions, seed=seed)
        delivered = deliver_kept(model, graph, kept, small)
    if delivered.refusal:
        warnings.warn(f"The pruned network is a graph module, not its own class. {delivered.refusal}", stacklevel=2)
    return delivered.module


def _take(graph: Graph, calibration: Any, criterion: str | Criterion, recipe: Recipe, seed: int) -> list[Batch]:
    """Return the calibration batches that statistics and fits are made from; none where none were given or needed."""
    if calibration is None:
        if criterion not in ("magnitude", "random"):
            raise InputError(
                f"criterion={criterion!r} needs calibration inputs. Pass calibration=, or criterion='magnitude'."
            )
        return []
    return read_calibration(graph, calibration, seed).take(recipe.samples)


def _count(group: Group, keep: float | Mapping[str, int | float], recipe: Recipe) -> int:
    """Return how many positions of a group stay: a share is rounded to the multiple, a count is taken as it is."""
    value = keep.get(group.name, 1.0) if isinstance(keep, Mapping) else keep
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"keep={value!r} for group {group.name!r} is no number. Give a share or a count.")
    if isinstance(value, int) and isinstance(keep, Mapping):
        if not 1 <= value <= group.size:
            raise InputError(f"Group {group.name!r} has {group.size} positions and cannot keep {value}.")
        return value
    if not 0 < value <= 1:
        raise InputError(f"keep={value} must be a share in (0, 1], or a mapping from group names to counts.")
    step = recipe.multiple if group.size > recipe.multiple else 1
    return min(group.size, max(step, round(group.size * value / step) * step))
