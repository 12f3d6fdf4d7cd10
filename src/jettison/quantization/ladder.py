"""The post-training ladder: every rung a function and a line in `RUNGS`, climbed only as far as a loss asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from jettison.core.errors import CalibrationError, InputError, UnknownName
from jettison.quantization.adaround import apply_adaround
from jettison.quantization.awq import scale_for_weights
from jettison.quantization.bias_correction import correct_bias
from jettison.quantization.bits import check_bits, describe_bits, refuse_coarse
from jettison.quantization.convert import Quantized, convert, fold, list_sites, refuse_bad_input
from jettison.quantization.equalise import equalise
from jettison.quantization.fold import add_biases, find_layers
from jettison.quantization.gptq import apply_gptq
from jettison.quantization.ranges import Ranger, find_ranger
from jettison.quantization.reconstruct import reconstruct
from jettison.quantization.replay import Batches
from jettison.quantization.smooth import smooth
from jettison.targets.integer import IntegerScheme, Levels


@dataclass(frozen=True)
class Rung:
    """One method, what it helps against and what it costs.

    With `before` the function is `(folded, batches, scheme, *, seed) -> folded`: other weights, same function.
    Else it is `(folded, converted, batches, scheme, *, seed) -> converted`: other integers, biases or scales.
    """

    function: Callable[..., GraphModule]
    before: bool
    helps: str
    cost: str


RUNGS: dict[str, Rung] = {
    "equalise": Rung(equalise, True, "channels of very different weights, one scale for all", "no run"),
    "smooth": Rung(smooth, True, "activation outliers in transformers", "one run of the float network"),
    "awq": Rung(scale_for_weights, True, "coarse weights of linear layers", "one run of the float network"),
    "bias": Rung(correct_bias, False, "a shifted mean", "one run of both networks"),
    "gptq": Rung(apply_gptq, False, "coarse weights", "one run of both networks and a matrix factorisation a layer"),
    "adaround": Rung(apply_adaround, False, "coarse weights before a ReLU", "a thousand small steps a layer"),
    "reconstruct": Rung(reconstruct, False, "weights and activations below 8 bits", "hundreds of steps a block"),
}


@dataclass(frozen=True)
class Task:
    """A network made ready for the ladder."""

    folded: GraphModule
    batches: Batches
    scheme: IntegerScheme
    exclude: frozenset[str]
    ranger: Ranger
    weights: str
    seed: int
    note: str

    def convert(self, folded: GraphModule) -> GraphModule:
        """Return the graph in integers, rounded to nearest."""
        return convert(
            folded, self.batches, scheme=self.scheme, exclude=self.exclude, ranger=self.ranger, weights=self.weights
        )

    def finish(self, converted: GraphModule) -> Quantized:
        """Return the graph with its layers' bits."""
        return Quantized(converted, list_sites(self.folded, converted, self.scheme), self.note)


def prepare(
    module: GraphModule,
    batches: Batches,
    *,
    scheme: IntegerScheme,
    exclude: Collection[str] = (),
    ranges: str | Ranger = "mse",
    weights: str = "per_channel",
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    seed: int = 0,
    biases: bool = False,
) -> Task:
    """Return a network folded and checked, with the scheme at the bits asked for; raises what `quantize` raises."""
    ranger = find_ranger(ranges)
    refuse_bad_input(module, batches)
    if weights not in ("per_channel", "per_tensor"):
        raise UnknownName("granularity of weights", weights, ("per_channel", "per_tensor"))
    narrowed, note = narrow(scheme, weight_bits, activation_bits)
    operators = frozenset(scheme.weighted)
    folded = fold(module, operators)
    if biases:
        add_biases(folded, operators)
    layers = find_layers(folded, operators)
    for name in exclude:
        if name not in layers:
            raise UnknownName("layer with weights", name, layers)
    check_bits(narrowed, layers)
    note = " ".join(part for part in (note, describe_bits(scheme)) if part)
    return Task(folded, batches, narrowed, frozenset(exclude), ranger, weights, seed, note)


def narrow(scheme: IntegerScheme, weight_bits: int | None, activation_bits: int | None) -> tuple[IntegerScheme, str]:
    """Return the scheme on a coarser grid, weights symmetric, and what must be said about it.

    Raises InputError for weight bits outside 2 to 8, activation bits outside 4 to 8, more than the scheme has, or fewer
    bits of activations than the target's files keep.
    """
    parts = []
    for what, bits, lowest, levels in (
        ("weight", weight_bits, 2, scheme.weight),
        ("activation", activation_bits, 4, scheme.activation),
    ):
        most = (levels.q_max - levels.q_min).bit_length()
        if bits is None or bits == most:
            continue
        if isinstance(bits, bool) or not isinstance(bits, int) or not lowest <= bits <= most:
            raise InputError(
                f"{what}_bits={bits!r} is out of range. {scheme.target} takes whole numbers from {lowest} to {most}. "
                "Choose one of them, or leave it out."
            )
        if what == "weight":
            half = 2 ** (bits - 1) - 1
            scheme = replace(scheme, weight=Levels(-half, half, True))
        else:
            refuse_coarse(scheme, f"activation_bits={bits}")
            low = 0 if levels.q_min == 0 else -(2 ** (bits - 1))
            scheme = replace(scheme, activation=Levels(low, low + 2**bits - 1, levels.symmetric))
        parts.append(f"{bits}-bit {what}s")
    if not parts:
        return scheme, ""
    return scheme, (
        f"A simulation of {' and '.join(parts)}: no kernel of {scheme.target} computes on them. "
        "The exported file runs the coarser grid in 8 bits, at the speed and size of 8 bits."
    )


