"""`train_quantized`: quantization-aware training in one call, from a float network and inputs without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from jettison.core.errors import InputError, ShapeError
from jettison.core.recipe import Recipe
from jettison.distill.train import AfterStep, Schedule, distil
from jettison.flow.calibration import Calibration, list_digests, make_calibration
from jettison.flow.folder import fingerprint, open_folder
from jettison.flow.reading import Data, fit_batch
from jettison.flow.recovering import make_schedule
from jettison.flow.run import split_judges
from jettison.flow.schemes import find_scheme
from jettison.flow.sensitivity import measure_loss
from jettison.graph.trace import Batch, Traced, nest, trace_module
from jettison.quantization import Quantized
from jettison.quantization import quantize as quantize_graph
from jettison.quantization.bits import find_ends, split_bits
from jettison.quantization.convert import fold
from jettison.quantization.fold import find_layers
from jettison.quantization.oscillation import damp_oscillations
from jettison.quantization.qat import convert_trained, list_spots, list_undecayed, make_trainable
from jettison.targets.integer import IntegerScheme

Form = Literal["integer", "ternary", "binary"]
RECIPE = Recipe(steps=600, learning_rate=1e-3)
STATE = "training.safetensors"


@dataclass(frozen=True)
class Task:
    """A network ready to be trained: what it shall answer like, its scheme, and layers that are treated differently.

    `coarse` are those with ternary or binary weights, `floats` those that stay float.
    """

    traced: Traced
    teacher: fx.GraphModule
    scheme: IntegerScheme
    coarse: dict[str, str]
    floats: frozenset[str]


def train_quantized(
    model: nn.Module,
    calibration: Data,
    *,
    target: str = "onnxruntime",
    weight_bits: int = 8,
    activation_bits: int = 8,
    weights: Form = "integer",
    bits: Mapping[str, tuple[int, int]] | None = None,
    teacher: nn.Module | None = None,
    rungs: Sequence[str] = (),
    recipe: Recipe | None = None,
    seed: int = 0,
    out: Path | str | None = None,
) -> Quantized:
    """Return a network trained to compute in integers: step sizes and weights learn together from the float original.

    `calibration` are inputs, without labels. Weights and activations get `weight_bits` and `activation_bits` (2 to 8);
    first and last layers keep 8. `weights` may be "ternary" or "binary" instead, one scale per output channel. `bits`
    gives single layers, by name, their own (weight, activation) bits, (32, 32) for float. Starts from post-training
    quantization (with `rungs` of its ladder) and distils from `teacher`, by default `model` as it is: a pruned network
    can learn from its larger original. The recipe's samples, judges, steps, learning_rate, temperature and half are
    used; by default 600 steps at 1e-3. With `out`, a folder, a run that was cut off goes on where it last saved and
    ends with the same bits. The result has the form that `quantize` gives, and `export` takes it. Training is kept only
    where it brings the network nearer to the teacher on inputs held out; `note` has the figures, and says that no
    kernel here runs fewer than 8 bits. `model` is left alone. Raises InputError for bits out of range, CheckpointError
    for a folder of another run, and what `quantize` raises.
    """
    recipe = recipe or RECIPE
    _check(weight_bits, activation_bits, weights)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        data, arguments, keywords = make_calibration(calibration, model, seal=False, seed=seed, device=device)
        traced = trace_module(model, arguments, keywords)
        data = fit_batch(data, traced)
        original = traced if teacher is None else trace_module(teacher, arguments, keywords)
        if original.out_spec != traced.out_spec:
            raise ShapeError(
                f"The teacher's outputs are nested as {original.out_spec}, the network's as {traced.out_spec}. "
                "The network learns to answer as the teacher does. Give one of the same outputs."
            )
        scheme = find_scheme(target)
        task = Task(traced, original.module, *_choose_bits(traced, scheme, weight_bits, activation_bits, weights, bits))
        state = _open(out, task, data, recipe, rungs, seed)
        found = _train(task, data, recipe, rungs, seed, state)
        return replace(found, module=nest(found.module, traced.in_spec, traced.out_spec))


def _check(weight_bits: int, activation_bits: int, weights: str) -> None:
    for name, value in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if type(value) is not int or not 2 <= value <= 8:
            raise InputError(f"{name}={value!r} is out of range. Training takes whole numbers from 2 to 8. Choose one.")
    if weights not in get_args(Form):
        raise InputError(f"weights={weights!r} is none of {', '.join(map(repr, get_args(Form)))}. Choose one.")


def _choose_bits(
    traced: Traced,
    scheme: IntegerScheme,
    weight_bits: int,
    activation_bits: int,
    weights: Form,
    bits: Mapping[str, tuple[int, int]] | None,
) -> tuple[IntegerScheme, dict[str, str], frozenset[str]]:
    """Return the scheme with the bits of each layer, the layers with ternary or binary weights, and those in float."""
    folded = fold(traced.module, frozenset(scheme.weighted))
    names = find_layers(folded, frozenset(scheme.weighted))
    inner = [name for name in names if name not in find_ends(folded, scheme)]
    # The grid -1, 0, 1 holds ternary weights and binary ones.
    pair = (2 if weights != "integer" else weight_bits, activation_bits)
    chosen = dict.fromkeys(inner, pair) if pair != (8, 8) else {}
    coarse = dict.fromkeys(inner, str(weights)) if weights != "integer" else {}
    own, floats = split_bits(bits or {})
    named = {*own, *floats}
    chosen = {n: pair for n, pair in chosen.items() if n not in named}
    coarse = {n: form for n, form in coarse.items() if n not in named}
    return replace(scheme, bits={**chosen, **own}), dict(coarse), floats


def _open(
    out: Path | str | None, task: Task, data: Calibration, recipe: Recipe, rungs: Sequence[str], seed: int
) -> Path | None:
    """Return the file a run is saved to; raises CheckpointError where the folder holds another run."""
    if out is None:
        return None
    settings = {
        "recipe": recipe, "bits": {n: list(pair) for n, pair in task.scheme.bits.items()}, "coarse": task.coarse,
        "floats": sorted(task.floats), "target": task.scheme.target, "rungs": list(rungs), "seed": seed,
    }  # fmt: skip
    tensors = {**task.traced.module.state_dict(), **{f"teacher.{n}": t for n, t in task.teacher.state_dict().items()}}
    mark = fingerprint(tensors, data.take(1)[0], task.traced.module.code, settings)
    return open_folder(Path(out), mark, settings).path / STATE


def _train(
    task: Task, data: Calibration, recipe: Recipe, rungs: Sequence[str], seed: int, state: Path | None
) -> Quantized:
    fitting, judges = split_judges(data, recipe)
    start = quantize_graph(task.traced.module, fitting, scheme=task.scheme, exclude=task.floats, rungs=rungs, seed=seed)
    spots = dict(list_spots(start.module, task.scheme, task.coarse))
    student = make_trainable(start.module, task.traced.module, task.scheme, coarse=task.coarse)
    schedule = make_schedule(recipe, data.device)
    judged = list_digests(judges) if judges is not fitting else frozenset[int]()
    damping = damp_oscillations(spots, recipe.steps)
    trained = _distil(
        student, task.teacher, partial(_iterate, data, judged), schedule, list_undecayed(student), damping, state, seed
    )
    found = convert_trained(trained, start.module, task.scheme, coarse=task.coarse)
    targets = [task.teacher(*batch) for batch in judges]
    before, after = (measure_loss(m, judges, targets) for m in (start.module, found))
    nearer = after < before
    samples = sum(len(batch[0]) for batch in judges)
    where = f"on {samples} inputs{' held out' if judges is not fitting else ''}"
    figures = (
        f"Divergence from the original {where}: {before:.4g} as calibrated, {after:.4g} after {recipe.steps} steps."
    )
    refusal = "" if nearer else "Training brought it no nearer and was left out."
    note = " ".join(part for part in (start.note, figures, refusal) if part)
    return Quantized(found if nearer else start.module, start.sites, note)


def _distil(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    batches: Any,
    schedule: Schedule,
    undecayed: frozenset[str],
    damping: AfterStep,
    state: Path | None,
    seed: int,
) -> fx.GraphModule:
    with torch.enable_grad():
        return distil(
            student, teacher, batches, schedule, undecayed=undecayed, after_step=damping, state=state, seed=seed
        )[0]


def _iterate(data: Calibration, judged: frozenset[int], epoch: int) -> Iterator[Batch]:
    return data.iterate_without(judged, epoch)
