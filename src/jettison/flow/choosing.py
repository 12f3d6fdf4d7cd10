"""Where and in which precision a network runs fastest: every target here, measured on the network itself, in turns."""

from __future__ import annotations

import contextlib
import importlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from jettison.core.errors import CalibrationError, InputError, JettisonError, TargetMissing, UnknownName
from jettison.core.record import Interval
from jettison.flow.auditing import AUDITED, audit
from jettison.flow.calibration import make_calibration
from jettison.flow.evaluation import Evaluate, run_evaluate
from jettison.flow.options import Option, TargetChoice
from jettison.flow.reading import Data, fit_batch
from jettison.flow.run import nest_predict
from jettison.graph.trace import Batch, Traced, trace_module
from jettison.progress import track
from jettison.quantization import quantize
from jettison.targets import TARGETS
from jettison.targets.feeding import open_run
from jettison.targets.integer import IntegerScheme
from jettison.targets.timing import ROUNDS, Timing, bootstrap_median, time_interleaved

BASELINE = "onnxruntime fp32"
HELD_OUT = 256
NOISY = 1.5
"""An interval whose ends are further apart than this factor decides nothing."""


@dataclass(frozen=True)
class _Loaded:
    """A file that runs, before it is measured."""

    target: ModuleType
    precision: str
    file: Path
    session: Any

    @property
    def name(self) -> str:
        return f"{self.target.__name__.rpartition('.')[2]} {self.precision}"


@dataclass(frozen=True)
class _Limits:
    min_agreement: float
    min_sqnr_db: float
    max_drop: float
    evaluate: Evaluate | None


@dataclass
class _Work:
    """What the options share while they are made: the float graph, and one int8 form for each kind of arithmetic."""

    traced: Traced
    batches: list[Batch]
    folder: Path
    forms: list[tuple[IntegerScheme | None, Any]] = field(default_factory=list)
    files: dict[tuple[str, str], Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def choose_target(
    model: nn.Module,
    calibration: Data,
    *,
    threads: int = 1,
    targets: Sequence[str] = TARGETS,
    min_agreement: float = 0.95,
    min_sqnr_db: float = 20.0,
    evaluate: Evaluate | None = None,
    max_drop: float = 1.0,
    samples: int = 512,
    rounds: int = ROUNDS,
    seed: int = 0,
    out: Path | str | None = None,
) -> TargetChoice:
    """Measure every usable target and precision on this network in one interleaved run and recommend one.

    int8 forms are calibrated on `samples` of the inputs, and all are judged on the sealed fifth of them, which nothing
    else sees: `min_agreement` is the least share of inputs (0..1) that must get the original's class, `min_sqnr_db`
    the least signal to noise in dB where the first output is no class scores; with `evaluate`, at most `max_drop`
    points of its score may go instead. Latency is of one sample, or the traced batch where the network fixes it.
    Files are written to `out`, by default a temporary folder. A target that fails is a line of the table, no error.
    Raises CalibrationError for too few inputs, UnknownName for a target that is none, TargetMissing where none runs.
    """
    for name in targets:
        if name not in TARGETS:
            raise UnknownName("target", name, TARGETS)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads={threads!r} must be a whole number, at least 1.")
    limits = _Limits(min_agreement, min_sqnr_db, max_drop, evaluate)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        data, arguments, keywords = make_calibration(
            calibration, model, seal=True, seed=seed, device=_find_device(model)
        )
        traced = trace_module(model, arguments, keywords)
        data = fit_batch(data, traced)
        held_out = _take(list(data.iterate_sealed()), HELD_OUT)
        folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="jettison-"))
        work = _Work(traced, data.take(samples), folder)
        loaded = _load_all(work, targets, threads)
        if not loaded:
            lines = [f"{name}: {why}" for name, why in {**work.missing, **work.failed}.items()]
            raise TargetMissing(f"No target runs this network here. {' '.join(lines)}")
        timings, baseline = _time(loaded, _sample(traced, held_out), threads, rounds, seed)
        options = _judge(work, loaded, timings, baseline, held_out, limits, seed)
    recommended, reason = _recommend(options, timings, baseline, seed)
    count = sum(len(batch[0]) for batch in held_out)
    ranked = tuple(sorted(options, key=lambda option: -option.speedup.value))
    return TargetChoice(ranked, recommended, reason, baseline, threads, count, work.missing, work.failed, folder)


def settle_target(target: str, model: nn.Module, calibration: Data, *, quantize: bool, threads: int, seed: int) -> str:
    """Return the target to compress for; "auto" measures them all on the network first.

    Of "auto"'s options only those in the precision that will be deployed count: int8, or float32 without `quantize`.
    Raises InputError, with the table, where none of them agrees with the original.
    """
    if target != "auto":
        return target
    choice = choose_target(model, calibration, threads=threads, seed=seed)
    precision = "int8" if quantize else "fp32"
    found = next((o for o in choice.options if o.precision == precision and o.good), None)
    if found is None:
        raise InputError(
            f"{choice}\nNo target here keeps this network's outputs in {precision}, so none can be chosen to compress "
            f"for. {'Pass recipe=Recipe(quantize=False), or n' if quantize else 'N'}ame the target yourself."
        )
    return found.target


