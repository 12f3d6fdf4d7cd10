"""Operators that choose by value or by number: the features beside what they choose from stay free."""

from __future__ import annotations

import pytest
import torch
from tests.unit.operators import Between, Operator, Pictured, check_graph, sizes_of, trace_small
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.cost.macs import count
from jettison.graph.groups import trace
from jettison.testing import randomise

ROWS = torch.tensor([3, 0, 3])


def _write_rows(y: Tensor) -> Tensor:
    y = y.clone()
    y[torch.tensor([1, 0])] = y[:, :1].sum(0)
    return y


def _write_where(y: Tensor) -> Tensor:
    y = y.clone()
    y[y.detach().sum(-1) > 0] = 0.5
    return y


def _write_run(y: Tensor) -> Tensor:
    z = y.new_zeros(y.shape[0], 6, 6)
    z[..., 2:5] = y[..., :3]
    return z * 2


def _write_one(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, 1] = y[:, 2] * 2
    return y


def _by_rank(y: Tensor) -> Tensor:
    order = y.sum(-1).argsort(1)
    return y.gather(1, order[..., None].expand(-1, -1, 6))


def _recut(y: Tensor) -> Tensor:
    """Tokens as 3 x 2, turned over, then read as 3 x 2 again: no common refinement, but features pass."""
    y = y.view(-1, 3, 2, 6).transpose(1, 2).reshape(-1, 6, 6)
    return y.view(-1, 3, 2, 6).amax(2)


TOKENS: dict[str, tuple[Operator, list[int]]] = {
    "cumsum": (lambda y: y.cumsum(1), [6]),
    "cumprod": (lambda y: y.cumprod(-2), [6]),
    "logcumsumexp": (lambda y: y.logcumsumexp(1), [6]),
    "diff": (lambda y: y.diff(dim=1), [6]),
    "diff with ends": (lambda y: y.diff(dim=1, prepend=y[:, :1] * 2, append=y[:, -1:]), [6]),
    "sort": (lambda y: y.sort(1, descending=True).values, [6]),
    "stable sort": (lambda y: torch.sort(y, stable=True, dim=1).values, [6]),
    "topk": (lambda y: y.topk(2, 1).values, [6]),
    "kthvalue": (lambda y: y.kthvalue(2, 1, keepdim=True).values, [6]),
    "max": (lambda y: y.max(1).values + y.min(1).values, [6]),
    "median": (lambda y: y.median(1, keepdim=True).values, [6]),
    "max of two": (lambda y: torch.max(y, y.flip(1)), [6]),
    "argmax": (lambda y: y.gather(1, y.argmax(1, keepdim=True)), [6]),
    "gather by rank": (_by_rank, [6]),
    "first features only": (lambda y: y + y.gather(1, torch.zeros(2, 6, 1, dtype=torch.long)), []),
    "index_select": (lambda y: y.index_select(1, ROWS), [6]),
    "look up": (lambda y: y[:, ROWS], [6]),
    "windows": (lambda y: y.unfold(1, 2, 2).sum(-1), [6]),
    "narrow": (lambda y: y.narrow(1, 1, 3), [6]),
    "movedim": (lambda y: y.movedim(-1, 0).relu().movedim((0, 1), (2, 0)), [6]),
    "put rows": (_write_rows, [6]),
    "put where": (_write_where, [6]),
    "write a run": (_write_run, [2, 3, 3]),
    "write one": (_write_one, [6]),
    "overwrite": (lambda y: torch.zeros_like(y).copy_(y[:, :1]) + y, [6]),
    "recut": (_recut, [6]),
    "running over features": (lambda y: y.cumsum(-1), []),
    "largest features": (lambda y: y.sort(-1).values, []),
    "which feature": (lambda y: y * y.argmax(-1, keepdim=True), []),
}


@pytest.mark.parametrize("name", TOKENS)
def test_features_beside_a_choice_stay_free(name: str) -> None:
    operator, sizes = TOKENS[name]
    graph = trace_small(Between(operator))
    assert sizes_of(graph) == sizes
    if sizes:
        check_graph(graph)
    else:
        part = next(p for p in graph.frozen if p.what == "first.weight (dimension 0)")
        assert part.reason and "operators.py:" in part.where


