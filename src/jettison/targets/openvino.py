"""OpenVINO on the CPU: the same ONNX files and its own IR, in float32, in bfloat16 by a hint, or in int8.

OpenVINO's own default is bfloat16 where the processor has it, which would make a float baseline look both faster and
less exact than it is; here the precision is always said. Importable without openvino.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, TargetMissing
from jettison.core.plain import write_bytes
from jettison.core.record import TimeShare
from jettison.targets import onnx_file, onnx_layers
from jettison.targets import onnxruntime as ort
from jettison.targets.audit import Operator, check_precision, name_product, rank_times, tell_integers
from jettison.targets.feeding import predict as predict
from jettison.targets.integer import LAYERS, IntegerScheme
from jettison.targets.memory import find_death, measure_growth

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.fx import GraphModule

LABEL = "OpenVINO"
SUFFIX = ".onnx"
PACKAGE = "openvino"
EXACT = False
PROFILED = True
PRECISIONS = ("fp32", "bf16", "int8")
"""int8 is what the file says by its QuantizeLinear nodes; its float parts then run in float32."""
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}
SHAPES_KEPT = 3


def why_missing() -> str | None:
    """Return None where OpenVINO is installed, else one sentence with the command that installs it."""
    missing = [name for name in ("openvino", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed: run `pip install {' '.join(missing)}`." if missing else None


def scheme(cpu_flags: frozenset[str] | None = None) -> IntegerScheme:
    """Return the integer arithmetic of OpenVINO's CPU kernels on this machine, or on one with `cpu_flags`.

    That of ONNX Runtime, with transposed convolutions, which ONNX Runtime never runs on integers and OpenVINO does
    where their input is not negative, as after a ReLU. Elsewhere it unpacks their weights at every run: the audit names
    them, exclude them then. A convolution takes in the addition after it and does not round in between, whatever the
    file says; so files ask for no rounding there.
    """
    base = ort.scheme(cpu_flags)
    return replace(
        base,
        target="openvino",
        weighted={**base.weighted, "aten.conv_transpose2d.input": 1},
        summed=frozenset(name for name in LAYERS if "conv" in name),
    )


def export(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_batch: bool,
) -> None:
    """Write a float or converted graph as ONNX, or where `path` ends in ".xml" as OpenVINO's IR with its ".bin" beside.

    Raises what `onnx_file.export` raises.
    """
    if path.suffix != ".xml":
        onnx_file.export(
            module, inputs, path, input_names=input_names, output_names=output_names, dynamic_batch=dynamic_batch
        )
        return
    with tempfile.TemporaryDirectory() as name:
        onnx = Path(name) / "model.onnx"
        onnx_file.export(
            module, inputs, onnx, input_names=input_names, output_names=output_names, dynamic_batch=dynamic_batch
        )
        openvino = _import_runtime()
        openvino.save_model(_read(onnx), str(onnx.with_suffix(".xml")), compress_to_fp16=False)
        # The weights first: a description without them would be a broken network.
        for suffix in (".bin", ".xml"):
            write_bytes(onnx.with_suffix(suffix).read_bytes(), path.with_suffix(suffix))


@dataclass(frozen=True)
class Session:
    """A loaded network. Shapes hold None where a dimension is free.

    One with free dimensions is compiled anew for each of the first shapes it meets, since kernels for a known shape are
    faster; beyond `SHAPES_KEPT` shapes one form serves all.
    """

    model: Any
    settings: dict[str, Any]
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]
    requests: dict[tuple[tuple[int, ...], ...], Any] = field(default_factory=dict)

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once; arrays stand in the order of `input_names`."""
        shapes = tuple(a.shape for a in arrays)
        request = self.requests.get(shapes) or self._compile(shapes)
        return list(request.infer(dict(enumerate(arrays)), share_inputs=True).values())

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        key = shapes if len(self.requests) < SHAPES_KEPT else ()
        if key not in self.requests:
            self.requests[key] = _compile(self.model, self.settings, shapes if key else None).create_infer_request()
        return self.requests[key]


