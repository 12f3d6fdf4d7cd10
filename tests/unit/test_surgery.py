"""The eager result: the user's own class, sliced, with its integer attributes put right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples.fashion_mnist.network import FashionNet
from tests.unit.slicing import InPlace, attributes_of, prune, randomise, thin
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.core.errors import CheckpointError, FixedSize
from jettison.graph.axes import Keeps
from jettison.graph.comparing import list_tensors
from jettison.graph.groups import Graph, trace
from jettison.graph.provenance import Demand, Journal, Operation, Place, Source, make_tag, solve_demands
from jettison.graph.rewrite import slice_graph
from jettison.graph.surgery import copy_tensors, rebuild, slice_module


class Sequence(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_fashion_net() -> None:
    eager = prune(FashionNet((8, 12, 16)), torch.rand(2, 1, 28, 28))
    conv = eager.module.get_submodule("blocks.0.conv1")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.out_channels, conv.in_channels) == tuple(conv.weight.shape[:2])
    assert eager.module.get_submodule("blocks.0.bn1").num_features == conv.out_channels
    assert eager.module.head.in_features == eager.module.head.weight.shape[1]  # type: ignore[union-attr]


def test_a_train_step_works() -> None:
    small = prune(FashionNet((6, 6, 9)), torch.rand(2, 1, 28, 28)).module.train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    before = small.stem[0].weight.detach().clone()  # type: ignore[union-attr,index]
    F.cross_entropy(small(torch.rand(4, 1, 28, 28)), torch.tensor([1, 2, 3, 4])).backward()
    optimizer.step()
    assert not torch.equal(before, small.stem[0].weight)  # type: ignore[union-attr,index]


class Inverted(nn.Module):
    def __init__(self, width: int = 6, expanded: int = 12) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, expanded, 1)
        self.depthwise = nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False)
        self.norm = nn.BatchNorm2d(expanded)
        self.squeeze = nn.Conv2d(expanded, 4, 1)
        self.excite = nn.Conv2d(4, expanded, 1)
        self.project = nn.Conv2d(expanded, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm(self.depthwise(self.expand(x))))
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return x + self.project(y * scale)


def test_depthwise_and_squeeze_excite() -> None:
    eager = prune(Inverted(), torch.randn(2, 6, 5, 5))
    depthwise = eager.module.depthwise
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 8  # type: ignore[union-attr]
    assert eager.module.excite.in_channels == 2  # type: ignore[union-attr]
    assert eager.module.expand.in_channels == 6  # type: ignore[union-attr]
    assert eager.module.depthwise.kernel_size == (3, 3)  # type: ignore[union-attr]


def test_grouped_convolution() -> None:
    model = Sequence(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(12, 5, 1))
    eager = prune(model, torch.randn(2, 3, 6, 6))
    grouped = eager.module.layers[2]  # type: ignore[index]
    assert grouped.in_channels == grouped.weight.shape[1] * grouped.groups  # type: ignore[union-attr,operator,index]
    assert grouped.out_channels == grouped.weight.shape[0]  # type: ignore[union-attr,operator,index]
    assert grouped.groups == 2  # type: ignore[union-attr]


class Flattened(nn.Module):
    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.literal = literal
        self.fc = nn.Linear(6 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = x.view(-1, 6 * 4 * 4) if self.literal else x.flatten(1)  # the line in question
        return self.fc(x)


def test_flatten_adapts() -> None:
    assert attributes_of(prune(Flattened(False), torch.randn(2, 1, 6, 6)))["fc.in_features"] == 4 * 16


def test_a_literal_size_is_named_with_its_line() -> None:
    with pytest.raises(
        FixedSize, match=r"size of 64 where the source gives 96.*test_surgery\.py:\d+ \(`x = x\.view\(-1, 6 \* 4 \* 4\)"
    ):
        prune(Flattened(True), torch.randn(2, 1, 6, 6))


class Counted(nn.Module):
    """The same as an attribute, a product of attributes, and checked by an assert."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.side = 6, 4
        self.conv = nn.Conv2d(1, self.channels, 3)
        self.fc = nn.Linear(self.channels * self.side**2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        assert x.shape[1] == self.channels
        return self.fc(x.view(-1, self.channels * (self.side * self.side)))


def test_arithmetic_and_asserts_on_attributes() -> None:
    found = attributes_of(prune(Counted(), torch.randn(2, 1, 6, 6)))
    assert found["channels"] == 4 and "side" not in found


class OfClass(nn.Module):
    width = 9

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, self.width), nn.Linear(self.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, self.width))


