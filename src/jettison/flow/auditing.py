"""Which kernels a runtime really uses for a file, and in words why it is not faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jettison.core.errors import InputError
from jettison.flow.reading import order_inputs
from jettison.targets import find_target
from jettison.targets.audit import Kernel, KernelAudit, Operator, match, share_of_integers, share_of_time
from jettison.targets.feeding import open_run
from jettison.targets.onnx_layers import list_layers, read_input_types
from jettison.targets.onnxruntime import has_exact_dot_products, read_cpu_flags
from jettison.targets.timing import time_interleaved

AUDITED = ("onnxruntime", "openvino")
"""Targets that show the graph they run."""
FLOATS = ("fp32", "fp16", "bf16")
WORTH_SAYING = 0.05
"""A share of the time below this would change little if it went."""
BUSY_MS = 0.02
"""An operator that takes less spends much of it on being called."""


def audit(
    path: Path | str,
    *,
    target: str = "onnxruntime",
    inputs: Any = None,
    baseline: Path | str | None = None,
    threads: int = 1,
    precision: str = "fp32",
    runs: int = 50,
) -> KernelAudit:
    """Return what a runtime makes of an exported ONNX file: kernels and precision per layer, roundings left, findings.

    The file is run `runs` times with profiling on `inputs` (a tensor, a tuple, or a dict by input name; by default,
    where no dimension but the batch is free, one row of zeros, or of ones where they are whole numbers). With
    `baseline`, the float file, both are also timed in turns.
    `precision` is what the runtime is asked for where the file is float ("bf16" in OpenVINO).
    Raises CheckpointError where it is no ONNX network, ShapeError where inputs do not fit, TargetMissing, UnknownName.
    """
    if target not in AUDITED:
        raise InputError(
            f"target={target!r} does not show which kernels it runs. {' and '.join(AUDITED)} do. Audit the file there."
        )
    path, runtime = Path(path), find_target(target)
    session = runtime.load(path, threads=threads, precision=precision)
    arrays = _make_arrays(path, session, inputs)
    runtime.predict(session, tuple(torch.from_numpy(a) for a in arrays))  # refuses what does not fit
    operators = runtime.list_operators(path, arrays, threads=threads, precision=precision, runs=runs)
    kernels = match(list_layers(path, [a.shape for a in arrays]), operators)
    speedup = None
    if baseline is not None:
        both = {
            "baseline": partial(open_run, runtime, Path(baseline), arrays, threads=threads),
            "this": partial(open_run, runtime, path, arrays, threads=threads, precision=precision),
        }
        speedup = time_interleaved(both, baseline="baseline")["this"].speedup
    found = KernelAudit(
        target=runtime.LABEL,
        file=path.name,
        precision=_say_precision(kernels, precision),
        kernels=kernels,
        operators=operators,
        integer_share=share_of_integers(kernels),
        float_share=share_of_time(operators, FLOATS),
        rounding_share=_share(operators, [o for o in operators if o.alone]),
        speedup=speedup,
        findings=(),
    )
    findings = (*_explain_speed(found), *_explain_layers(found, target), *_explain_time(found), *_name_options(found))
    return KernelAudit(**{**vars(found), "findings": findings})


def _make_arrays(path: Path, session: Any, inputs: Any) -> list[np.ndarray[Any, Any]]:
    if inputs is not None:
        return [np.ascontiguousarray(x.detach().cpu().numpy()) for x in order_inputs(inputs, session.input_names)]
    for name, shape in zip(session.input_names, session.input_shapes, strict=True):
        if any(size is None for size in shape[1:]):
            raise InputError(
                f"Input {name!r} has the shape {shape}, free in more than its batch. What it costs depends on those "
                "sizes. Pass inputs=."
            )
    types = read_input_types(path)
    # Ones where they are whole numbers: a mask of zeros would hide every token from the others.
    return [
        np.full([size or 1 for size in shape], 0 if types[name].kind == "f" else 1, types[name])
        for name, shape in zip(session.input_names, session.input_shapes, strict=True)
    ]


def _say_precision(kernels: Sequence[Kernel], precision: str) -> str:
    stored = {k.stored for k in kernels if not k.weights_only}
    small = sorted({k.stored for k in kernels if k.weights_only})
    return "int8" if "int8" in stored else f"{small[0]} weights" if small else precision


def _share(operators: Sequence[Operator], some: Sequence[Operator]) -> float | None:
    total = sum(o.ms or 0.0 for o in operators)
    return sum(o.ms or 0.0 for o in some) / total if total else None


def _explain_speed(found: KernelAudit) -> list[str]:
    if found.speedup is None or found.speedup.high >= 1.0:
        return []
    return [
        f"This file is slower than its baseline: {found.speedup.value:.2f} times its speed (at most "
        f"{found.speedup.high:.2f}). Do not deploy it for speed; `jettison.choose_target` measures the alternatives."
    ]


def _explain_layers(found: KernelAudit, target: str) -> list[str]:
    """Name the layers that do not run on integers, by cause."""
    weighted = [k for k in found.kernels if k.stored]
    if not any(k.stored.startswith("int") for k in weighted):
        return ["No layer of this file is int8. `jettison.quantize` makes such a file."]
    total, findings = sum(k.macs for k in weighted), []
    floats = [k for k in found.left_in_float if k.stored in FLOATS]
    if floats:
        other = " OpenVINO has one for ConvTranspose." if _is_transposed(floats, found) else ""
        findings.append(
            f"{_list_names(floats)} ({_percent(floats, total)} of the MACs) have float weights in the file: excluded "
            f"by name, or of a kind that {found.target} has no integer kernel for. Take them out of exclude=, or prune "
            f"them, where they cost too much.{other}"
        )
    light = [k for k in found.left_in_float if k.weights_only]
    if light:
        stored = _list(sorted({k.stored for k in light}))
        findings.append(
            f"{_list_names(light)} ({_percent(light, total)} of the MACs) have {stored} weights only: they save memory "
            "and the time to read it, as where one token is computed at a time, and multiply in float. Quantize the "
            "activations too where the multiplications take the time."
        )
    unused = [k for k in found.left_in_float if k.stored not in FLOATS and not k.weights_only]
    if unused:
        kinds = sorted({k.operator for k in unused})
        remedy = f"Quantize with target={target!r}, which places the roundings where its kernels take them in"
        if kinds == ["ConvTranspose"] and target == "openvino":
            remedy = "It takes them only where their input is not negative: put a ReLU before them"
        if kinds == ["MatMulInteger"]:
            remedy = "Ranges are found at each call here: quantize with kind='static'"
        findings.append(
            f"{_list_names(unused)} ({_percent(unused, total)} of the MACs) have int8 weights but run as "
            f"{_list(sorted({k.kernel for k in unused}))}: {found.target} has no integer kernel for {_list(kinds)} as "
            f"this file writes it. {remedy}, or exclude these layers, so that nothing is unpacked."
        )
    rounded = [k for k in weighted if k.stored in FLOATS and k.precision == "int8"]
    if rounded:
        findings.append(
            f"{_list_names(rounded)} have float weights in the file, and {found.target} rounds them by itself, with "
            "one scale for all channels. Export the network with `jettison.export`, which keeps such layers float, or "
            "quantize them with it, channel by channel."
        )
    products = [k for k in found.kernels if not k.stored and k.precision != "int8"]
    if products:
        macs = sum(k.macs for k in products)
        findings.append(
            f"{len(products)} products of two activations (attention), {macs / (total + macs):.0%} of all MACs, run in "
            "float: they are not quantized. bf16 makes them faster where the processor has it."
        )
    return findings


def _is_transposed(kernels: Sequence[Kernel], found: KernelAudit) -> bool:
    return any(k.operator == "ConvTranspose" for k in kernels) and "OpenVINO" not in found.target


def _explain_time(found: KernelAudit) -> list[str]:
    """Say where the time goes that integers do not save."""
    findings, operators = [], found.operators
    integer = found.precision == "int8"
    alone = found.rounding_share or 0.0
    floats = [o for o in operators if o.precision in FLOATS and o.ms]
    names = _list(_rank(floats)[:4])
    if integer and found.alone and alone >= WORTH_SAYING:
        around = f", around operators that stay in float: {names}" if floats else ""
        findings.append(
            f"{len(found.alone)} roundings stand alone and take {alone:.0%} of the time{around}. Exclude the small "
            "layers between such operators, or run the float part in bf16."
        )
    if integer and (found.float_share or 0.0) >= WORTH_SAYING:
        findings.append(
            f"{found.float_share:.0%} of the time is floating point, most of it in {names}. Integers cannot speed "
            "that up; bf16 or pruning can."
        )
    deep = [k for k in found.kernels if k.depthwise]
    total = sum(o.ms or 0.0 for o in operators)
    spent = sum(k.ms or 0.0 for k in deep)
    macs = sum(k.macs for k in found.kernels)
    if deep and total and spent / total > 2 * sum(k.macs for k in deep) / macs and spent / total >= WORTH_SAYING:
        findings.append(
            f"{len(deep)} depthwise convolutions take {spent / total:.0%} of the time for "
            f"{sum(k.macs for k in deep) / macs:.0%} of the MACs. They do little with each value they move, "
            "so that int8 saves memory traffic only. Prune their channels to multiples of 16, or use dense ones."
        )
    busy = [o for o in operators if o.ms]
    small = [o for o in busy if (o.ms or 0.0) < BUSY_MS]
    spent = sum(o.ms or 0.0 for o in small)
    if busy and spent > total / 2:
        findings.append(
            f"{len(small)} of {len(busy)} operators take less than {BUSY_MS * 1000:.0f} µs each and together "
            f"{spent / total:.0%} of the time: the network is so small that calling them counts as much as computing. "
            "Remove layers rather than channels, or run larger batches."
        )
    return findings


def _name_options(found: KernelAudit) -> list[str]:
    findings = []
    exact, why = has_exact_dot_products()
    if found.precision == "int8" and not exact:
        findings.append(f"On this processor weights have 7 bits ({why}). Another machine may be faster and more exact.")
    flags = read_cpu_flags() or frozenset()
    halves = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    if halves and found.precision == "fp32":
        findings.append(
            f"This processor computes bfloat16 ({', '.join(halves)}): OpenVINO runs this very file in bf16, without "
            "calibration. `jettison.choose_target` measures it."
        )
    return findings


def _rank(operators: Sequence[Operator]) -> list[str]:
    spent: dict[str, float] = {}
    for operator in operators:
        spent[operator.kernel] = spent.get(operator.kernel, 0.0) + (operator.ms or 0.0)
    return sorted(spent, key=lambda kernel: -spent[kernel])


def _percent(kernels: Sequence[Kernel], total: int) -> str:
    return f"{sum(k.macs for k in kernels) / total:.1%}" if total else "0 %"


def _list_names(kernels: Sequence[Kernel]) -> str:
    names = [repr(k.layer) for k in kernels]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{_list(names[:4])}{more}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
