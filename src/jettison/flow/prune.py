"""`prune`: pruning alone, in one call, for those who want just that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jettison.core.errors import InputError
from jettison.core.recipe import Recipe
from jettison.flow.calibration import make_calibration
from jettison.flow.delivering import deliver_kept
from jettison.graph.groups import Group, trace
from jettison.graph.layers import find_layers
from jettison.graph.rewrite import prune_graph
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

    `inputs` are example inputs. `keep` is one share in (0, 1] for all groups, or a share or count for each named one.
    With `calibration` (a tensor, or a re-iterable of batches) positions are ranked by what they do on it and the
    rest is refitted; without it `criterion` must be "magnitude" or "random" and the weights stay as sliced.
    Kept counts are rounded to the recipe's multiple. The result has the caller's own class where its source allows
    that, else it is a graph module; it is in eval mode. Raises InputError, UnknownName and what `trace` raises.
    """
    recipe = recipe or Recipe()
    graph = trace(model, inputs)
    ranker = find_criterion(criterion)
    batches = []
    if calibration is not None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        data, _, _ = make_calibration(calibration, model, seal=False, seed=seed, device=device)
        with torch.random.fork_rng():
            batches = data.take(recipe.samples)
    elif criterion not in ("magnitude", "random"):
        raise InputError(
            f"criterion={criterion!r} needs calibration inputs. Pass calibration=, or criterion='magnitude'."
        )
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
    small = prune_graph(graph, kept)
    if batches and kept:
        keeps = graph.keeps(kept)
        recalibrate(graph, small.module, keeps, batches, positions=recipe.positions, seed=seed)
    return deliver_kept(model, graph, kept, small.module).module


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
