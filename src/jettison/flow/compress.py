"""`compress`: all stages in a row. It composes and owns no algorithm."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from jettison.core.budget import Budget
from jettison.core.errors import BudgetError, FixedSize, InputError, StorageError, VerificationError
from jettison.core.plain import to_plain, write_json
from jettison.core.plan import Plan, PlanPoint
from jettison.core.recipe import Recipe
from jettison.core.record import Check, Record
from jettison.flow.calibration import Calibration, make_calibration
from jettison.flow.choosing import settle_target
from jettison.flow.deciding import Reference, decide, load_sensitivity, measure_reference
from jettison.flow.delivering import ResultKind, check_kind, deliver, save_module
from jettison.flow.evaluation import Evaluate, agreement
from jettison.flow.folder import RunFolder, fingerprint, open_folder
from jettison.flow.proving import Measurements, count_widths, measure_variants, run_checks
from jettison.flow.reading import trace_small
from jettison.flow.recording import Checks, build_record
from jettison.flow.recovering import distil_from_original, refit
from jettison.flow.run import Run, export_file, nest_predict
from jettison.flow.schemes import find_scheme
from jettison.graph.expressible import explain_whole, find_inexpressible
from jettison.graph.groups import Graph, build_graph
from jettison.graph.trace import nest
from jettison.progress import show_progress
from jettison.pruning.choice import read_widths
from jettison.pruning.criteria import find_criterion
from jettison.quantization import Quantized, quantize
from jettison.quantization.storing import FILES as QUANTIZED_FILES
from jettison.report.html import write_html
from jettison.targets import find_target

DELIVERABLES = (
    "model.json", "model.safetensors", "module.json", "module.safetensors",
    *QUANTIZED_FILES, "plan.json", "record.json", "report.html",
)  # fmt: skip
"""What `Result.save` copies beside the file to deploy; a run folder also holds the stages' own files."""


@dataclass(frozen=True)
class Result:
    """A compressed network: the module, the deployable file, what was decided and what was measured.

    `model` has the caller's own class where its source allows that, else it is a graph module (the record's notes
    say why). Both are ordinary modules in eval mode. The network on integers, whose outputs are those of `artifact`,
    is `load_quantized(result.folder)`.
    """

    model: nn.Module
    plan: Plan
    record: Record
    folder: Path

    @property
    def artifact(self) -> Path:
        """The file to deploy: `model.onnx`, or with the ending of another target."""
        files = [v.file for v in self.record.variants if v.name == self.record.compressed]
        assert files and files[0] is not None
        return self.folder / files[0]

    @property
    def front(self) -> tuple[PlanPoint, ...]:
        """The plans that were best for their predicted cost."""
        return self.plan.front

    def save(self, folder: Path | str) -> Path:
        """Copy everything needed later into `folder` and return it; `load` and `load_quantized` read it anywhere."""
        folder, names = Path(folder), (self.artifact.name, *DELIVERABLES)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                if name in QUANTIZED_FILES and not (self.folder / name).exists():
                    continue  # the recipe did not quantize
                partial = folder / f".{name}.partial"
                shutil.copyfile(self.folder / name, partial)
                partial.replace(folder / name)
        except OSError as error:
            for name in names:
                with contextlib.suppress(OSError):
                    (folder / f".{name}.partial").unlink(missing_ok=True)
            raise StorageError(f"{folder} could not be written: {error.strerror}. Choose another folder.") from error
        return folder


