"""Sums stay float where no integer layer reads them, which saves most where a residual stream has outliers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import jettison as jt
from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.quantization.fold import name_operator
from jettison.targets import onnxruntime

FLAGS = frozenset({"avx512_vnni"})


class Stream(nn.Module):
    """Two residual steps on rows, a LayerNorm before each; one channel of the stream is far larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(16) for _ in range(3)), nn.Linear(16, 4)
        with torch.no_grad():
            self.norms[2].weight[3] = 0.01

    def forward(self, x: Tensor) -> Tensor:
        for step, norm in zip(self.steps, self.norms[:2], strict=True):
            x = x + step(norm(x))
        logits: Tensor = self.head(self.norms[2](x))
        return logits


class Pictures(nn.Module):
    """A residual step between convolutions, and a sum of a convolution that only a LayerNorm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = y + self.two(y.relu())
        found: Tensor = self.norm(y + self.three(y))
        return found


def count_sums(module: GraphModule) -> tuple[int, int]:
    """Return how many sums a converted graph has, and how many of them are rounded."""
    found = [n for n in module.graph.nodes if name_operator(n) == "aten.add.Tensor"]
    return len(found), sum(any("quantize_per_tensor" in str(u.target) for u in n.users) for n in found)


def make(network: type[nn.Module], *shape: int) -> tuple[GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(32, *shape)
    return trace_module(network().eval(), (x,)).module.requires_grad_(False), x


def test_a_stream_that_no_integer_operator_reads_stays_float() -> None:
    module, x = make(Stream, 6, 16)
    found = quantize(module, [(x,)], scheme=onnxruntime.scheme(FLAGS))
    assert count_sums(found.module) == (2, 0) and [site.bits for site in found.sites] == [8, 8, 8]


def test_sums_of_convolutions_are_rounded_as_before() -> None:
    module, x = make(Pictures, 4, 8, 8)
    assert count_sums(quantize(module, [(x,)], scheme=onnxruntime.scheme(FLAGS)).module) == (2, 2)


def test_a_target_without_float_results_rounds_every_sum() -> None:
    module, x = make(Stream, 6, 16)
    scheme = dataclasses.replace(onnxruntime.scheme(FLAGS), float_output=frozenset())
    assert count_sums(quantize(module, [(x,)], scheme=scheme).module) == (2, 2)


def test_a_sum_that_a_layer_reads_is_rounded_unless_that_layer_is_float() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.three(self.one(x) + self.two(x))
            return found

    module, x = make(Read, 8)
    scheme = onnxruntime.scheme(FLAGS)
    assert count_sums(quantize(module, [(x,)], scheme=scheme).module) == (1, 1)
    assert count_sums(quantize(module, [(x,)], scheme=scheme, exclude=["three"]).module) == (1, 0)


def test_outliers_in_a_stream_cost_a_tenth_of_what_rounding_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(Stream, 6, 16)
    x[:, :, 3] *= 200
    (wanted,) = module(x)
    losses = []
    for keep in (True, False):
        if not keep:
            monkeypatch.setattr("jettison.quantization.annotate.find_read", lambda m, *_: frozenset(m.graph.nodes))
        (found,) = quantize(module, [(x,)], scheme=onnxruntime.scheme(FLAGS)).module(x)
        losses.append(float((found - wanted).square().sum()))
    assert losses[0] < 0.1 * losses[1]


class Placed(nn.Module):
    """A projection of positions that are made for as many rows as the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.project, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.ones(x.shape[0], 4, 6, 6).cumsum(2).sin()
        logits: Tensor = self.head((self.first(x) + self.project(table)).mean((2, 3)))
        return logits


def test_what_reads_only_sizes_stays_float() -> None:
    """The layer, and the sum with what it gives."""
    torch.manual_seed(0)
    found = jt.quantize(Placed().eval(), [torch.randn(8, 3, 6, 6)])
    assert {site.layer: site.bits for site in found.sites} == {"first": 8, "project": 32, "head": 8}
    (added,) = (n for n in found.module.graph.nodes if name_operator(n) == "aten.add.Tensor")
    assert "dequantize" in str(added.args[0].target) and name_operator(added.args[1]) == "aten.conv2d.default"
