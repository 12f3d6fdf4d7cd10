"""The small setting of these tests: scikit-learn's handwritten digits, 8x8, and a residual CNN trained in seconds."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jettison as jt

QUICK = jt.Recipe(samples=128, judges=64, positions=4000, steps=20, rounds=15, corrections=1)
"""Every stage runs, none for long."""
BUDGET = jt.Budget(macs=0.5)
"""Decided by arithmetic alone, so that two runs decide the same."""


class DigitNet(nn.Module):
    """Two stages, a residual block, a depthwise layer: all that pruning and int8 meet in small CNNs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(2 * width)
        self.outer = nn.Conv2d(2 * width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer(F.relu(self.inner_norm(self.inner(x)))))
        x = F.relu(self.depthwise(F.relu(self.down(x))))
        return self.head(x.mean((2, 3)))


@functools.cache
def load_digits() -> tuple[Tensor, Tensor]:
    """Return 1797 pictures of shape (1, 8, 8) in 0..1 and their labels."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return x, torch.tensor(labels, dtype=torch.int64)


def split_digits() -> tuple[Tensor, Tensor, Tensor]:
    """Return training pictures, test pictures and test labels."""
    x, y = load_digits()
    return x[:1300], x[1300:], y[1300:]


def train(model: nn.Module, *, steps: int = 300, seed: int = 0) -> nn.Module:
    """Train on the first 1300 digits, seeded, and return the model in eval mode."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y = load_digits()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for _ in range(steps):
        pick = torch.randint(0, 1300, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
    return model.eval()


def build_trained() -> nn.Module:
    """Return the trained network, the same each time on one machine."""
    torch.manual_seed(0)
    return train(DigitNet())


def make_test_batches() -> list[tuple[Tensor, Tensor]]:
    """Return the labelled test pictures in batches."""
    _, x, y = split_digits()
    return list(zip(x.split(100), y.split(100), strict=True))
