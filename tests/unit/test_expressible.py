"""Pruning in the caller's own class alone: what its source cannot express stays whole."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import jettison as jt
from jettison.core.errors import FixedSize
from jettison.graph.expressible import find_inexpressible
from jettison.testing import randomise

ONE_BY_ONE = jt.Recipe(multiple=1)


class Attention(nn.Module):
    """The default scale follows the head's size, and the width comes from the input: neither can be pruned here."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(6, 16), nn.Sequential(Block(), Block()), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)).mean(1))
        return y


class Literal(nn.Module):
    """A width written as a number in the network's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.relu(self.conv(x)).view(-1, 8 * 16))
        return y


def test_what_the_source_can_express_is_pruned_in_its_own_class() -> None:
    model, x = randomise(Tower()), torch.randn(2, 7, 6)
    with pytest.warns(UserWarning, match=r"stay whole.*source fixes their sizes"):
        small = jt.prune(model, x, keep=0.5, criterion="random", recipe=ONE_BY_ONE, result="eager")
    assert type(small) is Tower
    assert not any(isinstance(m, fx.GraphModule) for m in small.modules())
    assert [block.up.out_features for block in small.blocks] == [20, 20]
    assert small.blocks[0].attention.qkv.out_features == 48
    assert small(x).shape == (2, 5)


def test_without_that_wish_the_same_choice_puts_graphs_inside() -> None:
    model, x = randomise(Tower()), torch.randn(2, 7, 6)
    with pytest.warns(UserWarning, match="with graphs in the place of"):
        small = jt.prune(model, x, keep=0.5, criterion="random", recipe=ONE_BY_ONE)
    assert any(isinstance(m, fx.GraphModule) for m in small.modules())


def test_groups_are_named_with_the_line_that_holds_them() -> None:
    model, x = randomise(Tower()), torch.randn(2, 7, 6)
    graph = jt.trace(model, x)
    kept = {g.name: list(range(max(1, g.size // 2))) for g in graph.groups}
    found = find_inexpressible(model, graph, kept)
    assert found and not any(name.endswith(".up") for name in found)
    assert any("test_expressible.py:" in reason for reason in found.values())


def test_a_source_that_can_express_everything_keeps_nothing_back() -> None:
    model, x = randomise(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))), torch.randn(2, 6)
    graph = jt.trace(model, x)
    assert find_inexpressible(model, graph, {graph.groups[0].name: [0, 1, 2]}) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jt.prune(model, x, keep=0.5, criterion="random", recipe=ONE_BY_ONE, result="eager")


def test_nothing_left_to_prune_is_an_error() -> None:
    model, x = randomise(Literal()), torch.randn(2, 3, 4, 4)
    with pytest.raises(FixedSize, match=r"test_expressible\.py:\d+"):
        jt.prune(model, x, keep=0.5, criterion="random", recipe=ONE_BY_ONE, result="eager")


@pytest.mark.parametrize("result", ["eager", "auto", "graph"])
@pytest.mark.filterwarnings("ignore:.*prune groups stay whole", "ignore:.*with graphs in the place")
def test_what_is_pruned_can_be_saved_at_once(tmp_path: Path, result: str) -> None:
    model, x = randomise(Tower()), torch.randn(2, 7, 6)
    small = jt.prune(
        model, x, keep=0.5, criterion="random", recipe=ONE_BY_ONE, result=result, out=tmp_path / "new" / "small"
    )
    again = jt.load(tmp_path / "new" / "small", model=None if result == "graph" else Tower())
    assert torch.equal(again(x), small(x)) and list(again.state_dict()) == list(small.state_dict())
