"""Small networks that the tests of targets run, and how they are made ready."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from jettison.graph.trace import Traced, trace_module


class Pictures(nn.Module):
    """Depthwise and pointwise convolutions with BatchNorm and ReLU6, a residual sum, two poolings, a linear layer."""

    shape = (3, 24, 24)

    def __init__(self) -> None:
        super().__init__()

        def block(width: int, out: int, stride: int) -> nn.Sequential:
            layers: list[nn.Module] = [
                nn.Conv2d(width, 2 * width, 1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.ReLU6(),
            ]
            layers += [nn.Conv2d(2 * width, 2 * width, 3, stride, 1, groups=2 * width, bias=False)]
            layers += [nn.BatchNorm2d(2 * width), nn.ReLU6(), nn.Conv2d(2 * width, out, 1), nn.BatchNorm2d(out)]
            return nn.Sequential(*layers)

        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.one, self.two = block(16, 16, 1), block(16, 24, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = nn.functional.max_pool2d(x + self.one(x), 2)
        logits: Tensor = self.fc(torch.flatten(self.pool(self.two(x)), 1))
        return logits


class Tokens(nn.Module):
    """A residual perceptron over tokens with LayerNorm and GELU, and a linear layer over their mean."""

    shape = (12, 32)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Heavy(nn.Module):
    """Enough work for a second thread to be worth it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


def trace_trained(kind: type[Pictures] | type[Tokens]) -> Traced:
    """Trace a network whose BatchNorm has seen something; weights are those of seed 0."""
    torch.manual_seed(0)
    fresh = kind().train()
    with torch.no_grad():
        for _ in range(3):
            fresh(torch.randn(8, *fresh.shape) * 2 + 0.5)
    return trace_module(fresh.eval(), (torch.randn(4, *fresh.shape),))


def write(target: ModuleType, module: GraphModule, path: Path, x: Tensor, *, dynamic: bool = True) -> Path:
    target.export(module, (x,), path, input_names=["pixels"], output_names=["logits"], dynamic_batch=dynamic)
    return path