def _find_device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _take(batches: list[Batch], samples: int) -> list[Batch]:
    """Return the first batches that hold so many samples; whole ones, since a network may fix its batch."""
    taken: list[Batch] = []
    for batch in batches:
        if sum(len(b[0]) for b in taken) >= samples:
            break
        taken.append(batch)
    if not taken:
        raise CalibrationError(
            "No calibration input fell into the sealed fifth that judges the targets. What they lose cannot be said. "
            "Give a few hundred inputs."
        )
    return taken


def _sample(traced: Traced, held_out: Sequence[Batch]) -> Batch:
    return tuple(x[:1] for x in held_out[0]) if traced.dynamic_batch else held_out[0]


def _load_all(work: _Work, targets: Sequence[str], threads: int) -> list[_Loaded]:
    """Export and load every option that works; the others are noted with their reason."""
    loaded = []
    for name in track(list(targets), "Exporting for each target"):
        target = importlib.import_module(f"jettison.targets.{name}")
        why = target.why_missing()
        if why is not None:
            work.missing[name] = why
            continue
        for precision in target.PRECISIONS:
            try:
                path = _export(work, target, name, precision)
                session = target.load(path, threads=threads, precision=precision)
                target.predict(session, _sample(work.traced, work.batches))
                loaded.append(_Loaded(target, precision, path, session))
            except Exception as error:  # noqa: BLE001 - whatever a runtime raises is a line of the table
                work.failed[f"{name} {precision}"] = _say(error)
    return loaded


