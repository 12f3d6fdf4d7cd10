"""ONNX Runtime on the CPU: which patterns are integer, how to export, load, run, profile and audit.

Importable without onnxruntime; `why_missing` says what to install.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, TargetMissing
from jettison.core.record import TimeShare
from jettison.targets import onnx_recurrent
from jettison.targets.audit import Operator, check_precision, name_product, tell_integers
from jettison.targets.feeding import predict as predict
from jettison.targets.integer import CLAMPS, LAYERS, MOVES, IntegerScheme, Levels
from jettison.targets.memory import measure_growth
from jettison.targets.onnx_file import export as export
from jettison.targets.onnx_layers import PRODUCTS

if TYPE_CHECKING:
    import numpy as np

LABEL = "ONNX Runtime"
SUFFIX = ".onnx"
PACKAGE = "onnxruntime"
EXACT = True
PROFILED = True
PRECISIONS = ("fp32", "int8")
"""What its files can compute in; the file itself says which, by its QuantizeLinear nodes."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def why_missing() -> str | None:
    """Return None where this target is usable, else one sentence with the command that makes it so."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed: run `pip install {' '.join(missing)}`." if missing else None


def scheme(cpu_flags: frozenset[str] | None = None) -> IntegerScheme:
    """Return the integer arithmetic of ONNX Runtime's CPU kernels on this machine, or on one with `cpu_flags`."""
    exact, why = has_exact_dot_products(cpu_flags)
    limit = 127 if exact else 63
    return IntegerScheme(
        target="onnxruntime",
        activation=Levels(0, 255, symmetric=False),
        weight=Levels(-limit, limit, symmetric=True),
        # No transposed convolution: the CPU provider has no integer kernel for it.
        weighted=dict.fromkeys(LAYERS, 0),
        float_output=frozenset({"aten.linear.default"}),
        fused=CLAMPS,
        requantized=frozenset(
            {"aten.add.Tensor", "aten.mean.dim", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default"}
        ),
        shared=frozenset({"aten.cat.default"}),
        inherited=MOVES | {"aten.squeeze.dims"},
        why=why,
    )


@functools.cache
def read_cpu_flags() -> frozenset[str] | None:
    """Return the flags in /proc/cpuinfo, or None where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    return frozenset(
        flag
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
        for flag in line.split(":")[1].split()
    )


def has_exact_dot_products(flags: frozenset[str] | None = None) -> tuple[bool, str]:
    """Say whether u8 x s8 sums are exact here, and why; where not, int16 saturates and weights get 7 bits.

    Where the flags cannot be read, ARM (Apple silicon has dot products) is taken as exact and x86 as not.
    """
    flags = read_cpu_flags() if flags is None else flags
    if flags is None:
        arm = os.uname().machine in ("arm64", "aarch64") if hasattr(os, "uname") else False
        return (
            arm,
            f"CPU flags cannot be read; {'ARM is assumed to have' if arm else 'x86 is assumed to lack'} dot products",
        )
    for flag in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp"):
        if flag in flags:
            return True, f"{flag}: sums of u8 x s8 products are exact"
    return False, "no VNNI and no ARM dot product: int16 sums would saturate, so weights have 7 bits"


@dataclass(frozen=True)
class Session:
    """A loaded file. Shapes hold None where a dimension is free."""

    session: Any
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once; arrays stand in the order of `input_names`."""
        outputs: list[np.ndarray[Any, Any]] = self.session.run(None, dict(zip(self.input_names, arrays, strict=True)))
        return outputs


def load(path: Path, *, threads: int, precision: str = "fp32") -> Session:
    """Load a file with full graph optimisation; `threads` compute one operator, operators run one by one.

    Every file gets the same settings, whatever the `precision`, which the file decides. Threads spin while they wait,
    as is ONNX Runtime's default. Raises TargetMissing where onnxruntime is not installed, CheckpointError where the
    file is not a network, UnknownName for a precision it has not.
    """
    check_precision(precision, PRECISIONS)
    session = _open(path, _make_options(threads))
    return Session(
        session,
        tuple(i.name for i in session.get_inputs()),
        tuple(tuple(d if isinstance(d, int) else None for d in i.shape) for i in session.get_inputs()),
        tuple(o.name for o in session.get_outputs()),
    )


def _import_runtime() -> Any:
    reason = why_missing()
    if reason:
        raise TargetMissing(f"ONNX Runtime cannot be used on this machine. {reason}")
    import onnxruntime

    return onnxruntime


def _open(path: Path, options: Any) -> Any:
    runtime = _import_runtime()
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own error classes have no common public base
        raise CheckpointError(
            f"{path} is no network that ONNX Runtime can load: {str(error).splitlines()[0][:200]}. "
            "It may be cut short or made for a newer version. Export it anew."
        ) from error


def _make_options(threads: int) -> Any:
    runtime = _import_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.log_severity_level = 3
    return options


def profile(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, runs: int = 50
) -> tuple[TimeShare, ...]:
    """Return the median milliseconds of every operator of the runtime's own graph, longest first.

    The profiler itself costs a microsecond or so per operator; use `timing` for the network's latency.
    """
    found = list_operators(path, arrays, threads=threads, runs=runs)
    shares = [TimeShare(operator.name, operator.kernel, operator.ms or 0.0) for operator in found]
    return tuple(sorted(shares, key=lambda share: -share.ms))


def _plain_name(name: str) -> str:
    """Take off what the runtime adds to a node's name when it changes the layout or fuses."""
    return re.sub(r"(_nchwc|_token_\d+)+$", "", name.removeprefix("fused "))


INTEGER_OPERATORS = frozenset(
    {
        "QLinearConv",
        "ConvInteger",
        "QGemm",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QLinearMatMul",
        "QAttention",
    }
)
ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
MOVING = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice"})
TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether the runtime's own optimised graph computes it on integers.

    A layer is found by its weight's name in the file (`export` keeps the dotted names) or by its node's name.
    It counts as integer only if every operator found for it is an integer one.
    """
    return tell_integers(layers, list_operators(path, None, threads=1))


def list_operators(
    path: Path,
    arrays: Sequence[np.ndarray[Any, Any]] | None,
    *,
    threads: int,
    precision: str = "fp32",
    runs: int = 50,
) -> tuple[Operator, ...]:
    """Return the operators of the runtime's own optimised graph in its order, with times where `arrays` are given."""
    import onnx

    check_precision(precision, PRECISIONS)
    options = _make_options(threads)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        if arrays is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
        session = _open(path, options)
        graph = onnx.load(options.optimized_model_filepath).graph
        timed = {} if arrays is None else _time_nodes(session, arrays, runs)
    producers = {output: node for node in graph.node for output in node.output}
    outside = {value.name for value in graph.input}, {value.name for value in graph.output}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for value in node.input:
            readers[value].append(node)
    constants = {value.name for value in graph.initializer}
    found = []
    for node in graph.node:
        ms, kind = timed.get(node.name, (None, ""))
        alone = node.op_type in ROUNDING and not _at_an_end(node, producers, readers, outside, constants)
        covers = () if node.op_type in (*ROUNDING, *MOVING) else _list_covered(node, producers)
        found.append(Operator(_plain_name(node.name), node.op_type, _tell_precision(node, kind), covers, alone, ms))
    return tuple(found)


def _time_nodes(session: Any, arrays: Sequence[np.ndarray[Any, Any]], runs: int) -> dict[str, tuple[float, str]]:
    """Return each node's median milliseconds and the element type of its first input."""
    names = [i.name for i in session.get_inputs()]
    warm = max(3, runs // 10)
    for _ in range(warm + runs):
        session.run(None, dict(zip(names, arrays, strict=True)))
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"] / 1000)
            kinds[name] = next((kind for given in event["args"].get("input_type_shape", ()) for kind in given), "")
    return {name: (statistics.median(ms[warm:]), kinds[name]) for name, ms in times.items()}


def _tell_precision(node: Any, kind: str) -> str:
    if node.op_type in ROUNDING:
        return "rounding"
    body = onnx_recurrent.read_body(node)
    if body is not None:
        products = {inner.op_type for inner in body.node} & {*INTEGER_OPERATORS, *PRODUCTS, "FusedMatMul"}
        return (
            "int8" if products and products <= INTEGER_OPERATORS else TYPES.get(kind, "fp32" if not kind else "other")
        )
    if node.op_type in INTEGER_OPERATORS or node.op_type.startswith("QLinear"):
        return "int8"
    return TYPES.get(kind, "fp32" if not kind else "other")


def _list_covered(node: Any, producers: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of what this operator computes: its own, and the weights it reads, unpacked or not."""
    names = [_plain_name(node.name)]
    if node.op_type.removeprefix("Fused") in PRODUCTS:
        # A product is named after the last of what it has taken in: "conv.relu", "matmul/MatMulScaleFusion/".
        names.append(name_product(names[0]))
    body = onnx_recurrent.read_body(node)
    for name in (*node.input, *(i.name for i in (body.initializer if body is not None else ()))):
        while name in producers and producers[name].op_type in ("DequantizeLinear", "Transpose", "Cast"):
            name = producers[name].input[0]
        if name not in producers:
            names.append(name.removesuffix("_nchwc"))
    names += dict.fromkeys(layer for layer in map(onnx_recurrent.find_layer, names) if layer)
    return tuple(names)


def _at_an_end(
    node: Any,
    producers: Mapping[str, Any],
    readers: Mapping[str, Sequence[Any]],
    outside: tuple[set[str], set[str]],
    constants: set[str],
) -> bool:
    """Say if a rounding stands where it must: at the network's input, at its output, or on a constant."""
    name = node.input[0]
    while name in producers and producers[name].op_type in MOVING:
        name = producers[name].input[0]
    if name in outside[0] or name in constants:
        return True
    name = node.output[0]
    while name not in outside[1]:
        following = readers.get(name, ())
        if len(following) != 1 or following[0].op_type not in MOVING:
            return False
        name = following[0].output[0]
    return True


_START = """
import onnxruntime as ort

def start(path, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": bool}
    shape = lambda i: [d if isinstance(d, int) else 1 for d in i.shape]
    feed = {i.name: np.zeros(shape(i), kinds[i.type]) for i in session.get_inputs()}
    return lambda: session.run(None, feed)
"""


def measure_peak_memory(path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows through this network at batch 1.

    See `memory.measure_growth` for what is counted. Raises TargetMissing where onnxruntime is not installed,
    CheckpointError where the file does not run.
    """
    _import_runtime()
    return measure_growth(_START, path, threads=threads)
