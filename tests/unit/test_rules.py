"""Rules one by one: small networks that use an operator in a way the networks of `jettison.testing` do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.operators import check_graph, sizes_of, trace_small
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.graph.groups import trace
from jettison.testing import build_model, randomise


class Strange(nn.Module):
    """Bounds the length of its hidden features, takes distances of others to centres, and lets a third layer be."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(3, 5)
        self.centres = nn.Parameter(torch.zeros(3, 6))
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.renorm(self.a(x), 2, 0, 1.0)
        x = torch.cdist(self.b(x), self.centres)
        y: Tensor = self.out(torch.sigmoid(self.c(x)))
        return y


def test_operators_without_a_rule_freeze_what_they_touch() -> None:
    graph = trace(randomise(Strange()), torch.randn(3, 4))
    assert graph.opaque == ("aten.cdist.default", "aten.renorm.default")
    assert [g.name for g in graph.groups] == ["c"]
    check_graph(graph)
    part = next(p for p in graph.frozen if p.what == "a.weight (dimension 0)")
    assert "aten.renorm" in part.reason and "test_rules.py:" in part.where


class OverTime(nn.Module):
    """Learned queries under a causal mask: their order counts, so they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.zeros(1, 5, 8)), nn.Linear(3, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        k = self.key(x)
        q = self.query.expand(x.shape[0], -1, -1)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, k, is_causal=True)).mean(1)
        return y


def test_a_causal_mask_freezes_the_queries() -> None:
    graph = trace(randomise(OverTime()), torch.randn(2, 5, 3))
    assert [g.size for g in graph.groups] == [8]
    check_graph(graph)


class Untracked(nn.Module):
    """BatchNorm that takes its statistics from the batch even in eval mode, over learned tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 6, 7))
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens * x[:, None, None])
        out: Tensor = self.out(y.pow(2).sum(-1))
        return out


def test_batch_statistics_run_over_what_is_kept() -> None:
    graph = trace(randomise(Untracked()), torch.randn(4))
    assert {g.size: g.exact for g in graph.groups} == {6: True, 7: False}
    check_graph(graph)


class Mirrored(nn.Module):
    """Channels moved to the end and padded with their own mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(8, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.a(x)[:, None], (1, 1), mode="reflect")[:, 0]
        y: Tensor = self.out(torch.relu(self.b(x)))
        return y


def test_mirrored_channels_stay() -> None:
    graph = trace(randomise(Mirrored()), torch.randn(3, 4))
    assert [g.name for g in graph.groups] == ["b"]
    check_graph(graph)


class Query(nn.Module):
    """Grouped-query attention by the operator's own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 8, bias=False), nn.Linear(6, 8)
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        out: Tensor = self.out(y)
        return out


def test_grouped_queries_by_flag() -> None:
    graph = trace(randomise(Query()), torch.randn(2, 5, 6))
    assert sizes_of(graph) == [2, 2, 4, 4]
    check_graph(graph)


class Movements(nn.Module):
    """Operators that move positions: repeat, interleave, flip, look-up, shuffle, sub-pixels, expand_as."""

    which: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(32, 4, 1)
        self.d = nn.Conv2d(8, 6, 1)
        self.table, self.row = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(6, 1, 1))
        self.register_buffer("which", torch.tensor([[1, 3], [0, 4]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.relu(x * self.row.expand_as(x)).flip(-1)
        x = self.b(x.repeat(1, 2, 1, 1))
        x = self.c(F.pixel_unshuffle(F.channel_shuffle(x, 2), 2))
        x = self.d(x.repeat_interleave(2, 1))
        y: Tensor = x.mean((2, 3)) * self.table[self.which].sum((0, 1))
        norm: Tensor = y.norm(dim=-1, keepdim=True)
        return norm


def test_movements() -> None:
    graph = trace(randomise(Movements()), torch.randn(2, 3, 4, 4))
    assert not graph.opaque
    check_graph(graph)


def test_printing_names_groups_reasons_and_lines() -> None:
    text = str(trace(randomise(Strange()), torch.randn(3, 4)))
    assert text.startswith("1 prune group; 2 opaque operators; ")
    assert "test_rules.py:" in text and "aten.renorm" in text and "batch free" in text
    for drawn in (text, str(trace(*build_model("dense"))), str(trace(*build_model("norms")))):
        assert max(map(len, drawn.splitlines())) <= 100


class Recurrent(nn.Module):
    """An LSTM before layers of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.relu(self.b(self.lstm(x)[0])))
        return y


class Weighted(nn.Module):
    """Weights made in forward: one by weight norm, one standardised by hand; a cast; outputs that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        self.b, self.c = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        w = self.b.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        x = F.relu(F.conv2d(F.relu(self.a(x)).half().float(), w, self.b.bias), inplace=True)
        x = self.c(x)
        return x, None, x.argmax(1)


class Rotary(nn.Module):
    """Rotary positions: pairs (d, d + half) of queries and keys die together, with their sines."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)
        self.register_buffer("cos", torch.zeros(5, 8))
        self.register_buffer("sin", torch.zeros(5, 8))

    def _turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(x.shape[0], 5, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize(
    ("make", "shape", "sizes"),
    [
        (Recurrent, (2, 3, 4), [5, 6]),
        (Weighted, (2, 3, 6, 6), [4, 6]),
        (Rotary, (2, 5, 6), [2, 4, 8]),
    ],
)
def test_unusual_networks(make: type[nn.Module], shape: Any, sizes: list[int]) -> None:
    graph = trace_small(make(), torch.randn(shape))
    assert sizes_of(graph) == sizes
    check_graph(graph, least=2)  # one filter's weight has no deviation
