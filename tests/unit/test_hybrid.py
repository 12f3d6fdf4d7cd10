"""Submodules as graphs of their own: cut out where a size is written in the source, put back under the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.slicing import prune, randomise, thin
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.core.errors import FixedSize
from jettison.graph import hybrid
from jettison.graph.caches import forget_caches
from jettison.graph.groups import trace
from jettison.graph.surgery import slice_module
from jettison.graph.trainable import TrainableGraph


class Literal(nn.Module):
    """Attention over pixels with its sizes written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.heads = 3
        self.register_buffer("table", torch.randn(3, 1, 1), persistent=False)
        self.register_buffer("unused", torch.ones(2))

    def forward(self, x: Tensor, scale: float = 1.0, mask: Any = None, *, gain: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1)) * scale + self.table).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, 12)) * gain, None


class Block(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.shared = nn.LayerNorm(12), Literal(), shared

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(self.norm(x), 0.5, mask=None, gain=x.mean(-1, keepdim=True))[0]
        return x + self.shared(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 4)
        shared = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 12))
        self.blocks = nn.ModuleList([Block(shared), Block(shared)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_only_the_submodule_with_the_literal_is_replaced() -> None:
    eager = prune(Net(), torch.randn(2, 3, 4, 4))
    assert set(eager.replaced) == {"blocks.0.inner", "blocks.1.inner"}
    assert "test_hybrid.py" in eager.replaced["blocks.0.inner"] and "reshape" in eager.replaced["blocks.0.inner"]
    first: Any = eager.module.blocks[0]  # type: ignore[index]
    assert isinstance(first, Block) and isinstance(first.inner, TrainableGraph)
    # What others may read of it is still there.
    assert first.inner.heads == 2 and first.inner.unused.tolist() == first.inner.state_dict()["unused"].tolist()
    # It takes any batch, any number of tokens being another matter.
    small = eager.module.eval()
    x = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(small(x)[1:3], small(x[1:3]))


class Twice(nn.Module):
    """One module with a literal, called twice; `other` makes the second call another one."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.other = other
        self.up, self.flat, self.down = nn.Linear(4, 6), Flat(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.flat(self.up(x), False)
        return self.down(self.flat(y, self.other))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor, negate: bool) -> Tensor:
        y = self.mix(x).reshape(-1, 6)
        return -y if negate else y


def test_a_module_called_twice_is_one_graph_where_both_calls_are_alike() -> None:
    eager = prune(Twice(False), torch.randn(3, 4))
    assert set(eager.replaced) == {"flat"}
    model = randomise(Twice(True))
    graph = trace(model, torch.randn(3, 4))
    with pytest.raises(FixedSize, match=r"size of 4 where the source gives 6.*test_hybrid"):
        slice_module(model, graph, thin(graph))


class Handing(nn.Module):
    """Hands a submodule the batch as a number: only the next larger one can be cut out."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.out = Middle(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(x))


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(4, 6), Numbered()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.up(x), x.shape[0])


class Numbered(nn.Module):
    def forward(self, x: Tensor, batch: int) -> Tensor:
        return x.view(batch, 6).relu()


def test_a_number_that_follows_the_batch_takes_the_larger_module() -> None:
    eager = prune(Handing(), torch.randn(3, 4))
    assert set(eager.replaced) == {"middle"}
    assert eager.module(torch.randn(7, 4)).shape == (7, 2)


def test_a_layer_that_is_the_identity_is_not_taken_for_the_input() -> None:
    model = randomise(Twice(False))
    with torch.no_grad():
        model.flat.mix.weight.copy_(torch.eye(6))  # type: ignore[union-attr,operator]
        model.flat.mix.bias.zero_()  # type: ignore[union-attr,operator]
    graph = trace(model, torch.randn(3, 4))
    eager = slice_module(model, graph, thin(graph))
    assert set(eager.replaced) == {"flat"}
    assert [n.target for n in eager.module.flat.graph.nodes].count(torch.ops.aten.linear.default) == 1  # type: ignore[union-attr,operator]


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scaled, self.b = nn.Linear(3, 9), Scaled(), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scaled(self.a(x)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * float(x.shape[-1]) ** -0.5


def test_a_number_computed_from_a_size_is_traced_to_its_module() -> None:
    eager = prune(Scaling(), torch.randn(2, 3))
    assert set(eager.replaced) == {"scaled"} and "differs from its graph's" in eager.replaced["scaled"]


def test_a_part_that_is_wrong_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a mistake: a part gets another tensor than the submodule had."""
    install = hybrid.install_part

    def spoil(module: nn.Module, path: str, part: Any) -> None:
        install(module, path, part)
        for inner in module.get_submodule(path).modules():
            if inner._parameters.get("bias") is not None:
                inner.bias = nn.Parameter(torch.ones_like(inner.bias))  # type: ignore[arg-type]

    monkeypatch.setattr(hybrid, "install_part", spoil)
    model = randomise(Net())
    graph = trace(model, torch.randn(2, 3, 4, 4))
    inside = {g.name: range(1, g.size) for g in graph.groups if g.size == 3}
    with pytest.raises(FixedSize, match="source gives 3"):
        slice_module(model, graph, graph.keeps(inside))


class Caching(nn.Module):
    """Keeps what it computed for the next call, in a dict and as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 3)
        self.table = nn.Parameter(torch.randn(2, 9))
        self.kept: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self.constant = torch.tensor([2.0])

    def forward(self, x: Tensor) -> Tensor:
        if "rows" not in self.kept:
            self.kept["rows"] = self.table[torch.tensor([1, 0])]
        if self.last is None:
            self.last = self.kept["rows"].sum(0)
        return self.down(F.relu(self.up(x)) * self.last * self.constant)


def test_tensors_kept_from_an_earlier_call_are_forgotten() -> None:
    model = randomise(Caching())
    assert isinstance(model, Caching)
    x = torch.randn(3, 4)
    assert not prune(model, x).replaced
    model.kept, model.last = {}, None
    model(x)  # with gradients: what is kept now cannot even be copied
    graph = trace(model, x)
    kept, last = model.kept, model.last
    small = slice_module(model, graph, thin(graph)).module
    assert small.kept == {} and small.last is None and small.constant is not None
    assert model.kept is kept and model.last is last
    with forget_caches(model, (x,), {}):
        assert model.kept == {} and model.last is None and model.constant is not None
    assert model.kept is kept and model.last is last


class Tables(nn.Module):
    """One with a plain tensor along its channels, one that writes a buffer anew when its shape does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.writing = Plain(), Writing()
        self.out = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.writing(self.plain(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gain = nn.Linear(4, 9), torch.rand(9) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.gain


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(9, 9)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != 9:
            self.table = torch.linspace(1, 2, 9)
        return self.mix(x) * self.table


def test_tensors_that_a_submodule_makes_itself() -> None:
    model = randomise(Tables())
    graph = trace(model, torch.randn(3, 4))
    eager = slice_module(model, graph, thin(graph))
    assert set(eager.replaced) == {"plain", "writing"}
    assert "register_buffer" in eager.replaced["plain"] and "writes it anew" in eager.replaced["writing"]
