"""Proving: every form of the network measured in one interleaved run, and every oracle asked."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from jettison.core.errors import CheckpointError
from jettison.core.plan import Plan
from jettison.core.record import Check, Drop, Score, TimeShare, Variant
from jettison.cost.macs import count
from jettison.flow.costs import CostModel, sum_layer_macs
from jettison.flow.evaluation import Evaluate, Outcome, compare, run_evaluate
from jettison.flow.run import Run, make_predict
from jettison.graph.check import check_masked
from jettison.graph.layers import find_layers
from jettison.graph.store import load_graph, save_graph
from jettison.graph.trace import Batch
from jettison.progress import track
from jettison.quantization.integers import run_integers
from jettison.targets import TARGETS
from jettison.targets.feeding import open_run
from jettison.targets.timing import Timing, time_interleaved

ORIGINAL, UNPRUNED, COMPRESSED, EAGER = "original", "int8 alone", "compressed", "PyTorch eager"
FILES = {ORIGINAL: "original", UNPRUNED: "int8", COMPRESSED: "model"}

EXPORT_TOLERANCE = 1e-4
"""Relative to 1 + the largest output: float32 sums in another order, through some tens of layers."""
INTEGER_OUTSIDE = 1e-4
"""Share of outputs that may differ from exact integer arithmetic: results that fall on a tie of a rescaling."""
OUTSIDE_STEP = 1e-3
"""Share of outputs that may lie further than one 8-bit step of the output's range from the simulation, in a target
whose kernels round otherwise now and then: a turned rounding spreads through the layers after it."""
NUDGE = 1e-3
"""Share of an input's standard deviation by which its values are moved at random there. Pictures hold whole levels, and
whole levels fall on ties of the input's own step, which runtimes that multiply by a reciprocal round either way."""
ROUNDING = 1e-5
"""Relative to 1 + the largest output: float32 rounding of what stays in float, far below one integer step."""


@dataclass(frozen=True)
class Measurements:
    """All forms of the network with their figures, and what the compressed one loses against the original.

    `refused` are sentences on the files that a runtime they would have been compared in does not load.
    """

    variants: tuple[Variant, ...]
    drop: Drop
    time_before: tuple[TimeShare, ...]
    time_after: tuple[TimeShare, ...]
    refused: tuple[str, ...] = ()


def measure_variants(run: Run, evaluate: Evaluate, widths: Mapping[str, tuple[int, int]]) -> Measurements:
    """Measure latency, size, memory and score of the original, its int8 form, the compressed file and eager.

    `widths` gives MACs and parameters per variant. Latency is taken on one sample, all forms interleaved.
    """
    paths = {name: run.file(file) for name, file in FILES.items() if name in widths}
    sample = run.sample
    arrays = [x.detach().cpu().numpy() for x in sample]
    loads, refused = _list_loads(run, paths, arrays)
    timings = _time(run, loads)
    outcomes: dict[str, Outcome] = {}
    for name, path in track(list(paths.items()), "Scoring the deployed files"):
        outcomes[name] = run_evaluate(evaluate, make_predict(run, path), f"{name} file")
    variants = [_describe(run, name, timings[name], widths, outcomes, paths) for name in loads]
    drop = compare(outcomes[ORIGINAL], outcomes[COMPRESSED])
    before, after = (_profile(run, paths[name], arrays) for name in (ORIGINAL, COMPRESSED))
    return Measurements(tuple(variants), drop, before, after, refused)


def _profile(run: Run, path: Path, arrays: list[np.ndarray]) -> tuple[TimeShare, ...]:
    """Return the time of each operator, nothing where the target times whole networks only."""
    if not run.target.PROFILED:
        return ()
    shares: tuple[TimeShare, ...] = run.target.profile(path, arrays, threads=run.threads)
    return shares


def _time(run: Run, loads: Mapping[str, Callable[[], Callable[[], object]]]) -> dict[str, Timing]:
    before = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        return time_interleaved(loads, baseline=ORIGINAL, rounds=run.recipe.rounds, seed=run.seed)
    finally:
        torch.set_num_threads(before)