def test_an_attribute_of_the_class_is_set_on_the_instance() -> None:
    assert attributes_of(prune(OfClass(), torch.randn(3, 4)))["width"] == 6
    assert OfClass.width == 9


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 6 * i, 6, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 6 * i) for i in range(3))
        self.head = nn.Conv2d(21, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(x)


def test_dense_concatenation() -> None:
    assert attributes_of(prune(Dense(), torch.randn(2, 3, 4, 4)))["head.in_channels"] == 3 + 3 * 4


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.stem = nn.Conv2d(3, 12, 1)
        self.a = nn.Conv2d(12, 12, 1, groups=self.groups)
        self.b = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.c = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.c(self.b(x))


def test_channel_shuffle() -> None:
    def inner(graph: Graph) -> Keeps:
        return graph.keeps({g.name: [i for i in range(g.size) if i % 3] for g in graph.groups if g.size == 6})

    eager = prune(Shuffle(), torch.randn(2, 3, 4, 4), keeps=inner)
    assert eager.module.groups == 2
    assert eager.module.b.groups == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("whole", [True, False])
def test_group_norm(whole: bool) -> None:
    model = Sequence(nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 4, 1))

    def choose(graph: Graph) -> Keeps:
        size = 3 if whole else 4
        return graph.keeps({g.name: range(1, g.size) for g in graph.groups if g.size == size})

    norm = prune(model, torch.randn(2, 3, 4, 4), keeps=choose).module.layers[1]  # type: ignore[index]
    assert (norm.num_groups, norm.num_channels) == ((2, 8) if whole else (3, 9))  # type: ignore[union-attr]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 9)
        self.middle = nn.Linear(9, 9)
        self.out = nn.Linear(9, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.embed(x)).relu())


def test_tied_weights_stay_tied() -> None:
    eager = prune(Tied(), torch.tensor([[0, 3, 6], [1, 2, 5]]))
    small = eager.module
    assert small.out.weight is small.embed.weight  # type: ignore[union-attr]
    assert small.embed.embedding_dim == 6 and small.out.in_features == 6  # type: ignore[union-attr]
    again = rebuild(Tied(), list_tensors(small), eager.attributes)
    assert again.out.weight is again.embed.weight  # type: ignore[union-attr]
    with torch.device("meta"):
        bare = Tied()
    whole = rebuild(bare, list_tensors(small), eager.attributes)
    tokens = torch.tensor([[0, 3]])
    assert whole.out.weight is whole.embed.weight  # type: ignore[union-attr]
    assert torch.equal(whole(tokens), small(tokens))


class Branches(nn.Module):
    """Keyword inputs, split, chunk, slices by attribute, a frozen parameter and a buffer outside the state."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = 6, 9
        self.a = nn.Linear(4, self.left + self.right)
        self.b = nn.Linear(self.left, 12)
        self.c = nn.Linear(self.right, 6)
        self.out = nn.Linear(12, 3)
        self.out.weight.requires_grad_(False)
        self.register_buffer("shift", torch.randn(6), persistent=False)

    def forward(self, x: Tensor, *, gain: Tensor) -> Tensor:
        left, right = self.a(x).relu().split([self.left, self.right], dim=-1)
        value, gate = self.b(left).chunk(2, dim=-1)
        y = torch.cat([value * gate.sigmoid(), self.c(right) + self.shift], -1) * gain
        return self.out(y)


def test_split_chunk_and_keyword_inputs() -> None:
    found = attributes_of(prune(Branches(), torch.randn(3, 4), kw={"gain": torch.randn(3, 1)}))
    assert (found["left"], found["right"]) == (4, 6)


class Sliced(nn.Module):
    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.cut = 6
        self.literal = literal
        self.a = nn.Conv2d(3, 15, 1)
        self.b = nn.Conv2d(6, 4, 1)
        self.c = nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first = y[:, :6] if self.literal else y[:, : self.cut]
        return self.b(first) + self.c(y[:, self.cut :, ...])


def test_slices_by_attribute_and_by_number() -> None:
    assert attributes_of(prune(Sliced(), torch.randn(2, 3, 4, 4)))["cut"] == 4
    with pytest.raises(FixedSize, match=r"size of 4 where the source gives 6.*y\[:, :6\]"):
        prune(Sliced(literal=True), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("inner", [Shuffle, Sliced, Inverted])
def test_networks_that_change_tensors_in_place(inner: Callable[[], nn.Module]) -> None:
    prune(InPlace(inner()), torch.randn(2, 6 if inner is Inverted else 3, 4, 4))


def test_a_bare_sequence_in_bfloat16() -> None:
    layers = (nn.Conv2d(3, 9, 3, bias=False), nn.BatchNorm2d(9), nn.Flatten(), nn.Linear(9 * 16, 3))
    small = prune(nn.Sequential(*layers).bfloat16(), torch.randn(1, 3, 6, 6).bfloat16()).module
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())


class OwnType(nn.Module):
    """A type written into forward: the graph cannot run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(x.to(torch.float32)).relu())


