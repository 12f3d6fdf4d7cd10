"""From a budget to a Plan: predict, build the candidate, measure it in the runtime, correct, and predict again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from jettison.core.errors import CheckpointError
from jettison.core.plain import read_json, write_json
from jettison.core.plan import Cost, Plan
from jettison.cost.macs import count
from jettison.flow.costs import CostModel, make_cost_model
from jettison.flow.evaluation import agreement, run_evaluate
from jettison.flow.planning import make_plan, read_limits
from jettison.flow.run import Run, export_file
from jettison.flow.sensitivity import GroupOptions, Sensitivity, measure_sensitivity
from jettison.pruning.recalibrate import recalibrate
from jettison.quantization import quantize
from jettison.targets.feeding import open_run
from jettison.targets.timing import time_interleaved

CANDIDATE_ROUNDS = 40
"""Rounds that a candidate is measured against the original: an interval of about 2 %."""
MARGIN = 0.97
"""Plans aim this far below a latency limit, for a measurement is an interval."""
NEAR = 0.90
"""A candidate between this share of its limit and the limit is taken as it is."""
DROP_STEPS = 5
"""Halvings of the range in which the fastest plan within `drop` is sought."""


@dataclass(frozen=True)
class Reference:
    """The original on the target: its milliseconds, those of its unpruned int8 form, and both files' bytes.

    Without quantization the second figures repeat the first.
    """

    original_ms: float
    unpruned_ms: float
    original_bytes: int
    unpruned_bytes: int


@dataclass(frozen=True)
class Measured:
    """Milliseconds of candidates that were built and measured, by what they keep."""

    latency_ms: Mapping[str, float]


def load_sensitivity(run: Run) -> Sensitivity:
    """Return the sensitivity of every group, going on where an earlier call was cut off."""
    path = run.folder.path / "sensitivity.json"
    known = {g.group: g for g in read_json(Sensitivity, path).groups} if path.exists() else {}

    def keep(options: GroupOptions) -> None:
        known[options.group] = options
        write_json(Sensitivity(tuple(known.values())), path)

    if not run.recipe.prune:
        return Sensitivity(())
    return measure_sensitivity(
        run.graph, run.batches, run.judges, recipe=run.recipe, seed=run.seed, known=known, keep=keep
    )


def measure_reference(run: Run) -> Reference:
    """Return the original's and its unpruned int8 form's latency in one interleaved measurement."""
    files = {"original": run.file("original")}
    if run.recipe.quantize:
        files["unpruned"] = run.file("int8")
    timings = measure_files(run, files, rounds=2 * CANDIDATE_ROUNDS)
    original = timings["original"][0]
    unpruned = original / timings["unpruned"][1] if run.recipe.quantize else original
    sizes = [path.stat().st_size for path in files.values()]
    return Reference(original, unpruned, sizes[0], sizes[-1])


def measure_files(run: Run, files: Mapping[str, Path], *, rounds: int) -> dict[str, tuple[float, float]]:
    """Return median milliseconds and speed-up over the first file, interleaved, one sample at a time."""
    arrays = [x.detach().cpu().numpy() for x in run.sample]
    loads = {name: partial(open_run, run.target, path, arrays, threads=run.threads) for name, path in files.items()}
    found = time_interleaved(loads, baseline=next(iter(files)), rounds=rounds, seed=run.seed)
    return {name: (t.latency_ms.value, t.speedup.value) for name, t in found.items()}


def decide(run: Run, sensitivity: Sensitivity, reference: Reference) -> Plan:
    """Return the plan of least predicted loss whose measured candidate keeps the limits.

    With only a drop to keep, the fastest plan whose refitted network disagrees with the original on no more
    than that share of the held-out calibration inputs; the true drop cannot be larger, up to sampling. Without
    quantization or pruning there is nothing to decide and the plan keeps everything.
    """
    original = Cost(count(run.graph.module).macs, reference.original_bytes, reference.original_ms)
    limits = read_limits(run.budget, original)
    needs_time = "latency_ms" in limits or not limits
    costs = make_cost_model(run.graph, bits=run.bits, latency=needs_time, threads=run.threads, target=run.target_name)
    full = costs.predict({})
    costs.overhead_bytes = reference.unpruned_bytes - full.size_bytes
    if full.latency_ms:
        costs.scale = reference.unpruned_ms / full.latency_ms
    if not limits:
        return _decide_by_drop(run, sensitivity, costs)
    if "latency_ms" not in limits:
        return make_plan(sensitivity, costs, limits)
    return _decide_by_latency(run, sensitivity, costs, limits, reference)


def _decide_by_latency(
    run: Run, sensitivity: Sensitivity, costs: CostModel, limits: Mapping[str, float], reference: Reference
) -> Plan:
    limit = limits["latency_ms"]
    aim = {**limits, "latency_ms": limit * MARGIN}
    plan = make_plan(sensitivity, costs, aim)
    best: Plan | None = None
    for _ in range(run.recipe.corrections):
        if not plan.kept:
            return plan
        measured = _measure_candidate(run, plan, reference)
        assert plan.cost.latency_ms is not None
        # A plan that seemed too slow may be measured fast enough, but still break another limit.
        kept = all(getattr(plan.cost, kind) <= most for kind, most in limits.items() if kind != "latency_ms")
        if kept and measured <= limit and (best is None or plan.loss < best.loss):
            best = dataclasses.replace(plan, feasible=True)
        if (kept and NEAR * limit <= measured <= limit) or (not plan.feasible and measured > limit):
            break
        costs.scale *= measured / plan.cost.latency_ms
        again = make_plan(sensitivity, costs, aim)
        if again.kept == plan.kept:
            break
        plan = again
    if best is None and not plan.feasible:
        plan = make_plan(sensitivity, costs, limits)  # the margin may ask for more than the limits do
    return best or plan


def _measure_candidate(run: Run, plan: Plan, reference: Reference) -> float:
    """Build what the plan would deploy, weights as sliced, and return its milliseconds beside the original's."""
    notes = run.folder.path / "candidates.json"
    known = dict(read_json(Measured, notes).latency_ms) if notes.exists() else {}
    key = " ".join(f"{name}={len(kept)}" for name, kept in sorted(plan.kept.items()))
    if key not in known:
        file = run.file("candidate")
        module = run.slice(plan)
        if run.recipe.quantize:
            module = quantize(module, run.batches[:1], scheme=run.target.scheme(), ranges="minmax").module
        export_file(run, module, file)
        files = {"original": run.file("original"), "candidate": file}
        known[key] = reference.original_ms / measure_files(run, files, rounds=CANDIDATE_ROUNDS)["candidate"][1]
        write_json(Measured(known), notes)
        file.unlink(missing_ok=True)
    return known[key]


