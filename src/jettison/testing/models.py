# ruff: noqa: D102 - the class says what its forward does
"""Small networks, one for each way the axes of a network hang together; every tensor of theirs is random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[Any, ...]]
"""A network in eval mode and inputs for it."""


class Residual(nn.Module):
    """Two blocks whose sums tie the trunk's channels together, then pooling and a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.a = nn.Sequential(
            nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, width, 1, bias=False)
        )
        self.b = nn.Sequential(nn.Conv2d(width, 10, 1), nn.Hardswish(inplace=True), nn.Conv2d(10, width, 1))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.a(x))
        x = x + self.b(x)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 + 3 * i), nn.ReLU(), nn.Conv2d(4 + 3 * i, 3, 3, padding=1)) for i in range(3)
        )
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Any:
        features = [self.first(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted bottleneck with a depthwise convolution and squeeze-and-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu6(self.norm(self.depth(self.expand(x))))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.head(self.project(x * torch.sigmoid(gate)))


class Grouped(nn.Module):
    """Grouped convolutions: whole groups may go, and positions inside all groups at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.grouped = nn.Conv2d(12, 18, 3, groups=3)
        self.norm = nn.GroupNorm(3, 18)
        self.last = nn.Conv2d(18, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(F.gelu(self.norm(self.grouped(self.first(x)))))


class Shuffle(nn.Module):
    """ShuffleNet: split in two, work on one half, join, shuffle by hand, split again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.two = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        for layer in (self.one, self.two):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, F.relu(layer(right))], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean((2, 3)))


class CrossStage(nn.Module):
    """CSP / C2f: split unevenly, chain on one part, concatenate all pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 1)
        self.one, self.two = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 5, 1)
        self.last = nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Any:
        stem = F.silu(self.stem(x))
        kept, worked = stem.split([4, 6], 1)
        one = self.one(worked)
        two = one + self.two(one)
        return self.last(torch.cat([kept, worked[:, 1:], one, two, kept[:, :1]], 1))


class Attention(nn.Module):
    """A vision transformer block: patches, class token, positions, fused qkv, MLP."""

    def __init__(self, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size, width = heads, size, heads * size
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.zeros(1, 5, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.scale * self.out(y)
        x = x + self.mlp(x)
        return self.head(x[:, 0])


class GroupedQuery(nn.Module):
    """Grouped-query attention: queries of several heads share one key and value head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 8, bias=False), nn.Linear(6, 8)
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k, v = (p(x).view(b, n, 2, 4).transpose(1, 2) for p in (self.k, self.v))
        k, v = (t[:, :, None].expand(b, 2, 2, n, 4).reshape(b, 4, n, 4) for t in (k, v))
        weights = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, 16))


class Gates(nn.Module):
    """Gated units: GLU by chunk, by the operator, and by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(8, 12), nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        value, gate = self.a(x).chunk(2, -1)
        x = value * F.silu(gate)
        return self.out(F.glu(self.b(x), -1) * torch.tanh(self.c(x)))


class Norms(nn.Module):
    """Every norm there is, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 1, bias=o != 6) for i, o in ((3, 8), (8, 12), (12, 6), (6, 6)))
        self.batch, self.group = nn.BatchNorm2d(8), nn.GroupNorm(4, 12)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.layer, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        self.hidden, self.out = nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.elu(self.batch(self.convs[0](x)))
        x = F.leaky_relu(self.group(self.convs[1](x)))
        x = torch.sigmoid(self.instance(self.convs[2](x)))
        x = self.layer(self.convs[3](x).permute(0, 2, 3, 1))
        return self.out(F.softplus(self.hidden(self.rms(x))))