def load(path: Path, *, threads: int, precision: str = "fp32") -> Session:
    """Load an ONNX or IR file for latency with a fixed number of threads, in the precision that is said.

    An int8 network with a concatenation is tried in a process of its own before its first loading, since OpenVINO is
    known to kill the one that compiles some of them. Raises TargetMissing where openvino is not installed or the
    processor has no such precision, CheckpointError where the file is not a network or deadly, UnknownName for a
    precision this target has not.
    """
    check_precision(precision, PRECISIONS)
    model = _read(path)
    if {"Concat", "FakeQuantize"} <= {operator.get_type_name() for operator in model.get_ops()}:
        _refuse_deadly(path.resolve(), path.stat().st_mtime_ns, threads)
    if precision == "bf16" and "BF16" not in _import_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise TargetMissing(
            "This processor has no bfloat16 arithmetic, which OpenVINO's bf16 needs. It needs avx512_bf16, AMX or "
            "ARM's bf16. Use fp32 or int8 here."
        )
    settings = describe_settings(threads=threads, precision=precision)
    shapes = tuple(tuple(d.get_length() if d.is_static else None for d in i.get_partial_shape()) for i in model.inputs)
    return Session(
        model,
        settings,
        tuple(i.get_any_name() for i in model.inputs),
        shapes,
        tuple(o.get_any_name() for o in model.outputs),
    )


@functools.lru_cache(maxsize=256)
def _refuse_deadly(path: Path, changed_ns: int, threads: int) -> None:
    death = find_death(_START, path, threads=threads)
    if death is not None:
        raise CheckpointError(
            f"OpenVINO {_import_runtime().__version__} kills the process that loads {path}: {death}. A fresh process "
            "was tried, so this one goes on. It is a fault of OpenVINO's; run the file elsewhere, as in ONNX Runtime."
        )


def describe_settings(*, threads: int, precision: str) -> dict[str, Any]:
    """Return what every network is compiled with: for latency, in the precision that is said."""
    return {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _import_runtime() -> Any:
    reason = why_missing()
    if reason:
        raise TargetMissing(f"OpenVINO cannot be used on this machine. {reason}")
    import openvino

    return openvino


def _import_core() -> Any:
    return _import_runtime().Core()


def _read(path: Path) -> Any:
    core = _import_core()
    try:
        return core.read_model(str(path))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is no network that OpenVINO can load: {_shorten(error)}. "
            "It may be cut short, or an .xml without its .bin. Export it anew."
        ) from error


def _compile(model: Any, settings: dict[str, Any], shapes: tuple[tuple[int, ...], ...] | None) -> Any:
    if shapes is not None:
        model = model.clone()
        model.reshape({index: list(shape) for index, shape in enumerate(shapes)})
    return _import_core().compile_model(model, "CPU", settings)


def _shorten(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines or ["no message"])[-1].strip()[:200]


def profile(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, runs: int = 50, precision: str = "fp32"
) -> tuple[TimeShare, ...]:
    """Return the median milliseconds of every operator of the runtime's own graph that takes time, longest first."""
    found = list_operators(path, arrays, threads=threads, runs=runs, precision=precision)
    return rank_times(found)


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether the runtime's own optimised graph computes it on integers.

    A layer is found by its weight's name in the file (`export` keeps the dotted names) or by its node's name.
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
    """Return the operators of the runtime's own compiled graph in its order, with times where `arrays` are given.

    Constants and what fused kernels have taken in are left out.
    """
    session = load(path, threads=threads, precision=precision)
    shapes = None if arrays is None else tuple(a.shape for a in arrays)
    compiled = _compile(session.model, {**session.settings, "PERF_COUNT": True}, shapes)
    timed = {} if arrays is None else _time_nodes(compiled, arrays, runs)
    roundings = onnx_layers.list_roundings(path) if path.suffix == ".onnx" else frozenset[str]()
    found = []
    products: set[str] = set()
    nodes = [(node, {key: str(value.value) for key, value in node.get_rt_info().items()}) for node in _order(compiled)]
    kinds = {node.get_friendly_name(): info["layerType"] for node, info in nodes}
    stored = {node.get_friendly_name(): info["outputPrecisions"] for node, info in nodes}
    for node, info in nodes:
        name, kind = node.get_friendly_name(), info["layerType"]
        if kind in ("Const", "Input", "Output"):
            continue
        sources = [value.get_node().get_friendly_name() for value in node.input_values()]
        covers = [_plain_name(n) for n in info["originalLayersNames"].split(",") if n]
        if kind in PRODUCT_KINDS and covers:
            covers.append(name_product(covers[0]))
            products.update(covers)
        weights = [source for source in sources if kinds.get(source) == "Const"]
        rounding = kind in ROUNDING_KINDS and _is_rounding(kind, covers, roundings)
        at_start = any(kinds.get(source) == "Input" for source in sources)
        at_end = any(kinds.get(t.get_node().get_friendly_name()) == "Output" for t in _list_readers(node))
        if kind == "Subgraph" and not rounding and not any(stored[weight] == "i8" for weight in weights):
            # A chain of element-wise operators: it may read int8, but computes in floating point. Chains of small
            # linear layers, told by their weights, do compute on integers.
            info["runtimePrecision"] = HINTS[precision]
        ms = timed.get(name)
        found.append(
            Operator(
                _plain_name(name),
                f"{kind} {info['primitiveType']}",
                "rounding" if rounding else _tell_precision(kind, info),
                () if rounding or kind in MOVING_KINDS else (*covers, *weights),
                rounding and not at_start and not at_end,
                ms if ms is not None or not timed else 0.0,
            )
        )
    # The scales of an integer product may be multiplied in by whoever reads it, which then bears its name, too.
    return tuple(
        o
        if o.kernel.split()[0] in PRODUCT_KINDS
        else replace(o, covers=tuple(c for c in o.covers if c not in products))
        for o in found
    )


