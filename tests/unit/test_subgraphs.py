"""Branches and autocast regions: what stands inside is analysed, sliced, proven, counted and saved as all else is."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jettison.core.errors import CheckpointError
from jettison.cost.macs import count
from jettison.flow.costs import CostModel, sum_layer_macs
from jettison.graph.check import run_double
from jettison.graph.groups import Graph, build_graph, trace
from jettison.graph.layers import find_layers
from jettison.graph.rewrite import prune_graph, refresh, slice_graph
from jettison.graph.store import load_graph, save_graph
from jettison.graph.subgraphs import count_branch_levels, iterate_nodes, iterate_regions
from jettison.graph.surgery import slice_module
from jettison.graph.trace import get_tensor, nest, run_nodes, set_tensor, trace_module
from jettison.graph.trainable import make_trainable
from jettison.pruning.moments import collect_moments
from jettison.testing import (
    check_composition,
    check_masked,
    check_permutation,
    check_prediction,
    check_round_trip,
    draw_kept,
    randomise,
)


class Branch(nn.Module):
    """One branch has a hidden layer, written sizes and a constant of its own; the other a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.up, self.down, self.out = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        def deep(h: Tensor) -> Tensor:
            y: Tensor = self.down(torch.relu(self.up(h))).view(h.shape[0], 1, 6).flatten(1)
            return y * torch.tensor([1.0, 2, 3, 4, 5, 6]) + torch.ones(h.shape[0], 6)

        return self.out(torch.cond(x.sum() > 0, deep, lambda h: h * self.scale, (self.one(x),)))


