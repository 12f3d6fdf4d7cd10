"""Each stage of `compress` as a function of its own, for those who want to see or change what lies between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from jettison.core.budget import Budget
from jettison.core.errors import InputError
from jettison.core.plan import Plan
from jettison.core.recipe import Recipe
from jettison.core.record import Check
from jettison.cost.macs import Profile, count
from jettison.flow.calibration import make_calibration
from jettison.flow.costs import make_cost_model
from jettison.flow.planning import make_plan
from jettison.flow.recovering import make_schedule, train_if_better
from jettison.flow.run import split_samples
from jettison.flow.sensitivity import Sensitivity, measure_sensitivity
from jettison.graph.check import check_masked
from jettison.graph.groups import Graph
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.trace import Batch, Traced, nest, trace_module
from jettison.pruning.recalibrate import recalibrate
from jettison.quantization import Quantized
from jettison.quantization import quantize as quantize_graph
from jettison.targets import find_target
from jettison.targets.timing import Timing, time_interleaved

Data = Iterable[Any] | Tensor


def profile(graph: Graph) -> Profile:
    """Return MACs, parameters and activation memory of a traced network for one sample, and what was not counted."""
    return count(graph.module)


def sensitivity(graph: Graph, calibration: Data, *, recipe: Recipe | None = None, seed: int = 0) -> Sensitivity:
    """Return what each kept count of each prune group would lose, measured on `calibration` inputs.

    Losses are divergences from the original (nats for class scores). Raises CalibrationError without inputs,
    UnknownName for a criterion that is none.
    """
    recipe = recipe or Recipe()
    fitting, judges = _take(graph, calibration, recipe, seed)
    return measure_sensitivity(graph, fitting, judges, recipe=recipe, seed=seed)


def plan(
    graph: Graph,
    sensitivity: Sensitivity,
    *,
    budget: Budget,
    target: str = "onnxruntime",
    quantize: bool = True,
    threads: int = 1,
) -> Plan:
    """Return the plan of least predicted loss whose predicted costs keep the budget's latency, size and MACs.

    Latency is the sum of single layers measured on `target`; shares are of the fp32 original's prediction.
    (`compress` also builds and measures candidates, and corrects.) `plan.feasible` is False where nothing
    keeps the limits. A budget with `drop` alone raises InputError: only `compress` can weigh it.
    """
    find_target(target)
    timed = budget.latency is not None or budget.latency_ms is not None
    whole = make_cost_model(graph, bits=32, latency=timed, threads=threads).predict({})
    rows = (
        ("latency_ms", budget.latency, whole.latency_ms or 0.0, budget.latency_ms, 1.0),
        ("size_bytes", budget.size, whole.size_bytes, budget.size_mb, 1e6),
        ("macs", budget.macs, whole.macs, budget.mmacs, 1e6),
    )
    limits: dict[str, float] = {}
    for kind, share, reference, absolute, unit in rows:
        bounds = [share * reference] if share is not None else []
        bounds += [absolute * unit] if absolute is not None else []
        if bounds:
            limits[kind] = min(bounds)
    if not limits:
        raise InputError("plan() needs a limit on latency, size or MACs. For a drop alone, use compress().")
    costs = make_cost_model(graph, bits=8 if quantize else 32, latency=timed, threads=threads)
    return make_plan(sensitivity, costs, limits)


def apply(graph: Graph, plan: Plan) -> nn.Module:
    """Return the network with only the positions a plan keeps, weights as they were; the original is left alone."""
    module = prune_graph(graph, plan.kept).module
    return nest(module, graph.traced.in_spec, graph.traced.out_spec)


def recover(
    graph: Graph,
    plan: Plan,
    calibration: Data,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return the planned network, refitted by least squares and distilled from the original; needs inputs only.

    Distillation is kept only where it brings the network nearer to the original on inputs held out from it.
    """
    recipe = recipe or Recipe()
    fitting, judges = _take(graph, calibration, recipe, seed)
    keeps = graph.keeps(plan.kept)
    student = prune_graph(graph, plan.kept).module
    recalibrate(graph, student, keeps, fitting, positions=recipe.positions, seed=seed)
    if recipe.steps:
        data, _, _ = make_calibration(calibration, graph.module, seal=False, seed=seed, device=_device(graph))
        with torch.random.fork_rng():
            schedule = make_schedule(recipe, _device(graph))
            student = train_if_better(graph, plan, student, data.iterate, judges, schedule, seed=seed)
    return nest(student, graph.traced.in_spec, graph.traced.out_spec)