def test_a_graph_that_runs_in_its_own_type_only() -> None:
    assert attributes_of(prune(OwnType(), torch.randn(2, 5)))["up.out_features"] == 6


def test_weights_recovered_on_the_graph_go_into_the_module() -> None:
    model = randomise(FashionNet((6, 6, 9))).eval()
    x = torch.rand(2, 1, 28, 28)
    graph = trace(model, x)
    keeps = thin(graph)
    eager, flat = slice_module(model, graph, keeps), copy.deepcopy(slice_graph(graph, keeps))
    with torch.no_grad():
        for tensor in flat.parameters():
            tensor.mul_(1.5)
    copy_tensors(flat, eager.module)
    # The same kernels on the same tensors: nothing to tolerate.
    assert torch.equal(eager.module(x), flat(x)[0])
    other = slice_graph(graph, thin(graph, lambda name: name == graph.groups[0].name))
    with pytest.raises(CheckpointError, match="tensors differ"):
        copy_tensors(other, eager.module)


def test_rebuild_refuses_tensors_of_another_network() -> None:
    eager = prune(Flattened(False), torch.randn(2, 1, 6, 6))
    tensors = list_tensors(eager.module)
    with pytest.raises(CheckpointError, match=r"conv\.bias"):
        rebuild(Flattened(False), {n: t for n, t in tensors.items() if n != "conv.bias"}, [])
    with pytest.raises(CheckpointError, match="no_such"):
        rebuild(Flattened(False), tensors, [{"module": "fc", "name": "no_such", "value": 3}])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * float(y.shape[-1]) ** -0.5)


def test_a_number_computed_from_a_size_is_found_by_the_comparison() -> None:
    with pytest.raises(FixedSize, match="differs from its graph's"):
        prune(Scaled(), torch.randn(2, 3))


def test_weights_of_zero_hide_nothing() -> None:
    model = Scaled()
    nn.init.zeros_(model.b.weight)
    graph = trace(model, torch.randn(2, 3))
    with pytest.raises(FixedSize, match="differs from its graph's"):
        slice_module(model, graph, thin(graph))


def test_demands_are_solved_together() -> None:
    heads, size = Source("m", "heads"), Source("m", "size")
    line = Place("model.py", 3)
    old = {heads: 4, size: 16}
    product = Demand(Operation("*", heads, size), 48, line)
    assert solve_demands([product, Demand(size, 16, line)], old) == {heads: 3, size: 16}
    assert solve_demands([Demand(Operation("//", 48, heads), 16, line)], old) == {heads: 3}
    with pytest.raises(FixedSize, match=r"model\.py:3"):
        solve_demands([Demand(heads, 3, line), Demand(heads, 4, line)], old)


def test_tags_survive_arithmetic_and_are_ints() -> None:
    journal = Journal()
    tag = make_tag(4, Source("", "n"), journal)
    number: Any = (2 * tag + 1) // tag
    assert number == 2 and isinstance(number, int)
    assert number.expression == Operation("//", Operation("+", Operation("*", 2, Source("", "n")), 1), Source("", "n"))
    assert tag * 0.5 == 2.0 and type(tag * 0.5) is float
    assert hash(tag) == hash(4) and {4: "four"}[tag] == "four"
    assert type(copy.deepcopy([tag])[0]) is type(tag)