def _say(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return str(error) if isinstance(error, JettisonError) else f"{type(error).__name__}: {lines[0][:200]}"


def _export(work: _Work, target: ModuleType, name: str, precision: str) -> Path:
    """Return the target's file of the float or the int8 form, written on first use; equal ONNX files are shared."""
    index, module = _find_form(work, target.scheme() if precision == "int8" else None)
    key = ("onnx" if target.SUFFIX == ".onnx" else name, "float" if index == 0 else f"int8-{index}")
    if key not in work.files:
        traced, path = work.traced, work.folder / f"{key[0]}-{key[1]}{target.SUFFIX}"
        work.folder.mkdir(parents=True, exist_ok=True)
        target.export(
            module,
            traced.example,
            path,
            input_names=list(traced.input_names),
            output_names=[f"output{i}" if i else "output" for i in range(traced.out_spec.num_leaves)],
            dynamic_batch=traced.dynamic_batch,
        )
        work.files[key] = path
    return work.files[key]


def _find_form(work: _Work, scheme: IntegerScheme | None) -> tuple[int, Any]:
    """Return the graph in that arithmetic and its number, quantized on first use; number 0 is the float one."""
    if not work.forms:
        work.forms.append((None, work.traced.module))
    plain = None if scheme is None else replace(scheme, target="", why="")
    for index, (known, module) in enumerate(work.forms):
        if known == plain:
            return index, module
    assert scheme is not None
    work.forms.append((plain, quantize(work.traced.module, work.batches, scheme=scheme).module))
    return len(work.forms) - 1, work.forms[-1][1]


def _time(
    loaded: Sequence[_Loaded], sample: Batch, threads: int, rounds: int, seed: int
) -> tuple[dict[str, Timing], str]:
    names = [option.name for option in loaded]
    baseline = BASELINE if BASELINE in names else next((n for n in names if n.endswith("fp32")), names[0])
    arrays = [x.detach().cpu().numpy() for x in sample]
    loads = {
        option.name: partial(open_run, option.target, option.file, arrays, threads=threads, precision=option.precision)
        for option in loaded
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return time_interleaved(loads, baseline=baseline, rounds=rounds, seed=seed), baseline
    finally:
        torch.set_num_threads(before)


def _judge(
    work: _Work,
    loaded: Sequence[_Loaded],
    timings: Mapping[str, Timing],
    baseline: str,
    held_out: Sequence[Batch],
    limits: _Limits,
    seed: int,
) -> list[Option]:
    """Compare what each option gives with the original, and say what should be known of it."""
    original = [work.traced.module(*batch) for batch in held_out]
    scored = None
    if limits.evaluate is not None:
        scored = run_evaluate(limits.evaluate, nest_predict(work.traced, lambda x: work.traced.module(*x)), "original")
    options = []
    for one in track(list(loaded), "Comparing with the original"):
        predict = partial(one.target.predict, one.session)
        outputs = [predict(tuple(x.cpu() for x in batch)) for batch in held_out]
        agreement, sqnr_db = _compare(original, outputs)
        drop = None
        if limits.evaluate is not None and scored is not None:
            nested = nest_predict(work.traced, lambda x, predict=predict: predict(tuple(t.cpu() for t in x)))
            drop = 100 * (scored.value - run_evaluate(limits.evaluate, nested, one.name).value)
        good, why = _keeps(limits, agreement, sqnr_db, drop)
        target = one.name.rpartition(" ")[0]
        float_name = f"{target} fp32"
        over = None
        if one.precision != "fp32" and float_name in timings:
            over = _compare_speed(timings[one.name], timings[float_name], seed)
        timing = timings[one.name]
        notes = ([] if good else [why]) + _warn_of_speed(one, target, over, timing.speedup, baseline, work)
        options.append(
            Option(
                target=target,
                precision=one.precision,
                file=one.file,
                size_bytes=_measure_size(one.file),
                latency_ms=timing.latency_ms,
                speedup=timing.speedup,
                over_float=over,
                agreement=agreement,
                sqnr_db=sqnr_db,
                drop_points=drop,
                good=good,
                notes=tuple(notes),
            )
        )
    return options


def _compare(original: Sequence[Batch], outputs: Sequence[Batch]) -> tuple[float | None, float]:
    """Return the share of equal classes (None where there are no class scores) and 10 log10(signal / noise)."""
    signal = noise = 0.0
    same: list[Tensor] = []
    for wanted, found in zip(original, outputs, strict=True):
        for mine, theirs in zip(found, wanted, strict=True):
            if theirs.is_floating_point():
                signal += float(theirs.double().square().sum())
                noise += float((mine.cpu().double() - theirs.cpu().double()).square().sum())
        if wanted[0].dim() >= 2 and wanted[0].shape[1] >= 2 and wanted[0].is_floating_point():
            same.append((found[0].cpu().argmax(1) == wanted[0].cpu().argmax(1)).float().flatten())
    ratio = math.inf if noise == 0.0 else 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf
    # A noise that is itself NaN says that the outputs are.
    return (float(torch.cat(same).mean()) if same else None), -math.inf if math.isnan(noise) else ratio


def _keeps(limits: _Limits, agreement: float | None, sqnr_db: float, drop: float | None) -> tuple[bool, str]:
    if drop is not None:
        return drop <= limits.max_drop, f"loses {drop:.2f} points, more than max_drop={limits.max_drop}."
    if agreement is not None:
        return (
            agreement >= limits.min_agreement,
            f"agrees with the original on {agreement:.1%}, less than min_agreement={limits.min_agreement}.",
        )
    return sqnr_db >= limits.min_sqnr_db, f"has {sqnr_db:.1f} dB, less than min_sqnr_db={limits.min_sqnr_db}."


def _compare_speed(timing: Timing, other: Timing, seed: int) -> Interval:
    """Return how many times faster `timing` is than `other`, round by round."""
    ratios = [b / t for b, t in zip(other.samples_ms, timing.samples_ms, strict=True)]
    return bootstrap_median(ratios, sittings=timing.sittings, seed=seed)


def _warn_of_speed(
    one: _Loaded, target: str, over: Interval | None, speedup: Interval, baseline: str, work: _Work
) -> list[str]:
    """Say where an option is slower than the float it replaces, with the audit's reason where there is one."""
    slower = {f"{target} fp32": over, baseline: speedup if one.precision != "fp32" else None}
    notes = [
        f"is slower than {name}: {ratio.value:.2f} times its speed. Do not use it for speed."
        for name, ratio in slower.items()
        if ratio is not None and ratio.high < 1.0
    ]
    if notes and one.precision == "int8" and target in AUDITED:
        with contextlib.suppress(JettisonError):  # the audit needs an input it can make up
            notes += audit(one.file, target=target, inputs=_sample(work.traced, work.batches), runs=10).findings[:1]
    return notes


def _measure_size(file: Path) -> int:
    weights = file.with_suffix(".bin")
    return file.stat().st_size + (weights.stat().st_size if file.suffix == ".xml" and weights.exists() else 0)


EXACTNESS = ("fp32", "fp16", "bf16", "int8")


def _recommend(
    options: Sequence[Option], timings: Mapping[str, Timing], baseline: str, seed: int
) -> tuple[Option, str]:
    """Return the fastest option that keeps the limits; of equally fast ones the most exact."""
    good = [option for option in options if option.good]
    if not good:
        best = max(options, key=lambda option: option.sqnr_db)
        return best, "No option keeps the limits; this is the nearest to the original."
    fastest = max(good, key=lambda option: option.speedup.value)
    equal = [
        option
        for option in good
        if option is fastest or _compare_speed(timings[fastest.name], timings[option.name], seed).low <= 1.0
    ]
    best = min(equal, key=lambda option: (EXACTNESS.index(option.precision), -option.speedup.value))
    reason = f"It is {best.speedup.value:.2f} times as fast as {baseline} and keeps the limits."
    if best is not fastest:
        reason += f" {fastest.name} is as fast within the measurement, and less exact."
    lossy = [o for o in options if not o.good and o.speedup.value > best.speedup.value]
    if lossy:
        reason += f" Faster, but beyond the limits: {', '.join(o.name for o in lossy)}."
    if best.precision == "int8" and (best.notes or best.speedup.high < 1.0):
        reason += " It is slower than a float form, which does not keep the limits."
    if best.speedup.high > NOISY * best.speedup.low:
        reason += " The intervals are wide, so the machine was busy: measure again, or with more rounds."
    return best, reason