class Nested(nn.Module):
    """A branch in a branch, with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        def inner(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cond(x.mean() > 0.5, lambda h: self.two(h), lambda h: h.sin(), (h,)), h * 3

        a, b = torch.cond(x.sum() > 0, inner, lambda h, x: (h.cos(), h * 2), (self.one(x), x))
        return self.out(torch.relu(a) + b)


class Cast(nn.Module):
    """Autocast on, off inside it, and on again around views with written sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.norm, self.out = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.one(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.relu(self.two(h))
            with torch.autocast("cpu", enabled=False):
                y = self.three(y.float())
        h = self.norm(h + y).view(h.shape[0], 6, 16).mean(2)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.out(h)
        return h.float()


class Graded(nn.Module):
    """A region in another gradient mode than the one the network is traced in."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            h = torch.relu(self.two(torch.relu(self.one(x))))
        return self.out(h)


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...], list[int]]] = {
    "branch": (Branch, (4, 5), [6, 8]),
    "nested": (Nested, (4, 5), [6]),
    "cast": (Cast, (4, 3, 4, 4), [6, 8]),
    "graded": (Graded, (4, 5), [6, 8]),
}

LAYERS = {
    "branch": ["one", "up", "down", "out"],
    "nested": ["one", "two", "out"],
    "cast": ["one", "two", "three", "out"],
    "graded": ["one", "two", "out"],
}
"""The layers in the order they run, those inside regions too."""


def _trace(name: str) -> Graph:
    make, shape, _ = NETWORKS[name]
    return trace(randomise(make(), 0), torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_oracle_holds_through_sub_graphs(name: str) -> None:
    graph = _trace(name)
    assert list(iterate_regions(graph.module))
    assert sorted(g.size for g in graph.groups) == NETWORKS[name][2] and not graph.opaque
    inputs = graph.traced.example
    for seed in range(2):
        keeps = graph.keeps(draw_kept(graph, seed=seed))
        check = check_masked(graph, slice_graph(graph, keeps), keeps, inputs)
        assert check.passed, check
        for sign in (1, -1):
            assert check_prediction(graph, keeps, (sign * inputs[0].abs(),)).passed
    positive = (inputs[0].abs(),)  # the branch that reads every tensor but the other's own
    for group in graph.groups:
        check = check_permutation(graph, group, positive)
        assert check.passed, check
        for member in group.members:
            source = (-positive[0],) if member.tensor == "scale" else positive
            assert check_permutation(graph, group, source, without=member).value > 1e-6, member
    first = {g.name: list(range(1, g.size)) for g in graph.groups}
    second = {g.name: [0, *range(2, g.size)] for g in graph.groups}
    check = check_composition(graph, first, second, inputs)
    assert check.passed, check


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_predicted_and_files_reload(name: str, tmp_path: Path) -> None:
    graph = _trace(name)
    kept = draw_kept(graph, seed=1)
    layers = find_layers(graph.module)
    assert [layer.name for layer in layers] == LAYERS[name]
    assert len({n.name for n in iterate_nodes(graph.module)}) == len(list(iterate_nodes(graph.module)))
    sliced = slice_graph(graph, graph.keeps(kept))
    refresh(sliced, graph, graph.keeps(kept))
    predicted = CostModel(graph, layers, None, 32).count_layer_macs({n: len(k) for n, k in kept.items()})
    assert predicted == sum_layer_macs(sliced) == count(sliced).macs < count(graph.module).macs
    assert not count(sliced).uncounted
    small = prune_graph(graph, kept)
    for sign in (1, -1):
        check = check_round_trip(small, (sign * graph.traced.example[0].abs(),), tmp_path)
        assert check.passed, check


def test_the_pruned_graph_computes_as_the_original_does_in_its_own_type() -> None:
    graph = _trace("cast")
    whole = slice_graph(graph, {})
    x = graph.traced.example[0]
    assert torch.equal(whole(x)[0], graph.module(x)[0])
    inside = {n.meta["val"].dtype for n in iterate_nodes(whole) if str(n.target) == "aten.conv2d.default"}
    assert inside == {torch.float32, torch.bfloat16}
    found = {n.name: v.dtype for n, v, _ in run_nodes(graph.module, (x,)) if isinstance(v, Tensor)}
    expected = {n.name: n.meta["val"].dtype for n in iterate_nodes(graph.module) if n.name in found}
    assert found == expected and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("sign", [1, -1])
def test_running_node_by_node_takes_the_branch_the_values_ask_for(sign: int) -> None:
    graph = _trace("nested")
    x = sign * graph.traced.example[0].abs()
    *_, (node, outputs, _) = run_nodes(graph.module, (x,))
    assert node.op == "output" and torch.equal(outputs[0], graph.module(x)[0])


def test_both_branches_are_proven_whatever_the_inputs() -> None:
    """A mistake in the branch that the inputs do not take is found."""
    graph = _trace("branch")
    keeps = graph.keeps(draw_kept(graph, seed=0))
    for sign, tensor in itertools.product((1, -1), ("scale", "down.weight")):
        pruned = slice_graph(graph, keeps)
        set_tensor(pruned, tensor, get_tensor(pruned, tensor).detach().flip(0))
        check = check_masked(graph, pruned, keeps, (sign * graph.traced.example[0].abs(),))
        assert check.value > 1e-6 and not check.passed, (sign, tensor)


def test_branches_can_be_chosen() -> None:
    graph = _trace("nested")
    assert count_branch_levels(graph.module) == 2
    x = (graph.traced.example[0].double(),)
    ways = itertools.product((0, 1), repeat=2)
    outputs = {tuple(run_double(graph.module, x, way)[0].flatten().tolist()) for way in ways}
    assert len(outputs) == 3  # the second branch has none inside


def test_a_constant_of_a_branch_is_sliced_where_it_lies() -> None:
    graph = _trace("branch")
    name = next(n for n in graph.axes.tensors if n.startswith("true_graph"))
    group = next(g for g in graph.groups if g.size == 6)
    assert any(m.tensor == name for m in group.members)
    small = prune_graph(graph, {group.name: [0, 3]})
    assert get_tensor(small.module, name).tolist() == [1.0, 4.0]


def test_what_one_branch_freezes_is_frozen() -> None:
    class Sorting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            h = torch.cond(x.sum() > 0, lambda h: h.softmax(1), lambda h: h * 2, (self.one(x),))
            return self.out(h)

    graph = trace(Sorting(), torch.randn(4, 5))
    assert not graph.groups and any("softmax" in f.reason for f in graph.frozen)


def test_statistics_are_collected_inside() -> None:
    graph = _trace("cast")
    layers = find_layers(graph.module)
    found = collect_moments(graph.module, layers, [graph.traced.example], positions=64, seed=0)
    assert {layer.name for layer in layers if layer.node in found} == {"one", "two", "three", "out"}


def test_the_graph_result_trains_and_keeps_autocast() -> None:
    graph = _trace("cast")
    small = prune_graph(graph, draw_kept(graph, seed=0)).module
    small(graph.traced.example[0])[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in small.parameters())


class Flexible(nn.Module):
    """A size held as an attribute, used inside autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.one, self.out = 6, nn.Conv2d(3, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.one(x).view(x.shape[0], self.width, 16).mean(2)
            h = self.out(h + torch.zeros(x.shape[0], self.width))
        return h.float()


@pytest.mark.parametrize(("make", "shape"), [(Flexible, (4, 3, 4, 4)), (Graded, (4, 5))])
def test_the_callers_own_class_comes_out_of_regions(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, x = randomise(make(), 0), torch.randn(shape)
    graph = trace(model, x)
    keeps = graph.keeps(draw_kept(graph, seed=0))
    small = slice_module(model, graph, keeps).module
    assert type(small) is make
    with torch.no_grad():
        torch.testing.assert_close(small(x), slice_graph(graph, keeps)(x)[0])


def test_a_saved_sub_graph_cannot_name_other_operators(tmp_path: Path) -> None:
    graph = _trace("branch")
    save_graph(graph.module, graph.traced.in_spec, graph.traced.out_spec, tmp_path)
    path = tmp_path / "model.json"
    data = json.loads(path.read_text())
    inner = data["graphs"]["true_graph_0"]["nodes"]
    next(n for n in inner if n["op"] == "call_function")["target"] = "higher_order.print"
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError):
        load_graph(tmp_path)


def test_a_sub_graph_that_two_nodes_run_ties_their_axes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                a = torch.relu(self.one(x))
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                b = torch.relu(self.two(x))
            return self.out(torch.cat([a.float(), b.float()], 1))

    traced = trace_module(randomise(Twice(), 0), (torch.randn(4, 5),))
    module = traced.module
    first, second = [n for n in module.graph.nodes if str(n.target) == "wrap_with_autocast"]
    second.update_arg(4, first.args[4])
    module.recompile()
    graph = build_graph(traced)
    assert [g.size for g in graph.groups] == [6]
    keeps = graph.keeps(draw_kept(graph, seed=0))
    check = check_masked(graph, slice_graph(graph, keeps), keeps, traced.example)
    assert check.passed, check


def test_train_mode_reaches_inside_and_copies_have_their_own() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.drop, self.out = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                h = self.drop(self.norm(self.one(x)))
            return self.out(h.float())

    x = torch.randn(16, 5)
    graph = trace(randomise(Dropping(), 0), x)
    small = prune_graph(graph, draw_kept(graph, seed=0))
    module = make_trainable(nest(small.module, graph.traced.in_spec, graph.traced.out_spec))
    assert torch.equal(module(x), module(x))
    copied = copy.deepcopy(module)
    copied.train()
    before = get_tensor(copied, "norm.running_mean").clone()
    assert not torch.equal(copied(x), copied(x)) and torch.equal(module(x), module(x))
    assert not torch.equal(before, get_tensor(copied, "norm.running_mean"))
    copied.eval()
    assert torch.equal(copied(x), copied(x))


def test_a_loaded_branch_can_be_trained(tmp_path: Path) -> None:
    """Gradients reach what lies before a branch also once the graph comes from a file."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            z: Tensor = torch.cond(y.sum() > 0, lambda v: self.one(v).sin(), lambda v: self.two(v).cos(), (y,))
            return z

    graph = trace(Branching(), torch.randn(3, 4))
    save_graph(graph.module, graph.traced.in_spec, graph.traced.out_spec, tmp_path)
    loaded = load_graph(tmp_path)[0]
    loaded(torch.randn(3, 4))[0].sum().backward()
    stem = loaded.get_parameter("stem.weight").grad
    assert stem is not None and bool(stem.any())
