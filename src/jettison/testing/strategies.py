"""Hypothesis strategies: random networks from blocks that split, join, group, shuffle, norm and attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.testing.models import Built, randomise

CHANNELS = (4, 6, 8, 12)
SPACE = 4
"""Height and width of every picture inside the random networks."""


class Convolve(nn.Module):
    """A convolution, plain, grouped or depthwise, with a norm and an activation."""

    def __init__(self, channels: int, out: int, groups: int, norm: str, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1, groups=groups, bias=norm == "none")
        norms: dict[str, Callable[[], nn.Module]] = {
            "none": nn.Identity,
            "batch": lambda: nn.BatchNorm2d(out),
            "group": lambda: nn.GroupNorm(2, out),
            "layer": lambda: nn.GroupNorm(1, out),
        }
        self.norm, self.activation = norms[norm](), activation

    def forward(self, x: Tensor) -> Any:
        return getattr(F, self.activation)(self.norm(self.conv(x)))


class Add(nn.Module):
    """A branch and its input, added."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Any:
        return x + self.branch(x)


class Join(nn.Module):
    """A branch and its input, one after the other."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.branch(x), x], 1)


class Part(nn.Module):
    """Split at `at`, work on one part, join in the other order."""

    def __init__(self, at: int, branch: nn.Module, by_slice: bool) -> None:
        super().__init__()
        self.at, self.branch, self.by_slice = at, branch, by_slice

    def forward(self, x: Tensor) -> Any:
        if self.by_slice:
            left, right = x[:, : self.at], x[:, self.at :]
        else:
            left, right = x.split([self.at, x.shape[1] - self.at], 1)
        return torch.cat([right, self.branch(left)], 1)


class Mix(nn.Module):
    """Channel shuffle by hand, in `groups`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Gate(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 3), nn.Linear(3, channels)

    def forward(self, x: Tensor) -> Any:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


class Halve(nn.Module):
    """A gated linear unit over channels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * out, 1)

    def forward(self, x: Tensor) -> Any:
        value, gate = self.conv(x).chunk(2, 1)
        return value * torch.sigmoid(gate)


class Attend(nn.Module):
    """Self-attention over space with two heads, residual, fused projections."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 24)
        self.out = nn.Linear(8, channels)

    def forward(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).view(n, h * w, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, 8)
        return (tokens + self.out(y)).transpose(1, 2).reshape(n, c, h, w)


class Net(nn.Module):
    """A stem, blocks and a head that averages over space or flattens it."""

    def __init__(self, blocks: list[nn.Module], stem: int, channels: int, flatten: bool) -> None:
        super().__init__()
        self.stem, self.blocks, self.flatten = nn.Conv2d(3, stem, 1), nn.ModuleList(blocks), flatten
        self.head = nn.Linear(channels * SPACE * SPACE if flatten else channels, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.flatten(x, 1) if self.flatten else x.mean((2, 3)))


def _draw_convolution(draw: st.DrawFn, channels: int, out: int) -> nn.Module:
    divisors = [g for g in (1, 2, channels) if channels % g == 0 and out % g == 0]
    norm = draw(st.sampled_from(("none", "batch", "group", "layer") if out % 2 == 0 else ("none", "batch", "layer")))
    activation = draw(st.sampled_from(("relu", "silu", "sigmoid", "hardswish")))
    return Convolve(channels, out, draw(st.sampled_from(divisors)), norm, activation)


def _draw_block(draw: st.DrawFn, channels: int) -> tuple[nn.Module, int]:
    kind = draw(st.sampled_from(("convolve", "add", "join", "part", "mix", "gate", "halve", "attend")))
    if kind == "convolve":
        out = draw(st.sampled_from(CHANNELS))
        return _draw_convolution(draw, channels, out), out
    if kind == "add":
        inner = draw(st.sampled_from(CHANNELS))
        one, two = _draw_convolution(draw, channels, inner), _draw_convolution(draw, inner, channels)
        return Add(nn.Sequential(one, two)), channels
    if kind == "join" and channels <= 12:
        out = draw(st.sampled_from((2, 4)))
        return Join(_draw_convolution(draw, channels, out)), channels + out
    if kind == "part":
        at = draw(st.integers(1, channels - 1))
        return Part(at, _draw_convolution(draw, at, at), draw(st.booleans())), channels
    if kind == "mix" and channels % 2 == 0:
        return Mix(2), channels
    if kind == "halve":
        out = draw(st.sampled_from(CHANNELS))
        return Halve(channels, out), out
    return (Attend(channels), channels) if kind == "attend" else (Gate(channels), channels)


@st.composite
def networks(draw: st.DrawFn, blocks: int = 5) -> Built:
    """Draw a network of up to `blocks` blocks with random tensors, in eval mode, and a batch of two pictures."""
    stem = channels = draw(st.sampled_from(CHANNELS))
    chosen = []
    for _ in range(draw(st.integers(1, blocks))):
        block, channels = _draw_block(draw, channels)
        chosen.append(block)
    net = Net(chosen, stem, channels, draw(st.booleans()))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    return randomise(net, seed), (torch.randn(2, 3, SPACE, SPACE, generator=generator),)


__all__ = ["networks"]