def _decide_by_drop(run: Run, sensitivity: Sensitivity, costs: CostModel) -> Plan:
    """Bisect the latency limit, in logarithms, for the fastest plan that agrees well enough."""
    drop = run.budget.drop
    if drop is None:
        raise CheckpointError("A budget without limits reached the planner.")
    full = costs.predict({})
    assert full.latency_ms is not None
    best = make_plan(sensitivity, costs, {"latency_ms": full.latency_ms})
    low, high = math.log(0.05), 0.0
    for _ in range(DROP_STEPS):
        middle = (low + high) / 2
        plan = make_plan(sensitivity, costs, {"latency_ms": full.latency_ms * math.exp(middle)})
        if plan.feasible and _disagreement(run, plan) <= drop:
            best, high = plan, middle
        else:
            low = middle
    return best


def _disagreement(run: Run, plan: Plan) -> float:
    """Return in how many of a hundred held-out inputs a plan's refitted network names another class."""
    module = run.slice(plan)
    keeps = run.graph.keeps(plan.kept)
    recalibrate(run.graph, module, keeps, run.batches, positions=run.recipe.positions, seed=run.seed)
    with torch.no_grad():
        judge = agreement(lambda *x: run.graph.module(*x), run.judges)
        return 100 * (1 - run_evaluate(judge, lambda *x: module(*x), "candidate").value)
