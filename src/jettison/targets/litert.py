"""LiteRT on the CPU: one .tflite file, in float32 or int8, for phones as for this machine.

Files have one row per call: the converter cannot keep a free batch through a reshape or a LayerNorm. The file carries
names and a fingerprint of every integer layer's weights in its metadata. Importable without LiteRT.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CheckpointError, ExportError, InputError, TargetMissing
from jettison.core.plain import write_bytes
from jettison.core.record import TimeShare
from jettison.targets.audit import Operator, check_precision, tell_integers
from jettison.targets.feeding import predict as predict
from jettison.targets.integer import CLAMPS, LAYERS, MOVES, IntegerScheme, Levels
from jettison.targets.memory import measure_growth

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.fx import GraphModule

LABEL = "LiteRT"
SUFFIX = ".tflite"
PACKAGE = "ai-edge-litert"
EXACT = False
PROFILED = False
PRECISIONS = ("fp32", "int8")
"""What its files can compute in; the file itself says which."""
NEEDED = {"ai_edge_litert": "ai-edge-litert", "litert_torch": "litert-torch"}


def why_missing() -> str | None:
    """Return None where this target is usable, else one sentence with the command that makes it so."""
    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed: run `pip install 'jettison[litert]'`." if missing else None


def scheme() -> IntegerScheme:
    """Return the integer arithmetic of LiteRT: signed activations per tensor, signed weights per channel.

    Every operator between two roundings becomes an integer one, GELU and means over any axes too.
    """
    return IntegerScheme(
        target="litert",
        activation=Levels(-128, 127, symmetric=False),
        weight=Levels(-127, 127, symmetric=True),
        weighted=dict.fromkeys(LAYERS, 0),
        float_output=frozenset(),
        fused=CLAMPS,
        requantized=frozenset(
            f"aten.{name}"
            for name in (
                *("add.Tensor", "mul.Tensor", "mean.dim", "avg_pool2d.default", "adaptive_avg_pool2d.default"),
                *("gelu.default", "hardswish.default"),
            )
        ),
        shared=frozenset({"aten.cat.default"}),
        inherited=MOVES,
        why="LiteRT's int8 specification; sums of s8 x s8 products are exact",
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
    """Write a float or converted graph as one .tflite file that takes and gives float32, whole or not at all.

    Where the batch is free the file takes one row, and `predict` goes row by row; else it takes the batch of `inputs`.
    Raises ExportError with the converter's own words, InputError for activations of fewer than 8 bits, TargetMissing,
    StorageError.
    """
    reason = why_missing()
    if reason:
        raise TargetMissing(f"LiteRT cannot be used on this machine. {reason}")
    from jettison.targets.converted import is_converted, list_fingerprints, refuse_coarse, spell_for_pt2e
    from jettison.targets.tflite_file import finish

    if dynamic_batch:
        inputs = tuple(x[:1] for x in inputs)
    refuse_coarse(module, LABEL)
    spelled = spell_for_pt2e(module, weights_as_pairs=True)
    with _quiet():
        try:
            data = _convert(spelled, inputs, integer=is_converted(module))
        except Exception as error:  # the converter raises whatever its many passes raise
            raise ExportError(
                f"The network cannot be written for LiteRT: {type(error).__name__}: {str(error).strip()[:300]}. "
                "Replace the operator in the network, or leave the part that holds it out of the export."
            ) from error
    about = {"inputs": list(input_names), "outputs": list(output_names), "layers": list_fingerprints(module)}
    write_bytes(finish(data, json.dumps(about, sort_keys=True)), path)


def _convert(module: GraphModule, inputs: tuple[Tensor, ...], *, integer: bool) -> bytes:
    import litert_torch
    import torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    config = None
    if integer:
        # Nothing is quantized by this: it tells the converter that roundings in the graph are to be taken in.
        config = QuantConfig(
            pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        )
    with torch.no_grad():
        return bytes(litert_torch.convert(module, inputs, quant_config=config).model_content())


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the converter's progress lines, logs and warnings; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch", "torchao", "root", "jax")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from litert_torch import progress

        was = progress.console.quiet
        progress.console.quiet = True
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            progress.console.quiet = was
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@dataclass(frozen=True)
class Session:
    """A loaded file. Its shapes are all fixed."""

    interpreter: Any
    places: tuple[tuple[int, Any], ...]
    results: tuple[int, ...]
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    output_names: tuple[str, ...]

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once; arrays stand in the order of `input_names`."""
        for (index, kind), array in zip(self.places, arrays, strict=True):
            self.interpreter.set_tensor(index, array.astype(kind, copy=False))
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(index) for index in self.results]


def load(path: Path, *, threads: int, precision: str = "fp32") -> Session:
    """Load a file with `threads` threads, float and integer operators handed to XNNPACK as LiteRT does by default.

    The file decides what it computes in, whatever the `precision`. Raises TargetMissing where LiteRT is not installed,
    CheckpointError where the file is not a network of ours, UnknownName for a precision it has not.
    """
    check_precision(precision, PRECISIONS)
    data, about = _read(path)
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_content=data, num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no network that LiteRT can load: {error}. Export it anew.") from error
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    return Session(
        interpreter,
        tuple((i["index"], i["dtype"]) for i in inputs),
        tuple(o["index"] for o in outputs),
        tuple(about["inputs"]),
        tuple(tuple(int(d) for d in i["shape"]) for i in inputs),
        tuple(about["outputs"]),
    )


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return a file's bytes and our own description in it; raises CheckpointError where there is none."""
    reason = why_missing()
    if reason:
        raise TargetMissing(f"LiteRT cannot be used on this machine. {reason}")
    from jettison.targets.tflite_file import describe

    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Export the network anew.") from error
    return data, describe(data, path)


def audit(path: Path, layers: Sequence[str]) -> dict[str, bool]:
    """Say for each layer whether the file computes it from integers to integers.

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
    """Return the operators of the file in its order, without times: LiteRT's Python package does not give any."""
    from jettison.targets import tflite_file

    check_precision(precision, PRECISIONS)
    data, about = _read(path)
    return tflite_file.list_operators(data, about["layers"])


def profile(
    path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, runs: int = 50
) -> tuple[TimeShare, ...]:
    """Raise InputError: LiteRT's Python package times whole networks only."""
    raise InputError(
        f"The operators of {path.name} cannot be timed one by one. LiteRT's Python package has no profiler. "
        "Use its benchmark_model tool with --enable_op_profiling=true, or profile another target."
    )


_START = """
from pathlib import Path
from jettison.targets import litert as target
from ai_edge_litert.interpreter import Interpreter
from jettison.targets import tflite_file

def start(path, threads):
    session = target.load(Path(path), threads=threads)
    feed = [np.zeros(shape, np.float32) for shape in session.input_shapes]
    return lambda: session.run(feed)
"""


def measure_peak_memory(path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows through this network at its batch.

    See `memory.measure_growth` for what is counted. Raises TargetMissing, CheckpointError.
    """
    _read(path)
    return measure_growth(_START, path, threads=threads)
