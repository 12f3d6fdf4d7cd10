"""Which positions of a group matter: each criterion orders them from the most to the least important.

`CRITERIA` is the table; a criterion is a function of the graph, one group and the moments, and says by its
name what it is. "obs" is structured Optimal Brain Surgeon (LeCun 1990, Hassibi 1993; for structures as in
ZipLM, Kurtic et al. 2023), here over all consumers of a group at once, each weighted by its output energy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from jettison.core.errors import UnknownName
from jettison.graph.axes import iterate_atoms
from jettison.graph.groups import Graph, Group
from jettison.graph.layers import Layer, find_layers, find_owners
from jettison.graph.trace import get_tensor
from jettison.pruning.moments import Moments

DAMPING = 1e-2
"""Added to the Gram matrix, as a share of its mean diagonal, so that rarely used inputs stay solvable."""

Criterion = Callable[[Graph, Group, Mapping[fx.Node, Moments], int], Tensor]
"""Takes the graph, a group, moments per layer and a seed; returns positions, most important first."""


@dataclass
class _Consumer:
    """A layer that reads the group: its weight as a matrix, the inverse Gram, and each position's columns."""

    weight: Tensor
    inverse: Tensor
    columns: Tensor
    scale: float


def order_by_obs(graph: Graph, group: Group, moments: Mapping[fx.Node, Moments], seed: int) -> Tensor:
    """Take away one position at a time: the one whose loss the others can best make up for.

    Groups that no layer reads through a weight (the axis shared by queries and keys) fall to magnitude.
    """
    consumers = _find_consumers(graph, group, moments)
    if not consumers:
        return order_by_magnitude(graph, group, moments, seed)
    alive = torch.ones(group.size, dtype=torch.bool)
    removed: list[int] = []
    while len(removed) < group.size - 1:
        score = sum(_score(c) / c.scale for c in consumers)
        assert isinstance(score, Tensor)
        score = score.cpu().masked_fill(~alive, torch.inf)
        worst = int(score.argmin())
        for consumer in consumers:
            _remove(consumer, worst)
        alive[worst] = False
        removed.append(worst)
    return torch.tensor([int(alive.nonzero()), *reversed(removed)])


def order_by_magnitude(graph: Graph, group: Group, moments: Mapping[fx.Node, Moments], seed: int) -> Tensor:
    """The L2 norm of each position's slices, every slice divided by its mean first (as DepGraph does)."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        tensor = get_tensor(graph.module, member.tensor)
        if tensor.dim() < 2:
            continue
        owners = find_owners(graph.axes.tensors[member.tensor][member.dim], group.atom)
        energy = tensor.detach().double().cpu().pow(2).transpose(0, member.dim).flatten(1).sum(1)
        mine = torch.zeros(group.size, dtype=torch.float64)
        mine.index_add_(0, owners[owners >= 0], energy[owners >= 0])
        total += mine / mine.mean().clamp(min=1e-30)
    return total.argsort(descending=True, stable=True)


def order_by_activation(graph: Graph, group: Group, moments: Mapping[fx.Node, Moments], seed: int) -> Tensor:
    """Expected output energy of each position's columns, Σ W² E[x²] (Wanda, Sun et al. 2024, for structures)."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for layer, owners in _readers(graph, group):
        if layer.node not in moments:
            continue
        found = moments[layer.node]
        weight = get_tensor(graph.module, layer.weight).detach().double().flatten(1)
        energy = (weight.pow(2).sum(0) * found.xx[0].diagonal() / max(found.count, 1)).cpu()
        mine = torch.zeros(group.size, dtype=torch.float64)
        mine.index_add_(0, owners[owners >= 0], energy[owners >= 0])
        total += mine / energy.sum().clamp(min=1e-30)
    if not bool(total.any()):
        return order_by_magnitude(graph, group, moments, seed)
    return total.argsort(descending=True, stable=True)


def order_at_random(graph: Graph, group: Group, moments: Mapping[fx.Node, Moments], seed: int) -> Tensor:
    """A random order: the baseline that every other criterion has to beat."""
    return torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))


CRITERIA: dict[str, Criterion] = {
    "obs": order_by_obs,
    "activation": order_by_activation,
    "magnitude": order_by_magnitude,
    "random": order_at_random,
}
"""Every criterion by name; where a name is accepted, so is the function."""


def find_criterion(criterion: str | Criterion) -> Criterion:
    """Return a criterion by name; a function passes through; raises UnknownName with the nearest names."""
    if not isinstance(criterion, str):
        return criterion
    if criterion not in CRITERIA:
        raise UnknownName("criterion", criterion, CRITERIA)
    return CRITERIA[criterion]


def _readers(graph: Graph, group: Group) -> list[tuple[Layer, Tensor]]:
    """Return the ungrouped layers whose weight columns belong to the group, with the owner of each column."""
    readers = []
    for layer in find_layers(graph.module):
        columns = graph.axes.tensors[layer.weight][1]
        if layer.groups == 1 and group.atom in set(iterate_atoms(columns)):
            kernel = get_tensor(graph.module, layer.weight)[0, 0].numel()
            readers.append((layer, find_owners(columns, group.atom).repeat_interleave(kernel)))
    return readers


def _find_consumers(graph: Graph, group: Group, moments: Mapping[fx.Node, Moments]) -> list[_Consumer]:
    consumers = []
    for layer, owners in _readers(graph, group):
        if layer.node not in moments:
            continue
        found = moments[layer.node]
        weight = get_tensor(graph.module, layer.weight).detach().double().flatten(1)
        gram = found.xx[0] / max(found.count, 1)
        energy = float(((weight @ gram) * weight).sum())
        damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (
            DAMPING * gram.diagonal().mean().clamp(min=1e-12)
        )
        columns = torch.stack([(owners == p).nonzero().flatten() for p in range(group.size)])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        consumers.append(_Consumer(weight.clone(), inverse, columns.to(gram.device), max(energy, 1e-30)))
    return consumers


def _score(consumer: _Consumer) -> Tensor:
    """Return tr(W_B (H⁻¹_BB)⁻¹ W_Bᵀ) for every position's block of columns B."""
    columns = consumer.columns
    blocks = consumer.inverse[columns[:, :, None], columns[:, None, :]]
    weights = consumer.weight[:, columns].permute(1, 2, 0)
    solved = torch.linalg.solve(blocks, weights) if columns.shape[1] > 1 else weights / blocks
    return (weights * solved).sum((1, 2))


def _remove(consumer: _Consumer, position: int) -> None:
    """Update the weight and downdate the inverse Gram for one removed block."""
    block = consumer.columns[position]
    inverse = consumer.inverse
    rows = inverse[block]
    solved = torch.linalg.solve(inverse[block][:, block], rows)
    consumer.weight -= consumer.weight[:, block] @ solved
    inverse -= rows.T @ solved
    # What is gone must stay gone: exact zeros instead of rounding residue, ones keep blocks solvable.
    inverse[block] = 0
    inverse[:, block] = 0
    inverse[block, block] = 1
    consumer.weight[:, block] = 0