PARTS: dict[str, tuple[Operator, int, list[int]]] = {
    "narrow": (lambda y: y.narrow(-1, 2, 4), 4, [2, 2, 4]),
    "narrow from the end": (lambda y: y.narrow(-1, -4, 3), 3, [3, 4]),
    "tensor_split": (lambda y: torch.cat(y.tensor_split((3, 5), -1)[:2], -1), 5, [2, 3, 3]),
    "uneven tensor_split": (lambda y: torch.cat(y.tensor_split(3, -1)[1:], -1), 5, [2, 3, 3]),
    "write a run": (lambda y: torch.slice_scatter(y, y[:, :, 2:5] * 2, -1, 2, 5), 8, [2, 3, 3]),
    "write an end": (lambda y: torch.slice_scatter(y, y[:, :, :3], -1, -3), 8, [2, 3]),
}


@pytest.mark.parametrize("name", PARTS)
def test_features_are_parted(name: str) -> None:
    operator, out, sizes = PARTS[name]
    graph = trace_small(Between(operator, 8, out))
    assert sizes_of(graph) == sizes
    check_graph(graph)


PICTURES: dict[str, Operator] = {
    "patches and back": lambda y: F.fold(F.unfold(y, 3, padding=1) * 2, (6, 6), 3, padding=1),
    "columns": lambda y: F.unfold(y, 2, stride=2).unflatten(1, (-1, 4)).sum(2).unflatten(-1, (3, 3)),
    "windows": lambda y: y.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)),
    "where": lambda y: torch.where(y > 0, y, y.amin((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_channels_beside_space_stay_free(name: str) -> None:
    graph = trace_small(Pictured(PICTURES[name]))
    assert sizes_of(graph) == [6]
    check_graph(graph)


class Numbered(nn.Module):
    """Writes rows at places found among learned scores: a score that is gone would write nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.first, self.last = nn.Parameter(torch.zeros(3, 7)), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).transpose(0, 1).clone()
        y[self.scores.argmax(0) % 2] = 0.25
        z: Tensor = self.last(y)
        return z


def test_numbers_that_are_written_at_stay() -> None:
    graph = trace_small(Numbered())
    assert sizes_of(graph) == [5]
    check_graph(graph)


class Listed(nn.Module):
    """How many positions come out depends on values: the list is read, the channels beside it stay free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.score = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        places = torch.nonzero(self.score(y)[..., 0] > 0)
        found: Tensor = self.last(y[places[:, 0], places[:, 1]])
        return self.last(y), found


def test_lists_of_unknown_length() -> None:
    graph = trace_small(Listed())
    assert sizes_of(graph) == [6]
    check_graph(graph)
    profile = count(graph.module)
    # score and last run on 6 tokens, first too; the second run of last has a length nobody knows.
    assert profile.macs == 6 * (4 * 6 + 6 * 2 + 6)
    assert any("nonzero" in name for name in profile.uncounted)


class Regions(nn.Module):
    """A detector's second stage: channels pass through places that are read by number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        found = torch.ops.torchvision.roi_align(self.first(x), boxes, 1.0, 2, 2, 2, False)
        y: Tensor = self.last(torch.relu(self.hidden(found)).flatten(1))
        return y


class Deformed(nn.Module):
    """A convolution that reads at places of its own, one set for all channels or one per run of channels."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.runs = runs
        self.first, self.places = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 18 * runs, 3, padding=1)
        self.deformed, self.last = nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros((x.shape[0], 1))
        args = (1, 1, 1, 1, 1, 1, 1, self.runs, False)
        weight, bias = self.deformed.weight, self.deformed.bias
        y = torch.ops.torchvision.deform_conv2d(self.first(x), weight, self.places(x), mask, bias, *args)
        z: Tensor = self.last(torch.relu(y))
        return z


def test_operators_of_torchvision() -> None:
    pytest.importorskip("torchvision")
    boxes = torch.tensor([[0.0, 0, 0, 3, 3], [1, 1, 1, 5, 4], [0, 2, 2, 5, 5]])
    graph = trace(randomise(Regions()), (torch.randn(2, 3, 6, 6), boxes))
    assert sizes_of(graph) == [4, 6] and not graph.opaque
    check_graph(graph)
    for runs, sizes in ((1, [4, 6]), (2, [4])):
        graph = trace_small(Deformed(runs), torch.randn(2, 3, 6, 6))
        assert sizes_of(graph) == sizes
        check_graph(graph)
