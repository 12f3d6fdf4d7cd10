"""ExecuTorch with XNNPACK on the CPU: one .pte file, in float32 or int8, for phones as for this machine.

The file carries what ExecuTorch itself does not keep: names and shapes of inputs, names of outputs, and a fingerprint
of every integer layer's weights. Importable without executorch; its runtime takes seconds to import, so it is imported
on first use.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, ExportError, TargetMissing
from jettison.core.plain import write_bytes
from jettison.core.record import TimeShare
from jettison.targets.audit import Operator, check_precision, rank_times, tell_integers
from jettison.targets.feeding import predict as predict
from jettison.targets.integer import CLAMPS, LAYERS, MOVES, IntegerScheme, Levels
from jettison.targets.memory import measure_growth

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.fx import GraphModule

LABEL = "ExecuTorch (XNNPACK)"
SUFFIX = ".pte"
PACKAGE = "executorch"
EXACT = False
PROFILED = True
PRECISIONS = ("fp32", "int8")
"""What its files can compute in; the file itself says which."""
MOST = 15
"""The largest batch of a file with a free one; memory is planned for it, and larger batches are run in pieces.

From 16 rows on torch would choose another convolution while it traces, and the batch would be free on one side only.
"""
METHOD = "jettison"
"""The file's second method; it returns our own description of the file."""


def why_missing() -> str | None:
    """Return None where this target is usable, else one sentence with the command that makes it so."""
    if importlib.util.find_spec("executorch") is None:
        return "executorch is not installed: run `pip install 'jettison[executorch]'`."
    return None