def _list_loads(
    run: Run, paths: Mapping[str, Path], arrays: list[np.ndarray]
) -> tuple[dict[str, Callable[[], Callable[[], object]]], tuple[str, ...]]:
    """Return how to load each form: in the target, in eager, and in the other runtimes here that read the same file.

    With it come sentences on the files that another runtime refuses.
    """
    refused: list[str] = []
    loads: dict[str, Callable[[], Callable[[], object]]] = {
        name: partial(open_run, run.target, path, arrays, threads=run.threads) for name, path in paths.items()
    }
    loads[EAGER] = partial(_eager_run, run, run.sample)
    for name in TARGETS:
        other = importlib.import_module(f"jettison.targets.{name}")
        if other is run.target or other.SUFFIX != ".onnx" or run.target.SUFFIX != ".onnx" or other.why_missing():
            continue
        for form, path in paths.items():
            try:
                other.load(path, threads=run.threads)
            except CheckpointError as error:  # it runs in its target, and is measured here for comparison only
                refused.append(f"{form} is not compared in {other.LABEL}: {error}")
            else:
                loads[f"{form}, {other.LABEL}"] = partial(open_run, other, path, arrays, threads=run.threads)
    return loads, tuple(refused)


def _eager_run(run: Run, sample: Batch) -> Callable[[], object]:
    module = run.graph.module

    def call() -> object:
        with torch.no_grad():
            output = module(*sample)
        if run.calibration.device.type == "cuda":
            torch.cuda.synchronize(run.calibration.device)  # kernels run on after the call returns
        return output

    return call


def _describe(
    run: Run,
    name: str,
    timing: Timing,
    widths: Mapping[str, tuple[int, int]],
    outcomes: Mapping[str, Outcome],
    paths: Mapping[str, Path],
) -> Variant:
    base, _, elsewhere = name.partition(", ")
    path = paths.get(base)
    macs, parameters = widths.get(base, widths[ORIGINAL])
    integer = run.recipe.quantize and base in (UNPRUNED, COMPRESSED)
    runtime = "PyTorch" if name == EAGER else elsewhere or run.target.LABEL
    measured = path is not None and name == base
    score: Score | None = outcomes[base].score if measured else None
    return Variant(
        name=name,
        runtime=runtime,
        precision="int8" if integer else "fp32",
        file=path.name if path is not None else None,
        latency_ms=timing.latency_ms,
        speedup=timing.speedup,
        size_bytes=path.stat().st_size if path is not None else None,
        macs=macs,
        parameters=parameters,
        peak_memory_bytes=run.target.measure_peak_memory(path, threads=run.threads) if measured else None,
        score=score,
    )


def run_checks(run: Run, plan: Plan, final: fx.GraphModule, simulated: fx.GraphModule | None) -> tuple[Check, ...]:
    """Ask every oracle; failed checks are returned, not raised."""
    keeps = run.graph.keeps(plan.kept)
    few = tuple(x[:4] for x in run.judges[0]) if run.graph.traced.dynamic_batch else run.graph.traced.example
    checks = [check_masked(run.graph, run.slice(plan), keeps, few)]
    checks.append(_check_prediction(run, plan, final))
    checks.append(_check_reload(run, final, few))
    with torch.no_grad():
        checks.append(_check_file(run, run.graph.module, run.file("original"), "original file = module"))
        path = run.file("model")
        if simulated is None:
            checks.append(_check_file(run, final, path, "compressed file = module"))
        else:
            check = _check_integers if run.target.EXACT else _check_within_a_step
            checks.append(check(run, simulated, path))
    return tuple(checks)


def _check_prediction(run: Run, plan: Plan, final: fx.GraphModule) -> Check:
    """The MACs of all layers predicted from the terms are those counted on the result."""
    layers = find_layers(run.graph.module)
    kept = {name: len(positions) for name, positions in plan.kept.items()}
    predicted = CostModel(run.graph, layers, None, run.bits).count_layer_macs(kept)
    found = sum_layer_macs(final)
    error = abs(found - predicted) / max(found, 1)
    detail = f"{len(layers)} layers: predicted {predicted:,} MACs from the axes, counted {found:,} on the result"
    return Check("predicted = counted MACs", error == 0, error, 0.0, detail)


