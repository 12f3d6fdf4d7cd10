"""Everything a run found out, as one Record."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import fx

import jettison
from jettison.core.plan import Plan
from jettison.core.record import Check, FrontPoint, GroupRecord, LayerRecord, Option, Record, Tensor, Variant
from jettison.cost.latency import describe_machine
from jettison.flow.costs import CostModel, find_timed, list_macs
from jettison.flow.proving import COMPRESSED, ORIGINAL, Measurements
from jettison.flow.run import Run
from jettison.flow.sensitivity import Sensitivity
from jettison.graph.groups import build_graph
from jettison.graph.layers import find_layers
from jettison.graph.trace import Traced
from jettison.quantization import Quantized, measure_sqnr
from jettison.targets.loading import show_loading

FORMAT = "jettison.record/1"
PACKAGES = (
    *("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "torchao", "openvino", "executorch", "ai-edge-litert"),
)


@dataclass(frozen=True)
class Checks:
    """The oracles' answers, as a stage's file."""

    checks: tuple[Check, ...]


def build_record(
    run: Run,
    plan: Plan,
    sensitivity: Sensitivity,
    final: fx.GraphModule,
    quantized: Quantized | None,
    measured: Measurements,
    checks: tuple[Check, ...],
    name: str,
    command: str,
) -> Record:
    """Return the Record of a finished run."""
    graph = run.graph
    unmet = list_unmet(run, measured)
    limits = {f.name: getattr(run.budget, f.name) for f in fields(run.budget)}
    inputs = [n for n in graph.module.graph.nodes if n.op == "placeholder"]
    outputs = next(n for n in reversed(graph.module.graph.nodes) if n.op == "output").args[0]
    return Record(
        format=FORMAT,
        version=jettison.__version__,
        created=_read_time(run),
        command=command,
        model=name,
        target=run.target.LABEL,
        inputs=tuple(_describe_tensor(run.graph.traced, n, n.name) for n in inputs),
        outputs=tuple(
            _describe_tensor(run.graph.traced, n, f"output{i}" if i else "output") for i, n in enumerate(outputs)
        ),
        seed=run.seed,
        budget={k: v for k, v in limits.items() if v is not None},
        met=not unmet,
        unmet=unmet,
        environment=describe_environment(run.threads),
        variants=measured.variants,
        baseline=ORIGINAL,
        compressed=COMPRESSED,
        drop=measured.drop,
        groups=_list_groups(run, plan, sensitivity),
        front=_list_front(plan),
        layers=_list_layers(run, final, quantized),
        time_before=measured.time_before,
        time_after=measured.time_after,
        checks=checks,
        frozen=graph.frozen,
        notes=_list_notes(run, measured, plan),
        stages=run.folder.list_stages(),
        load_example=_show_loading(run),
    )


def list_unmet(run: Run, measured: Measurements) -> tuple[str, ...]:
    """Say in sentences which limits the measured result breaks."""
    before, after = (_find(measured, name) for name in (ORIGINAL, COMPRESSED))
    budget = run.budget
    assert before.size_bytes is not None and after.size_bytes is not None
    rows = (
        ("latency", 1 / after.speedup.value, budget.latency, "of the original's"),
        ("latency", after.latency_ms.value, budget.latency_ms, "ms"),
        ("size", after.size_bytes / before.size_bytes, budget.size, "of the original's"),
        ("size", after.size_bytes / 1e6, budget.size_mb, "MB"),
        ("MACs", after.macs / max(before.macs, 1), budget.macs, "of the original's"),
        ("MACs", after.macs / 1e6, budget.mmacs, "million"),
        (f"{measured.drop.metric} drop", measured.drop.points, budget.drop, "points"),
    )
    return tuple(
        f"{what} is {value:.3g} {unit}, above the limit of {limit:g}"
        for what, value, limit, unit in rows
        if limit is not None and value > limit
    )


def describe_environment(threads: int) -> dict[str, str]:
    """Return what the figures depend on: machine, threads and versions."""
    found = describe_machine()
    environment = {
        "processor": found["cpu"],
        "vector extensions": found["flags"] or "unknown",
        "cores": str(os.cpu_count()),
        "threads of the runtime": str(threads),
        "threads of PyTorch": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            environment[package] = version(package)
        except PackageNotFoundError:
            environment[package] = "not installed"
    return environment


def _read_time(run: Run) -> str:
    """Return when the figures were measured: a finished run that is called again measures nothing."""
    written = (run.folder.path / "measurements.json").stat().st_mtime
    return datetime.datetime.fromtimestamp(written, datetime.UTC).isoformat(timespec="seconds")


def _find(measured: Measurements, name: str) -> Variant:
    return next(v for v in measured.variants if v.name == name)


def _describe_tensor(traced: Traced, node: fx.Node, name: str) -> Tensor:
    value = node.meta["val"]
    shape = tuple(
        None if traced.dynamic_batch and i == 0 else int(s) if isinstance(s, int) else None
        for i, s in enumerate(value.shape)
    )
    return Tensor(name, shape, str(value.dtype).removeprefix("torch."))


def _list_groups(run: Run, plan: Plan, sensitivity: Sensitivity) -> tuple[GroupRecord, ...]:
    costs = CostModel(run.graph, find_layers(run.graph.module), None, run.bits)
    tables = {g.group: g for g in sensitivity.groups}
    records = []
    for group in run.graph.groups:
        table = tables.get(group.name)
        options: tuple[Option, ...] = ()
        if table is not None:
            options = tuple(
                Option(c, loss, costs.predict({group.name: c}).macs, None)
                for c, loss in zip(table.counts, table.losses, strict=True)
            )
        kept = len(plan.kept.get(group.name, range(group.size)))
        records.append(GroupRecord(group.name, group.layers, group.size, kept, options))
    return tuple(records)


def _list_front(plan: Plan) -> tuple[FrontPoint, ...]:
    points = [FrontPoint(p.cost.macs, p.cost.latency_ms, p.loss, chosen=False) for p in plan.front]
    mine = FrontPoint(plan.cost.macs, plan.cost.latency_ms, plan.loss, chosen=True)
    return (*[p for p in points if (p.macs, p.loss) != (mine.macs, mine.loss)], mine)


def _list_layers(run: Run, final: fx.GraphModule, quantized: Quantized | None) -> tuple[LayerRecord, ...]:
    before = list_macs(run.graph)
    traced = run.graph.traced
    small = build_graph(
        Traced(final, traced.in_spec, traced.out_spec, traced.example, traced.dynamic_batch, traced.input_names)
    )
    after = list_macs(small)
    sqnr: Mapping[str, float] = {}
    integer: Mapping[str, bool] = {}
    bits: Mapping[str, int] = {}
    if quantized is not None:
        sqnr = measure_sqnr(final, quantized.module, run.judges[:1])
        bits = {site.layer: site.bits for site in quantized.sites}
        integer = run.target.audit(run.file("model"), sorted(bits))
    records = []
    for layer in find_layers(run.graph.module):
        ratio = sqnr.get(layer.name)
        finite = ratio if ratio is not None and abs(ratio) < 1e6 else None
        records.append(
            LayerRecord(
                layer.name,
                layer.operator,
                bits.get(layer.name, 32),
                before[layer.name],
                after.get(layer.name, 0),
                finite,
                integer.get(layer.name, False if quantized is None else None),
            )
        )
    return tuple(records)


def _list_notes(run: Run, measured: Measurements, plan: Plan) -> tuple[str, ...]:
    notes = []
    if run.calibration.seal:
        notes.append(
            "No evaluate function was given: the drop is the share of sealed calibration inputs on which the "
            "compressed network names another class than the original. It says nothing about labels."
        )
    elif measured.drop.bound_points is None:
        notes.append("evaluate returned one number, so the drop has no bound. Return one score per sample to get it.")
    if not run.graph.traced.dynamic_batch:
        notes.append("The network fixes its batch size; the file takes only that batch.")
    if run.graph.opaque:
        notes.append(f"Operators without a pruning rule, whose axes were frozen: {', '.join(run.graph.opaque)}.")
    if not plan.kept and run.recipe.prune:
        notes.append("The budget is met without pruning; the widths are the original's.")
    if find_timed(run.target_name) != run.target_name and plan.cost.latency_ms is not None:
        notes.append(
            f"{run.target.LABEL} does not time single layers: the plan is made with times of ONNX Runtime, and "
            f"corrected by whole networks measured in {run.target.LABEL}."
        )
    notes += measured.refused
    alone = [v for v in measured.variants if v.name == COMPRESSED]
    if alone and alone[0].speedup.high < 1:
        notes.append("The compressed file is slower than the original here. Do not deploy it for speed.")
    return tuple(notes)


def _show_loading(run: Run) -> str:
    nodes = [n for n in run.graph.module.graph.nodes if n.op == "placeholder"]
    values = [(n.name, n.meta["val"]) for n in nodes]
    inputs = [(name, [1, *map(int, v.shape[1:])], str(v.dtype).removeprefix("torch.")) for name, v in values]
    return show_loading(run.target_name, run.file("model").name, inputs)
