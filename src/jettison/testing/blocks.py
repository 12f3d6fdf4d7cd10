# ruff: noqa: D102 - the class says what its forward does
"""Blocks of random networks: each takes and gives pictures [N, channels, H, W] and ties axes in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.Module):
    """A norm of torch over the channels of each pixel."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Any:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HandNorm(nn.Module):
    """A norm written out: RMS by the mean of squares, layer norm by mean and variance, global response norm."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind, self.gain = kind, nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Any:
        if self.kind == "rms":
            return self.gain * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3)
        if self.kind == "layer":
            variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            return (x - mean) / torch.sqrt(variance + 1e-3) * self.gain
        energy = x.square().sum((2, 3), keepdim=True).add(1e-3).sqrt()
        return x + self.gain * (x * (energy / (energy.mean(1, keepdim=True) + 1e-3)))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": lambda channels: nn.BatchNorm2d(channels),
    "group": lambda channels: nn.GroupNorm(2 if channels % 2 == 0 else 1, channels),
    "whole group": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "layer": lambda channels: ChannelNorm(nn.LayerNorm(channels, eps=1e-3)),
    "rms": lambda channels: ChannelNorm(nn.RMSNorm(channels, eps=1e-3)),
    "rms by hand": lambda channels: HandNorm(channels, "rms"),
    "layer by hand": lambda channels: HandNorm(channels, "layer"),
    "response": lambda channels: HandNorm(channels, "response"),
}
"""Every norm, from a number of channels."""


class Convolve(nn.Module):
    """A convolution, plain, grouped or depthwise, with a norm and an activation."""

    def __init__(self, channels: int, out: int, groups: int, norm: str, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1, groups=groups, bias=norm == "none")
        self.norm, self.activation = NORMS[norm](out), activation

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
    """Branches and their input, one after the other; each branch reads all before it."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Any:
        for branch in self.branches:
            x = torch.cat([branch(x), x], 1)
        return x


class Part(nn.Module):
    """Split at `at`, work on one part, join in the other order."""

    def __init__(self, at: int, branch: nn.Module, by: str) -> None:
        super().__init__()
        self.at, self.branch, self.by = at, branch, by

    def forward(self, x: Tensor) -> Any:
        if self.by == "slice":
            left, right = x[:, : self.at], x[:, self.at :]
        elif self.by == "narrow":
            left, right = x.narrow(1, 0, self.at), x.narrow(1, self.at, x.shape[1] - self.at)
        elif self.by == "tensor_split":
            left, right = x.tensor_split([self.at], 1)
        else:
            left, right = x.split([self.at, x.shape[1] - self.at], 1)
        return torch.cat([right, self.branch(left)], 1)


class CrossStage(nn.Module):
    """CSP / C2f: halves by chunk, a chain on one of them, and all pieces joined."""

    def __init__(self, one: nn.Module, two: nn.Module, join: nn.Module) -> None:
        super().__init__()
        self.one, self.two, self.join = one, two, join

    def forward(self, x: Tensor) -> Any:
        left, right = x.chunk(2, 1)
        first = self.one(right)
        return self.join(torch.cat([left, right, first, first + self.two(first)], 1))


class Mix(nn.Module):
    """Channel shuffle in `groups`, by hand or by the operator."""

    def __init__(self, groups: int, by_hand: bool) -> None:
        super().__init__()
        self.groups, self.by_hand = groups, by_hand

    def forward(self, x: Tensor) -> Any:
        if not self.by_hand:
            return F.channel_shuffle(x, self.groups)
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Gate(nn.Module):
    """Squeeze-and-excite: by linear layers or by convolutions."""

    def __init__(self, channels: int, by_linear: bool) -> None:
        super().__init__()
        self.by_linear = by_linear
        make: Any = nn.Linear if by_linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.down, self.up = make(channels, 3), make(3, channels)

    def forward(self, x: Tensor) -> Any:
        if self.by_linear:
            return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]
        return x * F.hardsigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Halve(nn.Module):
    """A gated linear unit over channels: by chunk, by the operator, or by two layers."""

    def __init__(self, channels: int, out: int, by: str) -> None:
        super().__init__()
        self.by = by
        self.conv = nn.Conv2d(channels, out if by == "two" else 2 * out, 1)
        self.gate = nn.Conv2d(channels, out, 1) if by == "two" else None

    def forward(self, x: Tensor) -> Any:
        if self.gate is not None:
            return self.conv(x) * F.silu(self.gate(x))
        if self.by == "glu":
            return F.glu(self.conv(x), 1)
        value, gate = self.conv(x).chunk(2, 1)
        return value * F.gelu(gate)


