"""Every small network against every oracle, and every oracle against a planted mistake."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from jettison.core.errors import InputError, UnknownName
from jettison.graph.groups import Graph, Member, trace
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.trace import get_tensor, set_tensor
from jettison.testing import (
    MODELS,
    build_model,
    check_composition,
    check_masked,
    check_permutation,
    check_prediction,
    draw_kept,
    randomise,
)

aten = torch.ops.aten
PLANTED = 1e-6
"""A planted mistake moves the output by more than this; exact results stay below 1e-10."""


@functools.cache
def _trace(name: str) -> Graph:
    return trace(*build_model(name))


def _check(graph: Graph, *, seed: int = 0, share: float = 0.6) -> None:
    keeps = graph.keeps(draw_kept(graph, seed=seed, share=share))
    check = check_masked(graph, slice_graph(graph, keeps), keeps, graph.traced.example)
    assert check.passed, check
    prediction = check_prediction(graph, keeps, graph.traced.example)
    assert prediction.passed, prediction


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_sliced(name: str) -> None:
    graph = _trace(name)
    assert graph.groups and not graph.opaque
    for seed in range(3):
        _check(graph, seed=seed)
    _check(graph, share=0.0)  # one position of every group


@pytest.mark.parametrize("name", MODELS)
def test_members_are_complete_and_each_is_needed(name: str) -> None:
    graph = _trace(name)
    for group in graph.groups:
        check = check_permutation(graph, group, graph.traced.example)
        assert check.passed, check
        for member in group.members:
            without = check_permutation(graph, group, graph.traced.example, without=member)
            assert without.value > PLANTED, without


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_are_one(name: str) -> None:
    graph = _trace(name)
    first = {g.name: list(range(1, g.size)) for g in graph.groups if g.size > 2}
    second = {g.name: [0, *range(2, g.size)] for g in graph.groups if g.size > 3}
    check = check_composition(graph, first, second, graph.traced.example)
    assert check.passed, check


EXPECTED = {
    "attention": [12, 3, 4, 20],  # the trunk; heads and head size shared by q, k, v and out; the hidden layer
    "cross_stage": [3, 5, 5],
    "dense": [4, 3, 3, 3],
    "depthwise": [12, 4, 6],
    "encoder": [8, 2, 4, 12],
    "flatten": [5, 4, 9],
    "gates": [8, 6],
    "grouped": [3, 4, 6],  # groups; positions inside them, in and out
    "grouped_query": [2, 2, 4, 4],  # key heads, queries per key head, size of q and k, size of v
    "merging": [6, 6, 10],
    "residual": [8, 6, 10],
    "shared": [6, 6],
    "shuffle": [2, 2],
    "tied": [8, 12],
    "transposed": [8, 2, 3, 2, 3],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_the_worked_examples(name: str) -> None:
    assert sorted(g.size for g in _trace(name).groups) == sorted(EXPECTED[name])


def test_heads_are_shared_by_qkv_and_out() -> None:
    heads = next(g for g in _trace("attention").groups if g.size == 3)
    assert {m.tensor for m in heads.members} == {"qkv.weight", "qkv.bias", "out.weight"}
    assert heads.exact


def test_one_channel_owns_its_columns_behind_flatten() -> None:
    graph = _trace("flatten")
    pruned = prune_graph(graph, {"more": [0, 2]})
    assert get_tensor(pruned.module, "hidden.weight").shape == (9, 2 * 16)


def test_normalised_groups_say_so() -> None:
    exact = {g.name: g.exact for g in _trace("norms").groups}
    assert False in exact.values() and True in exact.values()


def test_tied_weights_stay_tied() -> None:
    graph = _trace("tied")
    pruned = prune_graph(graph, {graph.groups[0].name: [0, 3, 5]})
    module = pruned.module
    names = [n for n, t in module.named_parameters(remove_duplicate=False) if t.shape == (11, 3)]
    assert names and all(get_tensor(module, n) is get_tensor(module, names[0]) for n in names)


def test_slices_leave_the_original_alone() -> None:
    model, inputs = build_model("residual")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = trace(model, inputs)
    expected = model(*inputs)
    pruned = prune_graph(graph, draw_kept(graph, seed=1))
    for parameter in pruned.module.parameters():
        parameter.data.zero_()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(graph.module(*graph.traced.example[:1])[0], model(*graph.traced.example))
    assert torch.equal(model(*inputs), expected)


def test_keeping_everything_changes_nothing() -> None:
    graph = _trace("attention")
    pruned = prune_graph(graph, {g.name: range(g.size) for g in graph.groups})
    assert torch.equal(pruned.module(*graph.traced.example)[0], graph.module(*graph.traced.example)[0])


def test_a_pruned_graph_takes_any_batch() -> None:
    graph = _trace("merging")
    pruned = prune_graph(graph, draw_kept(graph, seed=0))
    for batch in (1, 3, 7):
        assert pruned.module(torch.randn(batch, 3, 8, 8))[0].shape[0] == batch


def test_wrong_positions_are_refused() -> None:
    graph = _trace("residual")
    name = graph.groups[0].name
    for kept in ([], [99], [-1]):
        with pytest.raises(InputError, match="Keep at least one"):
            graph.keeps({name: kept})
    with pytest.raises(UnknownName, match="Did you mean"):
        graph.keeps({name + "x": [0]})


def _plant_member_left_out(graph: Graph, pruned: fx.GraphModule, kept: dict[str, list[int]]) -> None:
    group = next(g for g in graph.groups if g.size == 6)
    bias = next(m for m in group.members if m.tensor == "a.0.bias")
    wrong = get_tensor(graph.module, bias.tensor).detach()[: len(kept[group.name])]
    assert not torch.equal(wrong, get_tensor(pruned, bias.tensor))
    set_tensor(pruned, bias.tensor, wrong)


def _plant_swapped_axis(graph: Graph, pruned: fx.GraphModule, kept: dict[str, list[int]]) -> None:
    weight = get_tensor(pruned, "b.0.weight").detach()
    set_tensor(pruned, "b.0.weight", weight.flip(1))


def _plant_slice_off_by_one(graph: Graph, pruned: fx.GraphModule, kept: dict[str, list[int]]) -> None:
    node = next(n for n in pruned.graph.nodes if n.target == aten.slice.Tensor and n.args[1] == 1 and n.args[2])
    node.args = (node.args[0], 1, node.args[2] - 1, node.args[3] - 1)


def _plant_free_scale(graph: Graph, pruned: fx.GraphModule, kept: dict[str, list[int]]) -> None:
    node = next(n for n in pruned.graph.nodes if n.target == aten.scaled_dot_product_attention.default)
    assert node.kwargs["scale"] == 4**-0.5
    node.kwargs = {}


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("residual", _plant_member_left_out),
        ("residual", _plant_swapped_axis),
        ("cross_stage", _plant_slice_off_by_one),
        ("attention", _plant_free_scale),
    ],
)
def test_planted_mistakes_are_caught(name: str, plant: Callable[[Graph, fx.GraphModule, Any], None]) -> None:
    graph = _trace(name)
    kept = {g.name: list(range(1, g.size)) for g in graph.groups}
    keeps = graph.keeps(kept)
    pruned = slice_graph(graph, keeps)
    assert check_masked(graph, pruned, keeps, graph.traced.example).passed
    plant(graph, pruned, kept)
    wrong = check_masked(graph, pruned, keeps, graph.traced.example)
    assert not wrong.passed and wrong.value > PLANTED


def test_a_choice_without_effect_proves_nothing() -> None:
    graph = trace(*build_model("residual"))
    set_tensor(graph.module, "b.2.weight", torch.zeros_like(get_tensor(graph.module, "b.2.weight")))
    keeps = graph.keeps({"b.0": [0, 1]})
    check = check_masked(graph, slice_graph(graph, keeps), keeps, graph.traced.example)
    assert not check.passed and check.value == 0 and "too little" in check.detail


def test_a_wrong_member_is_no_symmetry() -> None:
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


class Strange(nn.Module):
    """Sorts its hidden features, cumulates others, and lets a third layer be."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sort(self.a(x), dim=-1).values
        x = torch.cumsum(self.b(x), -1)
        y: Tensor = self.out(torch.relu(self.c(x)))
        return y


