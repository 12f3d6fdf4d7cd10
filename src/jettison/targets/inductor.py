"""PyTorch's own compiler on the CPU: constants folded and packed, operators fused, in float32 or bfloat16.

The file is the same as that of `eager`; compiling happens when it is loaded, takes from seconds to minutes, and needs a
C++ compiler on the machine that runs it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import InputError, TargetMissing
from jettison.core.record import TimeShare
from jettison.targets import graph_file
from jettison.targets.audit import Operator, check_precision, tell_integers
from jettison.targets.eager import START, lay_out, prepare, take_out, use_threads
from jettison.targets.feeding import predict as predict
from jettison.targets.graph_file import export as export
from jettison.targets.memory import measure_growth

if TYPE_CHECKING:
    import numpy as np

LABEL = "PyTorch, compiled"
SUFFIX = graph_file.SUFFIX
PACKAGE = "torch"
EXACT = False
PROFILED = False
PRECISIONS = ("fp32", "bf16")
COMPILERS = ("g++", "clang++", "c++")


def why_missing() -> str | None:
    """Return None where this target is usable, else one sentence with the command that makes it so."""
    if os.environ.get("CXX") or any(shutil.which(name) for name in COMPILERS):
        return None
    return "PyTorch's compiler needs a C++ compiler: run `apt-get install g++`, or set CXX."


@dataclass(frozen=True)
class Session:
    """A compiled network. Shapes hold None where a dimension is free.

    It is compiled for the first batch size it meets, then once for any other, then perhaps for one row.
    """

    call: Callable[..., Any]
    threads: int
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once; arrays stand in the order of `input_names`."""
        import torch

        with torch.no_grad(), use_threads(self.threads), _quiet():
            return take_out(self.call(*lay_out(arrays)))


def load(path: Path, *, threads: int, precision: str = "fp32") -> Session:
    """Load a file and make it ready to be compiled at its first run, for `threads` threads.

    In "bf16" convolutions, linear layers and matrix products read bfloat16, outputs are float32. Raises TargetMissing
    without a C++ compiler, CheckpointError where the file is not a network of ours, UnknownName for a precision this
    target has not.
    """
    import torch

    check_precision(precision, PRECISIONS)
    reason = why_missing()
    if reason:
        raise TargetMissing(reason)
    found = graph_file.open_graph(path)
    with _quiet():
        # The number of threads is written into the code. Said here, it also keeps code for other numbers apart.
        options: dict[str, Any] = {"freezing": True, "cpp.threads": threads}
        call = torch.compile(prepare(found.module, precision), options=options)
    return Session(call, threads, found.input_names, found.input_shapes, found.output_names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the compiler's own warnings; errors still come as exceptions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether it runs on integers: none does, float files are all this target takes."""
    return tell_integers(layers, list_operators(path, None, threads=1))


def list_operators(
    path: Path,
    arrays: Sequence[np.ndarray[Any, Any]] | None,
    *,
    threads: int,
    precision: str = "fp32",
    runs: int = 50,
) -> tuple[Operator, ...]:
    """Return the graph's operators before they are fused, without times: the compiled code is not timed in parts."""
    from jettison.targets import eager

    return eager.list_operators(path, None, threads=threads, precision=precision)


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