def compress(
    model: nn.Module,
    calibration: Iterable[Any] | Tensor,
    *,
    budget: Budget,
    target: str = "onnxruntime",
    evaluate: Evaluate | None = None,
    recipe: Recipe | None = None,
    threads: int = 1,
    device: str | torch.device | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    quiet: bool = False,
    name: str | None = None,
    command: str | None = None,
    result: ResultKind = "auto",
) -> Result:
    """Return the network made to keep `budget` on `target`, with everything measured and checked.

    `target` is a name of `jettison.targets.TARGETS`, or "auto" for the fastest here that agrees with the original, in
    int8 where the recipe quantizes and in float32 where it does not; float-only targets need `Recipe(quantize=False)`.
    `model` is left as it is. `calibration` is a tensor of samples or a re-iterable of batches (a DataLoader);
    labels in it are ignored. `evaluate` maps a callable network to a score in 0..1 or one per sample (see
    `accuracy`); without it, agreement with the original is measured on a sealed fifth of the calibration data. `out` is
    the run's folder (a temporary one by default): started again with the same arguments, a run that was cut off goes on
    from its last finished stage. `threads` are the runtime's. `result` says what `Result.model` shall be: "auto" the
    caller's own class, with graphs where a submodule's source fixes a size, or else the graph of the whole; "eager" the
    caller's own class throughout, prune groups that its source cannot express staying whole, which a UserWarning says;
    "graph" always the graph.

    Raises BudgetError, carrying the best result, where the budget is not met; VerificationError where an oracle
    finds the result wrong; FixedSize where `result="eager"` cannot be had (the folder then holds the graph);
    InputError and its kinds for what was given; see `jettison.core.errors`.
    """
    recipe = recipe or Recipe()
    _check_settings(budget, recipe, threads, evaluate)
    check_kind(result)
    target = settle_target(target, model, calibration, quantize=recipe.quantize, threads=threads, seed=seed)
    runtime = find_target(target)
    if recipe.quantize:
        find_scheme(target)  # refuses a target that runs no integers
    find_criterion(recipe.criterion)
    where = _find_device(device, model)
    if where != _device_of(model):
        model = copy.deepcopy(model).to(where)
    # The caller may stand inside no_grad or inference_mode; gradients are switched on where something learns.
    with show_progress(not quiet), torch.random.fork_rng(), torch.inference_mode(False), torch.no_grad():
        data, arguments, keywords = make_calibration(calibration, model, seal=evaluate is None, seed=seed, device=where)
        graph = build_graph(trace_small(model, arguments, keywords))
        read_widths(graph, recipe)  # refuses names that nothing answers to
        if result == "eager" and recipe.prune:
            recipe = _protect_inexpressible(model, graph, recipe)
        if not graph.traced.dynamic_batch:
            data = replace(data, fixed=len(graph.traced.example[0]))
        if evaluate is None:
            evaluate = _make_agreement(graph, data)
        settings = to_plain(
            {
                "budget": budget,
                "recipe": recipe,
                "target": target,
                "threads": threads,
                "seed": seed,
                "device": str(where),
                "sealed": data.seal,
                "versions": {name: version(name) for name in ("jettison", "torch", "torchao", runtime.PACKAGE)},
            }
        )
        folder = _open(out, graph, data, settings)
        run = Run(graph, data, budget, recipe, runtime, threads, seed, folder)
        return _carry_out(run, model, evaluate, name or type(model).__name__, command or "", result)


def _carry_out(run: Run, model: nn.Module, evaluate: Evaluate, name: str, command: str, kind: ResultKind) -> Result:
    path = run.folder.path
    _export_once(run, "export original", "original", lambda: run.graph.module)
    if run.recipe.quantize:
        _export_once(run, "quantize original", "int8", lambda: _quantize(run, run.graph.module).module)
    reference = run.folder.do_json("reference", Reference, lambda: measure_reference(run))
    sensitivity = _timed(run, "sensitivity", lambda: load_sensitivity(run))
    plan = run.folder.do_json("plan", Plan, lambda: decide(run, sensitivity, reference))
    final = distil_from_original(run, plan, refit(run, plan))
    quantized = _quantize(run, final) if run.recipe.quantize else None
    deployed = final if quantized is None else quantized.module
    _export_once(run, "export", "model", lambda: deployed)
    widths = count_widths(run, final)
    measured = run.folder.do_json("measurements", Measurements, lambda: measure_variants(run, evaluate, widths))
    simulated = None if quantized is None else quantized.module
    checks = run.folder.do_json("checks", Checks, lambda: Checks(run_checks(run, plan, final, simulated)))
    delivered = deliver(model, run.graph, plan, final, result="auto" if kind == "eager" else kind)
    save_module(delivered, run.graph, final, path)
    if quantized is not None:
        traced = run.graph.traced
        replace(quantized, module=nest(quantized.module, traced.in_spec, traced.out_spec)).save(path)
    record = build_record(run, plan, sensitivity, final, quantized, measured, checks.checks, name, command)
    if delivered.note:
        record = replace(record, notes=(*record.notes, delivered.note))
    write_json(record, path / "record.json")
    write_html(record, path / "report.html")
    result = Result(delivered.module, plan, record, path)
    _judge(result, checks.checks)
    if kind == "eager" and delivered.kind != "eager":
        raise FixedSize(delivered.note)
    return result


