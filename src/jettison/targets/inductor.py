"""PyTorch's own compiler on the CPU: constants folded and packed, operators fused, in float32, bfloat16 or int8.

The file is the same as that of `eager`, or the converted graph; compiling happens when it is loaded, takes from seconds
to minutes, and needs a C++ compiler on the machine that runs it. Int8 runs in oneDNN's kernels.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import InputError, TargetMissing
from jettison.core.record import TimeShare
from jettison.targets import graph_file
from jettison.targets import onnxruntime as ort
from jettison.targets.audit import Operator, check_precision, tell_integers
from jettison.targets.eager import START, lay_out, prepare, take_out, use_threads
from jettison.targets.feeding import predict as predict
from jettison.targets.integer import IntegerScheme
from jettison.targets.memory import measure_growth

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.fx import GraphModule

LABEL = "PyTorch, compiled"
SUFFIX = graph_file.SUFFIX
PACKAGE = "torch"
EXACT = False
PROFILED = False
PRECISIONS = ("fp32", "bf16", "int8")
"""A file of integers computes in int8 whatever is asked for, and a float one never does."""
SHAPES = 64
"""As many shapes a network on integers is compiled for."""
COMPILERS = ("g++", "clang++", "c++")


def why_missing() -> str | None:
    """Return None where this target is usable, else one sentence with the command that makes it so."""
    if os.environ.get("CXX") or any(shutil.which(name) for name in COMPILERS):
        return None
    return "PyTorch's compiler needs a C++ compiler: run `apt-get install g++`, or set CXX."


def scheme(cpu_flags: frozenset[str] | None = None) -> IntegerScheme:
    """Return the integer arithmetic of oneDNN's kernels here, or on a processor with `cpu_flags`: ONNX Runtime's.

    What lies between the layers is compiled, and computes what it computes in the simulation.
    """
    return replace(ort.scheme(cpu_flags), target="inductor")


def export(
    module: GraphModule,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_batch: bool,
) -> None:
    """Write a float or converted graph as a packed folder of JSON and safetensors, whole or not at all.

    The compiler finds integer kernels only for PT2E's own roundings, which multiply with the step's reciprocal: where a
    value lies in the middle between two integers, the file may take the other one. Raises ExportError for what the
    graph's store refuses, StorageError where the file cannot be written.
    """
    from jettison.targets.converted import cut_before_rounding, is_converted, spell_for_pt2e

    if is_converted(module):
        module = spell_for_pt2e(module, weights_as_pairs=False)
        cut_before_rounding(module)
    graph_file.write(
        module, inputs, path, input_names=input_names, output_names=output_names, dynamic_batch=dynamic_batch
    )


@dataclass(frozen=True)
class Session:
    """A compiled network. Shapes hold None where a dimension is free.

    It is compiled for the first batch size it meets, then once for any other, then perhaps for one row. On integers it
    is compiled for each batch size anew: oneDNN's kernels are found reliably for fixed shapes only (torch 2.13).
    """

    call: Callable[..., Any]
    threads: int
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]
    each_shape: bool = False
    seen: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once; arrays stand in the order of `input_names`.

        Raises InputError where integers would have to be compiled for yet another shape after `SHAPES`.
        """
        import torch

        shapes = tuple(a.shape for a in arrays)
        if self.each_shape and shapes not in self.seen and len(self.seen) >= SHAPES:
            raise InputError(
                f"This network has been compiled for {SHAPES} shapes of inputs, and int8 is compiled for each anew. "
                "It would take ever longer. Feed it batches of few sizes, or load it again."
            )
        with torch.no_grad(), use_threads(self.threads):
            if shapes in self.seen:
                return take_out(self.call(*lay_out(arrays)))
            with _quiet(), _freezing():
                found = take_out(self.call(*lay_out(arrays)))
            self.seen.add(shapes)
            return found


def load(path: Path, *, threads: int, precision: str = "fp32") -> Session:
    """Load a file and make it ready to be compiled at its first run, for `threads` threads.

    In "bf16" convolutions, linear layers and matrix products read bfloat16, outputs are float32. Raises TargetMissing
    without a C++ compiler, CheckpointError where the file is not a network of ours, UnknownName for a precision this
    target has not.
    """
    import torch

    from jettison.targets.converted import is_converted

    check_precision(precision, PRECISIONS)
    reason = why_missing()
    if reason:
        raise TargetMissing(reason)
    found = graph_file.open_graph(path)
    with _quiet():
        # The number of threads is written into the code. Said here, it also keeps code for other numbers apart.
        options: dict[str, Any] = {"freezing": True, "cpp.threads": threads}
        fixed = is_converted(found.module)
        call = torch.compile(_prepare(found.module, precision), options=options, dynamic=False if fixed else None)
    return Session(call, threads, found.input_names, found.input_shapes, found.output_names, fixed)