def test_operators_without_a_rule_freeze_what_they_touch() -> None:
    graph = trace(randomise(Strange()), torch.randn(3, 4))
    assert graph.opaque == ("aten.cumsum.default", "aten.sort.default")
    assert [g.name for g in graph.groups] == ["c"]
    _check(graph)
    part = next(p for p in graph.frozen if p.what == "a.weight (dimension 0)")
    assert "aten.sort" in part.reason and "test_rewrite.py:" in part.where


def _conditional(x: Tensor) -> Tensor:
    y: Tensor = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))
    return y


class Branching(nn.Module):
    """Control flow inside the graph: an operator with sub-graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.relu(self.b(_conditional(self.a(x)))))
        return y


def test_sub_graphs_are_opaque_and_kept() -> None:
    graph = trace(randomise(Branching()), torch.randn(3, 4))
    assert [g.name for g in graph.groups] == ["b"]
    _check(graph)


class OverTime(nn.Module):
    """Learned queries under a causal mask: their order counts, so they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.zeros(1, 5, 8)), nn.Linear(3, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        k = self.key(x)
        q = self.query.expand(x.shape[0], -1, -1)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, k, is_causal=True)).mean(1)
        return y


def test_a_causal_mask_freezes_the_queries() -> None:
    graph = trace(randomise(OverTime()), torch.randn(2, 5, 3))
    assert [g.size for g in graph.groups] == [8]
    _check(graph)


