"""Which tensors suffer from rounding, how much each costs the network, why, and what mends it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from jettison.core.errors import CalibrationError
from jettison.quantization.causes import LOUD, LOW_DB, Cause, Facts, find_causes
from jettison.quantization.clamps import read_clamp
from jettison.quantization.convert import fold
from jettison.quantization.fold import BATCH_NORM, copy_graph, find_layers, name_operator
from jettison.quantization.leave_out import Bench, Divergence, read_range, run_bench
from jettison.quantization.switches import WEIGHTED, Spot, Switched, is_restoring, is_rounding
from jettison.targets.integer import IntegerScheme

HEALTHY_DB = 20.0
"""Noise below 1 % of what varies in the output: nothing to mend."""
HEALTHY_LOSS = 0.05
"""Divergence from the float network below which there is nothing to mend: nats for class scores."""
NOTABLE = 0.1
"""Share of the whole loss that leaving one tensor out must give back to be called a trouble."""
FEW = 3.0
"""With n tensors the share must also be this many times 1 / n: in a small network each one has a large share."""
GATE_STEPS = 4
GATES = ("aten.sigmoid.default", "aten.hardsigmoid.default")


@dataclass(frozen=True)
class TensorLoss:
    """What rounding one tensor costs, over all that share its range.

    Ratios of signal to noise are in dB, None where there is no noise: `local_db` with only this tensor rounded (of a
    weight: at its layer's output), `cumulative_db` with all before it rounded too. `gain` is the divergence that the
    rounded network loses when this tensor alone stays float, `share` the same over the whole loss, `gain_db` what the
    output's ratio gains, `gain_agreement` the share of samples whose largest score comes right again. `exclude` are
    the layers to keep in float so that the tensor is.
    """

    tensor: str
    kind: str
    local_db: float | None
    cumulative_db: float | None
    gain: float
    share: float
    gain_db: float
    gain_agreement: float | None
    alarm: bool
    causes: tuple[Cause, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """How far the rounded network is from the float one, and its tensors from the costliest to the cheapest.

    `loss` is the mean divergence per sample (nats for class scores). `output_db` is the outputs' ratio of signal to
    noise, where signal is what varies from sample to sample. `agreement` is the share of samples with the same largest
    score, None where the outputs are no scores.
    """

    samples: int
    loss: float
    output_db: float | None
    agreement: float | None
    healthy: bool
    verdict: str
    tensors: tuple[TensorLoss, ...]


def diagnose(
    reference: GraphModule,
    quantized: GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    scheme: IntegerScheme,
    divergence: Divergence,
) -> Diagnosis:
    """Return what each quantized tensor costs and why, on `batches`; costs about half a run per tensor and batch.

    `quantized` is what `quantize` made of the flat graph `reference` under `scheme`; neither is changed.
    `divergence(outputs, float_outputs)` gives one number per sample. Raises CalibrationError without batches,
    InputError where the graphs do not belong together.
    """
    if not batches or not any(x.numel() for batch in batches for x in batch):
        raise CalibrationError("There are no inputs to diagnose the network with. Nothing can be measured. Give some.")
    with torch.no_grad():
        net = Switched(fold(reference, frozenset(scheme.weighted)), quantized)
        bench = run_bench(net, batches, divergence)
    return _judge(bench)


def _judge(bench: Bench) -> Diagnosis:
    whole = bench.whole
    output_db = to_decibels(whole.signal, whole.noise)
    healthy = (output_db is None or output_db >= HEALTHY_DB) and whole.mean <= HEALTHY_LOSS
    least = max(NOTABLE, min(0.5, FEW / max(1, len(bench.net.spots))))
    rows = [_judge_tensor(bench, spot, healthy, least) for spot in bench.net.spots]
    rows.sort(key=lambda row: (-row.gain, row.tensor))
    verdict = _say_verdict(healthy, [row for row in rows if row.alarm])
    return Diagnosis(whole.samples, whole.mean, output_db, whole.agreement, healthy, verdict, tuple(rows))


def _say_verdict(healthy: bool, alarms: Sequence[TensorLoss]) -> str:
    if healthy:
        return "Rounding costs this network next to nothing. There is nothing to mend."
    if not alarms:
        return (
            "Rounding hurts, but no single tensor stands out: the loss is spread. "
            'Try the rung "reconstruct", or more bits throughout.'
        )
    first = alarms[0]
    why = f" ({first.causes[0].words})" if first.causes else ""
    share = f"{100 * min(1.0, first.share):.0f} %"
    return f"Rounding hurts: {first.tensor!r} alone accounts for {share} of the loss{why}."


def _judge_tensor(bench: Bench, spot: Spot, healthy: bool, least: float) -> TensorLoss:
    whole, without, measure = bench.whole, bench.without[spot.name], bench.measures[spot.name]
    gain = whole.mean - without.mean
    share = gain / whole.mean if whole.mean > 0 else 0.0
    local_db = to_decibels(measure.signal, measure.noise)
    both = whole.agreement, without.agreement
    alarm = not healthy and (share >= least or (local_db is not None and local_db < LOW_DB and share > 0.0))
    return TensorLoss(
        tensor=spot.name,
        kind=spot.kind,
        local_db=local_db,
        cumulative_db=to_decibels(measure.cumulative_signal, measure.cumulative_noise),
        gain=gain,
        share=share,
        gain_db=_compare_noise(whole.noise, without.noise),
        gain_agreement=both[1] - both[0] if both[0] is not None and both[1] is not None else None,
        alarm=alarm,
        causes=find_causes(_gather(bench, spot, local_db)),
        exclude=tuple(dict.fromkeys(layer for layer in (spot.source, *spot.readers) if layer)),
    )


def _compare_noise(before: float, after: float) -> float:
    """Return by how many dB noise falls; no noise at all counts as 200 dB below what was there."""
    if before <= 0.0:
        return 0.0
    return 10 * math.log10(before / max(after, before * 1e-20))


def _gather(bench: Bench, spot: Spot, local_db: float | None) -> Facts:
    net, measure = bench.net, bench.measures[spot.name]
    channel_ratio, loud = measure.find_loud_channel()
    tail_ratio, kurtosis = measure.find_tail()
    ends = [read_range(node) for node in spot.nodes] if spot.kind == "activation" else []
    span = measure.high - measure.low
    layers = tuple(dict.fromkeys(layer for layer in (spot.source, *spot.readers) if layer))
    readers = [node for node, name in net.layers.items() if name in spot.readers]
    return Facts(
        kind=spot.kind,
        local_db=local_db,
        channel_ratio=channel_ratio,
        loud_channel=loud,
        input_ratio=_compare_input(bench, spot),
        tail_ratio=tail_ratio,
        kurtosis=kurtosis,
        mean_share=measure.find_mean_share(),
        clipped_share=measure.clipped / max(1, measure.values),
        range_ratio=(ends[0][1] - ends[0][0]) / span if ends and span > 0 else 0.0,
        gate=_find_gate(spot.nodes if spot.kind == "activation" else (net.order[spot.start],)),
        linear=any(name_operator(node) == "aten.linear.default" for node in readers),
        side=measure.side,
        layers=layers,
    )


def _compare_input(bench: Bench, spot: Spot) -> float:
    """Return how far the weights that read a loud input channel lie below the median ones; 0 where none is loud."""
    inputs = bench.inputs.get(spot.name)
    columns = bench.measures[spot.name].peaks.get(0)
    if spot.kind != "weight" or inputs is None or columns is None or bench.measures[spot.name].side != "input":
        return 0.0
    ratio, loud = inputs.find_loud_channel()
    if ratio <= LOUD or len(columns) != len(inputs.peaks[0]) or float(columns[loud]) <= 0:
        return 0.0
    return float(columns.median() / columns[loud])


def _find_gate(nodes: Sequence[Node]) -> str:
    """Return the squashing function that multiplies other values with what these nodes give, or ""."""
    todo = [(node, 0) for node in nodes]
    todo += [(node.args[0], 0) for node in nodes if is_rounding(node) and isinstance(node.args[0], Node)]
    while todo:
        node, depth = todo.pop()
        if name_operator(node) in GATES and _multiplies(node):
            return name_operator(node).split(".")[1]
        if depth < GATE_STEPS:
            passing = [n for n in node.users if is_rounding(n) or is_restoring(n) or name_operator(n) in GATES]
            todo += [(user, depth + 1) for user in passing]
    return ""


def _multiplies(gate: Node) -> bool:
    """Say if a product with something else than the gate's own input follows."""
    before = gate.all_input_nodes[0]
    todo = list(gate.users)
    while todo:
        user = todo.pop()
        if is_rounding(user) or is_restoring(user):
            todo += list(user.users)
        elif name_operator(user) == "aten.mul.Tensor" and before not in user.all_input_nodes:
            return True
    return False


def to_decibels(signal: float, noise: float) -> float | None:
    """Return 10 log10(signal / noise), None without noise."""
    if noise <= 0.0:
        return None
    return 10 * math.log10(max(signal, noise * 1e-20) / noise)


def measure_sqnr(
    original: GraphModule, quantized: GraphModule, batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, float]:
    """Return 10 log10(sum y^2 / sum (y - y')^2) in dB at every weighted layer's output, errors before it included.

    A layer's output is taken after its BatchNorm and its clamping activation, where the runtime rounds. Layers
    equal on both sides have infinity. Raises CalibrationError without batches.
    """
    if not batches:
        raise CalibrationError("There are no inputs to compare the networks on. The ratio is undefined. Give a batch.")
    # Copies without in-place calls, which would change a layer's output after it was kept.
    original, quantized = copy_graph(original), copy_graph(quantized)
    left = {name: _find_end(node) for name, node in find_layers(original, WEIGHTED).items()}
    right = {name: _find_end(node) for name, node in find_layers(quantized, WEIGHTED).items()}
    signal, noise = dict.fromkeys(left, 0.0), dict.fromkeys(left, 0.0)
    for batch in batches:
        wanted, given = _Tap(original, left).collect(batch), _Tap(quantized, right).collect(batch)
        for name in left:
            if name in given:
                signal[name] += float(wanted[name].double().square().sum())
                noise[name] += float((wanted[name].double() - given[name].double()).square().sum())
    return {name: _decibels(signal[name], noise[name]) for name in left if name in right}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _find_end(node: Node) -> Node:
    """Follow what belongs to the layer: BatchNorm, one clamp, and the rounding of the result."""
    while len(node.users) == 1:
        (user,) = node.users
        name = name_operator(user)
        if not (name == BATCH_NORM or read_clamp(user) is not None or "quantize_per_tensor" in name):
            break
        node = user
        if "dequantize" in name:
            return node
    if "quantize_per_tensor" in name_operator(node) and "dequantize" not in name_operator(node):
        # Several readers have a dequantization each; they all say the same.
        return next(iter(node.users))
    return node


class _Tap(Interpreter):
    """Runs a graph and keeps what the layers' ends give."""

    def __init__(self, module: GraphModule, ends: dict[str, Node]) -> None:
        super().__init__(module)
        self.names: dict[Node, list[str]] = {}
        for name, node in ends.items():
            self.names.setdefault(node, []).append(name)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node, and keep its result if a layer ends here."""
        result = super().run_node(n)
        for name in self.names.get(n, ()):
            self.kept[name] = result
        return result

    def collect(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return each layer's output for this batch."""
        with torch.no_grad():
            self.run(*batch)
        return self.kept
