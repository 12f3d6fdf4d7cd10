"""Sums do not notice zeros; statistics are taken over what is kept; what counts zeros keeps its axis whole."""

from __future__ import annotations

import pytest
import torch
from tests.unit.operators import Between, Operator, Pictured, check_graph, sizes_of, trace_small
from torch import Tensor, nn
from torch.nn import functional as F


def _response_norm(y: Tensor) -> Tensor:
    """ConvNeXt V2: each channel's energy over space, relative to the mean of all channels'."""
    energy = y.square().sum((2, 3), keepdim=True).add(1e-6).sqrt()
    return y + y * (energy / (energy.mean(1, keepdim=True) + 1e-6))


EXACT: dict[str, Operator] = {
    "sum": lambda y: y + y.sum(-1, keepdim=True),
    "sum of all": lambda y: y + y.sum(),
    "length": lambda y: F.normalize(y, dim=-1),
    "sum of sizes": lambda y: y / (1 + y.norm(p=1, dim=-1, keepdim=True)),
    "largest size": lambda y: y / (1 + y.norm(p=float("inf"), dim=-1, keepdim=True)),
    "any": lambda y: y * (y > 1).any(-1, keepdim=True),
    "over tokens": lambda y: y - y.mean(1, keepdim=True) + y.std(1, keepdim=True) + y.prod(1, keepdim=True),
    "logsumexp over tokens": lambda y: y - y.logsumexp(1, keepdim=True),
}


@pytest.mark.parametrize("name", EXACT)
def test_sums_leave_the_axis_exact(name: str) -> None:
    graph = trace_small(Between(EXACT[name]))
    assert sizes_of(graph) == [6] and graph.groups[0].exact
    check_graph(graph)


STATISTICS: dict[str, Operator] = {
    "mean of squares": lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6),
    "mean of all": lambda y: y - y.mean(),
    "largest": lambda y: y * torch.sigmoid(y.amax(-1, keepdim=True)),
    "smallest": lambda y: y - y.amin(-1, keepdim=True),
    "variance": lambda y: y / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-6),
    "deviation": lambda y: y / (1 + y.std(-1, keepdim=True)),
    "both": lambda y: (lambda v, m: (y - m) / torch.sqrt(v + 1e-6))(*torch.var_mean(y, -1, correction=0, keepdim=True)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_taken_over_what_is_kept(name: str) -> None:
    graph = trace_small(Between(STATISTICS[name]))
    assert sizes_of(graph) == [6] and not graph.groups[0].exact
    check_graph(graph, least=2)  # one position has no deviation


PICTURES: dict[str, Operator] = {
    "global response": _response_norm,
    "spatial attention": lambda y: y * torch.sigmoid(y.mean(1, keepdim=True) + y.amax(1, keepdim=True)),
    "channels and space": lambda y: y - y.mean((1, 2, 3), keepdim=True),
    "channels in two runs": lambda y: (y.view(-1, 2, 3, 6, 6) - y.view(-1, 2, 3, 6, 6).mean(2, True)).flatten(1, 2),
}


@pytest.mark.parametrize("name", PICTURES)
def test_statistics_over_channels(name: str) -> None:
    graph = trace_small(Pictured(PICTURES[name]))
    assert graph.groups and not all(g.exact for g in graph.groups)
    check_graph(graph, least=2)


WHOLE: dict[str, Operator] = {
    "product": lambda y: y + y.prod(-1, keepdim=True),
    "logsumexp": lambda y: y - y.logsumexp(-1, keepdim=True),
    "all": lambda y: y * (y > -3).all(-1, keepdim=True),
    "how many": lambda y: y + torch.linalg.vector_norm(y, 0, -1, keepdim=True),
    "softmax": lambda y: y.softmax(-1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_counts_zeros_stays_whole(name: str) -> None:
    graph = trace_small(Between(WHOLE[name]))
    assert sizes_of(graph) == []
    part = next(p for p in graph.frozen if p.what == "first.weight (dimension 0)")
    assert "operators.py:" in part.where


class Standardised(nn.Module):
    """A convolution's weight is standardised filter by filter: by batch norm's own statistics, or by hand."""

    def __init__(self, by_norm: bool) -> None:
        super().__init__()
        self.by_norm = by_norm
        self.first, self.conv, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1)
        self.gain = nn.Parameter(torch.zeros(4))

    def _weight(self) -> Tensor:
        weight = self.conv.weight
        if self.by_norm:
            rows = weight.reshape(1, self.conv.out_channels, -1)
            return F.batch_norm(rows, None, None, self.gain, training=True, momentum=0.0).reshape_as(weight)
        mean, deviation = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return (weight - mean) / (deviation + 1e-3) * self.gain[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.relu(F.conv2d(self.first(x), self._weight(), self.conv.bias)))
        return y


@pytest.mark.parametrize("by_norm", [True, False])
def test_standardised_weights(by_norm: bool) -> None:
    graph = trace_small(Standardised(by_norm), torch.randn(2, 3, 6, 6))
    assert {g.size: g.exact for g in graph.groups} == {6: False, 4: True}
    check_graph(graph)
