"""A variant run from the frontier gives what running it whole gives."""

from __future__ import annotations

import pytest
import torch

from jettison.flow.frontier import find_first_use, start_frontier
from jettison.graph.groups import trace
from jettison.graph.rewrite import slice_graph
from jettison.testing import MODELS, build_model, draw_kept


@pytest.mark.parametrize("name", sorted(MODELS))
def test_frontier_equals_the_whole_run(name: str) -> None:
    model, inputs = build_model(name)
    graph = trace(model, inputs)
    batches = [graph.traced.example, tuple(x.clone() for x in graph.traced.example)]
    frontier = start_frontier(graph, batches)
    for group in sorted(graph.groups, key=lambda g: find_first_use(graph, g)):
        frontier.advance(find_first_use(graph, group))
        kept = draw_kept(graph, seed=1)[group.name]
        variant = slice_graph(graph, graph.keeps({group.name: kept}))
        with torch.no_grad():
            for batch, found in zip(batches, frontier.run(variant), strict=True):
                for a, b in zip(found, variant(*batch), strict=True):
                    assert (a is None and b is None) or torch.equal(a, b)


def test_starting_too_late_is_noticed() -> None:
    model, inputs = build_model("residual")
    graph = trace(model, inputs)
    group = graph.groups[0]
    frontier = start_frontier(graph, [graph.traced.example])
    nodes = len(list(graph.module.graph.nodes))
    frontier.advance(nodes - 1)  # past every node that the group changes
    variant = slice_graph(graph, graph.keeps({group.name: draw_kept(graph, seed=1)[group.name]}))
    with torch.no_grad():
        late = frontier.run(variant)[0][0]
        assert not torch.allclose(late, variant(*graph.traced.example)[0])
