"""Short cuts of calibration: they leave out work, and change no scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jettison as jt
from jettison.flow import reading
from jettison.graph.trace import trace_module
from jettison.quantization import convert, quantize, ranges
from jettison.quantization.ranges import HALF_BINS, Histogram, choose_weight_scale
from jettison.targets.integer import Levels, fake_quantize
from jettison.targets.onnxruntime import scheme

SUMMING = 1e-5
"""Relative; float32 sums in another order, as another batch size makes them."""


def draw_weight(seed: int) -> Tensor:
    weight = torch.randn(70, 1500, generator=torch.Generator().manual_seed(seed))
    weight[:30, 9:] = 0.0  # many zeros, and few weights that the rows are watched by
    return weight


def search_whole_grid(weight: Tensor, levels: Levels) -> Tensor:
    most = weight.abs().amax(1) / levels.q_max
    most = most.clamp(min=float(most.max()) * 2.0**-12)
    shares = torch.linspace(1.0, ranges.SMALLEST_SHARE, ranges.GRID_POINTS)
    errors = [(fake_quantize(weight, (most * s)[:, None], 0, levels) - weight).pow(2).sum(1) for s in shares]
    best: Tensor = most * shares[torch.stack(errors).argmin(0)]
    return best.clamp(min=float(most.max()) * 2.0**-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [1, 5])
@pytest.mark.parametrize("least", [0, 1])
def test_leaving_the_grid_early_changes_no_weight_scale(bits: int, power: int, least: int) -> None:
    """Also where the integers reach one further below zero than above, as those of weights in groups."""
    levels, weight = Levels(least - 2 ** (bits - 1), 2 ** (bits - 1) - 1, True), draw_weight(bits) ** power
    assert torch.equal(choose_weight_scale(weight, 0, levels), search_whole_grid(weight, levels))


def test_leaving_the_grid_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "ROUNDING_ROOM", 0.0)
    weight, levels = draw_weight(4), Levels(-7, 7, True)
    assert not torch.equal(choose_weight_scale(weight, 0, levels), search_whole_grid(weight, levels))


def test_zeros_are_not_counted() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([0.0, -0.0, 1e-9, -1e-9, 0.5, -2.0, 0.0]), "here")
    assert histogram.counts is not None and histogram.seen == 7
    assert histogram.counts[HALF_BINS - 1 : HALF_BINS + 1].tolist() == [1, 1] and int(histogram.counts.sum()) == 4


class Net(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.deep(self.stem(x).relu()).relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize(("at_once", "rows"), [(1, 1), (8 * 10 * 10 * 3, 3), (2**22, 7)])
def test_ranges_are_the_same_however_many_samples_run_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int, rows: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 12, 12)
    module = trace_module(Net().eval(), (x,)).module
    steps, sizes, add = [], [], Histogram.add

    def watch(self: Histogram, value: Tensor, where: str) -> None:
        sizes.append(len(value))
        add(self, value, where)

    monkeypatch.setattr(Histogram, "add", watch)
    for limit in (at_once, 2**30):
        monkeypatch.setattr(convert, "AT_ONCE", limit)
        found = quantize(module, [(x,)], scheme=scheme(), ranges="minmax").module
        steps.append([n.args[1] for n in found.graph.nodes if "dequantize_per_tensor" in str(n.target)])
        assert max(sizes) == (rows if limit == at_once else 7)
        sizes.clear()
    assert len(steps[0]) > 2 and steps[0] == pytest.approx(steps[1], rel=SUMMING)


def test_the_converted_graph_shares_no_memory_with_the_folded_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 12, 12)
    folded = convert.fold(trace_module(Net().eval(), (x,)).module, frozenset(scheme().weighted))
    held = {name: value.clone() for name, value in folded.state_dict().items()}
    given = {"scheme": scheme(), "exclude": ("head",), "ranger": ranges.span_mse}
    converted = convert.convert(folded, [(x,)], **given)
    tensors = dict(converted.state_dict())
    assert torch.equal(tensors["head.weight"], held["head.weight"])
    for value in tensors.values():
        value.zero_()
    assert all(torch.equal(value, held[name]) for name, value in folded.state_dict().items())


def test_a_fixed_batch_runs_whole() -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(4, 3, 12, 12))

    assert convert.choose_rows(trace_module(Net().eval(), (torch.randn(4, 3, 12, 12),)).module) == 2**22 // 800
    assert convert.choose_rows(trace_module(Fixed().eval(), (torch.randn(4, 3, 12, 12),)).module) is None


@pytest.mark.parametrize("least", [1, 3])
def test_a_network_is_traced_with_two_samples_where_it_takes_them(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] < least:
                raise ValueError("too few")
            return super().forward(x)

    traced: list[int] = []

    def watch(model: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> object:
        traced.append(len(inputs[0]))
        return trace_module(model, inputs, keywords)

    monkeypatch.setattr(reading, "trace_module", watch)
    found = jt.quantize(Picky().eval(), [torch.randn(6, 3, 12, 12)])
    assert traced == ([2] if least == 1 else [2, 6])
    assert [site.bits for site in found.sites] in ([8, 8, 8], [7, 7, 7])