def check_rungs(rungs: Sequence[str]) -> None:
    """Raise UnknownName for a rung that is none."""
    for name in rungs:
        if name not in RUNGS:
            raise UnknownName("rung", name, RUNGS)


def apply_rungs(task: Task, rungs: Sequence[str]) -> GraphModule:
    """Return the converted graph after these rungs: those on the float graph first, then the others, each in order."""
    folded = task.folded
    for rung in (RUNGS[name] for name in rungs):
        if rung.before:
            folded = rung.function(folded, task.batches, task.scheme, seed=task.seed)
    converted = task.convert(folded)
    for rung in (RUNGS[name] for name in rungs):
        if not rung.before:
            converted = rung.function(folded, converted, task.batches, task.scheme, seed=task.seed)
    return converted


@dataclass(frozen=True)
class Step:
    """One rung of a climb: its seconds, the loss on inputs it did not see, and whether it lowered that and was kept."""

    rung: str
    seconds: float
    loss_before: float
    loss_after: float
    kept: bool


@dataclass(frozen=True)
class Climb:
    """The best that was reached, its loss, and the rungs that led to it; `reached` says if the loss asked for was."""

    quantized: Quantized
    loss: float
    steps: tuple[Step, ...]
    reached: bool


CLIMB = ("bias", "gptq", "reconstruct")
"""The rungs of a climb, cheap ones first."""


def climb(
    module: GraphModule,
    batches: Batches,
    judges: Batches,
    *,
    scheme: IntegerScheme,
    loss: float,
    rungs: Sequence[str] = CLIMB,
    exclude: Collection[str] = (),
    ranges: str | Ranger = "mse",
    weights: str = "per_channel",
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    seed: int = 0,
) -> Climb:
    """Quantize, and take one rung after the other until the loss on `judges` is at most `loss`.

    `judges` are inputs that `batches` does not hold; the loss is that of `measure_loss` to the float network. A rung
    that does not lower it is taken back. The other arguments, and what is raised, are those of `quantize`.
    """
    check_rungs(rungs)
    if not judges:
        raise CalibrationError(
            "There are no inputs to judge by. A climb needs some that it does not calibrate on. Give at least one."
        )
    task = prepare(
        module, batches, scheme=scheme, exclude=exclude, ranges=ranges, weights=weights,
        weight_bits=weight_bits, activation_bits=activation_bits, seed=seed, biases=True,
    )  # fmt: skip
    targets = run_all(task.folded, judges)
    start = time.perf_counter()
    folded, best = task.folded, task.convert(task.folded)
    seconds = time.perf_counter() - start
    now = measure_loss(run_all(best, judges), targets)
    steps = [Step("nearest", seconds, float("inf"), now, True)]
    for name in rungs:
        if now <= loss:
            break
        start = time.perf_counter()
        other, tried = _take(task, RUNGS[name], folded, best)
        seconds = time.perf_counter() - start
        found = measure_loss(run_all(tried, judges), targets)
        steps.append(Step(name, seconds, now, found, found < now))
        if found < now:
            folded, best, now = other, tried, found
    return Climb(task.finish(best), now, tuple(steps), now <= loss)


def _take(task: Task, rung: Rung, folded: GraphModule, converted: GraphModule) -> tuple[GraphModule, GraphModule]:
    if rung.before:
        # What was done to the integers of the old weights says nothing about the new ones.
        folded = rung.function(folded, task.batches, task.scheme, seed=task.seed)
        return folded, task.convert(folded)
    return folded, rung.function(folded, converted, task.batches, task.scheme, seed=task.seed)


def run_all(module: GraphModule, batches: Batches) -> list[tuple[Tensor, ...]]:
    """Return what a flat graph gives for each batch."""
    with torch.no_grad():
        return [tuple(module(*batch)) for batch in batches]


def measure_loss(outputs: Sequence[tuple[Tensor, ...]], targets: Sequence[tuple[Tensor, ...]]) -> float:
    """Return how far outputs are from the float network's: nats for class scores, else a share of their power.

    An output `(batch, classes)` of several classes counts with KL(target, output), every other one with its squared
    error over the target's squares; several outputs are added. Whole numbers do not count.
    """
    total = 0.0
    for pairs in zip(*(zip(y, t, strict=True) for y, t in zip(outputs, targets, strict=True)), strict=True):
        if not pairs[0][1].is_floating_point():
            continue
        given, wanted = torch.cat([y for y, _ in pairs]).double(), torch.cat([t for _, t in pairs]).double()
        if wanted.ndim == 2 and wanted.shape[1] > 1:
            total += float(
                F.kl_div(given.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
            )
        else:
            total += float((given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))
    return total
