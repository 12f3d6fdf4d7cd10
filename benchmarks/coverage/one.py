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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.coverage.zoo import Case, find_case, list_tensors
from jettison.core.errors import FixedSize
from jettison.cost.macs import count
from jettison.flow.delivering import deliver_kept, load, save_module
from jettison.graph.check import check_masked
from jettison.graph.expressible import find_inexpressible
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
    _randomise(model)
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
    names = {g.name for g in graph.groups}
    row["prunable"] = round(1 - _count_macs(graph, _keep(graph, 0.0, names)) / before, 3)
    row |= _prune(model, graph, _choose(graph, before, names), row, "auto")
    if row["result"] == "eager":
        row["own_class_removed"], row["own_class_groups"] = row["removed"], row["groups"]
    else:
        row["stage"] = "own class: choice"
        kept = _choose_expressible(model, graph, before)
        found = _prune(model, graph, kept, row, "eager") if kept else {"removed": 0.0}
        row["own_class_removed"], row["own_class_groups"] = found["removed"], len(kept)
    row["stage"] = "size"
    if row["removed"] < 0.25:
        raise AssertionError(f"only {row['removed']:.0%} of the MACs could go")


def _randomise(model: nn.Module) -> None:
    """Give parameters and running statistics random values; tables and bounds in other buffers stay what they are."""
    fixed = {n: b.clone() for n, b in model.named_buffers() if "running_" not in n}
    randomise(model, SEED)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in fixed:
                buffer.copy_(fixed[name])


def _choose_expressible(model: nn.Module, graph: Graph, macs: int) -> dict[str, list[int]]:
    """Choose among the groups that the model's own source can express smaller; nothing where it can express none."""
    names = {g.name for g in graph.groups}
    kept = _keep(graph, TARGET, names)
    try:
        while fixed := find_inexpressible(model, graph, kept).keys():
            names -= fixed
            kept = _choose(graph, macs, names)
    except FixedSize:
        return {}
    return kept


def _prune(
    model: nn.Module, graph: Graph, kept: Mapping[str, list[int]], row: dict[str, Any], kind: str
) -> dict[str, Any]:
    """Slice, prove, deliver, save, load and train one choice; returns what was found."""
    found: dict[str, Any] = {}
    where = "own class: " if kind == "eager" else ""
    row["stage"] = f"{where}slice"
    keeps = graph.keeps(kept)
    small = prune_graph(graph, kept)
    found["removed"] = round(1 - count(small.module).macs / row["macs"], 3)
    row["stage"] = f"{where}masked = sliced"
    check = check_masked(graph, small.module, keeps, graph.traced.example)
    found["difference"] = check.value
    if not check.passed:
        raise AssertionError(f"masked and sliced differ: {check.value:.3g}; {check.detail}")
    row["stage"] = f"{where}deliver"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delivered = deliver_kept(model, graph, kept, small.module, result="eager" if kind == "eager" else "auto")
    found["result"] = delivered.kind
    if kind == "eager" and delivered.kind != "eager":
        raise AssertionError(f"not the model's own class: {delivered.note}")
    found["refusal"] = delivered.note
    row["stage"] = f"{where}reload"
    with tempfile.TemporaryDirectory() as folder:
        save_module(delivered, graph, small.module, Path(folder))
        again = load(Path(folder)) if delivered.kind == "graph" else load(Path(folder), model)
    given = pytree.tree_unflatten(list(graph.traced.example), graph.traced.in_spec)
    _compare(delivered.module, again, given)
    row["stage"] = f"{where}train"
    _train(again, given)
    return found


def _keep(graph: Graph, share: float, names: Collection[str]) -> dict[str, list[int]]:
    """Return the same share of every named group, at random positions, at least one; nested as the share grows."""
    kept = {}
    for index, group in enumerate(graph.groups):
        if group.name not in names:
            continue
        generator = torch.Generator().manual_seed(SEED * 100_003 + index)
        order = torch.randperm(group.size, generator=generator)
        kept[group.name] = sorted(order[: max(1, round(group.size * share))].tolist())
    return kept


def _count_macs(graph: Graph, kept: Mapping[str, list[int]]) -> int:
    shadow = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    refresh(shadow, graph, graph.keeps(kept))
    return count(shadow).macs


def _choose(graph: Graph, macs: int, names: Collection[str]) -> dict[str, list[int]]:
    """Find the largest share of the named groups with which at most half of the MACs are left."""
    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        if _count_macs(graph, _keep(graph, middle, names)) <= TARGET * macs:
            low = middle
        else:
            high = middle
    return _keep(graph, low, names)


def _compare(one: nn.Module, other: nn.Module, given: Any) -> None:
    args, kwargs = given
    with torch.no_grad():
        mine, theirs = list_tensors(one(*args, **kwargs)), list_tensors(other(*args, **kwargs))
    if len(mine) != len(theirs) or not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
        raise AssertionError("the reloaded network computes other bits")


def _train(model: nn.Module, given: Any) -> None:
    """Take one step of SGD in train mode towards random outputs: finite gradients reach the parameters, which move."""
    args, kwargs = given
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = [v.float() for v in list_tensors(model(*args, **kwargs)) if v.is_floating_point()]
    # Outputs that end in a norm have a constant square: only a target tells them apart.
    loss = sum((v - torch.randn_like(v)).pow(2).mean() for v in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    # A bias before a batch norm has no gradient, nor has a branch of the network that was not taken.
    reached = [n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    moved = any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    if not moved or len(reached) < len(before) / 2:
        still = [n for n in before if n not in reached][:3]
        raise AssertionError(f"one step of training reached {len(reached)} of {len(before)} parameters; not {still}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collection")
    parser.add_argument("name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(find_case(given.collection, given.name))))


if __name__ == "__main__":
    main()
