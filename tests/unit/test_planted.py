"""Planted mistakes: each is caught by some oracle, in the sliced network and in the rules that sliced it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from jettison.graph import groups, rewrite
from jettison.graph.analyse import Dims, Member, Walk
from jettison.graph.axes import Cat, Prod, make_axis
from jettison.graph.groups import Graph, build_graph, trace
from jettison.graph.movement import concatenate, reshape, resolve_dim, slice_dimension
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.rules import RULES
from jettison.graph.trace import get_tensor, set_tensor
from jettison.testing import (
    build_model,
    check_composition,
    check_masked,
    check_permutation,
    check_prediction,
    check_round_trip,
    draw_kept,
)

aten = torch.ops.aten
PLANTED = 1e-6
"""A planted mistake moves the output by more than this; exact results stay below 1e-10."""


@functools.cache
def _trace(name: str) -> Graph:
    return trace(*build_model(name))


def _member_left_out(pruned: fx.GraphModule, graph: Graph) -> None:
    """A bias keeps its first positions where its weight keeps the last."""
    bias = get_tensor(graph.module, "a.0.bias").detach()
    set_tensor(pruned, "a.0.bias", bias[: get_tensor(pruned, "a.0.bias").shape[0]])


def _columns_off_by_one(pruned: fx.GraphModule, graph: Graph) -> None:
    """The columns that read a group begin one position too early."""
    weight = get_tensor(graph.module, "a.3.weight").detach()
    set_tensor(pruned, "a.3.weight", weight[1:, : get_tensor(pruned, "a.3.weight").shape[1]])


def _swapped_axis(pruned: fx.GraphModule, graph: Graph) -> None:
    """The columns of a weight in another order."""
    set_tensor(pruned, "b.0.weight", get_tensor(pruned, "b.0.weight").detach().flip(1))


def _heads_swapped(pruned: fx.GraphModule, graph: Graph) -> None:
    """The out-projection reads head size by heads, not heads by head size."""
    weight = get_tensor(pruned, "out.weight").detach()
    set_tensor(pruned, "out.weight", weight.unflatten(1, (2, 3)).transpose(1, 2).flatten(1))


def _slice_off_by_one(pruned: fx.GraphModule, graph: Graph) -> None:
    node = next(n for n in pruned.graph.nodes if n.target == aten.slice.Tensor and n.args[1] == 1 and n.args[2])
    node.args = (node.args[0], 1, node.args[2] - 1, node.args[3] - 1)


def _default_scale(pruned: fx.GraphModule, graph: Graph) -> None:
    node = next(n for n in pruned.graph.nodes if n.target == aten.scaled_dot_product_attention.default)
    assert node.kwargs["scale"] == 4**-0.5
    node.kwargs = {}


PLANTS: list[tuple[str, Callable[[fx.GraphModule, Graph], None]]] = [
    ("residual", _member_left_out),
    ("residual", _columns_off_by_one),
    ("residual", _swapped_axis),
    ("attention", _heads_swapped),
    ("cross_stage", _slice_off_by_one),
    ("attention", _default_scale),
]


@pytest.mark.parametrize(("name", "plant"), PLANTS)
def test_wrong_slices_are_caught(name: str, plant: Callable[[fx.GraphModule, Graph], None]) -> None:
    graph = _trace(name)
    keeps = graph.keeps({g.name: range(1, g.size) for g in graph.groups})
    pruned = slice_graph(graph, keeps)
    assert check_masked(graph, pruned, keeps, graph.traced.example).passed
    plant(pruned, graph)
    wrong = check_masked(graph, pruned, keeps, graph.traced.example)
    assert not wrong.passed and wrong.value > PLANTED


def _first_operand(walk: Walk) -> Dims:
    """Adding ties nothing together."""
    return walk.dims(walk.args[0])


def _linear_without_bias(walk: Walk) -> Dims:
    x, w = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    walk.same(x[-1], w[1])
    return (*x[:-1], w[0])


def _batch_norm_without_variance(walk: Walk) -> Dims:
    x = walk.dims(walk.args[0])
    for argument in walk.args[1:4]:
        walk.same(walk.dims(argument)[0], x[1])
    return x


def _joined_backwards(walk: Walk) -> Dims:
    out = list(concatenate(walk))
    dim = resolve_dim(walk.arg(1, "dim", 0), len(out))
    out[dim] = Cat(tuple(walk.dims(n)[dim] for n in reversed(walk.args[0])))
    return tuple(out)


def _sliced_one_early(walk: Walk) -> Dims:
    x, dim, start = walk.dims(walk.args[0]), walk.arg(1, "dim", 0), walk.arg(2, "start", 0)
    if not start or walk.shape[dim] == x[dim].size:
        return slice_dimension(walk)
    sizes = (start - 1, walk.shape[dim], x[dim].size - start + 1 - walk.shape[dim])
    parts = tuple(make_axis(n) for n in sizes)
    walk.same(x[dim], Cat(tuple(p for p, n in zip(parts, sizes, strict=True) if n)))
    return (*x[:dim], parts[1], *x[dim + 1 :])


def _read_the_wrong_way(walk: Walk) -> Dims:
    """A dimension cut in two is read with the first factor running fastest."""
    x, shape = walk.dims(walk.args[0]), walk.shape
    at = next((i for i, t in enumerate(x) if i < len(shape) and t.size != shape[i]), None)
    if at is None or len(shape) != len(x) + 1 or x[at].size != shape[at] * shape[at + 1]:
        return reshape(walk)
    first, second = make_axis(shape[at]), make_axis(shape[at + 1])
    walk.same(x[at], Prod((second, first)))
    return (*x[:at], first, second, *x[at + 1 :])


def _groups_inside_out(walk: Walk) -> Dims:
    """Grouped convolution with groups running fastest."""
    x, w, groups = walk.dims(walk.args[0]), walk.dims(walk.args[1]), int(walk.arg(6, "groups", 1))
    if groups == 1:
        return RULES[aten.conv2d](walk)  # type: ignore[no-any-return]
    axis = make_axis(groups)
    walk.axes.group_axes[walk.node] = axis
    walk.same(x[1], Prod((w[1], axis)))
    walk.same(w[0], Prod((make_axis(w[0].size // groups), axis)))
    walk.same(walk.dims(walk.args[2])[0], w[0])
    return (x[0], w[0], *(walk.fixed(s) for s in walk.shape[2:]))


def _gates_interleaved(walk: Walk) -> Dims:
    """The two halves of a gated unit taken as pairs of neighbours."""
    x, half = walk.dims(walk.args[0]), make_axis(walk.shape[-1])
    walk.same(x[-1], Prod((half, walk.fixed(2))))
    return (*x[:-1], half)


def _chunks_interleaved(walk: Walk) -> tuple[Dims, ...]:
    x = walk.dims(walk.args[0])
    dim = resolve_dim(walk.arg(2, "dim", 0), len(x))
    part = make_axis(walk.node.meta["val"][0].shape[dim])
    walk.same(x[dim], Prod((part, walk.fixed(len(walk.node.meta["val"])))))
    return tuple((*x[:dim], part, *x[dim + 1 :]) for _ in walk.node.meta["val"])


def _untied_product(walk: Walk) -> Dims:
    """What a product sums over is not one axis."""
    a, b = walk.dims(walk.args[0]), walk.dims(walk.args[1])
    return (*walk.broadcast([a[:-2], b[:-2]]), a[-2], b[-1])


WRONG_RULES: list[tuple[str, Any, Any]] = [
    ("residual", aten.add, _first_operand),
    ("attention", aten.linear, _linear_without_bias),
    ("norms", aten.batch_norm, _batch_norm_without_variance),
    ("dense", aten.cat, _joined_backwards),
    ("cross_stage", aten.slice, _sliced_one_early),
    ("grouped_query", aten.view, _read_the_wrong_way),
    ("grouped", aten.conv2d, _groups_inside_out),
    ("gates", aten.glu, _gates_interleaved),
    ("gates", aten.chunk, _chunks_interleaved),
    ("grouped_query", aten.matmul, _untied_product),
]


def _is_caught(graph: Graph) -> bool:
    """Tell whether any oracle finds the graph wrong; sizes that do not fit stop the network instead."""
    inputs = graph.traced.example
    for seed in range(3):
        keeps = graph.keeps(draw_kept(graph, seed=seed))
        try:
            checks = [check_masked(graph, slice_graph(graph, keeps), keeps, inputs)]
            checks += [check_prediction(graph, keeps, inputs)]
            checks += [check_permutation(graph, group, inputs, seed=seed) for group in graph.groups]
        except RuntimeError:
            return True
        if not all(c.passed for c in checks):
            return True
    return False


@pytest.mark.parametrize(("name", "operator", "rule"), WRONG_RULES)
def test_wrong_rules_are_caught(name: str, operator: Any, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _trace(name)
    assert not _is_caught(graph)
    monkeypatch.setattr(groups, "RULES", {**RULES, operator: rule})
    assert _is_caught(build_graph(graph.traced))


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("attention", aten.scaled_dot_product_attention),
        ("grouped", aten.group_norm),
        ("depthwise", aten.conv2d),
        ("norms", aten.layer_norm),
        ("grouped_query", aten.expand),
        ("cross_stage", aten.split_with_sizes),
    ],
)
def test_sizes_that_are_not_rewritten_are_caught(name: str, operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _trace(name)
    assert operator in rewrite._FIXES
    monkeypatch.setattr(rewrite, "_FIXES", {k: v for k, v in rewrite._FIXES.items() if k != operator})
    assert _is_caught(graph)


def test_a_choice_without_effect_proves_nothing() -> None:
    graph = trace(*build_model("residual"))
    set_tensor(graph.module, "b.2.weight", torch.zeros_like(get_tensor(graph.module, "b.2.weight")))
    keeps = graph.keeps({"b.0": [0, 1]})
    check = check_masked(graph, slice_graph(graph, keeps), keeps, graph.traced.example)
    assert not check.passed and check.value == 0 and "too little" in check.detail


def test_a_group_without_its_last_member_is_no_symmetry() -> None:
    graph = _trace("residual")
    group = next(g for g in graph.groups if g.size == 6)
    wrong = type(group)(group.name, group.size, group.members[:-1], group.exact, group.atom)
    assert not check_permutation(graph, wrong, graph.traced.example).passed
    assert Member("a.3.weight", 1) in group.members


def test_composition_notices_a_lost_group(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _trace("residual")

    def forget(graph: Graph, kept: dict[str, list[int]]) -> Graph:
        found = prune_graph(graph, kept)
        return type(found)(found.traced, found.axes, found.groups[:-1], found.frozen) if len(kept) > 1 else found

    monkeypatch.setattr("jettison.testing.oracles.prune_graph", forget)
    names = [g.name for g in graph.groups]
    check = check_composition(graph, {names[0]: [0, 1, 2]}, {names[1]: [0, 1, 2]}, graph.traced.example)
    assert not check.passed


def test_prediction_notices_a_size_that_is_not_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _trace("residual")
    keeps = graph.keeps({"a.0": [0, 2, 5]})
    assert check_prediction(graph, keeps, graph.traced.example).passed
    other = graph.keeps({"a.0": [0, 2]})
    monkeypatch.setattr("jettison.testing.oracles.slice_graph", lambda graph, keeps: slice_graph(graph, other))
    assert not check_prediction(graph, keeps, graph.traced.example).passed


def test_a_file_with_another_number_is_no_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(*build_model("residual"))
    assert check_round_trip(graph, graph.traced.example).passed
    from jettison.testing import oracles

    load = oracles.load_graph

    def load_wrong(place: Any) -> Any:
        found, *specs = load(place)
        with torch.no_grad():
            next(found.parameters()).flatten()[0].add_(1e-3)
        return (found, *specs)

    monkeypatch.setattr(oracles, "load_graph", load_wrong)
    assert not check_round_trip(graph, graph.traced.example).passed
