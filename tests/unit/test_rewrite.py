"""Every small network against every oracle, and what slicing leaves as it was."""

from __future__ import annotations

import functools

import pytest
import torch

from jettison.core.errors import InputError, UnknownName
from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.trace import get_tensor
from jettison.testing import (
    MODELS,
    build_model,
    check_composition,
    check_masked,
    check_permutation,
    check_prediction,
    draw_kept,
)

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
