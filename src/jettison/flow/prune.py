"""`prune`: pruning alone, in one call, for those who want just that."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from jettison.core.errors import FixedSize, InputError
from jettison.core.recipe import Recipe
from jettison.flow.delivering import ResultKind, check_kind, deliver_kept, save_module
from jettison.flow.reading import check_graph, read_calibration
from jettison.graph.depth import drop
from jettison.graph.depth import drop_blocks as drop_blocks_of
from jettison.graph.expressible import explain_whole, find_inexpressible
from jettison.graph.groups import Graph, trace
from jettison.graph.layers import find_layers
from jettison.graph.rewrite import prune_graph
from jettison.graph.trace import Batch
from jettison.progress import track
from jettison.pruning.choice import balance, choose_counts
from jettison.pruning.criteria import Criterion, find_criterion
from jettison.pruning.moments import Moments, collect_moments
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
    result: ResultKind = "auto",
    drop_blocks: Sequence[str] = (),
    free_outputs: bool | Sequence[int] = False,
    out: Path | str | None = None,
) -> nn.Module:
    """Return a smaller network that keeps the given share (or count) of each prune group; `model` is left as it is.

    `inputs` are example inputs: a tensor, a tuple of what the network takes, or a dict of its keyword inputs.
    `keep` is one share in (0, 1] for all groups, or a share or count for each named one. With `calibration` (a tensor,
    or a re-iterable of batches) positions are ranked by what they do on it and the rest is refitted; without it
    `criterion` must be "magnitude" or "random" and the weights stay as sliced. What may be kept is the recipe's to
    say: multiples, smallest widths, protection, ties; it rounds shares, and takes counts as they are.
    `drop_blocks` names residual blocks to leave out whole (`find_blocks` lists them; a module's name stands for all in
    it). `free_outputs`, all or by number, may lose channels too. `out` is a folder to save the result in, without
    pickle: `load(out)` and `load(out, model=fresh)` bring it back.
    The result is in eval mode and has the caller's own class. Submodules whose source does not allow that become
    graphs, or else the whole network does, and a UserWarning says why. With `result="eager"` all stays the caller's
    own class: groups that its source cannot express stay whole, which a UserWarning says, and FixedSize is raised
    where that leaves nothing; `result="graph"` gives always the graph. Raises InputError, UnknownName and what
    `trace` raises.
    """
    check_kind(result)
    recipe = recipe or Recipe()
    ranker = find_criterion(criterion)
    refusal = ""
    # The caller may stand inside inference_mode; the result shall be trainable.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        graph = trace(model, inputs, free_outputs=free_outputs)
        if drop_blocks:
            graph, model, refusal = _drop(model, graph, drop_blocks, result)
            result = "graph" if refusal else result
        check_graph(graph)
        batches = _take(graph, calibration, criterion, recipe, seed)
        counts = choose_counts(graph, keep, recipe)
        moments: dict[fx.Node, Moments] = {}
        if batches:
            layers = find_layers(graph.module)
            moments = collect_moments(graph.module, layers, batches, positions=recipe.positions, seed=seed)
        graph, kept = _rank(graph, counts, ranker, moments, recipe, seed)
        whole = find_inexpressible(model, graph, kept) if result == "eager" else {}
        if whole and len(whole) == len(kept):
            raise FixedSize(next(iter(whole.values())))
        kept = {name: positions for name, positions in kept.items() if name not in whole}
        small = prune_graph(graph, kept).module
        if batches and kept:
            recalibrate(graph, small, graph.keeps(kept), batches, positions=recipe.positions, seed=seed)
        delivered = deliver_kept(model, graph, kept, small, result=result)
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            save_module(delivered, graph, small, Path(out))
    if refusal:
        warnings.warn(refusal, stacklevel=2)
    if whole:
        warnings.warn(explain_whole(whole), stacklevel=2)
    if delivered.note and result != "graph":
        warnings.warn(delivered.note, stacklevel=2)
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


def _drop(model: nn.Module, graph: Graph, names: Sequence[str], result: ResultKind) -> tuple[Graph, nn.Module, str]:
    """Leave blocks out of the graph and, where it can be done, of the caller's own class; else say why not."""
    if result == "graph":
        return drop_blocks_of(graph, names), model, ""
    small, bypassed = drop(model, graph, names)
    if bypassed is not None:
        return small, bypassed, ""
    refusal = (
        f"The network's own class cannot leave out the blocks {list(names)}: not each is a module that gives its input "
        "plus a branch. It was looked for in the calls of the traced forward. Take the graph result."
    )
    if result == "eager":
        raise FixedSize(refusal)
    return small, model, f"The result is a graph module. {refusal}"


def _rank(
    graph: Graph,
    counts: Mapping[str, int],
    ranker: Criterion,
    moments: Mapping[fx.Node, Moments],
    recipe: Recipe,
    seed: int,
) -> tuple[Graph, dict[str, list[int]]]:
    """Return the kept positions of each group that loses some, and the network that they are positions of."""
    smaller = [g for g in graph.groups if counts[g.name] < g.size]
    whole, balanced = graph, frozenset[str]()
    if recipe.balance:
        whole, balanced = balance(graph, [g.name for g in smaller], ranker, moments, seed)
    kept: dict[str, list[int]] = {}
    for group in track(smaller, "Ranking"):
        in_front = group.name in balanced
        order = range(group.size) if in_front else ranker(graph, group, moments, seed).tolist()
        kept[group.name] = list(order[: counts[group.name]])
    return whole, kept
