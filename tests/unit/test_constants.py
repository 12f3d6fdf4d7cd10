"""Weights that networks compute at every call: folded once, named after their layers, quantized like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import jettison as jt
from jettison.graph.subgraphs import list_tensors_used
from jettison.graph.trace import trace_module
from jettison.quantization.constants import fold_constants
from jettison.quantization.fold import copy_graph, name_operator


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT and NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return nn.functional.conv2d(x, w, self.bias, self.stride, self.padding)


class Net(nn.Module):
    """A standardised convolution under a BatchNorm, two wrapped layers, and a slice of a weight with a joined bias."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = Standardised(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.mid, self.head = wrap(nn.Conv2d(16, 16, 3, padding=1)), wrap(nn.Linear(16, 10))
        self.left, self.right = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.norm(self.stem(x)).relu()).relu()
        x = self.head(x.mean((2, 3)))
        return nn.functional.linear(x, 2 * self.head.weight[:, :10], torch.cat([self.left, self.right]))


def old(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return old_weight_norm(module)


WRAPS = {"weight norm": weight_norm, "spectral norm": spectral_norm, "old weight norm": old, "none": lambda m: m}


def build(wrap: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(WRAPS[wrap]).eval(), torch.randn(4, 3, 8, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_every_layer_is_quantized_under_its_own_name(wrap: str) -> None:
    model, x = build(wrap)
    with torch.no_grad():
        wanted = model(x)
    for kind, bits in (("static", [8, 8, 8, 8]), ("dynamic", [32, 32, 8, 8]), ("fp16", [16] * 4)):
        found = jt.quantize(model, [x, x + 0.1, x - 0.1], kind=kind)
        names = [site.layer for site in found.sites]
        assert names[:3] == ["stem", "mid", "head"] and names[3].startswith("head@"), names
        assert [site.bits for site in found.sites] == bits
        with torch.no_grad():
            error = found.module(x).sub(wanted).norm() / wanted.norm()
        assert 0 < error < 0.02
    found = jt.quantize(model, [x, x + 0.1, x - 0.1], exclude=["stem"])
    assert [site.bits for site in found.sites] == [32, 8, 8, 8]


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_folding_changes_no_output_and_leaves_no_computed_weight(wrap: str) -> None:
    model, x = build(wrap)
    module = trace_module(model, (x,), {}).module
    folded = copy_graph(module)
    fold_constants(folded)
    with torch.no_grad():
        assert torch.equal(folded(x)[0] if isinstance(folded(x), (tuple, list)) else folded(x), flat(module(x)))
    readers = [n for n in folded.graph.nodes if name_operator(n) in ("aten.conv2d.default", "aten.linear.default")]
    assert len(readers) == 4
    assert all(part.op == "get_attr" for n in readers for part in n.args[1:3])
    assert list_tensors_used(module) == list_tensors_used(
        trace_module(model, (x,), {}).module
    )  # the caller's is left alone


def flat(value: Any) -> Tensor:
    found = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(found, Tensor)
    return found


class Twice(nn.Module):
    """One computed weight in two calls, and its parameter read by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * self.layer.weight
        x = nn.functional.linear(nn.functional.linear(x, doubled), doubled, self.layer.bias)
        return x + self.layer.weight.sum()


def test_what_else_reads_the_parameter_still_gets_its_own_value() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(3, 6)
    folded = copy_graph(trace_module(model, (x,), {}).module)
    fold_constants(folded)
    with torch.no_grad():
        assert flat(folded(x)).sub(model(x)).abs().max() < 1e-6
    assert set(list_tensors_used(folded)) == {"layer.weight", "layer@2.weight", "layer.bias"}


class Placed(nn.Module):
    """A projection of a table of positions, as in XCiT: no layer that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.project = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.table, self.head = nn.Buffer(torch.randn(1, 4, 6, 6)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)) + torch.relu(self.project(self.table.sin()))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_layer_applied_to_a_constant_is_one() -> None:
    torch.manual_seed(0)
    model, x = Placed().eval(), torch.randn(4, 3, 6, 6)
    found = jt.quantize(model, [x, x + 0.1])
    assert [site.layer for site in found.sites] == ["first", "head"]
    with torch.no_grad():
        assert found.module(x).sub(model(x)).norm() < 0.03 * model(x).norm()


class Noisy(nn.Module):
    """A weight with noise is drawn at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight + torch.rand_like(self.layer.weight))


def test_what_is_drawn_is_no_constant() -> None:
    folded = copy_graph(trace_module(Noisy().eval(), (torch.randn(3, 6),), {}).module)
    fold_constants(folded)
    assert list_tensors_used(folded) == ["layer.weight"]


class Made(nn.Module):
    """A weight that hangs on the input is no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.table * x.mean())


def test_weights_made_from_inputs_stay_computed() -> None:
    x = torch.randn(3, 6)
    model = Made().eval()
    folded = copy_graph(trace_module(model, (x,), {}).module)
    fold_constants(folded)
    with torch.no_grad():
        assert flat(folded(2 * x)).sub(model(2 * x)).abs().max() < 1e-6
    assert list_tensors_used(folded) == ["table"]
