"""Each stage of `compress` as a function of its own, for those who want to see or change what lies between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from jettison.flow.calibration import list_digests, make_calibration
from jettison.flow.costs import make_cost_model
from jettison.flow.kinds import apply_kind, check_kind
from jettison.flow.planning import make_plan, read_limits
from jettison.flow.reading import (
    Data,
    check_graph,
    check_like,
    fit_batch,
    order_inputs,
    read_calibration,
    trace_small,
)
from jettison.flow.recovering import make_schedule, train_if_better
from jettison.flow.run import split_judges
from jettison.flow.schemes import find_scheme
from jettison.flow.sensitivity import Sensitivity, measure_sensitivity
from jettison.graph.check import check_masked
from jettison.graph.groups import Graph
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.trace import Traced, hint, nest, trace_module
from jettison.pruning.recalibrate import recalibrate
from jettison.quantization import Quantized
from jettison.quantization import quantize as quantize_graph
from jettison.quantization.bits import split_bits
from jettison.targets import find_target
from jettison.targets.timing import Timing, time_interleaved


def profile(graph: Graph) -> Profile:
    """Return MACs, parameters and activation memory of a traced network for one sample, and what was not counted."""
    check_graph(graph)
    return count(graph.module)


def sensitivity(graph: Graph, calibration: Data, *, recipe: Recipe | None = None, seed: int = 0) -> Sensitivity:
    """Return what each kept count of each prune group would lose, measured on `calibration` inputs.

    Losses are divergences from the original (nats for class scores). Raises CalibrationError without inputs,
    UnknownName for a criterion that is none, ShapeError for inputs that are not like those `graph` was traced with.
    """
    recipe = recipe or Recipe()
    with torch.random.fork_rng():
        fitting, judges = split_judges(read_calibration(graph, calibration, seed), recipe)
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

    Latency is the sum of single layers measured on `target`, or in ONNX Runtime where the target cannot time them;
    shares are of the fp32 original's prediction.
    (`compress` also builds and measures candidates, and corrects.) `plan.feasible` is False where nothing
    keeps the limits. A budget with `drop` alone raises InputError: only `compress` can weigh it.
    """
    check_graph(graph)
    find_target(target)
    for group in sensitivity.groups:
        graph.find(group.group)
    timed = budget.latency is not None or budget.latency_ms is not None
    whole = make_cost_model(graph, bits=32, latency=timed, threads=threads, target=target).predict({})
    limits = read_limits(budget, whole)
    if not limits:
        raise InputError("plan() needs a limit on latency, size or MACs. For a drop alone, use compress().")
    costs = make_cost_model(graph, bits=8 if quantize else 32, latency=timed, threads=threads, target=target)
    return make_plan(sensitivity, costs, limits)


def apply(graph: Graph, plan: Plan) -> nn.Module:
    """Return the network with only the positions a plan keeps, weights as they were; the original is left alone.

    It is a graph module in eval mode, with parameters of its own that can be trained.
    """
    check_graph(graph)
    with torch.inference_mode(False), torch.no_grad():
        module = prune_graph(graph, plan.kept).module
        return nest(module, graph.traced.in_spec, graph.traced.out_spec).eval()


