"""`choose_bits`: how many bits each layer gets, chosen by the one solver from losses measured one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jettison.core.budget import Budget
from jettison.core.errors import BudgetError, InputError
from jettison.cost.timing import RUNTIMES, measure_layers
from jettison.distill.losses import measure_divergence
from jettison.flow.calibration import make_calibration
from jettison.flow.costs import describe_layer
from jettison.flow.reading import Data, fit_batch
from jettison.flow.schemes import find_scheme
from jettison.graph.groups import build_graph
from jettison.graph.layers import find_layers as find_graph_layers
from jettison.graph.trace import Batch, Traced, trace_module
from jettison.progress import track
from jettison.quantization.convert import fold, refuse_bad_input
from jettison.quantization.fold import find_layers
from jettison.quantization.mixed import FLOAT, Bits, collect_histograms, count_bytes, find_units, round_unit
from jettison.quantization.ranges import find_ranger
from jettison.search.solver import Solution, solve, solve_many
from jettison.targets.integer import IntegerScheme

OPTIONS: tuple[Bits, ...] = (FLOAT, (8, 8), (4, 8))
UNDERSTOOD = ("size", "size_mb", "latency", "latency_ms")


@dataclass(frozen=True)
class UnitOptions:
    """What each option of a unit would lose and cost: mean divergence (nats for class scores), bytes, milliseconds.

    The layers choose together, because what they multiply has one scale. `float_bytes` and `float_ms` are the costs in
    float, whether that is an option or not; `latencies_ms` is empty where not asked.
    """

    layers: tuple[str, ...]
    options: tuple[Bits, ...]
    losses: tuple[float, ...]
    sizes_bytes: tuple[int, ...]
    float_bytes: int
    latencies_ms: tuple[float, ...] = ()
    float_ms: float = 0.0


@dataclass(frozen=True)
class BitPlan:
    """The (weight, activation) bits of every layer, (32, 32) for float, and what was predicted for them.

    `loss` is the sum of the units' own losses, `size_bytes` what weights, biases and scales take when packed,
    `latency_ms` the sum of single layers (None: not asked). Where `feasible` is False no choice keeps the limits, and
    this is the one that comes nearest. `note` says what no kernel here runs.
    """

    bits: Mapping[str, Bits]
    loss: float
    size_bytes: int
    latency_ms: float | None
    feasible: bool
    units: tuple[UnitOptions, ...]
    note: str = ""


def choose_bits(
    model: nn.Module,
    calibration: Data,
    *,
    budget: Budget | None = None,
    loss: float | None = None,
    options: Sequence[Bits] = OPTIONS,
    target: str = "onnxruntime",
    ranges: str = "mse",
    samples: int = 256,
    threads: int = 1,
    seed: int = 0,
) -> BitPlan:
    """Return the bits of each layer with the least predicted loss within a budget, or the least cost within a loss.

    `options` are (weight bits, activation bits) of 2 to 8, or (32, 32) for float. `budget` may limit size and latency,
    as shares of the float network's weights and layer times or as size_mb and latency_ms; `loss` limits the summed
    divergence from the float network (nats for class scores). With `loss` alone the size is made least. Losses are
    measured on `samples` inputs with one unit rounded at a time, and added up; latency is measured, layer by layer, in
    `target` (ONNX Runtime or OpenVINO), where fewer than 8 bits run as 8. Give `bits` of the plan to `quantize` or
    `train_quantized`. Raises BudgetError, with the nearest plan as its `result`, where no choice keeps the limits;
    InputError for a limit that is none of these and for options out of range.
    """
    limits = _check(budget, loss, options)
    timed = any(name.startswith("latency") for name in limits)
    if timed and target not in RUNTIMES:
        raise InputError(
            f"The latency of single layers is measured in {' and '.join(RUNTIMES)} only, not in {target}. "
            "Give a limit on size or loss, or one of these as target."
        )
    scheme = find_scheme(target)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        data, arguments, keywords = make_calibration(calibration, model, seal=False, seed=seed, device=device)
        traced = trace_module(model, arguments, keywords)
        batches = fit_batch(data, traced).take(samples)
        units = measure_units(traced, batches, scheme, options, ranges=ranges)
        if timed:
            units = _add_latencies(units, traced, target, threads)
    return solve_bits(units, limits)


def measure_units(
    traced: Traced, batches: Sequence[Batch], scheme: IntegerScheme, options: Sequence[Bits], *, ranges: str = "mse"
) -> tuple[UnitOptions, ...]:
    """Return the loss and bytes of each option of each unit, all other layers in float."""
    ranger = find_ranger(ranges)
    refuse_bad_input(traced.module, batches)
    folded = fold(traced.module, frozenset(scheme.weighted))
    units = find_units(folded, scheme)
    histograms = collect_histograms(folded, units, batches)
    targets = [folded(*batch) for batch in batches]
    found = []
    for unit in track(units, "Measuring losses by bits"):
        losses = []
        for bits in options:
            alone = round_unit(folded, unit, bits, histograms[unit.tensors[0]], scheme, ranger)
            losses.append(0.0 if bits == FLOAT else _average([alone(*b) for b in batches], targets))
        *sizes, whole = (
            sum(count_bytes(folded, name, bits, scheme) for name in unit.layers) for bits in (*options, FLOAT)
        )
        found.append(UnitOptions(unit.layers, tuple(options), tuple(losses), tuple(sizes), whole))
    return tuple(found)


def _average(outputs: Sequence[tuple[Tensor, ...]], targets: Sequence[tuple[Tensor, ...]]) -> float:
    total = sum(float(measure_divergence(o, t).sum()) for o, t in zip(outputs, targets, strict=True))
    return total / max(1, sum(len(t[0]) for t in targets))


def _add_latencies(units: Sequence[UnitOptions], traced: Traced, target: str, threads: int) -> tuple[UnitOptions, ...]:
    graph = build_graph(traced)
    named = {node.name: name for name, node in find_layers(traced.module, _LAYERED).items()}
    layers = {named[layer.node.name]: layer for layer in find_graph_layers(traced.module) if layer.node.name in named}
    unknown = [name for unit in units for name in unit.layers if name not in layers]
    if unknown:
        raise InputError(
            f"The latency of layer {unknown[0]!r} cannot be measured alone: it is no plain convolution or linear. "
            "Give a limit on size or loss instead."
        )
    shapes = {(n, bits): describe_layer(graph, layers[n], bits) for n in layers for bits in (8, 32)}
    wanted = list(dict.fromkeys(shapes.values()))
    measured = dict(zip(wanted, measure_layers(wanted, runtime=target, threads=threads), strict=True))

    def sum_ms(unit: UnitOptions, bits: Bits) -> float:
        return sum(measured[shapes[name, 32 if bits == FLOAT else 8]] for name in unit.layers)

    return tuple(
        replace(u, latencies_ms=tuple(sum_ms(u, bits) for bits in u.options), float_ms=sum_ms(u, FLOAT)) for u in units
    )


_LAYERED = frozenset({"aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default"})


def solve_bits(units: Sequence[UnitOptions], limits: Mapping[str, float]) -> BitPlan:
    """Return the best choice of one option for each unit under limits named as in `Budget`, or on "loss".

    Raises BudgetError with the nearest plan where nothing keeps them.
    """
    losses = [u.losses for u in units]
    costs: list[Sequence[Sequence[float]]] = []
    bounds: list[float] = []
    for name, limit in limits.items():
        if name == "loss":
            continue
        timed = name.startswith("latency")
        costs.append([u.latencies_ms if timed else u.sizes_bytes for u in units])
        whole = sum(u.float_ms if timed else u.float_bytes for u in units)
        bounds.append(limit * {"size_mb": 1e6, "latency_ms": 1.0}.get(name, whole))
    if "loss" in limits and costs:
        costs.append(losses)
        bounds.append(limits["loss"])
    if costs:
        solution = solve_many(losses, costs, bounds)
    else:
        solution = solve([u.sizes_bytes for u in units], losses, limits["loss"])
    plan = _make_plan(units, solution)
    if not solution.feasible:
        raise BudgetError(_explain(plan, limits), plan)
    return plan


def _make_plan(units: Sequence[UnitOptions], solution: Solution) -> BitPlan:
    pairs = list(zip(units, solution.choice, strict=True))
    bits = {name: unit.options[o] for unit, o in pairs for name in unit.layers}
    timed = all(unit.latencies_ms for unit in units)
    fewer = [name for name, pair in bits.items() if min(pair) < 8]
    note = ""
    if fewer:
        note = (
            f"{len(fewer)} layers have fewer than 8 bits. No kernel here computes on them: a file holds and runs them "
            "in 8 bits, and the size predicted is what packed weights would take."
        )
    return BitPlan(
        bits,
        float(sum(unit.losses[o] for unit, o in pairs)),
        sum(unit.sizes_bytes[o] for unit, o in pairs),
        sum(unit.latencies_ms[o] for unit, o in pairs) if timed else None,
        solution.feasible,
        tuple(units),
        note,
    )


def _explain(plan: BitPlan, limits: Mapping[str, float]) -> str:
    asked = ", ".join(f"{name}={value:g}" for name, value in limits.items())
    ms = "" if plan.latency_ms is None else f", {plan.latency_ms:.3f} ms"
    return (
        f"No choice of bits keeps {asked}. The nearest has {plan.size_bytes:,} bytes{ms} and loses {plan.loss:.4g}. "
        "Raise the limit, or add options of fewer bits; the nearest plan is this error's `result`."
    )


def _check(budget: Budget | None, loss: float | None, options: Sequence[Bits]) -> dict[str, float]:
    limits = {}
    if budget is not None:
        given = {name: value for name, value in vars(budget).items() if value is not None}
        wrong = [name for name in given if name not in UNDERSTOOD]
        if wrong:
            raise InputError(
                f"Budget {wrong[0]} has no meaning for bits: they change no MACs, and points are not predicted. "
                f"Use {', '.join(UNDERSTOOD)}, or loss=."
            )
        limits.update(given)
    if loss is not None:
        if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not math.isfinite(loss) or loss < 0:
            raise InputError(f"loss={loss!r} must be a number, at least 0. It is a mean divergence in nats.")
        limits["loss"] = float(loss)
    if not limits:
        raise InputError("choose_bits() needs a limit. Give budget=Budget(size=...), Budget(latency=...) or loss=.")
    for pair in options:
        if pair != FLOAT and (len(pair) != 2 or not all(type(b) is int and 2 <= b <= 8 for b in pair)):
            raise InputError(f"The option {pair!r} is none. Give pairs (weight, activation) of 2 to 8, or (32, 32).")
    if not options or len(set(options)) != len(options):
        raise InputError(f"The options {list(options)} are empty or hold one twice. Give each option once.")
    return limits
