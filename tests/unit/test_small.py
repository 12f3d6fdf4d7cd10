"""The comparison on small pictures: taken where it tells as much as the one on the example inputs, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.slicing import prune, randomise, thin
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.core.errors import FixedSize
from jettison.graph import small, surgery
from jettison.graph.check import run_both, run_double, run_masked
from jettison.graph.comparing import measure_error
from jettison.graph.groups import trace
from jettison.graph.rewrite import slice_graph
from jettison.graph.small import run_small, shrink
from jettison.graph.surgery import slice_module

PICTURE = (2, 3, 80, 72)


def _conv(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *more, nn.ReLU(), nn.Conv2d(6, 4, 1))


def _run_small(model: nn.Module, x: Tensor) -> Any:
    graph = trace(randomise(model).eval(), x)
    return run_small(model, slice_graph(graph, thin(graph)), graph.traced.example)


def test_only_pictures_are_made_smaller() -> None:
    picture, tokens = torch.randn(PICTURE), torch.randn(2, 90, 80)
    found = shrink((picture, tokens))
    assert found is not None and found[1] is tokens and torch.equal(found[0], picture[..., :64, :64])
    whole = torch.randn(1, 3, 224, 160)
    found = shrink((whole,))
    assert found is not None and torch.equal(found[0], whole[..., :192:3, :128:2])
    assert shrink((tokens, torch.randn(2, 3, 64, 80), torch.ones(PICTURE, dtype=torch.long))) is None


def test_small_pictures_are_enough_for_a_network_that_takes_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise AssertionError("the full comparison ran")

    monkeypatch.setattr(surgery, "verify", refuse)
    prune(_conv(nn.BatchNorm2d(6)), torch.randn(PICTURE))


def test_a_picture_of_one_colour_tells_nothing() -> None:
    picture = torch.zeros(1, 3, 200, 200)
    assert shrink((picture,)) is None
    picture[..., 60:140, 60:140] = torch.rand(80, 80)  # a black border around what is to be seen
    assert shrink((picture,)) is not None


def test_a_number_that_is_none_is_a_difference_in_any_output() -> None:
    right, wrong = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert measure_error([right, right], [right, right]) == 0
    assert not measure_error([right, wrong], [right, right]) <= 1e-10
    assert not measure_error([wrong, right], [right, right]) <= 1e-10


class Planted(nn.Module):
    """Computes something else than its graph once it is pruned, at every size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * float(y.shape[1]) ** -0.5)


class PlantedInLarge(Planted):
    """The same in large pictures only, by the same calls of torch."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * (float(y.shape[1]) if x.shape[-1] > 64 else 6.0) ** -0.5)


class PlantedInWhole(Planted):
    """A whole number in the place of the fraction."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.roll(y, y.shape[1] if x.shape[-1] > 64 else 6, 2))


class OtherCalls(Planted):
    """The same number by another call."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y / y.shape[1] if x.shape[-1] > 64 else y * (1 / 6))


@pytest.mark.parametrize("kind", [Planted, PlantedInLarge, PlantedInWhole, OtherCalls])
def test_a_mistake_in_large_pictures_is_found(kind: type[nn.Module]) -> None:
    with pytest.raises(FixedSize, match="differs from its graph's"):
        prune(kind(), torch.randn(PICTURE))


@pytest.mark.parametrize("kind", [PlantedInLarge, PlantedInWhole, OtherCalls])
def test_without_the_path_it_would_not_be(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    class Alike(list[Any]):
        def __eq__(self, other: object) -> bool:
            return True

    def forget(self: Any) -> None:
        super(small.Path, self).__init__()
        self.calls = Alike()

    monkeypatch.setattr(small.Path, "__init__", forget)
    prune(kind(), torch.randn(PICTURE))


def test_pictures_that_would_vanish_are_not_made_smaller() -> None:
    """Behind a norm over one pixel nothing is left to compare."""
    halves = [nn.Conv2d(6, 6, 3, stride=4, padding=1) for _ in range(3)]
    assert _run_small(_conv(*halves[:2], nn.InstanceNorm2d(6)), torch.randn(1, 3, 256, 256)) is not None
    assert _run_small(_conv(*halves, nn.InstanceNorm2d(6)), torch.randn(1, 3, 256, 256)) is None


class Flat(nn.Module):
    """Its classifier reads every pixel, so that it takes one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, stride=8), nn.Linear(6 * 10 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))


def test_a_network_of_one_size_is_compared_on_the_example() -> None:
    assert _run_small(Flat(), torch.randn(PICTURE)) is None
    assert not prune(Flat(), torch.randn(PICTURE)).replaced


class Placing(nn.Module):
    """Names a device in its forward: a copy without values cannot run there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.width = 6

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).reshape(-1, self.width) * torch.full((1, 1), 2.0, device="cpu")
        return self.b(y)


def test_a_network_that_needs_values_is_run_with_them() -> None:
    eager = prune(Placing(), torch.randn(3, 4))
    assert [a["value"] for a in eager.attributes if a["name"] == "width"] == [4] and not eager.replaced


def test_final_weights_are_compared_and_kept() -> None:
    x = torch.randn(PICTURE)
    model = randomise(_conv()).eval()
    graph = trace(model, x)
    final = slice_graph(graph, thin(graph))
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.mul_(1.5)
    result = slice_module(model, graph, thin(graph), final).module
    with torch.no_grad():
        torch.testing.assert_close(result(x), final(x)[0])


def test_side_by_side_is_one_after_the_other() -> None:
    graph = trace(randomise(_conv(nn.GroupNorm(2, 6))).eval(), torch.randn(2, 3, 8, 8))
    keeps, x = thin(graph), (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    masked, whole = run_both(graph, keeps, x)
    assert torch.equal(masked[0], run_masked(graph, keeps, x)[0]) and not torch.equal(masked[0], whole[0])
    assert torch.equal(whole[0], run_double(graph.module, x)[0])
