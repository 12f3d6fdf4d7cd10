"""PyTorch itself, operator by operator: what a network costs where nothing compiles it, in float32 or bfloat16."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError
from jettison.core.record import TimeShare
from jettison.targets import graph_file
from jettison.targets.audit import Operator, check_precision, rank_times, tell_integers
from jettison.targets.feeding import predict as predict
from jettison.targets.graph_file import export as export
from jettison.targets.memory import measure_growth

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.fx import GraphModule

LABEL = "PyTorch"
SUFFIX = graph_file.SUFFIX
PACKAGE = "torch"
EXACT = False
PROFILED = True
PRECISIONS = ("fp32", "bf16")


def why_missing() -> None:
    """Return None: PyTorch is always there."""
    return


@dataclass(frozen=True)
class Session:
    """A loaded network. Shapes hold None where a dimension is free."""

    module: GraphModule
    threads: int
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once; arrays stand in the order of `input_names`."""
        import torch

        with torch.inference_mode(), use_threads(self.threads):
            return take_out(self.module(*lay_out(arrays)))


def load(path: Path, *, threads: int, precision: str = "fp32") -> Session:
    """Load a file; in "bf16" convolutions, linear layers and matrix products read bfloat16, outputs are float32.

    Pictures and convolutions are laid out channels last. Raises CheckpointError where the file is not a network of
    ours, UnknownName for a precision this target has not.
    """
    check_precision(precision, PRECISIONS)
    from jettison.targets.converted import is_converted

    found = graph_file.open_graph(path)
    if is_converted(found.module):
        raise CheckpointError(f"{path} is on integers, which this target does not run. Load it with target='inductor'.")
    module = prepare(found.module, precision)
    return Session(module, threads, found.input_names, found.input_shapes, found.output_names)


def prepare(module: GraphModule, precision: str) -> GraphModule:
    """Return a copy in that precision whose four-dimensional weights are laid out channels last."""
    import torch

    from jettison.targets.converted import copy_flat, spell_in_bf16

    result = spell_in_bf16(module) if precision == "bf16" else copy_flat(module)
    for tensor in (*result.parameters(), *result.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return result


def lay_out(arrays: Sequence[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Return tensors of numpy arrays, pictures laid out channels last."""
    import torch

    tensors = [torch.from_numpy(a) for a in arrays]
    return [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in tensors]


def take_out(tensors: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """Return numpy arrays of tensors; numpy has no bfloat16, so those become float32."""
    import torch

    return [(y.float() if y.dtype == torch.bfloat16 else y).contiguous().numpy() for y in tensors]


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Give PyTorch's operators this many threads, and back the number it had."""
    import torch

    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether it runs on integers: none does, PyTorch computes in floating point."""
    return tell_integers(layers, list_operators(path, None, threads=1))


def list_operators(
    path: Path,
    arrays: Sequence[np.ndarray[Any, Any]] | None,
    *,
    threads: int,
    precision: str = "fp32",
    runs: int = 50,
) -> tuple[Operator, ...]:
    """Return the graph's operators in its order, with median milliseconds where `arrays` are given.

    Raises what `load` raises.
    """
    import torch

    session = load(path, threads=threads, precision=precision)
    times: dict[str, list[float]] = defaultdict(list)
    if arrays is not None:
        with torch.inference_mode(), use_threads(threads):
            for index in range(runs + (warm := max(3, runs // 10))):
                watch = _make_watch(session.module)
                watch.run(*lay_out(arrays))
                if index >= warm:
                    for name, ms in watch.spent.items():
                        times[name].append(ms)
    return tuple(
        Operator(
            _name(node),
            str(node.target).removeprefix("aten."),
            precision if _reads_weight(node) else "fp32",
            (_name(node),) if _reads_weight(node) else (),
            False,
            statistics.median(times[node.name]) if times else None,
        )
        for node in session.module.graph.nodes
        if node.op == "call_function"
    )


def _reads_weight(node: Any) -> bool:
    from jettison.targets.converted import WEIGHTED

    return str(node.target) in WEIGHTED and getattr(node.args[1], "op", "") == "get_attr"


def _name(node: Any) -> str:
    return str(node.args[1].target).removesuffix(".weight") if _reads_weight(node) else str(node.name)


def _make_watch(module: GraphModule) -> Any:
    """Return an interpreter of the graph that keeps each node's milliseconds in `spent`."""
    import time

    from torch.fx import Interpreter

    class Watch(Interpreter):
        spent: dict[str, float] = {}

        def run_node(self, n: Any) -> Any:
            start = time.perf_counter()
            result = super().run_node(n)
            self.spent[n.name] = (time.perf_counter() - start) * 1000
            return result

    watch = Watch(module)
    watch.spent = {}
    return watch


def profile(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, runs: int = 50, precision: str = "fp32"
) -> tuple[TimeShare, ...]:
    """Return the median milliseconds of every operator, longest first; the clock itself costs microseconds."""
    found = list_operators(path, arrays, threads=threads, runs=runs, precision=precision)
    return rank_times(found)


START = """
from pathlib import Path
from jettison.targets import {target} as target
import torch
from jettison.graph import store

def start(path, threads):
    session = target.load(Path(path), threads=threads)
    feed = [np.zeros([d or 1 for d in shape], np.float32) for shape in session.input_shapes]
    return lambda: session.run(feed)
"""


def measure_peak_memory(path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows through this network at batch 1.

    See `memory.measure_growth` for what is counted. For float inputs. Raises CheckpointError.
    """
    graph_file.open_graph(path)
    return measure_growth(START.format(target="eager"), path, threads=threads)
