"""The eager result of attention: by head, by its size, by width; torch's own attention and its fused kernels."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tests.unit.slicing import InPlace, attributes_of, prune, thin
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.graph import surgery
from jettison.graph.axes import Keeps
from jettison.graph.groups import Graph


def drop_heads(heads: int) -> Callable[[Graph], Keeps]:
    """Drop the first head of every attention; head axes are those of `heads` positions."""
    return lambda graph: graph.keeps({g.name: range(1, heads) for g in graph.groups if g.size == heads})


class Attention(nn.Module):
    def __init__(self, dim: int = 15, heads: int = 3) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))


class Vit(nn.Module):
    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 15, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 15))
        self.position = nn.Parameter(torch.zeros(1, 5, 15))
        self.blocks = nn.Sequential(attention(), attention())
        self.norm = nn.LayerNorm(15)
        self.head = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def test_attention_by_head() -> None:
    found = attributes_of(prune(Vit(), torch.randn(2, 3, 4, 4), keeps=drop_heads(3)))
    assert found["blocks.0.num_heads"] == found["blocks.1.num_heads"] == 2
    assert "blocks.0.head_dim" not in found


def test_attention_by_head_dimension_and_width() -> None:
    eager = prune(Vit(), torch.randn(2, 3, 4, 4))
    found = attributes_of(eager)
    assert found["blocks.0.num_heads"] == 2
    assert found["norm.normalized_shape"] == [10]
    assert eager.module.norm.normalized_shape == (10,)  # type: ignore[union-attr]
    assert found["blocks.0.head_dim"] == 3


class Quotient(Attention):
    """`C // heads` for the head's size: when C stays, no number of heads gives both sizes."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).flatten(2))


def test_one_attribute_cannot_have_two_values() -> None:
    eager = prune(Vit(Quotient), torch.randn(2, 3, 4, 4), keeps=drop_heads(3))
    assert type(eager.module) is Vit and set(eager.replaced) == {"blocks.0", "blocks.1"}
    assert re.search(r"'blocks\.0\.num_heads'.*test_surgery_attention\.py:\d+", eager.replaced["blocks.0"])


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_fused_attention_by_head_and_its_default_scale() -> None:
    assert attributes_of(prune(Vit(Fused), torch.randn(2, 3, 4, 4), keeps=drop_heads(3)))["blocks.1.num_heads"] == 2
    reason = prune(Vit(Fused), torch.randn(2, 3, 4, 4)).replaced["blocks.0"]
    assert re.search(r"default scale.*test_surgery_attention\.py:\d+.*scale=self\.scale", reason)


class MultiHead(nn.Module):
    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.embed = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up = nn.Linear(12, 9)
        self.down = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.down(self.up(x + self.attention(x, x, x, need_weights=self.weights)[0]).relu())


@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention(weights: bool) -> None:
    def hidden(graph: Graph) -> Keeps:
        return thin(graph, lambda name: graph.find(name).size == 9)

    assert not prune(MultiHead(weights), torch.randn(2, 4, 5), keeps=hidden).replaced
    eager = prune(MultiHead(weights), torch.randn(2, 4, 5))
    assert set(eager.replaced) == {"attention"} and "num_heads" in vars(eager.module.attention)  # type: ignore[arg-type]


def test_multi_head_attention_by_whole_heads_and_as_much_width() -> None:
    def even(graph: Graph) -> Keeps:
        return graph.keeps({g.name: range(g.size * 2 // 3) for g in graph.groups if g.size in (3, 12)})

    eager = prune(MultiHead(), torch.randn(2, 4, 5), keeps=even)
    assert not eager.replaced
    assert attributes_of(eager)["attention.num_heads"] == 2 and attributes_of(eager)["attention.embed_dim"] == 8


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 18, batch_first=True)
        self.embed, self.encoder, self.out = nn.Linear(5, 12), nn.TransformerEncoder(layer, 2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(x)))


@pytest.mark.parametrize("mode", ["hidden", "all"])
def test_a_transformer_encoder_with_the_fused_kernel(mode: str) -> None:
    def choose(graph: Graph) -> Keeps:
        return thin(graph, lambda name: mode == "all" or graph.find(name).size == 18)

    eager = prune(Encoder(), torch.randn(2, 4, 5), keeps=choose)
    # The kernel reads the attention's own sizes, so a layer whose attention cannot have them goes as a whole.
    assert set(eager.replaced) == (set() if mode == "hidden" else {"encoder.layers.0", "encoder.layers.1"})
    assert all("cannot run" not in reason for reason in eager.replaced.values())
    small = eager.module.eval()
    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        fused = small(x)
    # The kernel adds in another order; float32 rounds at 6e-8 per sum.
    torch.testing.assert_close(fused, small(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_wrong_size_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the graph is what makes a mistake of the search harmless: plant one."""
    monkeypatch.setattr(surgery, "solve_demands", lambda demands, old: {})
    eager = prune(Vit(), torch.randn(2, 3, 4, 4), keeps=drop_heads(3))
    assert set(eager.replaced) == {"blocks.0", "blocks.1"} and "cannot run" in eager.replaced["blocks.0"]


def test_attention_in_a_network_that_changes_tensors_in_place() -> None:
    assert not prune(InPlace(Vit()), torch.randn(2, 3, 4, 4)).replaced