def _prepare(module: GraphModule, precision: str) -> GraphModule:
    from jettison.targets.converted import copy_flat, is_converted

    return copy_flat(module) if is_converted(module) else prepare(module, "bf16" if precision == "bf16" else "fp32")


@contextmanager
def _freezing() -> Iterator[None]:
    """Have parameters taken as constants: `options=` reaches the compiler, but not the tracing before it (2.13).

    After some number of shapes, tracing would leave further ones uncompiled without a word; here it does not stop.
    """
    from torch._dynamo import config as tracing
    from torch._inductor import config

    with config.patch(freezing=True), tracing.patch(recompile_limit=SHAPES, fail_on_recompile_limit_hit=True):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the compiler's own warnings; errors still come as exceptions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether the compiler gives it to one of oneDNN's integer kernels."""
    return tell_integers(layers, list_operators(path, None, threads=1))


def list_operators(
    path: Path,
    arrays: Sequence[np.ndarray[Any, Any]] | None,
    *,
    threads: int,
    precision: str = "fp32",
    runs: int = 50,
) -> tuple[Operator, ...]:
    """Return the graph's operators before they are fused, without times: the compiled code is not timed in parts.

    Of a file on integers they are those of the graph that the compiler makes its code from, for a batch of 2.
    """
    from jettison.targets import eager
    from jettison.targets.converted import is_converted

    check_precision(precision, PRECISIONS)
    found = graph_file.open_graph(path)
    if not is_converted(found.module):
        return eager.list_operators(path, None, threads=threads, precision="bf16" if precision == "bf16" else "fp32")
    return _describe(_lower(found, arrays), found.module)


KERNELS = ("onednn.qconv", "onednn.qlinear")
ROUNDING = ("quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_")


def _lower(found: graph_file.GraphFile, arrays: Sequence[np.ndarray[Any, Any]] | None) -> GraphModule:
    """Return the graph that the compiler writes code for, weights packed; the code itself is not made."""
    import torch
    from torch._inductor.compile_fx import compile_fx

    lowered: list[GraphModule] = []

    def keep(graph: GraphModule, *_: Any, **__: Any) -> Any:
        lowered.append(graph)
        return lambda inputs: graph(*inputs)

    def backend(graph: GraphModule, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=keep)

    shapes = [[size or 2 for size in shape] for shape in found.input_shapes]
    tensors = lay_out(arrays) if arrays is not None else [torch.zeros(shape) for shape in shapes]
    with torch.no_grad(), _quiet(), _freezing():
        torch.compile(_prepare(found.module, "int8"), backend=backend)(*tensors)
    return lowered[-1]


def _describe(lowered: GraphModule, module: GraphModule) -> tuple[Operator, ...]:
    """Return the operators; an integer kernel covers the layers that have the very scales it reads."""
    import torch

    from jettison.targets.converted import DEQUANTIZE_WEIGHT

    scales: dict[bytes, list[str]] = {}
    for node in module.graph.nodes:
        if str(node.target) == DEQUANTIZE_WEIGHT:
            weight, value = (attrgetter(str(source.target))(module) for source in node.args[:2])
            if weight.dtype == torch.int8:
                layer = str(node.args[0].target).removesuffix(".weight")
                scales.setdefault(value.numpy().tobytes(), []).append(layer)
    operators = []
    for node in lowered.graph.nodes:
        if node.op != "call_function":
            continue
        kernel = str(node.target)
        precision = "int8" if kernel.startswith(KERNELS) else "rounding" if kernel.startswith(ROUNDING) else "fp32"
        covers: list[str] = []
        if precision == "int8":
            read = [a for a in node.args if getattr(a, "op", "") == "get_attr"]
            values = [getattr(lowered, str(a.target)) for a in read]
            dense = [v for v in values if not v.is_mkldnn and v.dtype.is_floating_point]
            covers = [layer for v in dense for layer in scales.get(v.numpy().tobytes(), ())]
        operators.append(Operator(node.name, kernel, precision, tuple(covers), False, None))
    return tuple(operators)


def profile(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, runs: int = 50
) -> tuple[TimeShare, ...]:
    """Raise InputError: compiled code is one piece."""
    raise InputError(
        f"The operators of {path.name} cannot be timed one by one. Compiled, they are fused into one piece of code. "
        "Profile the `eager` target, or use torch.profiler with TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE=1."
    )


def measure_peak_memory(path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows, compiling included, at batch 1.

    See `memory.measure_growth` for what is counted. For float inputs. Raises CheckpointError.
    """
    graph_file.open_graph(path)
    return measure_growth(START.format(target="inductor"), path, threads=threads)