class Untracked(nn.Module):
    """BatchNorm that takes its statistics from the batch even in eval mode, over learned tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 6, 7))
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens * x[:, None, None])
        out: Tensor = self.out(y.pow(2).sum(-1))
        return out


def test_batch_statistics_freeze_what_they_run_over() -> None:
    graph = trace(randomise(Untracked()), torch.randn(4))
    _check(graph)
    assert 7 not in [g.size for g in graph.groups]


class Mirrored(nn.Module):
    """Channels moved to the end and padded with their own mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(8, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.a(x)[:, None], (1, 1), mode="reflect")[:, 0]
        y: Tensor = self.out(torch.relu(self.b(x)))
        return y


def test_mirrored_channels_stay() -> None:
    graph = trace(randomise(Mirrored()), torch.randn(3, 4))
    assert [g.name for g in graph.groups] == ["b"]
    _check(graph)


class Query(nn.Module):
    """Grouped-query attention by the operator's own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 8, bias=False), nn.Linear(6, 8)
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        out: Tensor = self.out(y)
        return out


def test_grouped_queries_by_flag() -> None:
    graph = trace(randomise(Query()), torch.randn(2, 5, 6))
    assert sorted(g.size for g in graph.groups) == [2, 2, 4, 4]
    _check(graph)


class Movements(nn.Module):
    """Operators that move positions: repeat, interleave, flip, look-up, shuffle, sub-pixels, expand_as."""

    which: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(32, 4, 1)
        self.d = nn.Conv2d(8, 6, 1)
        self.table, self.row = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(6, 1, 1))
        self.register_buffer("which", torch.tensor([[1, 3], [0, 4]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.relu(x * self.row.expand_as(x)).flip(-1)
        x = self.b(x.repeat(1, 2, 1, 1))
        x = self.c(F.pixel_unshuffle(F.channel_shuffle(x, 2), 2))
        x = self.d(x.repeat_interleave(2, 1))
        y: Tensor = x.mean((2, 3)) * self.table[self.which].sum((0, 1))
        norm: Tensor = y.norm(dim=-1, keepdim=True)
        return norm


def test_movements() -> None:
    graph = trace(randomise(Movements()), torch.randn(2, 3, 4, 4))
    assert not graph.opaque
    _check(graph)
    for group in graph.groups:
        assert check_permutation(graph, group, graph.traced.example).passed


def test_printing_names_groups_reasons_and_lines() -> None:
    text = str(trace(randomise(Strange()), torch.randn(3, 4)))
    assert text.startswith("1 prune group touches ")
    assert "test_rewrite.py:" in text and "aten.sort" in text and "batch free" in text
    for drawn in (text, str(_trace("dense")), str(_trace("norms"))):
        assert max(map(len, drawn.splitlines())) <= 100


class Recurrent(nn.Module):
    """An LSTM, which has no rule, before layers that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.relu(self.b(self.lstm(x)[0])))
        return y


class Weighted(nn.Module):
    """Weights made in forward: one by weight norm, one standardised by hand; a cast; outputs that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        self.b, self.c = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        w = self.b.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        x = F.relu(F.conv2d(F.relu(self.a(x)).half().float(), w, self.b.bias), inplace=True)
        x = self.c(x)
        return x, None, x.argmax(1)


class Rotary(nn.Module):
    """Rotary positions: pairs (d, d + half) of queries and keys die together, with their sines."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)
        self.register_buffer("cos", torch.zeros(5, 8))
        self.register_buffer("sin", torch.zeros(5, 8))

    def _turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(x.shape[0], 5, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize(
    ("make", "shape", "sizes", "opaque"),
    [
        (Recurrent, (2, 3, 4), [5, 6], ()),
        (Weighted, (2, 3, 6, 6), [4], ("aten.argmax.default",)),
        (Rotary, (2, 5, 6), [2, 4, 8], ()),
    ],
)
def test_unusual_networks(make: type[nn.Module], shape: Any, sizes: list[int], opaque: tuple[str, ...]) -> None:
    graph = trace(randomise(make()), torch.randn(shape))
    assert sorted(g.size for g in graph.groups) == sizes and graph.opaque == opaque
    _check(graph)
