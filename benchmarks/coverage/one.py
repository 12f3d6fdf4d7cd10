"""One model of the zoo: trace, prune to half its MACs at random, prove, save, load, train a step; prints one JSON line.

`python -m benchmarks.coverage.one COLLECTION NAME`. Runs in a process of its own, so that time and memory are its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.coverage.zoo import Case, find_case
from jettison.cost.macs import count
from jettison.flow.delivering import deliver_kept, load, save_module
from jettison.graph.check import check_masked
from jettison.graph.groups import Graph, build_graph
from jettison.graph.rewrite import prune_graph, refresh
from jettison.graph.trace import trace_module
from jettison.testing import randomise

TARGET = 0.5
"""Share of the MACs that is to be left."""
SEED = 0


def run(case: Case) -> dict[str, Any]:
    """Return the row of one model; a stage that fails ends it, with the stage and the error in it."""
    row: dict[str, Any] = {"collection": case.collection, "model": case.name, "family": case.family, "stage": "build"}
    try:
        _run_stages(case, row)
        row["stage"] = ""
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is this model's row
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        row["trace"] = traceback.format_exc(limit=-4)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _run_stages(case: Case, row: dict[str, Any]) -> None:
    torch.manual_seed(SEED)
    model, args, kwargs = case.build()
    randomise(model, SEED)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["stage"] = "export"
    start = time.perf_counter()
    traced = trace_module(model, args, kwargs)
    row["export_s"] = round(time.perf_counter() - start, 2)
    row["stage"] = "analysis"
    start = time.perf_counter()
    graph = build_graph(traced)
    row["analysis_s"] = round(time.perf_counter() - start, 3)
    row["nodes"] = len(traced.module.graph.nodes)
    row["dynamic_batch"] = traced.dynamic_batch
    row["groups"] = len(graph.groups)
    row["opaque"] = " ".join(graph.opaque)
    row["stage"] = "choice"
    before = count(traced.module).macs
    row["macs"] = before
    row["prunable"] = round(1 - _count_macs(graph, _keep(graph, 0.0)) / before, 3)
    kept = _choose(graph, before)
    row["stage"] = "slice"
    keeps = graph.keeps(kept)
    small = prune_graph(graph, kept)
    row["removed"] = round(1 - count(small.module).macs / before, 3)
    row["stage"] = "masked = sliced"
    check = check_masked(graph, small.module, keeps, traced.example)
    row["difference"] = check.value
    row["effect"] = check.detail
    if not check.passed:
        raise AssertionError(f"masked and sliced differ: {check.value:.3g}; {check.detail}")
    row["stage"] = "deliver"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delivered = deliver_kept(model, graph, kept, small.module)
    row["result"] = getattr(delivered, "kind", "graph" if delivered.refusal else "eager")
    row["refusal"] = delivered.refusal
    row["stage"] = "reload"
    with tempfile.TemporaryDirectory() as folder:
        save_module(delivered, graph, small.module, Path(folder))
        again = load(Path(folder)) if row["result"] == "graph" else load(Path(folder), model)
    given = pytree.tree_unflatten(list(traced.example), traced.in_spec)
    _compare(delivered.module, again, given)
    row["stage"] = "train"
    _train(again, given)
    row["stage"] = "size"
    if row["removed"] < 0.25:
        raise AssertionError(f"only {row['removed']:.0%} of the MACs could go")


def _keep(graph: Graph, share: float) -> dict[str, list[int]]:
    """Return the same share of every group, at random positions, at least one; nested as the share grows."""
    kept = {}
    for index, group in enumerate(graph.groups):
        generator = torch.Generator().manual_seed(SEED * 100_003 + index)
        order = torch.randperm(group.size, generator=generator)
        kept[group.name] = sorted(order[: max(1, round(group.size * share))].tolist())
    return kept


def _count_macs(graph: Graph, kept: Mapping[str, list[int]]) -> int:
    shadow = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    refresh(shadow, graph, graph.keeps(kept))
    return count(shadow).macs


def _choose(graph: Graph, macs: int) -> dict[str, list[int]]:
    """Find the largest share of all groups with which at most half of the MACs are left."""
    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        if _count_macs(graph, _keep(graph, middle)) <= TARGET * macs:
            low = middle
        else:
            high = middle
    return _keep(graph, low)


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def _compare(one: nn.Module, other: nn.Module, given: Any) -> None:
    args, kwargs = given
    with torch.no_grad():
        mine, theirs = _tensors(one(*args, **kwargs)), _tensors(other(*args, **kwargs))
    if len(mine) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
        raise AssertionError("the reloaded network computes other bits")


def _train(model: nn.Module, given: Any) -> None:
    """Take one step of SGD in train mode towards random outputs: gradients reach the parameters and are finite."""
    args, kwargs = given
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = [v.float() for v in _tensors(model(*args, **kwargs)) if v.is_floating_point()]
    # Outputs that end in a norm have a constant square: only a target tells them apart.
    loss = sum((v - torch.randn_like(v)).pow(2).mean() for v in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    if not torch.isfinite(loss) or len(moved) < 0.8 * len(before):
        still = [n for n in before if n not in moved][:3]
        raise AssertionError(f"one step of training: {len(moved)} of {len(before)} parameters moved; not {still}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collection")
    parser.add_argument("name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(find_case(given.collection, given.name))))


if __name__ == "__main__":
    main()
