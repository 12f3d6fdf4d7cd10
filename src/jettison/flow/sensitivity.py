"""What each option of each group would lose: every option is built, refitted and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from jettison.core.recipe import Recipe
from jettison.distill.losses import measure_divergence
from jettison.flow.frontier import Frontier, find_first_use, start_frontier
from jettison.graph.groups import Graph, Group
from jettison.graph.layers import find_layers
from jettison.graph.rewrite import slice_graph
from jettison.graph.trace import Batch
from jettison.progress import track
from jettison.pruning.choice import find_ties, read_widths
from jettison.pruning.criteria import Criterion, find_criterion
from jettison.pruning.moments import Moments, collect_moments
from jettison.pruning.recalibrate import refit_consumers


@dataclass(frozen=True)
class GroupOptions:
    """A group's positions from most to least important, and the loss of keeping the first `counts[i]` of them.

    `losses` are mean divergences from the original (nats for class scores), made non-decreasing as counts fall;
    counts fall from the whole group, whose loss is 0.
    """

    group: str
    order: tuple[int, ...]
    counts: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The options of every group, in the graph's order; `ties` names groups that must keep the same count."""

    groups: tuple[GroupOptions, ...]
    ties: tuple[tuple[str, ...], ...] = ()


def measure_sensitivity(
    graph: Graph,
    batches: Sequence[Batch],
    judges: Sequence[Batch],
    *,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    criterion: str | Criterion | None = None,
    seed: int = 0,
    known: Mapping[str, GroupOptions] | None = None,
    keep: Callable[[GroupOptions], None] | None = None,
) -> Sensitivity:
    """Return what every option of every group would lose if it alone were taken.

    Statistics come from `batches`; each option is sliced, its readers refitted in closed form and judged on
    `judges`. `known` options are taken over instead of computed; `keep` is called with each new one.
    """
    ranker = find_criterion(criterion or recipe.criterion)
    widths = read_widths(graph, recipe)
    chosen = [g for g in graph.groups if widths[g.name].least < g.size]
    ties = [[n for n in names if widths[n].least < widths[n].size] for names in find_ties(graph, recipe)]
    todo = [g for g in chosen if g.name not in (known or {})]
    found = dict(known or {})
    if todo:
        moments = collect_moments(
            graph.module, find_layers(graph.module), batches, positions=recipe.positions, seed=seed
        )
        frontier = start_frontier(graph, judges)
        targets = frontier.run(graph.module)
        for group in track(sorted(todo, key=lambda g: find_first_use(graph, g)), "Measuring sensitivity"):
            frontier.advance(find_first_use(graph, group))
            counts = widths[group.name].list_counts(recipe.ratios)
            found[group.name] = _measure_group(frontier, group, ranker, moments, targets, counts, seed)
            if keep is not None:
                keep(found[group.name])
    return Sensitivity(tuple(found[g.name] for g in chosen), tuple(tuple(names) for names in ties if names))


def _measure_group(
    frontier: Frontier,
    group: Group,
    ranker: Criterion,
    moments: Mapping[fx.Node, Moments],
    targets: Sequence[tuple[Tensor, ...]],
    counts: Sequence[int],
    seed: int,
) -> GroupOptions:
    graph = frontier.graph
    order = ranker(graph, group, moments, seed).tolist()
    losses = [0.0]
    for count in counts[1:]:
        keeps = graph.keeps({group.name: order[:count]})
        pruned = slice_graph(graph, keeps)
        refit_consumers(graph, pruned, keeps, moments)
        losses.append(max(losses[-1], average_divergence(frontier.run(pruned), targets)))
    return GroupOptions(group.name, tuple(order), tuple(counts), tuple(losses))


def measure_loss(module: fx.GraphModule, judges: Sequence[Batch], targets: Sequence[tuple[Tensor, ...]]) -> float:
    """Return the mean divergence per sample of a module's outputs from `targets`."""
    with torch.no_grad():
        return average_divergence([module(*batch) for batch in judges], targets)


def average_divergence(outputs: Sequence[tuple[Tensor, ...]], targets: Sequence[tuple[Tensor, ...]]) -> float:
    """Return the mean divergence per sample over several batches."""
    total = sum(float(measure_divergence(o, t).sum()) for o, t in zip(outputs, targets, strict=True))
    return total / max(1, sum(len(t[0]) for t in targets))
