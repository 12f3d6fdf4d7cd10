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
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, ShapeError, TargetMissing
from jettison.core.record import TimeShare
from jettison.targets.integer import IntegerScheme, Levels
from jettison.targets.onnx_file import export as export

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LABEL = "ONNX Runtime"
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
        weighted={
            "aten.conv1d.default": 0,
            "aten.conv2d.default": 0,
            "aten.conv2d.padding": 0,
            "aten.linear.default": 0,
        },
        float_output=frozenset({"aten.linear.default"}),
        fused=frozenset({"aten.relu.default", "aten.relu6.default", "aten.hardtanh.default", "aten.clamp.default"}),
        requantized=frozenset(
            {"aten.add.Tensor", "aten.mean.dim", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default"}
        ),
        shared=frozenset({"aten.cat.default"}),
        inherited=frozenset(
            {
                "aten.constant_pad_nd.default",
                "aten.pad.default",
                "aten.max_pool2d.default",
                "aten.flatten.using_ints",
                "aten.view.default",
                "aten.reshape.default",
                "aten.squeeze.dims",
                "aten.permute.default",
                "aten.transpose.int",
            }
        ),
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


def load(path: Path, *, threads: int) -> Session:
    """Load a file with full graph optimisation; `threads` compute one operator, operators run one by one.

    Every file gets the same settings. Threads spin while they wait, as is ONNX Runtime's default.
    Raises TargetMissing where onnxruntime is not installed, CheckpointError where the file is not a network.
    """
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


def predict(session: Session, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run tensors through a file; a file with a fixed batch gets them in pieces of its size.

    Raises ShapeError where the number of inputs or a shape does not fit, or the batch is no multiple of the file's.
    """
    import numpy as np
    import torch

    arrays = [np.ascontiguousarray(x.detach().cpu().numpy()) for x in inputs]
    _check_shapes(session, arrays)
    fixed = session.input_shapes[0][0] if session.input_shapes and session.input_shapes[0] else None
    if fixed is None or arrays[0].shape[0] == fixed:
        return tuple(torch.from_numpy(y) for y in session.run(arrays))
    count = arrays[0].shape[0]
    pieces = [session.run([a[i : i + fixed] for a in arrays]) for i in range(0, count, fixed)]
    return tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*pieces, strict=True))


def _check_shapes(session: Session, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    if len(arrays) != len(session.input_names):
        raise ShapeError(
            f"{len(arrays)} inputs were given to a file that takes {len(session.input_names)}. "
            f"It takes {', '.join(session.input_names)}. Give one tensor for each."
        )
    for name, shape, array in zip(session.input_names, session.input_shapes, arrays, strict=True):
        fits = len(shape) == array.ndim and all(
            want in (None, have) or (axis == 0 and want is not None and want > 0 and have % want == 0 and have > 0)
            for axis, (want, have) in enumerate(zip(shape, array.shape, strict=True))
        )
        if not fits:
            raise ShapeError(
                f"Input {name!r} has shape {tuple(array.shape)}, but the file takes {shape} (None is free). "
                "A fixed batch can only be split where it divides the inputs. Change the inputs, or export with "
                "dynamic_batch=True."
            )


def profile(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, runs: int = 50
) -> tuple[TimeShare, ...]:
    """Return the median milliseconds of every operator of the runtime's own graph, longest first.

    The profiler itself costs a microsecond or so per operator; use `timing` for the network's latency.
    """
    options = _make_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _open(path, options)
        names = [i.name for i in session.get_inputs()]
        warm = max(3, runs // 10)
        for _ in range(warm + runs):
            session.run(None, dict(zip(names, arrays, strict=True)))
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            times[key].append(event["dur"] / 1000)
    shares = [
        TimeShare(_plain_name(name), operator, statistics.median(ms[warm:])) for (name, operator), ms in times.items()
    ]
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
        "QLinearMatMul",
    }
)


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether the runtime's own optimised graph computes it on integers.

    A layer is found by its weight's name in the file (`export` keeps the dotted names) or by its node's name.
    It counts as integer only if every operator found for it is an integer one.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        options = _make_options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        _open(path, options)
        graph = onnx.load(options.optimized_model_filepath).graph
    producers = {output: node for node in graph.node for output in node.output}
    found: dict[str, list[bool]] = {layer: [] for layer in layers}
    for node in graph.node:
        layer = _find_layer(node, producers, found)
        if layer is not None:
            found[layer].append(node.op_type in INTEGER_OPERATORS)
    return {layer: bool(kinds) and all(kinds) for layer, kinds in found.items()}


def _find_layer(node: Any, producers: dict[str, Any], layers: dict[str, list[bool]]) -> str | None:
    """Return the layer whose weight this operator multiplies with, looking through what only unpacks the weight."""
    if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast", "Reshape"):
        return None
    if _plain_name(node.name) in layers:
        return _plain_name(node.name)
    for name in node.input:
        while name in producers and producers[name].op_type in ("DequantizeLinear", "Transpose", "Cast"):
            name = producers[name].input[0]
        layer = name.removesuffix("_nchwc").removesuffix(".weight")
        if layer in layers and layer != name:
            return str(layer)
    return None


_MEMORY_SCRIPT = """
import resource, sys
import numpy as np, onnxruntime as ort
path, threads = sys.argv[1], int(sys.argv[2])
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3

def peak_bytes():
    try:
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

try:
    open("/proc/self/clear_refs", "w").write("5")
except OSError:
    pass
before = peak_bytes()
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": bool}
shape = lambda i: [d if isinstance(d, int) else 1 for d in i.shape]
feed = {i.name: np.zeros(shape(i), kinds[i.type]) for i in session.get_inputs()}
for _ in range(5):
    session.run(None, feed)
print(peak_bytes() - before)
"""
# Linux hands ru_maxrss down through fork and exec, so that under a large parent it would never grow: VmHWM starts anew,
# and clear_refs sets it back to what is resident, so that the peak of the imports does not hide the network's.


def measure_peak_memory(path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows through this network.

    The process imports onnxruntime and numpy only; counted is its highest resident set from just before the file is
    loaded to the end of five inferences of zeros at batch 1 (free dimensions are 1), less the resident set at the
    start. It holds weights, packed copies of them, activations, the runtime's arena, its kernels' code when first
    used, and what the loader needed for a moment. Raises TargetMissing where the file does not run.
    """
    _import_runtime()
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_SCRIPT, str(path), str(threads)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CheckpointError(
            f"The memory of {path.name} could not be measured: {done.stderr.strip().splitlines()[-1:]}. "
            "A fresh Python process failed to run the file. Try it by hand with onnxruntime.InferenceSession."
        )
    return int(done.stdout)
