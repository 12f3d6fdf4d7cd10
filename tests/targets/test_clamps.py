"""Activations after pooling, padding and joining: the file computes what was simulated, on integers throughout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jettison as jt
from jettison.graph.trace import trace_module
from jettison.quantization.clamps import hoist_clamps
from jettison.quantization.fold import copy_graph, name_operator
from jettison.targets import find_target, openvino

BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "pool, relu": lambda y: torch.relu(F.max_pool2d(y, 2)),
    "pool that overlaps, relu": lambda y: torch.relu(F.max_pool2d(y, 3, 2, 1)),
    "pool, relu6": lambda y: F.relu6(F.max_pool2d(y, 2)),
    "pool, pad, relu": lambda y: torch.relu(F.pad(F.max_pool2d(y, 2), (1, 1, 1, 1))),
    "permute, relu": lambda y: torch.relu(y.permute(0, 1, 3, 2)),
    "mean, relu": lambda y: torch.relu(F.avg_pool2d(y, 2)),
    "join, relu": lambda y: torch.relu(torch.cat([y[:, :4], y[:, 4:]], 1)),
    "join of pools, relu": lambda y: torch.relu(torch.cat([F.max_pool2d(y, 3, 1, 1), y], 1))[:, :8],
    "pool, relu beside it": lambda y: (lambda z: torch.relu(z) + z)(F.max_pool2d(y, 2)),
    "relu, pool": lambda y: F.max_pool2d(torch.relu(y), 2),
}
TARGETS = [
    "onnxruntime",
    pytest.param("openvino", marks=pytest.mark.skipif(openvino.why_missing() is not None, reason="openvino")),
]


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.second(self.function(self.first(x)))).mean((2, 3)))
        return logits


class Joined(nn.Module):
    """Layers that are joined, and one activation over all: two roundings in a row if nobody minds."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.second, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.cat([part(x) for part in self.parts], 1))
        logits: Tensor = self.head(self.second(y).mean((2, 3)))
        return logits


class Branched(Joined):
    """The same with an activation of its own in each branch, as in NASNet's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], 1)
        logits: Tensor = self.head((self.second(torch.relu(y)) + self.third(torch.relu(y))).mean((2, 3)))
        return logits


WHOLE = {"joined layers, relu": Joined, "joined layers, a relu in each branch": Branched}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*BETWEEN, *WHOLE])
def test_the_file_is_as_simulated(name: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (Between(BETWEEN[name]) if name in BETWEEN else WHOLE[name]()).eval()
    x = torch.randn(16, 3, 16, 16)
    quantized = jt.quantize(model, [x], target=target)
    path = jt.export(quantized.module, x, tmp_path / "net.onnx", target=target)
    runtime = find_target(target)
    (found,) = runtime.predict(runtime.load(path, threads=1), (x,))
    with torch.no_grad():
        simulated, wanted = quantized.module(x), model(x)
    step = (simulated.max() - simulated.min()) / 255
    # OpenVINO sums in another order: a rounding may turn, and then moves one output by a part of a step.
    assert (found - simulated).abs().max() < (0.3 if target == "openvino" else 1e-3) * step
    assert (simulated - wanted).norm() < 0.02 * wanted.norm()
    assert jt.audit(path, target=target, inputs=x, runs=2).integer_share == 1.0


@pytest.mark.parametrize("name", ["pool, relu", "pool that overlaps, relu", "pool, relu6", "pool, pad, relu"])
def test_hoisting_changes_no_number(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    module = copy_graph(trace_module(Between(BETWEEN[name]).eval(), (x,), {}).module)
    with torch.no_grad():
        (wanted,) = module(x)
        hoist_clamps(module)
        (found,) = module(x)
    assert torch.equal(found, wanted)
    clamp = next(n for n in module.graph.nodes if name_operator(n).startswith("aten.relu"))
    assert name_operator(clamp.args[0]) == "aten.conv2d.default"


@pytest.mark.parametrize(
    "function",
    [
        lambda y: F.hardtanh(F.max_pool2d(y, 2)),  # ends that a range need not cover
        lambda y: torch.relu(F.pad(y, (1, 1, 1, 1), value=-1.0)),  # a pad that ReLU changes
        lambda y: torch.relu(F.avg_pool2d(y, 2)),  # a mean keeps no order
        lambda y: (lambda z: torch.relu(z) + z)(F.max_pool2d(y, 2)),  # somebody reads what is not clamped
    ],
)
def test_what_would_change_something_stays(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 3, 16, 16)
    module = copy_graph(trace_module(Between(function).eval(), (x,), {}).module)
    before = [str(n.target) for n in module.graph.nodes]
    hoist_clamps(module)
    assert [str(n.target) for n in module.graph.nodes] == before