class Attend(nn.Module):
    """Self-attention over space with two heads, residual: projections fused in one of three ways, or separate."""

    def __init__(self, channels: int, size: int, by: str, core: str, norm_heads: bool) -> None:
        super().__init__()
        self.size, self.by, self.core, width = size, by, core, 2 * size
        self.norm = nn.LayerNorm(channels, eps=1e-3)
        self.projections = nn.ModuleList(nn.Linear(channels, width) for _ in range(3 if by == "separate" else 0))
        self.qkv = None if by == "separate" else nn.Linear(channels, 3 * width)
        self.heads = nn.ModuleList(nn.RMSNorm(size, eps=1e-3) for _ in range(2 if norm_heads else 0))
        self.out = nn.Linear(width, channels)

    def _project(self, x: Tensor) -> list[Tensor]:
        n, tokens, _ = x.shape
        if self.qkv is None:
            return [p(x).view(n, tokens, 2, self.size).transpose(1, 2) for p in self.projections]
        x = self.qkv(x)
        if self.by == "chunk":
            return [p.reshape(n, tokens, 2, -1).transpose(1, 2) for p in x.chunk(3, -1)]
        if self.by == "unbind":
            return list(x.view(n, tokens, 3, 2, self.size).permute(2, 0, 3, 1, 4).unbind(0))
        x = x.unflatten(-1, (2, 3 * self.size)).transpose(1, 2)  # each head's q, k and v side by side
        return list(x.split(self.size, -1))

    def forward(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self._project(self.norm(tokens))
        if self.heads:
            q, k = self.heads[0](q), self.heads[1](k)
        if self.core == "by hand":
            y = ((q * self.size**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3 if self.core == "scaled" else None)
        y = y.transpose(1, 2).reshape(n, h * w, 2 * self.size)
        return (tokens + self.out(y)).transpose(1, 2).reshape(n, c, h, w)


class GroupedQuery(nn.Module):
    """Attention whose four query heads share two heads of keys and values, repeated in one of three ways."""

    def __init__(self, channels: int, size: int, by: str) -> None:
        super().__init__()
        self.size, self.by = size, by
        self.q, self.k, self.v = (nn.Linear(channels, heads * size) for heads in (4, 2, 2))
        self.out = nn.Linear(4 * size, channels)

    def _repeat(self, x: Tensor) -> Tensor:
        n, heads, tokens, size = x.shape
        if self.by == "interleave":
            return x.repeat_interleave(2, 1)
        return x[:, :, None].expand(n, heads, 2, tokens, size).reshape(n, 2 * heads, tokens, size)

    def forward(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (p(tokens).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.by != "flag":
            k, v = self._repeat(k), self._repeat(v)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.by == "flag")
        return (tokens + self.out(y.transpose(1, 2).flatten(2))).transpose(1, 2).reshape(n, c, h, w)


class Twice(nn.Module):
    """One module that runs twice, and one matrix that reads and writes."""

    def __init__(self, branch: nn.Module, channels: int, hidden: int) -> None:
        super().__init__()
        self.branch, self.matrix = branch, nn.Parameter(torch.zeros(hidden, channels))
        self.mirror = nn.Linear(channels, hidden, bias=False)
        self.mirror.weight = self.matrix

    def forward(self, x: Tensor) -> Any:
        x = self.branch(F.silu(self.branch(x)))
        y = F.relu(self.mirror(x.permute(0, 2, 3, 1)))
        return x + (y @ self.matrix).permute(0, 3, 1, 2)


class Hourglass(nn.Module):
    """Down by a stride, up by a transposed convolution (plain, grouped, depthwise) or by sub-pixels, with a skip."""

    def __init__(self, channels: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 2, 2)
        self.up = nn.ConvTranspose2d(hidden, channels, 2, 2, groups=groups) if groups else None
        self.wide = None if groups else nn.Conv2d(hidden, 4 * channels, 1)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.down(x))
        if self.up is not None:
            return x + self.up(y)
        assert self.wide is not None
        return x + F.pixel_shuffle(self.wide(y), 2)


class Recur(nn.Module):
    """An LSTM or GRU over the pixels, in one direction or both."""

    def __init__(self, channels: int, hidden: int, kind: str, both: bool) -> None:
        super().__init__()
        make = nn.LSTM if kind == "lstm" else nn.GRU
        self.recurrence = make(channels, hidden, batch_first=True, bidirectional=both)
        self.out = nn.Linear(hidden * (2 if both else 1), channels)

    def forward(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        y = self.out(self.recurrence(x.flatten(2).transpose(1, 2))[0])
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class Line(nn.Module):
    """1-d convolutions over the pixels in a row, padded by hand, with a gain along the channels."""

    gain: Tensor

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(channels, channels, 3, groups=groups), nn.Conv1d(channels, out, 1)
        self.register_buffer("gain", torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.one(F.pad(x.flatten(2), (1, 1)))) * self.gain
        return self.two(y).unflatten(-1, (x.shape[2], x.shape[3]))


class Choose(nn.Module):
    """Pixels in the order of their values, and what each channel's largest is: channels are beside the choice."""

    def forward(self, x: Tensor) -> Any:
        tokens = x.flatten(2).transpose(1, 2)
        order = tokens.sum(-1).argsort(1)
        ranked = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
        top = ranked.cumsum(1) / 4 + tokens.topk(1, 1).values
        return top.transpose(1, 2).reshape(x.shape)


class Net(nn.Module):
    """A stem, blocks and a head that averages over space or flattens it."""

    def __init__(self, blocks: list[nn.Module], stem: int, channels: int, space: int, flatten: bool) -> None:
        super().__init__()
        self.stem, self.blocks, self.flatten = nn.Conv2d(3, stem, 1), nn.ModuleList(blocks), flatten
        self.head = nn.Linear(channels * space * space if flatten else channels, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.flatten(x, 1) if self.flatten else x.mean((2, 3)))
