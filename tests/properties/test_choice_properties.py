"""Over random networks: orders inside slabs change nothing, and a dropped block is one whose branch gives zero."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jettison.graph.depth import drop_blocks, find_blocks
from jettison.graph.groups import trace
from jettison.graph.slabs import check_slabs, find_slabs, permute_slabs
from jettison.graph.trace import run_nodes
from jettison.testing.models import Built
from jettison.testing.strategies import networks

EXAMPLES = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 12


# derandomize: the same networks in every run; no deadline: two shared cores have no sense of time.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 12,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(built=networks(), seed=st.integers(0, 1000))
def test_slabs_and_blocks_are_what_they_are_taken_for(built: Built, seed: int) -> None:
    graph = trace(*built)
    generator = torch.Generator().manual_seed(seed)
    for group in graph.groups:
        slabs = find_slabs(graph, group)
        if slabs.atoms:
            orders = torch.stack([torch.randperm(group.size, generator=generator) for _ in range(slabs.count)])
            check_slabs(graph, permute_slabs(graph, {group.name: orders}), graph.traced.example)
    for block in find_blocks(graph):
        expected = None
        with torch.no_grad():
            for node, value, values in run_nodes(graph.module, graph.traced.example):
                if node.name == block.end:
                    values[node] = value * 0
                expected = value
            found = drop_blocks(graph, (block.name,)).module(*graph.traced.example)
        assert expected is not None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
