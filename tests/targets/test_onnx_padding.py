"""Zero padding before a convolution goes into the convolution, and only where that computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.graph.trace import Traced, trace_module
from jettison.quantization import quantize
from jettison.quantization.integers import run_integers
from jettison.targets import onnxruntime as target

ROUNDING = 1e-5
"""Relative to the largest output: float32 sums in another order."""


class Padded(nn.Module):
    """Pads by one more on one side, as networks ported from TensorFlow do."""

    def __init__(self, value: float = 0.0, *, twice: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, groups=8)
        self.head = nn.Linear(8, 4)
        self.value, self.twice = value, twice

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(F.pad(x, (0, 1, 0, 1), value=self.value)))
        padded = F.pad(x, (0, 1, 1, 0), value=self.value)
        y = self.depthwise(padded).relu().mean((2, 3))
        if self.twice:
            y = y + padded.mean((2, 3))
        return self.head(y)


def write(traced: Traced, module: torch.fx.GraphModule, path: Path) -> Counter[str]:
    target.export(
        module, traced.example, path, input_names=traced.input_names, output_names=["output"], dynamic_batch=True
    )
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def trace_padded(**settings: bool | float) -> tuple[Traced, Tensor]:
    torch.manual_seed(0)
    model = Padded(**settings).eval()  # type: ignore[arg-type]
    x = torch.randn(6, 3, 18, 18)
    return trace_module(model, (x,)), x


@pytest.mark.parametrize("integer", [False, True])
def test_zero_padding_goes_into_the_convolution(tmp_path: Path, integer: bool) -> None:
    traced, x = trace_padded()
    path = tmp_path / "padded.onnx"
    scheme = target.scheme()
    module = quantize(traced.module, [(x,)], scheme=scheme).module if integer else traced.module
    operators = write(traced, module, path)
    assert "Pad" not in operators and operators["Conv"] == 2
    found = target.predict(target.load(path, threads=1), (x,))[0]
    with torch.no_grad():
        expected = run_integers(module, (x,), scheme)[0] if integer else module(x)[0]
    assert float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())
    if integer:
        assert all(target.audit(path, ["first", "depthwise", "head"]).values())
        assert operators["QuantizeLinear"] <= 5  # none is left around the padding


def test_other_padding_stays(tmp_path: Path) -> None:
    traced, x = trace_padded(value=1.0)
    operators = write(traced, traced.module, tmp_path / "ones.onnx")
    assert operators["Pad"] == 2
    with torch.no_grad():
        expected = traced.module(x)[0]
    found = target.predict(target.load(tmp_path / "ones.onnx", threads=1), (x,))[0]
    assert float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


def test_padding_that_others_read_stays(tmp_path: Path) -> None:
    traced, x = trace_padded(twice=True)
    operators = write(traced, traced.module, tmp_path / "twice.onnx")
    assert operators["Pad"] == 1
    with torch.no_grad():
        expected = traced.module(x)[0]
    found = target.predict(target.load(tmp_path / "twice.onnx", threads=1), (x,))[0]
    assert float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())