def _protect_inexpressible(model: nn.Module, graph: Graph, recipe: Recipe) -> Recipe:
    """Protect the groups that the network's own source cannot express at half their size."""
    fixed = find_inexpressible(model, graph, {g.name: range(max(1, g.size // 2)) for g in graph.groups})
    if fixed:
        warnings.warn(explain_whole(fixed), stacklevel=3)
    return replace(recipe, protect=(*recipe.protect, *fixed))


def _judge(result: Result, checks: tuple[Check, ...]) -> None:
    """Raise where an oracle failed or the budget is missed."""
    failed = [c for c in checks if not c.passed]
    if failed:
        raise VerificationError(
            f"{len(failed)} of {len(checks)} checks failed, first {failed[0].name!r}: {failed[0].detail} "
            f"({failed[0].value:.3g} against {failed[0].tolerance:.3g}). Do not deploy {result.artifact}; "
            f"{result.folder / 'report.html'} shows all."
        )
    if not result.record.met:
        raise BudgetError(
            f"The budget is not met: {'; '.join(result.record.unmet)}. The best that was reached is in "
            f"{result.folder} and on this error's .result. Loosen that limit, or give recovery more "
            "steps with recipe=Recipe(steps=...).",
            result,
        )


def _quantize(run: Run, module: fx.GraphModule) -> Quantized:
    return quantize(module, run.batches, scheme=run.target.scheme())


def _export_once(run: Run, name: str, form: str, make: Any) -> None:
    run.folder.do(name, run.file(form).name, lambda path: path, make, partial(export_file, run))


def _timed(run: Run, name: str, compute: Any) -> Any:
    """Like a stage of the folder, for one that keeps its own file while it runs."""
    import time

    start = time.perf_counter()
    result = compute()
    if name not in {s.name for s in run.folder.list_stages()}:
        run.folder.note_time(name, time.perf_counter() - start)
    return result


def _check_settings(budget: Budget, recipe: Recipe, threads: int, evaluate: Evaluate | None) -> None:
    """Refuse at once what would otherwise show only after minutes."""
    for name, value, kind in (("budget", budget, Budget), ("recipe", recipe, Recipe)):
        if not isinstance(value, kind):
            raise InputError(f"{name}={value!r} is a {type(value).__name__}. Give a jettison.{kind.__name__}(...).")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads={threads!r} must be a whole number, at least 1.")
    if evaluate is not None and not callable(evaluate):
        raise InputError(
            f"evaluate is a {type(evaluate).__name__}. Give a function that scores a network, such as "
            "jettison.accuracy(batches)."
        )


def _find_device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    own = _device_of(model)
    if device is None:
        return own
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"device={device!r} cannot be used here: {str(error).splitlines()[0]} Leave it out, or pass 'cpu'."
        ) from error
    return where


def _device_of(model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise InputError(f"Expected a torch.nn.Module, got {type(model).__name__}. Pass the network itself.")
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _open(out: Path | str | None, graph: Graph, data: Calibration, settings: dict[str, Any]) -> RunFolder:
    path = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="jettison-"))
    first = next(data.iterate(), None)
    if first is None:
        raise InputError("There are no calibration items left after sealing a fifth. Give a few dozen inputs or more.")
    state = {k: v for k, v in graph.module.state_dict().items() if isinstance(v, Tensor)}
    return open_folder(path, fingerprint(state, first, graph.module.code, settings), settings)


def _make_agreement(graph: Graph, data: Calibration) -> Evaluate:
    sealed = list(data.iterate_sealed())
    if not sealed:
        raise InputError(
            "Without evaluate=, a fifth of the calibration inputs is sealed for the proof, and none fell into it. "
            "Give more inputs (a few hundred), or an evaluate function."
        )
    output = graph.module(*sealed[0])[0]
    if output.dim() < 2 or output.shape[1] < 2 or not output.is_floating_point():
        raise InputError(
            f"The network's first output has shape {tuple(output.shape)}, no class scores, so agreement cannot be "
            "counted. Pass evaluate= with a function that scores this network."
        )
    # The sealed batches are flat, so both networks are asked in the order of the graph's inputs.
    return agreement(nest_predict(graph.traced, lambda inputs: graph.module(*inputs)), sealed)