class Shared(nn.Module):
    """One layer called twice and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(4, 6), nn.Linear(6, 6)
        self.mirror = nn.Linear(6, 6)
        self.mirror.weight = self.first_copy = nn.Parameter(torch.zeros(6, 6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.first(x)))))
        return self.out(self.mirror(x) + F.linear(x, self.first_copy))


class Tied(nn.Module):
    """A language model in small: token embedding and output layer are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Transposed(nn.Module):
    """An hourglass: down, up by transposed convolutions (one grouped), a skip, sub-pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.skip = nn.Conv2d(3, 6, 1)
        self.grouped = nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2)
        self.last = nn.Conv2d(4, 12, 1)
        self.mix = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.up(F.relu(self.down(x)))) + self.skip(x)
        return self.mix(F.pixel_shuffle(self.last(F.relu(self.grouped(y))), 2))


class Sequence(nn.Module):
    """1-D convolutions with padding and pooling, and a float constant along the channels."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 6, 3, dilation=2, groups=2)
        self.register_buffer("gain", torch.rand(8, 1) + 0.5)
        self.prelu = nn.PReLU(6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool1d(F.relu(self.a(x)) * self.gain, 2)
        return self.out(self.prelu(self.b(F.pad(x, (1, 1)))).amax(-1))


class Flatten(nn.Module):
    """LeNet: one channel owns height times width columns of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)
        self.hidden, self.out = nn.Linear(4 * 16, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.more(F.relu(self.conv(x))))
        return self.out(F.relu(self.hidden(torch.flatten(x, 1))))


class Several(nn.Module):
    """Two inputs and a keyword one, outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.numbers = nn.Conv2d(1, 6, 3), nn.Linear(4, 6)
        self.wide, self.score, self.box = nn.Linear(6, 7), nn.Linear(7, 2), nn.Linear(7, 4)

    def forward(self, picture: Tensor, numbers: Tensor) -> dict[str, Any]:
        x = self.picture(picture).mean((2, 3)) * self.numbers(numbers)
        x = F.relu(self.wide(x))
        return {"score": self.score(x), "boxes": [self.box(x).sigmoid()]}


class Merging(nn.Module):
    """Swin: windows, patch merging by strided slices, a shift by rolling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 1)
        self.inner = nn.Linear(6, 6)
        self.merge = nn.Linear(24, 10)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x).permute(0, 2, 3, 1).roll((1, 1), (1, 2))
        b, h, w, c = x.shape
        windows = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        x = F.gelu(self.inner(windows)).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.out(F.gelu(self.merge(torch.cat(parts, -1))))


class Encoder(nn.Module):
    """torch's own transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.layer(self.embed(x)))


class Letters(nn.Module):
    """Products by einsum, matmul and addmm, and a squeeze of everything that has size one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 5))
        self.bias, self.out = nn.Parameter(torch.zeros(5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(torch.einsum("bi,hi->bh", x, self.a))
        x = torch.addmm(self.bias, x, self.b)
        return self.out(x[:, None, :, None].squeeze())


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and float buffer of `model` random values, in place; returns it in eval mode.

    Variances stay positive and weights small, so that outputs stay of order one and no position is idle.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                fan = tensor[0].numel() if tensor.dim() > 1 else 4
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(fan, 1) ** 0.5)
    return model.eval()


def _picture() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "attention": (Attention, _picture),
    "cross_stage": (CrossStage, _picture),
    "dense": (Dense, _picture),
    "depthwise": (Depthwise, _picture),
    "encoder": (Encoder, lambda: (torch.randn(2, 6, 5),)),
    "flatten": (Flatten, _picture),
    "gates": (Gates, lambda: (torch.randn(3, 5),)),
    "grouped": (Grouped, _picture),
    "grouped_query": (GroupedQuery, lambda: (torch.randn(2, 5, 6),)),
    "letters": (Letters, lambda: (torch.randn(3, 4),)),
    "merging": (Merging, _picture),
    "norms": (Norms, _picture),
    "residual": (Residual, _picture),
    "sequence": (Sequence, lambda: (torch.randn(2, 2, 12),)),
    "several": (Several, lambda: (torch.randn(2, 1, 5, 5), torch.randn(2, 4))),
    "shared": (Shared, lambda: (torch.randn(3, 4),)),
    "shuffle": (Shuffle, _picture),
    "tied": (Tied, lambda: (torch.arange(10).reshape(2, 5),)),
    "transposed": (Transposed, _picture),
}
"""Every small network by name: how to build it, and how to make inputs for it."""


def build_model(name: str, *, seed: int = 0) -> Built:
    """Return the network of that name with random tensors, in eval mode, and inputs for it."""
    make, make_inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(make(), seed), make_inputs()
