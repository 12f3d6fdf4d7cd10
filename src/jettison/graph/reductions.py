"""Reductions: which leave the positions they run over free, and what they are once some of those are gone.

A sum does not notice positions that are zero. A mean, a maximum or a variance over channels does: the sliced network
takes it over what is kept, as a norm takes its statistics, and so does the masked oracle. Such an axis is "reduced".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from jettison.graph.analyse import Walk
from jettison.graph.axes import ONE, Keeps, Term, evaluate_mask, flag, is_touched, resolve
from jettison.graph.movement import resolve_dim

aten = torch.ops.aten

NOTICE_ZEROS = (aten.prod, aten.logsumexp, aten.all)
STATISTICS = (aten.mean, aten.amax, aten.amin, aten.std, aten.var, aten.std_mean, aten.var_mean)


def reduce_dimensions(walk: Walk) -> Any:
    """Sums pass zeros by; statistics are taken over what is kept; what runs over space or tokens keeps them whole."""
    x = walk.dims(walk.args[0])
    gone = _reduced(walk.node, len(x))
    for dim in gone:
        if walk.node.target.overloadpacket in STATISTICS:  # type: ignore[union-attr]
            flag(x[dim], "reduced")
        elif walk.node.target.overloadpacket in NOTICE_ZEROS:  # type: ignore[union-attr]
            walk.fix(x[dim], because="every position of it counts, zeros too")
        elif walk.node.target == aten.linalg_vector_norm.default and not _passes_zeros(walk.arg(1, "ord", 2)):
            walk.fix(x[dim], because="a norm that counts zeros is taken over it")
    value = walk.node.meta["val"]
    ranks = [v.dim() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    kept: tuple[Term, ...] = tuple(ONE if i in gone else t for i, t in enumerate(x))
    if ranks[0] != len(x):
        kept = tuple(t for i, t in enumerate(x) if i not in gone)
    return kept if isinstance(value, Tensor) else tuple(kept for _ in ranks)


def _passes_zeros(order: Any) -> bool:
    return isinstance(order, (int, float)) and order > 0


def _reduced(node: fx.Node, rank: int) -> set[int]:
    """Return the dimensions a reduction runs over."""
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = schema.index("dim") if "dim" in schema else len(schema)
    named = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if named is None or isinstance(named, bool) or named == []:
        return set(range(rank))
    dims = [named] if isinstance(named, int) else list(named)  # type: ignore[arg-type]
    return {resolve_dim(d, rank) for d in dims}


def restrict(
    source: fx.Node, node: fx.Node, values: Mapping[fx.Node, Any], dims: tuple[Term, ...], keeps: Keeps
) -> dict[fx.Node, Any]:
    """Return the values that `node` reads, its operand `source` cut down to kept positions along what it runs over."""
    given: Tensor = values[source]
    for dim in _reduced(node, given.dim()):
        if is_touched(dims[dim], keeps):
            index = evaluate_mask(resolve(dims[dim]), keeps).nonzero().flatten().to(given.device)
            given = given.index_select(dim, index)
    return {**{n: values[n] for n in node.all_input_nodes}, source: given}


def normalise_batch(args: tuple[Any, ...], x: tuple[Term, ...], keeps: Keeps) -> Tensor:
    """Batch norm that takes its own statistics (of a standardised weight): over kept positions only."""
    given: Tensor = args[0]
    index = {d: evaluate_mask(t, keeps).nonzero().flatten() for d, t in enumerate(x) if d != 1 and is_touched(t, keeps)}
    small = given
    for dim, kept in index.items():
        small = small.index_select(dim, kept.to(given.device))
    found: Tensor = aten.batch_norm.default(small, *args[1:])
    for dim, kept in index.items():
        whole = found.new_zeros([*found.shape[:dim], given.shape[dim], *found.shape[dim + 1 :]])
        found = whole.index_copy(dim, kept.to(given.device), found)
    return found