def recover(
    graph: Graph,
    plan: Plan,
    calibration: Data,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return the planned network, refitted by least squares and distilled from the original; needs inputs only.

    It is a graph module in eval mode. Distillation is kept only where it brings the network nearer to the original on
    inputs held out from it. Raises what `sensitivity` raises.
    """
    recipe = recipe or Recipe()
    # The caller may stand inside inference_mode; gradients are switched on where something learns.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        data = read_calibration(graph, calibration, seed)
        fitting, judges = split_judges(data, recipe)
        keeps = graph.keeps(plan.kept)
        student = prune_graph(graph, plan.kept).module
        recalibrate(graph, student, keeps, fitting, positions=recipe.positions, seed=seed)
        if recipe.steps:
            schedule = make_schedule(recipe, data.device)
            judged = list_digests(judges) if judges is not fitting else frozenset[int]()
            training = partial(data.iterate_without, judged)
            student = train_if_better(graph, plan, student, training, judges, schedule, seed=seed)
        return nest(student, graph.traced.in_spec, graph.traced.out_spec).eval()


def quantize(
    model: nn.Module,
    calibration: Data,
    *,
    target: str = "onnxruntime",
    kind: str = "static",
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    group_size: int = 32,
    exclude: Collection[str] = (),
    attention: bool = False,
    ranges: str = "mse",
    rungs: Sequence[str] = (),
    bits: Mapping[str, tuple[int, int]] | None = None,
    samples: int = 512,
    seed: int = 0,
) -> Quantized:
    """Return a quantized form of a network for `target`: a module that computes what the runtime will, and its layers.

    `kind` "static": weights int8 per channel, activations uint8 per tensor with ranges from `samples` calibration
    inputs. "dynamic": linear and recurrent layers int8, ranges found at each call; with `attention` products of two
    activations, too, which was no faster where measured (0.86 to 1.03 times in ONNX Runtime). "weight-only": linear
    layers' weights in 4 or 8 `weight_bits`, in groups of `group_size` inputs. "fp16", "bf16": weights stored so,
    computed with in float32. Only "static" looks at more than the first item, with which the network is traced; it is
    left alone. `exclude` names layers that stay float. For "static", `ranges` names a way to choose ranges and `rungs`
    methods of the post-training ladder (`jettison.quantization.RANGERS` and `RUNGS`); with fewer `weight_bits` or
    `activation_bits` it is a simulation; `bits` gives single layers their own (weight, activation) bits, (32, 32) for
    float. Raises InputError for what the target has no kernels for, UnknownName for an unknown layer or method.
    """
    check_kind(kind, target)
    scheme = find_scheme(target)
    if kind == "static" and attention:
        raise InputError("attention=True is for kind='dynamic'. Choose that kind, or leave it out.")
    if kind != "static" and (bits or rungs or activation_bits is not None or ranges != "mse"):
        raise InputError(
            f"bits= are for kind='static', not for {kind!r}; so are rungs=, ranges= and activation_bits=. "
            "Leave them out, or leave out kind=."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        data, arguments, keywords = make_calibration(calibration, model, seal=False, seed=seed, device=device)
        traced = trace_small(model, arguments, keywords)
        if kind == "static":
            batches = fit_batch(data, traced).take(samples)
            own, floats = split_bits(bits or {})
            found = quantize_graph(
                traced.module,
                batches,
                scheme=replace(scheme, bits=own),
                exclude={*exclude, *floats},
                ranges=ranges,
                rungs=rungs,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                seed=seed,
            )
        else:
            options: dict[str, Any] = {"weight_bits": weight_bits, "group_size": group_size, "exclude": exclude}
            found = apply_kind(traced.module, kind, scheme=scheme, target=target, attention=attention, **options)
    return replace(found, module=nest(found.module, traced.in_spec, traced.out_spec))


def export(model: nn.Module, inputs: Any, path: Path | str, *, target: str = "onnxruntime") -> Path:
    """Write a network, or the module of a `Quantized`, as the file `target` runs; returns its path.

    `inputs` are example inputs: a tensor, a tuple of what the network takes, or a dict of its keyword inputs.
    Raises ShapeError where the network does not take them, ExportError where the file cannot be made.
    """
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
    precision: str = "fp32",
    rounds: int = 200,
    seed: int = 0,
) -> dict[str, Timing]:
    """Return the latency of exported files in `target`, interleaved and in turns loaded anew, beside the first one's.

    `inputs` are what each call gets: a tensor, a tuple of tensors, or a dict by the files' input names. `precision` is
    what float parts are asked to run in, as "bf16" in OpenVINO. Raises UnknownName for one the target has not,
    ShapeError where a file does not take them, CheckpointError where it is no network.
    """
    runtime = find_target(target)
    if not files:
        raise InputError("There are no files to measure. Give a dict from names to paths, the baseline first.")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads={threads!r} must be a whole number, at least 1.")

    def load(path: Path) -> Callable[[], object]:
        session = runtime.load(path, threads=threads, precision=precision)
        tensors = order_inputs(inputs, session.input_names)
        runtime.predict(session, tensors)  # refuses what does not fit
        return partial(session.run, [x.detach().cpu().numpy() for x in tensors])

    loads = {name: partial(load, Path(path)) for name, path in files.items()}
    return time_interleaved(loads, baseline=next(iter(files)), rounds=rounds, seed=seed)


def verify(graph: Graph, plan: Plan, inputs: Any) -> Check:
    """Prove a plan exact: the original under masks and the sliced network give the same outputs in float64.

    `inputs` are as `trace` takes them, or a dict of keyword inputs. Raises ShapeError where they are not like those
    `graph` was traced with.
    """
    check_graph(graph)
    tensors = order_inputs(inputs, graph.traced.input_names)
    check_like(graph.traced, tensors)
    keeps = graph.keeps(plan.kept)
    return check_masked(graph, slice_graph(graph, keeps), keeps, tensors)


def _flatten(model: nn.Module, inputs: Any) -> Traced:
    """Trace a network; one that is a graph already (from another stage) only loses its nesting."""
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    arguments = () if keywords else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    codegen = getattr(getattr(model, "graph", None), "_codegen", None)
    info = getattr(codegen, "pytree_info", None)
    places = [n for n in model.graph.nodes if n.op == "placeholder"] if isinstance(model, fx.GraphModule) else []
    if not places or info is None or any("val" not in n.meta for n in places):
        return trace_module(model, arguments, keywords)
    assert isinstance(model, fx.GraphModule)
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    names = tuple(n.name for n in places)
    free = not all(isinstance(n.meta["val"].shape[0], int) for n in places)
    example = order_inputs(keywords or arguments, names)
    traced = Traced(fx.GraphModule(model, graph), info.in_spec, info.out_spec, example, free, names)
    check_like(replace(traced, example=tuple(_like(n.meta["val"]) for n in places)), example)
    return traced


def _like(value: Tensor) -> Tensor:
    """Return a meta tensor of a traced value's shape; a free batch gives the size it was traced with."""
    return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
