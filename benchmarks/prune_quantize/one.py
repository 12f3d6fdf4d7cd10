"""One model: prune to half its MACs, quantize, export, run, audit, save; `reload` is the fresh process after it.

Every step is a call of the public interface on what the one before gave.
"""

from __future__ import annotations

import json
import resource
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import jettison as jt
from benchmarks.coverage.one import SEED, _choose, _randomise
from benchmarks.coverage.zoo import Case, list_tensors
from benchmarks.prune_quantize.sample import find_case
from jettison.targets import find_target

TARGET = "onnxruntime"
BATCHES = 3
"""Batches to calibrate with; the example is the first."""
Inputs = tuple[Tensor, ...] | dict[str, Tensor]


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Return the row of one model; a stage that fails ends it, with the stage and the error in it."""
    row: dict[str, Any] = {"collection": case.collection, "model": case.name, "stage": "build"}
    start = time.process_time()
    try:
        _run_stages(case, row, folder)
        row |= {"stage": "", "outcome": "works"}
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is this model's row
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        row["outcome"] = "wrong" if row["stage"] == "simulated = runtime" else "exception"
        row["trace"] = traceback.format_exc(limit=-6)
    row["processor_s"] = round(time.process_time() - start, 1)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _run_stages(case: Case, row: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(SEED)
    model, args, kwargs = case.build()
    _randomise(model)
    inputs: Inputs = kwargs or args
    row["stage"] = "prune"
    small, row["result"] = _prune(model, inputs, row)
    row["stage"] = "quantize"
    quantized = jt.quantize(small, [_vary(inputs, seed) for seed in range(BATCHES)], target=TARGET)
    row["integer_layers"] = sum(site.bits < 32 for site in quantized.sites)
    row["layers"] = len(quantized.sites)
    row["stage"] = "export"
    path = jt.export(quantized.module, inputs, folder / "model.onnx", target=TARGET)
    row["stage"] = "run"
    with torch.no_grad():
        simulated = list_tensors(call(quantized.module, inputs))
        original = list_tensors(call(small, inputs))
    runtime = find_target(TARGET)
    session = runtime.load(path, threads=1)
    given = runtime.predict(session, order(inputs, session.input_names))
    row |= compare(simulated, list(given), original)
    row["stage"] = "simulated = runtime"
    if row["runtime_db"] <= row["float_db"]:
        raise AssertionError(
            f"{row['runtime_db']} dB from simulation to runtime, {row['float_db']} dB from float to it"
        )
    row["stage"] = "audit"
    audit = jt.audit(path, target=TARGET, inputs=inputs, runs=3)
    row["integer_share"] = None if audit.integer_share is None else round(audit.integer_share, 4)
    row["left_in_float"] = " ".join(f"{k.layer}:{k.kernel}" for k in audit.left_in_float[:4])
    row["stage"] = "save"
    quantized.save(folder)
    save_file(split_inputs(inputs), folder / "inputs.safetensors")
    save_file({str(i): y.contiguous() for i, y in enumerate(simulated)}, folder / "expected.safetensors")
    # Loading needs what defines the class of the outputs, where that is no tuple, list or dict, and operators.
    defined = type(call(small, inputs)).__module__
    row["needed"] = [m for m in (defined, "torchvision" if case.collection == "detection" else "") if m]


def _prune(model: nn.Module, inputs: Inputs, row: dict[str, Any]) -> tuple[nn.Module, str]:
    """Prune to half of the MACs, the same share of every group, as the coverage does."""
    graph = jt.trace(model, inputs)
    before = jt.profile(graph).macs
    kept = _choose(graph, before, {g.name for g in graph.groups})
    counts = {name: len(positions) for name, positions in kept.items()}
    del graph
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        small = jt.prune(model, inputs, keep=counts, criterion="random", seed=SEED)
    row["macs"] = before
    row["removed"] = round(1 - jt.profile(jt.trace(small, inputs)).macs / before, 3)
    kind = "graph" if isinstance(small, torch.fx.GraphModule) else "eager"
    return small, "hybrid" if kind == "eager" and any("graphs in the place" in str(w.message) for w in said) else kind


def _vary(inputs: Inputs, seed: int) -> Inputs:
    """Return other inputs of the same kind: pictures and sounds drawn anew, tokens and boxes in another order."""
    generator = torch.Generator().manual_seed(seed)

    def vary(x: Tensor) -> Tensor:
        if seed == 0:
            return x
        if x.is_floating_point() and x.dim() != 3:
            return torch.randn(x.shape, generator=generator)
        return x[:, torch.randperm(x.shape[1], generator=generator)]

    return {k: vary(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(map(vary, inputs))


def call(module: nn.Module, inputs: Inputs) -> Any:
    """Call a network with positional or keyword inputs, without gradients."""
    with torch.no_grad():
        return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def order(inputs: Inputs, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return the inputs in the order of a file's."""
    return tuple(inputs[name] for name in names) if isinstance(inputs, dict) else inputs


def split_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Return the inputs by name for a safetensors file."""
    named = inputs if isinstance(inputs, dict) else {str(i): x for i, x in enumerate(inputs)}
    return {name: x.contiguous() for name, x in named.items()}


def join_inputs(named: Mapping[str, Tensor]) -> Inputs:
    """Return what `split_inputs` split."""
    if all(name.isdigit() for name in named):
        return tuple(named[str(i)] for i in range(len(named)))
    return dict(named)


def compare(simulated: list[Tensor], given: list[Tensor], original: list[Tensor]) -> dict[str, Any]:
    """Return how far the runtime is from the simulation and the simulation from the float network.

    `steps`: the largest difference in steps, 255 to the range of an output; `within_a_step`: the worst output's share
    of numbers that are at most one step apart; `runtime_db` and `float_db`: the signal over the difference, decibels.
    """
    steps, within, runtime_db, float_db = 0.0, 1.0, float("inf"), float("inf")
    for ours, theirs, whole in zip(simulated, given, original, strict=True):
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                raise AssertionError("an output of whole numbers differs")
            continue
        if ours.shape != theirs.shape:
            raise AssertionError(f"the runtime gives the shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        step = float((ours.max() - ours.min()) / 255) or 1.0
        apart = (ours.double() - theirs.double()).abs() / step
        steps, within = max(steps, float(apart.max())), min(within, float((apart <= 1).float().mean()))
        runtime_db = min(runtime_db, _decibels(ours, theirs))
        float_db = min(float_db, _decibels(whole, ours))
    found = {"steps": steps, "within_a_step": within, "runtime_db": min(runtime_db, 200.0), "float_db": float_db}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _decibels(wanted: Tensor, given: Tensor) -> float:
    wanted, given = wanted.double(), given.double()
    noise = float((wanted - given).square().sum())
    return 10 * float(torch.log10(wanted.square().sum() / noise)) if noise else float("inf")


def write_row(collection: str, name: str, folder: Path) -> None:
    """Run one model; its row goes into `row.json`, and what the fresh process needs beside it."""
    torch.set_num_threads(1)
    row = run(find_case(collection, name), folder)
    (folder / "row.json").write_text(json.dumps(row))
