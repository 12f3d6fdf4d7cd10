"""Post-training static quantization of a flat graph, with as many rungs of the ladder as asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.fx import GraphModule

from jettison.quantization.convert import Quantized
from jettison.quantization.ladder import apply_rungs, check_rungs, prepare
from jettison.quantization.ranges import Ranger
from jettison.targets.integer import IntegerScheme


def quantize(
    module: GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    scheme: IntegerScheme,
    exclude: Collection[str] = (),
    ranges: str | Ranger = "mse",
    weights: str = "per_channel",
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    rungs: Sequence[str] = (),
    seed: int = 0,
) -> Quantized:
    """Return an integer form of a flat graph in eval mode; `module` itself is left alone.

    `batches` are tuples of input tensors, `exclude` names layers (weights' dotted names without ".weight") that
    stay float, `ranges` is a name in RANGERS or a function, `weights` is "per_channel" or "per_tensor". `rungs` are
    names in RUNGS; those on the float network are applied before those on integers. `weight_bits` (2 to 8) and
    `activation_bits` (4 to 8) coarsen the scheme's grid: the result is then a simulation, as its `note` says.
    Raises CalibrationError without items, NonFiniteError for NaN or infinity in weights or activations, UnknownName
    for a layer, range or rung that is none, InputError for bits out of range.
    """
    check_rungs(rungs)
    task = prepare(
        module, batches, scheme=scheme, exclude=exclude, ranges=ranges, weights=weights,
        weight_bits=weight_bits, activation_bits=activation_bits, seed=seed, biases=bool(rungs),
    )  # fmt: skip
    return task.finish(apply_rungs(task, rungs))