def _check_reload(run: Run, final: fx.GraphModule, inputs: Batch) -> Check:
    """What is saved and loaded computes the same bits."""
    traced = run.graph.traced
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        save_graph(final, traced.in_spec, traced.out_spec, Path(name))
        loaded = load_graph(Path(name))[0].to(run.calibration.device)
        error = max(float((a - b).abs().max()) for a, b in zip(final(*inputs), loaded(*inputs), strict=True))
    return Check("saved = loaded", error == 0, error, 0.0, "outputs of the reloaded module, bit for bit")


def _check_file(run: Run, module: fx.GraphModule, path: Path, name: str) -> Check:
    error = 0.0
    for found, expected in _compare_outputs(run, module, path):
        error = max(error, float((found - expected).abs().max()) / (1 + float(expected.abs().max())))
    detail = f"outputs on {len(run.judges)} batches, relative to 1 + the largest"
    return Check(name, error <= EXPORT_TOLERANCE, error, EXPORT_TOLERANCE, detail)


def _check_integers(run: Run, module: fx.GraphModule, path: Path) -> Check:
    """The runtime computes what exact integer arithmetic does."""
    inside = total = 0
    scheme = run.target.scheme()
    for found, expected in _compare_outputs(run, lambda *x: run_integers(module, x, scheme), path):
        inside += int(((found - expected).abs() <= ROUNDING * (1 + expected.abs().max())).sum())
        total += found.numel()
    share = 1 - inside / max(total, 1)
    detail = f"{inside:,} of {total:,} outputs equal those of exact integer arithmetic; value: share that differs"
    return Check("simulated int8 = runtime", share <= INTEGER_OUTSIDE, share, INTEGER_OUTSIDE, detail)


def _check_within_a_step(run: Run, module: fx.GraphModule, path: Path) -> Check:
    """The runtime computes what the simulation does, but for a rounding turned here and there."""
    outside = total = 0
    for found, expected in _compare_outputs(run, module, path, nudge=NUDGE):
        step = (expected.max() - expected.min()) / 255
        outside += int(((found - expected).abs() > step * (1 + ROUNDING)).sum())
        total += found.numel()
    share = outside / max(total, 1)
    detail = f"{total - outside:,} of {total:,} outputs within one 8-bit step of their range; value: share outside"
    return Check("simulated int8 = runtime", share <= OUTSIDE_STEP, share, OUTSIDE_STEP, detail)


def _compare_outputs(
    run: Run, module: Callable[..., Any], path: Path, *, nudge: float = 0.0
) -> list[tuple[Tensor, Tensor]]:
    session = run.target.load(path, threads=run.threads)
    batches = run.judges if run.graph.traced.dynamic_batch else [run.graph.traced.example]
    pairs: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(run.seed)
    for batch in batches:
        if nudge:
            batch = tuple(_nudge(x, nudge, generator) for x in batch)
        found = run.target.predict(session, batch)
        pairs += [(f.cpu(), e.cpu()) for f, e in zip(found, module(*batch), strict=True) if e.is_floating_point()]
    return pairs


def _nudge(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return `x` with its values moved by at most a share of their standard deviation; whole numbers stay."""
    if not x.is_floating_point() or x.numel() < 2:
        return x
    moves = torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.device, x.dtype) * 2 - 1
    return x + share * x.std() * moves


def count_widths(run: Run, final: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Return MACs and parameters of each variant."""
    original = count(run.graph.module)
    small = count(final)
    widths = {ORIGINAL: (original.macs, original.parameters), COMPRESSED: (small.macs, small.parameters)}
    if run.recipe.quantize:
        widths[UNPRUNED] = widths[ORIGINAL]
    return widths
