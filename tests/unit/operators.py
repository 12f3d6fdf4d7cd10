"""What the tests of operator rules share: one operator between two layers, and every oracle over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import slice_graph
from jettison.testing import check_masked, check_permutation, check_prediction, draw_kept, randomise

Operator = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """An operator on [N, tokens, features] between a layer that makes the features and one that reads them."""

    def __init__(self, operator: Operator, features: int = 6, out: int = 6) -> None:
        super().__init__()
        self.operator = operator
        self.first, self.last = nn.Linear(4, features), nn.Linear(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.operator(self.first(x)))
        return y


class Pictured(nn.Module):
    """An operator on [N, channels, 6, 6] between two convolutions."""

    def __init__(self, operator: Operator, out: int = 6) -> None:
        super().__init__()
        self.operator = operator
        self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(out, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.operator(self.first(x)))
        return y


def trace_small(model: nn.Module, *inputs: Any) -> Graph:
    """Trace a network with random tensors; nothing in it may be without a rule."""
    given = inputs or ((torch.randn(2, 3, 6, 6),) if isinstance(model, Pictured) else (torch.randn(2, 6, 4),))
    graph = trace(randomise(model), given)
    assert not graph.opaque, graph.opaque
    return graph


def check_graph(graph: Graph, *, least: int = 1) -> None:
    """Hold random choices to masked = sliced and to the predicted sizes, and every group to its permutation."""
    inputs = graph.traced.example
    for seed in range(2):
        keeps = graph.keeps(draw_kept(graph, seed=seed, least=least))
        masked = check_masked(graph, slice_graph(graph, keeps), keeps, inputs)
        assert masked.passed, masked
        predicted = check_prediction(graph, keeps, inputs)
        assert predicted.passed, predicted
    for group in graph.groups:
        moved = check_permutation(graph, group, inputs)
        assert moved.passed, moved


def sizes_of(graph: Graph) -> list[int]:
    """Return the sizes of the groups in order."""
    return sorted(g.size for g in graph.groups)