def quantize(
    model: nn.Module, calibration: Data, *, target: str = "onnxruntime", samples: int = 512, seed: int = 0
) -> Quantized:
    """Return the int8 form of a network for `target`: a module that computes what the runtime will, and its layers.

    Weights are int8 per channel, activations uint8 per tensor with ranges from `samples` calibration inputs.
    The network is traced with the first item and left alone.
    """
    runtime = find_target(target)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    data, arguments, keywords = make_calibration(calibration, model, seal=False, seed=seed, device=device)
    traced = trace_module(model, arguments, keywords)
    with torch.random.fork_rng():
        found = quantize_graph(traced.module, data.take(samples), scheme=runtime.scheme())
    return Quantized(nest(found.module, traced.in_spec, traced.out_spec), found.sites)


def export(model: nn.Module, inputs: Any, path: Path | str, *, target: str = "onnxruntime") -> Path:
    """Write a network, or the module of a `Quantized`, as the file `target` runs; returns its path."""
    runtime = find_target(target)
    traced = _flatten(model, inputs)
    outputs = [f"output{i}" if i else "output" for i in range(traced.out_spec.num_leaves)]
    runtime.export(
        traced.module,
        traced.example,
        Path(path),
        input_names=list(traced.input_names),
        output_names=outputs,
        dynamic_batch=traced.dynamic_batch,
    )
    return Path(path)


def measure(
    files: Mapping[str, Path | str],
    inputs: Any,
    *,
    target: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 200,
    seed: int = 0,
) -> dict[str, Timing]:
    """Return the latency of exported files in `target`, interleaved; speed-ups are over the first one.

    `inputs` are what each call gets: a tensor or a tuple of tensors.
    """
    runtime = find_target(target)
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    arrays = [x.detach().cpu().numpy() for x in tensors]
    sessions = {name: runtime.load(Path(path), threads=threads) for name, path in files.items()}
    runs = {name: (lambda session=session: session.run(arrays)) for name, session in sessions.items()}
    return time_interleaved(runs, baseline=next(iter(files)), rounds=rounds, seed=seed)


def verify(graph: Graph, plan: Plan, inputs: Any) -> Check:
    """Prove a plan exact: the original under masks and the sliced network give the same outputs in float64."""
    tensors: Batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    keeps = graph.keeps(plan.kept)
    return check_masked(graph, slice_graph(graph, keeps), keeps, tensors)


def _take(graph: Graph, calibration: Data, recipe: Recipe, seed: int) -> tuple[list[Batch], list[Batch]]:
    data, _, _ = make_calibration(calibration, graph.module, seal=False, seed=seed, device=_device(graph))
    with torch.random.fork_rng():
        taken = data.take(recipe.samples + recipe.judges)
    total = sum(len(b[0]) for b in taken)
    fitting, judges = split_samples(taken, max(1, total * recipe.samples // (recipe.samples + recipe.judges)))
    return fitting, judges or fitting


def _device(graph: Graph) -> torch.device:
    return graph.traced.example[0].device


def _flatten(model: nn.Module, inputs: Any) -> Traced:
    """Trace a network; one that is a graph already (from another stage) only loses its nesting."""
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    codegen = getattr(getattr(model, "graph", None), "_codegen", None)
    info = getattr(codegen, "pytree_info", None)
    if not isinstance(model, fx.GraphModule) or info is None:
        return trace_module(model, arguments)
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    names = tuple(n.name for n in graph.nodes if n.op == "placeholder")
    free = not all(isinstance(n.meta["val"].shape[0], int) for n in model.graph.nodes if n.op == "placeholder")
    return Traced(fx.GraphModule(model, graph), info.in_spec, info.out_spec, arguments, free, names)
