"""Small networks around one layer of torch.nn: recurrence, attention, convolutions of other ranks, control flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.zoo import Built


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    """An embedding, a recurrent layer and a classifier on its last output."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Linear(12, 32)
        self.recurrent = kind(32, 48, batch_first=True, **options)
        width = 48 * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recurrent(torch.relu(self.embedding(x)))
        logits: Tensor = self.head(y[:, -1])
        return logits


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Linear(12, 32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        logits: Tensor = self.head(x.mean(1))
        return logits


class Encoder(nn.Module):
    """nn.TransformerEncoder between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(x)).mean(1))
        return logits


class Branch(nn.Module):
    """torch.cond between two branches of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cond(x.sum() > 0, lambda y: torch.tanh(self.wide(y)), lambda y: torch.sigmoid(self.narrow(y)), (x,))
        logits: Tensor = self.head(x)
        return logits


class Autocast(nn.Module):
    """A region with its precision set by the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(12, 32), nn.Linear(32, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        with torch.autocast("cpu", enabled=False):
            x = torch.relu(self.inner(x.to(self.inner.weight.dtype)))
        logits: Tensor = self.head(x)
        return logits


def _convolve(rank: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    return nn.Sequential(
        conv(3, 16, 3, padding=1), norm(16), nn.ReLU(), conv(16, 24, 3, stride=2, padding=1), nn.ReLU(),
        up(24, 16, 2, stride=2), norm(16), nn.ReLU(), conv(16, 5, 1),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Built]] = {
    "lstm": lambda: (Recurrent(nn.LSTM).eval(), (_draw(2, 7, 12),), {}),
    "lstm-2-layers-bidirectional": lambda: (
        Recurrent(nn.LSTM, num_layers=2, bidirectional=True).eval(), (_draw(2, 7, 12),), {}),
    "gru": lambda: (Recurrent(nn.GRU, num_layers=2).eval(), (_draw(2, 7, 12),), {}),
    "rnn": lambda: (Recurrent(nn.RNN).eval(), (_draw(2, 7, 12),), {}),
    "multihead-attention": lambda: (SelfAttention().eval(), (_draw(2, 7, 12),), {}),
    "transformer-encoder": lambda: (Encoder().eval(), (_draw(2, 7, 12),), {}),
    "cond": lambda: (Branch().eval(), (_draw(2, 12),), {}),
    "autocast": lambda: (Autocast().eval(), (_draw(2, 12),), {}),
    "convolutions-1d": lambda: (_convolve(1).eval(), (_draw(2, 3, 16),), {}),
    "convolutions-2d": lambda: (_convolve(2).eval(), (_draw(2, 3, 16, 16),), {}),
    "convolutions-3d": lambda: (_convolve(3).eval(), (_draw(2, 3, 8, 8, 8),), {}),
}  # fmt: skip
