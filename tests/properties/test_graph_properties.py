"""Random networks: whatever the axes say may go, goes exactly."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from torch import nn

from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import slice_graph
from jettison.testing import check_composition, check_masked, check_permutation, check_prediction, draw_kept
from jettison.testing.strategies import KINDS, networks

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
EXAMPLES = 1000 if DEEP else 15
"""`HYPOTHESIS_PROFILE=deep` for a night, the default for every day."""

# derandomize: the same networks in every run; no deadline: two shared cores have no sense of time; without the phase
# that explains a failure, which watches every line that runs.
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not DEEP,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def _trace(built: tuple[nn.Module, tuple[Any, ...]]) -> Graph:
    graph = trace(*built)
    note(str(built[0]))
    note(str(graph))
    return graph


def _check_choice(built: tuple[nn.Module, tuple[Any, ...]], seed: int) -> None:
    torch.set_num_threads(1)
    graph = _trace(built)
    assert not graph.opaque
    keeps = graph.keeps(draw_kept(graph, seed=seed))
    check = check_masked(graph, slice_graph(graph, keeps), keeps, graph.traced.example)
    assert check.value <= check.tolerance, check
    event("exact, and the choice shows" if check.passed else "exact, but the choice does not show")
    assert check_prediction(graph, keeps, graph.traced.example).passed


@quick
@given(networks(), st.integers(0, 2**16))
def test_every_choice_is_exact(built: tuple[nn.Module, tuple[Any, ...]], seed: int) -> None:
    _check_choice(built, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_exact(kind: str) -> None:
    @settings(quick, max_examples=max(EXAMPLES // 100, 1))
    @given(networks(2, (kind,)), st.integers(0, 2**16))
    def check(built: tuple[nn.Module, tuple[Any, ...]], seed: int) -> None:
        _check_choice(built, seed)

    check()


@settings(quick, max_examples=max(EXAMPLES // 5, 5))
@given(networks(3), st.integers(0, 2**16))
def test_members_are_complete(built: tuple[nn.Module, tuple[Any, ...]], seed: int) -> None:
    torch.set_num_threads(1)
    graph = _trace(built)
    for group in graph.groups:
        check = check_permutation(graph, group, graph.traced.example, seed=seed)
        assert check.passed, check


@settings(quick, max_examples=max(EXAMPLES // 5, 5))
@given(networks(3), st.integers(0, 2**16))
def test_pruning_in_two_steps_is_pruning_once(built: tuple[nn.Module, tuple[Any, ...]], seed: int) -> None:
    torch.set_num_threads(1)
    graph = _trace(built)
    generator = torch.Generator().manual_seed(seed)
    first, second = {}, {}
    for group in graph.groups:
        order = [int(i) for i in torch.randperm(group.size, generator=generator)]
        if group.size > 2:
            first[group.name] = sorted(order[1:])
        if group.size > 3:
            second[group.name] = sorted(order[:1] + order[2:])
    check = check_composition(graph, first, second, graph.traced.example)
    assert check.passed, check