def scheme() -> IntegerScheme:
    """Return the integer arithmetic of XNNPACK: signed activations per tensor, signed weights per channel.

    A linear layer must end on integers. Of poolings only the maximum and the mean over the whole picture are integer.
    """
    return IntegerScheme(
        target="executorch",
        activation=Levels(-128, 127, symmetric=False),
        weight=Levels(-127, 127, symmetric=True),
        weighted=dict.fromkeys(LAYERS, 0),
        float_output=frozenset(),
        fused=CLAMPS,
        requantized=frozenset(
            {"aten.add.Tensor", "aten.mul.Tensor", "aten.mean.dim", "aten.adaptive_avg_pool2d.default"}
        ),
        shared=frozenset({"aten.cat.default"}),
        inherited=MOVES,
        why="XNNPACK's QS8 and QC8 kernels; sums of s8 x s8 products are exact",
        cuts=False,
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
    """Write a float or converted graph as one .pte file, whole or not at all, as much of it as possible for XNNPACK.

    A free batch is free up to `MOST`. Raises ExportError with the lowering's own words, InputError for activations of
    fewer than 8 bits, TargetMissing, StorageError.
    """
    reason = why_missing()
    if reason:
        raise TargetMissing(f"ExecuTorch cannot be used on this machine. {reason}")
    from jettison.targets.converted import list_fingerprints, refuse_coarse, spell_for_pt2e

    shapes = [[None if dynamic_batch else x.shape[0], *x.shape[1:]] for x in inputs]
    about = {
        "inputs": [{"name": name, "shape": shape} for name, shape in zip(input_names, shapes, strict=True)],
        "outputs": list(output_names),
        "layers": list_fingerprints(module),
    }
    refuse_coarse(module, LABEL)
    spelled = spell_for_pt2e(module, weights_as_pairs=False)
    with _quiet():
        try:
            data = _lower(spelled, inputs, dynamic_batch, json.dumps(about, sort_keys=True))
        except Exception as error:  # the lowering raises whatever its many passes raise
            raise ExportError(
                f"The network cannot be written for ExecuTorch: {type(error).__name__}: {str(error)[:300]}. "
                "Replace the operator in the network, or leave the part that holds it out of the export."
            ) from error
    write_bytes(data, path)


def _lower(module: GraphModule, inputs: tuple[Tensor, ...], dynamic: bool, about: str) -> bytes:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shapes = None
    if dynamic:
        inputs = tuple(x[:1].expand(MOST // 2, *x.shape[1:]).contiguous() for x in inputs)
        batch = torch.export.Dim("batch", min=1, max=MOST)
        shapes = tuple({0: batch} for _ in inputs)
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods={METHOD: about}
        )
        if dynamic:
            _check_batch(edge.exported_program())
        return bytes(edge.to_executorch().buffer)


def _check_batch(program: Any) -> None:
    """Refuse a lowered network whose batch is no longer free, or free for some batches only."""
    import torch

    names = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        size = node.meta["val"].shape[0]
        bounds = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if bounds is None or bounds.upper != MOST:
            raise ValueError(f"the batch is free up to {bounds.upper if bounds else size} only; {_FIXED}")


_FIXED = "export with dynamic_batch=False"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide logs and warnings of the lowering and of the imports; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch", "torchao", "root", "executorch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@dataclass
class _Held:
    """The runtime's own object, and how often the thread pool had been changed when it was made."""

    module: Any
    changes: int


_changes = 0


@dataclass(frozen=True)
class Session:
    """A loaded file. Shapes hold None where a dimension is free.

    ExecuTorch has one thread pool for the whole process, and a network keeps the pool it was loaded with. A session
    whose number of threads is not the pool's sets it and loads itself anew, so do not time such sessions in turn.
    """

    data: bytes
    held: _Held
    threads: int
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once; arrays stand in the order of `input_names`. Batches above `MOST` run in pieces."""
        import numpy as np
        import torch

        if self.input_shapes and self.input_shapes[0][:1] == (None,) and len(arrays[0]) > MOST:
            pieces = [self.run([a[i : i + MOST] for a in arrays]) for i in range(0, len(arrays[0]), MOST)]
            return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
        _set_threads(self.threads)
        if self.held.changes != _changes:
            self.held.module, self.held.changes = _open(self.data), _changes
        found = self.held.module.forward([torch.from_numpy(a) for a in arrays])
        return [y.detach().numpy() for y in found]


def load(path: Path, *, threads: int, precision: str = "fp32") -> Session:
    """Load a file, and set the process's one ExecuTorch thread pool to `threads`.

    The file decides what it computes in, whatever the `precision`. Raises TargetMissing where executorch is not
    installed, CheckpointError where the file is not a network of ours, UnknownName for a precision it has not.
    """
    check_precision(precision, PRECISIONS)
    _import_runtime()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Export the network anew.") from error
    about = _describe(data, path)
    _set_threads(threads)
    return Session(
        data,
        _Held(_open(data), _changes),
        threads,
        tuple(i["name"] for i in about["inputs"]),
        tuple(tuple(i["shape"]) for i in about["inputs"]),
        tuple(about["outputs"]),
    )


@functools.cache  # asked for at every run
def _import_runtime() -> Any:
    reason = why_missing()
    if reason:
        raise TargetMissing(f"ExecuTorch cannot be used on this machine. {reason}")
    with _quiet():
        from executorch.extension.pybindings import portable_lib
    return portable_lib


def _open(data: bytes) -> Any:
    with _quiet():
        return _import_runtime()._load_for_executorch_from_buffer(data)


def _describe(data: bytes, path: Path) -> dict[str, Any]:
    """Return our own description out of a file; raises CheckpointError where there is none."""
    try:
        # Beyond the length that the file's own head names, the runtime would read past the end of a cut one.
        size = int.from_bytes(data[16:24], "little") if data[8:12] in (b"eh00", b"eh01") else len(data) + 1
        if size > len(data):
            raise RuntimeError(f"it has {len(data)} bytes and should have more")
        (text,) = _open(data).run_method(METHOD, ())
        found: dict[str, Any] = json.loads(text)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no network that ExecuTorch can load and jettison has written: {str(error).splitlines()[0]}. "
            "It may be cut short or made for another version. Export it anew."
        ) from error
    return found


def _set_threads(threads: int) -> None:
    """Give the process's pool this many threads; networks loaded before must not run until they are loaded anew."""
    global _changes
    runtime = _import_runtime()
    if runtime._threadpool_get_thread_count() != threads:
        runtime._unsafe_reset_threadpool(threads)
        _changes += 1


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether the file hands it to XNNPACK as integers in, weights and out.

    A layer is found by the fingerprint of its integer weights, which `export` writes into the file.
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
    """Return the operators of the file, or where `arrays` are given those that XNNPACK's own profile names, with times.

    Raises what `load` raises.
    """
    from jettison.targets import pte_file

    check_precision(precision, PRECISIONS)
    session = load(path, threads=threads)
    about = _describe(session.data, path)
    operators = pte_file.list_operators(session.data, about["layers"])
    if arrays is None:
        return operators
    with _quiet():
        return pte_file.time_operators(path, arrays, operators, runs=runs)


def profile(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, runs: int = 50
) -> tuple[TimeShare, ...]:
    """Return the median milliseconds of every operator that the runtime's own profile names, longest first."""
    found = list_operators(path, arrays, threads=threads, runs=runs)
    return rank_times(found)


_START = """
from pathlib import Path
from jettison.targets import executorch as target
target._import_runtime()

def start(path, threads):
    session = target.load(Path(path), threads=threads)
    feed = [np.zeros([d or 1 for d in shape], np.float32) for shape in session.input_shapes]
    return lambda: session.run(feed)
"""


def measure_peak_memory(path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows through this network at batch 1.

    See `memory.measure_growth`; a file with a free batch has memory planned for `MOST`. For float inputs.
    """
    _import_runtime()
    return measure_growth(_START, path, threads=threads)
