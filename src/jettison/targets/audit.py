"""What a runtime really runs: the operators of its own optimised graph, and which layers of a file they compute."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jettison.core.errors import UnknownName
from jettison.core.record import Interval, TimeShare
from jettison.targets.onnx_layers import FileLayer


@dataclass(frozen=True)
class Operator:
    """One operator of the runtime's own graph.

    `precision` is "int8", "bf16", "fp16", "fp32", "rounding" (a step between float and integers that no kernel has
    taken in) or "other" (shapes and indices). `covers` are names of the file's nodes and weights that it computes.
    `alone` says that a rounding stands in the middle of the network. `ms` is its median time, None where not run.
    """

    name: str
    kernel: str
    precision: str
    covers: tuple[str, ...]
    alone: bool
    ms: float | None


@dataclass(frozen=True)
class Kernel:
    """A layer of the file and what computes it: kernel names joined by "+", the least reduced precision of them.

    `stored` is how the file holds its weight: "int8", "fp32" ("" for products of two activations, which have none).
    `weights_only` says that only the weight is in integers. `precision` is "" and `kernel` "not found" where no
    operator of the runtime names the layer.
    """

    layer: str
    operator: str
    stored: str
    kernel: str
    precision: str
    macs: int
    depthwise: bool
    ms: float | None
    weights_only: bool = False


@dataclass(frozen=True)
class KernelAudit:
    """What one file becomes in one runtime; `print` shows it.

    `integer_share` is the part of the MACs of layers with weights that runs on integers (None where there are none),
    `float_share` the part of the profiled time spent in floating point, `rounding_share` the part spent in roundings
    that stand alone. `speedup` is over the baseline file, with a 95 % interval, None where none was given. `findings`
    say in words what holds it back, and what to do.
    """

    target: str
    file: str
    precision: str
    kernels: tuple[Kernel, ...]
    operators: tuple[Operator, ...]
    integer_share: float | None
    float_share: float | None
    rounding_share: float | None
    speedup: Interval | None
    findings: tuple[str, ...]

    @property
    def alone(self) -> tuple[Operator, ...]:
        """The roundings that no kernel has taken in, longest first."""
        return tuple(sorted((o for o in self.operators if o.alone), key=lambda o: -(o.ms or 0.0)))

    @property
    def left_in_float(self) -> tuple[Kernel, ...]:
        """The layers with weights that do not run on integers, most MACs first."""
        return tuple(sorted((k for k in self.kernels if k.stored and k.precision != "int8"), key=lambda k: -k.macs))

    def __str__(self) -> str:
        """Return the summary, a line per layer, and the findings."""
        total = sum(o.ms or 0.0 for o in self.operators)
        lines = [f"{self.file} in {self.target}, {self.precision}: {len(self.kernels)} layers, {total:.3f} ms profiled"]
        for what, share in (
            ("of the MACs of layers with weights run on integers", self.integer_share),
            ("of the time is floating point", self.float_share),
            ("of the time goes to roundings that stand alone", self.rounding_share),
        ):
            if share is not None:
                lines.append(f"  {share:7.1%} {what}")
        if self.speedup is not None:
            lines.append(
                f"  {self.speedup.value:6.2f}x the baseline's speed ({self.speedup.low:.2f} to {self.speedup.high:.2f})"
            )
        width = max((len(k.layer) for k in self.kernels), default=0)
        lines += [
            f"  {k.layer:{width}}  {k.precision or '?':5} {k.macs / 1e6:9.3f} M MACs {k.ms or 0.0:8.4f} ms  {k.kernel}"
            for k in self.kernels
        ]
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])


RANK = ("", "fp32", "fp16", "bf16", "int8")
"""From the least to the most reduced; a layer that several kernels compute counts as the first that holds for one."""


def match(layers: Sequence[FileLayer], operators: Sequence[Operator]) -> tuple[Kernel, ...]:
    """Return each layer with the operators that name it or its weight."""
    names = {layer.name for layer in layers}
    by_name: dict[str, list[Operator]] = {}
    for operator in operators:
        for covered in dict.fromkeys(operator.covers):
            by_name.setdefault(covered, []).append(operator)
    kernels = []
    for layer in layers:
        # A node's own name decides; a weight may be shared by several nodes.
        found = by_name.get(layer.name) or by_name.get(layer.weight, [])
        found = [o for o in found if o.precision not in ("rounding", "other")] if layer.name in names else []
        precision = min((o.precision for o in found), key=RANK.index, default="")
        times = [o.ms for o in found if o.ms is not None]
        kernel = "+".join(dict.fromkeys(o.kernel for o in found)) or "not found"
        kernels.append(
            Kernel(
                layer.name,
                layer.operator,
                layer.stored,
                kernel,
                precision,
                layer.macs,
                layer.depthwise,
                sum(times) if times else None,
                layer.weights_only,
            )
        )
    return tuple(kernels)


def name_product(name: str) -> str:
    """Return the layer's name for a product that bears the name of the last operator it has taken in: "conv.relu"."""
    return re.sub(r"(\.(relu|clip|leakyrelu|add|batchnormalization)(_\d+)?)+$", "", name.split("/")[0])


def share_of_integers(kernels: Sequence[Kernel]) -> float | None:
    """Return the part of the MACs of layers with weights that runs on integers; None where there are none."""
    weighted = [k for k in kernels if k.stored]
    total = sum(k.macs for k in weighted)
    return sum(k.macs for k in weighted if k.precision == "int8") / total if total else None


def share_of_time(operators: Sequence[Operator], precisions: Sequence[str]) -> float | None:
    """Return the part of the profiled time that operators of these precisions take; None where nothing was run."""
    total = sum(o.ms for o in operators if o.ms is not None)
    return sum(o.ms for o in operators if o.ms is not None and o.precision in precisions) / total if total else None


def rank_times(operators: Sequence[Operator]) -> tuple[TimeShare, ...]:
    """Return the operators that take time, longest first."""
    timed = (TimeShare(o.name, o.kernel, o.ms) for o in operators if o.ms)
    return tuple(sorted(timed, key=lambda share: -share.ms))


def tell_integers(layers: Sequence[str], operators: Sequence[Operator]) -> dict[str, bool]:
    """Say for each layer, by its node's or its weight's name, whether all that computes it runs on integers."""
    covering: Mapping[str, list[str]] = {layer: [] for layer in layers}
    for operator in operators:
        for layer in layers:
            if operator.precision != "rounding" and (layer in operator.covers or f"{layer}.weight" in operator.covers):
                covering[layer].append(operator.precision)
    return {layer: bool(kinds) and all(kind == "int8" for kind in kinds) for layer, kinds in covering.items()}


def check_precision(precision: str, known: Sequence[str]) -> None:
    """Raise UnknownName for a precision that a target has not."""
    if precision not in known:
        raise UnknownName("precision of this target", precision, known)
