"""Products with a stored matrix become linear layers: what counts as one, names, and every kind of quantization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jettison as jt
from jettison.graph.trace import trace_module
from jettison.quantization.fold import copy_graph
from jettison.quantization.products import write_linear


class Products(nn.Module):
    """GPT-2's spelling of a layer, products without a bias, one of two activations, a matrix that is also added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bias = nn.Parameter(torch.randn(12, 16)), nn.Parameter(torch.randn(16))
        self.b, self.c = nn.Parameter(torch.randn(16, 12)), nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.a).relu()
        y = torch.matmul(y, self.b)
        z = torch.mm(y, self.c) + torch.matmul(y, y.t()).sum(1, keepdim=True)
        return z + self.c[:1]


@pytest.fixture
def products() -> nn.Module:
    torch.manual_seed(0)
    return Products().eval()


def test_products_with_a_matrix_become_linear(products: nn.Module) -> None:
    x = torch.randn(5, 12)
    graph = copy_graph(trace_module(products, (x,)).module)
    wanted = graph(x)[0]
    assert write_linear(graph) == 3
    names = [str(n.target) for n in graph.graph.nodes]
    assert names.count("aten.linear.default") == 3 and names.count("aten.matmul.default") == 1
    # The same sums by another kernel.
    torch.testing.assert_close(graph(x)[0], wanted, rtol=1e-5, atol=1e-5)
    state = graph.state_dict()
    assert state["a"].shape == (16, 12) and state["b"].shape == (12, 16)
    assert torch.equal(state["c"].t(), state["c@transposed"]), "what else reads the matrix still gets it as it was"
    assert write_linear(graph) == 0


class NoLayers(nn.Module):
    """Things that look alike: a scaled sum, a bias for every row, a batch of matrices, a stored left factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(2, 6, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.a, beta=0.5)
        y = torch.addmm(self.a, y, self.a)
        z: Tensor = torch.matmul(y, self.b).sum(0) + torch.mm(self.a, y)
        return z


def test_what_only_looks_like_a_layer_is_left_alone() -> None:
    torch.manual_seed(0)
    graph = copy_graph(trace_module(NoLayers().eval(), (torch.randn(6, 6),)).module)
    before = str(graph.graph)
    assert write_linear(graph) == 0 and str(graph.graph) == before


@pytest.mark.parametrize("kind", ["static", "dynamic", "weight-only"])
def test_they_are_quantized(products: nn.Module, kind: str) -> None:
    x = torch.randn(64, 12)
    found = jt.quantize(products, [x], kind=kind)
    assert [site.layer for site in found.sites] == ["a", "b", "c@transposed"]
    assert all(site.bits < 32 for site in found.sites)
    with torch.no_grad():
        wanted, given = products(x), found.module(x)
    error = float((wanted - given).square().sum() / wanted.square().sum())
    assert error < (1e-2 if kind == "weight-only" else 1e-3)
