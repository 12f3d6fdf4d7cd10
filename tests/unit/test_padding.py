"""Padding taken into convolutions: the same numbers, one operator less, and only where it may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.graph.trace import trace_module
from jettison.quantization.fold import copy_graph, name_operator
from jettison.quantization.padding import merge_padding


class Padded(nn.Module):
    def __init__(self, conv: nn.Module, pad: Callable[[Tensor], Tensor], *, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.pad, self.twice = conv, pad, twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        y: Tensor = self.conv(x)
        return y + x.mean() if self.twice else y


def merge(model: nn.Module, x: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """Return the operators left, and what the graph gives before and after."""
    module = copy_graph(trace_module(model.eval(), (x,), {}).module)
    with torch.no_grad():
        (before,) = module(x)
        merge_padding(module)
        (after,) = module(x)
    return [name_operator(n) for n in module.graph.nodes if n.op == "call_function"], before, after


PICTURE, ROWS = torch.randn(2, 4, 9, 7), torch.randn(2, 4, 9)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Padded(nn.Conv2d(4, 6, 3), lambda x: F.pad(x, (1, 1, 2, 2))), PICTURE),
        (Padded(nn.Conv2d(4, 4, 5, 2, 1, groups=4, bias=False), lambda x: F.pad(x, (2, 2, 1, 1))), PICTURE),
        (Padded(nn.Conv2d(4, 6, 3, padding=(0, 1)), nn.ZeroPad2d(1)), PICTURE),
        (Padded(nn.Conv1d(4, 6, 3, dilation=2), lambda x: F.pad(x, (2, 2))), ROWS),
        (Padded(nn.Conv3d(4, 6, (1, 3, 2)), lambda x: F.pad(x, (1, 1, 0, 0, 2, 2))), torch.randn(2, 4, 3, 6, 5)),
    ],
)
def test_the_same_numbers_without_the_padding(model: nn.Module, x: Tensor) -> None:
    operators, before, after = merge(model, x)
    assert len(operators) == 1 and "conv" in operators[0]
    assert after.shape == before.shape and torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Padded(nn.Conv2d(4, 6, 3), lambda x: F.pad(x, (0, 1, 0, 1))), PICTURE),
        (Padded(nn.Conv2d(4, 6, 3), lambda x: F.pad(x, (1, 1, 1, 1), value=0.5)), PICTURE),
        (Padded(nn.Conv2d(4, 6, 3), lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")), PICTURE),
        (Padded(nn.Conv2d(4, 6, 3), lambda x: F.pad(x, (1, 1))), PICTURE),
        (Padded(nn.Conv2d(4, 6, 3), lambda x: F.pad(x, (1, 1, 1, 1)), twice=True), PICTURE),
        (Padded(nn.Conv2d(5, 6, 3), lambda x: F.pad(x, (1, 1, 1, 1, 1, 0))), PICTURE),
        (Padded(nn.Conv2d(4, 6, 3), lambda x: F.pad(x, (-1, -1, 1, 1))), PICTURE),
    ],
)
def test_what_a_convolution_cannot_do_stays(model: nn.Module, x: Tensor) -> None:
    operators, before, after = merge(model, x)
    assert any("pad" in operator for operator in operators)
    assert torch.equal(before, after)