PRECISION_NAMES = {"u8": "int8", "i8": "int8", "I8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}
PRODUCT_KINDS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
ROUNDING_KINDS = ("FakeQuantize", "Convert", "Eltwise", "Subgraph")
MOVING_KINDS = ("Reorder", "Reshape", "Transpose", "Concatenation", "Split", "Gather", "StridedSlice")
_OWN_NAME = re.compile(r"(Convert|Multiply|Subtract|Add|FakeQuantize|Reshape)_\d+")
"""Names that OpenVINO's reader gives to the pieces of a DequantizeLinear."""


def _order(compiled: Any) -> list[Any]:
    nodes = compiled.get_runtime_model().get_ops()
    return sorted(nodes, key=lambda node: int(str(node.get_rt_info()["execOrder"].value)))


def _tell_precision(kind: str, info: Mapping[str, str]) -> str:
    """Return what an operator computes in; a layer with small weights says those, and its kernel's name the rest."""
    if kind in PRODUCT_KINDS and info["runtimePrecision"] not in PRECISION_NAMES:
        return PRECISION_NAMES.get(info["primitiveType"].rpartition("_")[2], "other")
    return PRECISION_NAMES.get(info["runtimePrecision"], "other")


def _list_readers(node: Any) -> Iterable[Any]:
    return [target for output in node.outputs() for target in output.get_target_inputs()]


def _is_rounding(kind: str, covers: Sequence[str], roundings: frozenset[str]) -> bool:
    """Say if an operator only goes between float and integers: all it computes are the file's roundings."""
    if kind in ("FakeQuantize", "Convert"):
        return True
    return any(name in roundings for name in covers) and all(
        name in roundings or _OWN_NAME.fullmatch(name) for name in covers
    )


def _time_nodes(compiled: Any, arrays: Sequence[np.ndarray[Any, Any]], runs: int) -> dict[str, float]:
    """Return the median milliseconds of every node that was executed."""
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = defaultdict(list)
    warm = max(3, runs // 10)
    for index in range(warm + runs):
        request.infer(dict(enumerate(arrays)), share_inputs=True)
        if index >= warm:
            spent: dict[str, float] = defaultdict(float)
            for node in request.get_profiling_info():
                spent[node.node_name] += node.real_time.total_seconds() * 1000
            for name, ms in spent.items():
                times[name].append(ms)
    return {name: statistics.median(ms) for name, ms in times.items()}


def _plain_name(name: str) -> str:
    """Take off what OpenVINO adds to a node's name when it takes it apart."""
    return re.sub(r"(/(WithoutBiases|DequantizationMultiply\w*|DequantizationSubtract\w*))+$", "", name)


_START = """
import openvino

def start(path, threads):
    core = openvino.Core()
    model = core.read_model(path)
    shapes = [[d.get_length() if d.is_static else 1 for d in i.get_partial_shape()] for i in model.inputs]
    model.reshape(dict(enumerate(shapes)))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feed = {k: np.zeros(s, i.get_element_type().to_dtype()) for k, (i, s) in enumerate(zip(model.inputs, shapes))}
    return lambda: request.infer(feed, share_inputs=True)
"""


def measure_peak_memory(path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows through this network at batch 1.

    See `memory.measure_growth` for what is counted; float parts run in float32. Raises TargetMissing where openvino is
    not installed, CheckpointError where the file does not run.
    """
    _import_runtime()
    return measure_growth(_START, path, threads=threads)
