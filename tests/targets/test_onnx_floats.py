"""A layer that was left out of quantization stays float in ONNX Runtime, which would round its weights by itself."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from jettison.flow.auditing import audit
from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.targets import onnxruntime as target
from jettison.targets.onnx_floats import keep_floats

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]

LAYERS = ("a", "b", "c", "f", "g")
SHAPE = (3, 8, 8)


class Chain(nn.Module):
    """Layers of every kind that the runtime would take, each between two quantized tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.c = nn.Conv2d(16, 8, 1)
        self.f, self.g = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(torch.relu(self.a(x))))
        logits: Tensor = self.g(torch.relu(self.f(x.mean((2, 3)))))
        return logits


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return trace_module(Chain().eval(), (torch.randn(4, *SHAPE),)).module.requires_grad_(False)


def write(graph: GraphModule, excluded: str, path: Path) -> tuple[GraphModule, Tensor]:
    x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    module = quantize(graph, [(x,)], scheme=target.scheme(), exclude=[excluded]).module
    target.export(module, (x[:1],), path, input_names=["x"], output_names=["y"], dynamic_batch=True)
    return module, x


@pytest.mark.parametrize("excluded", ["b", "f"])
def test_an_excluded_layer_runs_in_float_and_without_the_guard_would_not(
    graph: GraphModule, excluded: str, tmp_path: Path
) -> None:
    path = tmp_path / "kept.onnx"
    module, x = write(graph, excluded, path)
    others = [layer for layer in LAYERS if layer != excluded]
    assert target.audit(path, (excluded, *others)) == {excluded: False, **dict.fromkeys(others, True)}
    wanted, found = module(x)[0], target.predict(target.load(path, threads=1), (x,))[0]
    step = (wanted.max() - wanted.min()) / 255
    assert float((found - wanted).abs().max()) <= step

    planted = onnx.load(path)
    (guard,) = [node for node in planted.graph.node if node.op_type == "LeakyRelu"]
    for node in planted.graph.node:
        node.input[:] = [guard.input[0] if value == guard.output[0] else value for value in node.input]
    planted.graph.node.remove(guard)
    onnx.save(planted, tmp_path / "planted.onnx")
    # Should a later version leave float weights alone, this fails, and the guard can go.
    assert target.audit(tmp_path / "planted.onnx", [excluded]) == {excluded: True}
    findings = audit(tmp_path / "planted.onnx", runs=3).findings
    assert any(f"'{excluded}'" in finding and "by itself" in finding for finding in findings)


def test_only_float_layers_between_two_roundings_are_guarded(graph: GraphModule, tmp_path: Path) -> None:
    write(graph, "g", tmp_path / "last.onnx")  # the last layer gives the output, which is not rounded
    whole = onnx.load(tmp_path / "last.onnx")
    assert not any(node.op_type == "LeakyRelu" and "g" in node.name for node in whole.graph.node)
    write(graph, "c", tmp_path / "mid.onnx")
    found = onnx.load(tmp_path / "mid.onnx")
    assert keep_floats(found) == 0  # the guarded one is not guarded twice
