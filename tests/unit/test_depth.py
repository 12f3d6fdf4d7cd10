"""Residual blocks: found by their sums alone; without one, the network is the one whose branch gives zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import jettison as jt
from jettison.core.errors import FixedSize, InputError, UnknownName
from jettison.graph.depth import Block, drop, drop_blocks, find_blocks
from jettison.graph.groups import Graph, trace
from jettison.graph.trace import evaluate_node, find_attribute
from jettison.testing import MODELS, build_model, randomise


class Basic(nn.Module):
    """A ResNet block: an activation after the sum, in place."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        out = out or width
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(width, out, 1) if out != width else None

    def forward(self, x: Tensor) -> Any:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(Basic(8), Basic(8))
        self.layer2 = nn.Sequential(Basic(8, 12), Basic(12))
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.layer2(self.layer1(F.relu(self.stem(x)))).mean((2, 3)))


class Former(nn.Module):
    """Two blocks of attention and MLP before a norm each, with a mask and a bias that all blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Linear(1, 2)
        self.blocks = nn.ModuleList(FormerBlock() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        bias = self.bias(mask[..., None]).transpose(1, 2)[:, :, None]
        for block in self.blocks:
            x = block(x, bias)
        return self.head(x)


class FormerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 8))

    def forward(self, x: Tensor, bias: Tensor) -> Any:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class Cast(nn.Module):
    """A branch that computes in a type of its own: the casts leave checks in the graph, which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(x.to(torch.float64)).to(torch.float32)
        return x + self.down(torch.sigmoid(self.up(self.norm(x).to(torch.float64).to(x.dtype))))


class Elsewhere(nn.Module):
    """Sums that are no blocks: the branch is read elsewhere, is no function of x, or has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        inner = torch.tanh(self.a(x))
        x = x + self.b(inner)  # what is inside is read below
        x = self.c(x) + self.d(x)  # neither is made from the other
        x = x + 2 * x  # nothing to drop
        return torch.add(x, torch.sin(x), alpha=2) * inner


def _resnet() -> tuple[nn.Module, Tensor]:
    return randomise(ResNet()), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _run_zeroed(graph: Graph, blocks: tuple[Block, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The oracle: the original, with the last tensor of each branch multiplied by zero."""
    ends = {b.end for b in blocks}
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = find_attribute(graph.module, str(node.target))
            else:
                values[node] = evaluate_node(node, values)
                if node.name in ends:
                    values[node] = values[node] * 0
    return tuple(values[node])


@pytest.mark.parametrize("name", [*MODELS, "former", "resnet", "cast"])
def test_without_a_block_is_with_a_branch_of_zero(name: str) -> None:
    if name == "former":
        model: nn.Module = randomise(Former())
        inputs: tuple[Any, ...] = (torch.randn(2, 5, 8), torch.rand(2, 5))
    elif name == "cast":
        model, inputs = randomise(Cast()), (torch.randn(2, 6),)
        checks = [n for n in trace(model, inputs).module.graph.nodes if n.op == "call_function" and not n.users]
        assert len(checks) == 4
    elif name == "resnet":
        model, x = _resnet()
        inputs = (x,)
    else:
        model, inputs = build_model(name)
    graph = trace(model, inputs)
    blocks = find_blocks(graph)
    assert len({b.name for b in blocks}) == len(blocks)
    choices = [(b,) for b in blocks] + ([blocks] if len(blocks) > 1 else [])
    for chosen in choices:
        small = drop_blocks(graph, [b.name for b in chosen])
        with torch.no_grad():
            found, original = small.module(*graph.traced.example), graph.module(*graph.traced.example)
        expected = _run_zeroed(graph, chosen, graph.traced.example)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(found, original, strict=True))
        gone = {t for b in chosen for t in b.tensors}
        left = set(graph.module.state_dict()) - set(small.module.state_dict())
        assert gone and gone <= left  # and what only these blocks shared
        assert not find_blocks(small) or len(find_blocks(small)) <= len(blocks) - len(chosen)


def test_the_oracle_notices_another_block() -> None:
    model, x = _resnet()
    graph = trace(model, x)
    one, other, *_ = find_blocks(graph)
    with torch.no_grad():
        found = drop_blocks(graph, (one.name,)).module(*graph.traced.example)
    assert not torch.equal(found[0], _run_zeroed(graph, (other,), graph.traced.example)[0])


def test_names_are_those_of_modules() -> None:
    model, x = _resnet()
    graph = trace(model, x)
    assert [b.name for b in find_blocks(graph)] == ["layer1.0", "layer1.1", "layer2.1"]  # layer2.0 widens
    former = trace(randomise(Former()), (torch.randn(2, 5, 8), torch.rand(2, 5)))
    names = [b.name for b in find_blocks(former)]
    assert names == [f"blocks.{i}.{part}" for i in (0, 1) for part in ("qkv", "mlp")]
    whole = drop_blocks(former, ("blocks.1",))  # a module's name: both its sums
    assert [b.name for b in find_blocks(whole)] == names[:2]
    assert not any(n.startswith("blocks.1") for n in whole.module.state_dict())
    assert [b.name for b in find_blocks(drop_blocks(former, ("blocks.*.mlp",)))] == ["blocks.0", "blocks.1"]
    with pytest.raises(UnknownName, match=r"layer2\.1"):
        drop_blocks(graph, ("layer2.0",))
    with pytest.raises(InputError, match="tuple of names"):
        drop_blocks(graph, "layer1.0")


def test_sums_that_are_no_blocks() -> None:
    assert find_blocks(trace(randomise(Elsewhere()), torch.randn(2, 6))) == ()


def test_a_module_that_is_the_block_leaves_the_caller_s_class() -> None:
    model, x = _resnet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = jt.prune(model, x, keep=1.0, criterion="magnitude", drop_blocks=("layer1.*", "layer2.1"))
    assert type(small) is ResNet and type(model.get_submodule("layer1.1")) is Basic
    assert not any(n.startswith(("layer1", "layer2.1")) for n in small.state_dict())
    graph = trace(model, x)
    blocks = find_blocks(graph)
    expected = _run_zeroed(graph, blocks, (x,))[0]
    with torch.no_grad():
        assert torch.allclose(small(x), expected, atol=1e-6)  # float32 rounding
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    narrow = jt.prune(model, x, keep=0.5, criterion="obs", calibration=x, drop_blocks=("layer1.1",))
    assert type(narrow) is ResNet and narrow(x).shape == (2, 3)
    loss = narrow.train()(x).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in narrow.parameters())


def test_a_sum_in_the_parent_gives_the_graph_and_says_why() -> None:
    model, inputs = build_model("residual")
    graph = trace(model, inputs)
    small, bypassed = drop(model, graph, ("a",))
    assert bypassed is None and len(find_blocks(small)) == 1
    with pytest.warns(UserWarning, match=r"cannot leave out the blocks \['a'\]"):
        result = jt.prune(model, inputs, keep=1.0, criterion="magnitude", drop_blocks=("a",))
    with torch.no_grad():
        expected = _run_zeroed(graph, find_blocks(graph)[:1], inputs)[0]
        assert torch.allclose(result(*inputs), expected, atol=1e-6)  # float32 rounding
    with pytest.raises(FixedSize, match="cannot leave out"):
        jt.prune(model, inputs, keep=1.0, criterion="magnitude", drop_blocks=("a",), result="eager")
    jt.prune(model, inputs, keep=1.0, criterion="magnitude", drop_blocks=("a",), result="graph")  # asked for: no word
