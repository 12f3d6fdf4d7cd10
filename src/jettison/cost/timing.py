"""Times single layers in a runtime on this machine.

Why not one session per layer and a clock around it: a convolution alone stands between two layout changes that a
network pays only once, and the call itself costs as much as a small layer. So many layers stand side by side in one
model, and the runtime's own profile gives each layer's kernel. That also interleaves the layers in time. How many stand
together matters: a layer alone keeps its weights in the nearest cache, hundreds in turn throw each other out; about as
many as the network has is right.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jettison.core.errors import InputError, UnknownName
from jettison.cost.layers import LayerShape, build_model
from jettison.cost.medians import BLOCKS, min_of_medians
from jettison.progress import track

RUNTIMES = {"onnxruntime": "jettison.cost.bench_onnxruntime", "openvino": "jettison.cost.bench_openvino"}
"""Where single layers can be timed: each has a profile that names them."""
TURN_RUNS = 3
"""Runs of a session before the next one has its turn; the first finds the caches full of the others and is dropped."""
SESSIONS_AT_ONCE_BYTES = 400 * 2**20
"""Weights (twice: the runtime packs a copy) and tensors alive in open sessions at one time."""


def measure_layers(
    shapes: Sequence[LayerShape],
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 20,
    together: int = 16,
) -> list[float]:
    """Measure each layer's kernel in a runtime, one of RUNTIMES, and return milliseconds, in the order given.

    `together` layers run one after another, as in a network of that many. The smallest of 5 medians over interleaved
    rounds, less what the profiler's clock adds to a node (measured), never below zero. Raises InputError for fewer
    than 5 rounds, no thread or no layer together, UnknownName for a runtime that is none, TargetMissing without it.
    """
    bench = find_bench(runtime)
    if rounds < BLOCKS or threads < 1 or together < 1:
        raise InputError(
            f"The latency measurement was given rounds={rounds}, threads={threads}, together={together}. "
            f"Give at least {BLOCKS} rounds, one thread and one layer."
        )
    if not shapes:
        return []
    groups = _split(shapes, together)
    steps = track(range(len(groups) * rounds), "Measuring single layers")
    times_us: list[float] = []
    for group in groups:
        times_us += _measure_group(bench, group, threads, rounds, steps)
    for _ in steps:  # lets the bar close itself
        pass
    clock_us = bench.measure_clock(threads)
    return [max(0.0, t - clock_us) / 1e3 for t in times_us]


def find_bench(runtime: str) -> ModuleType:
    """Return the file that times layers in a runtime; raises UnknownName."""
    if runtime not in RUNTIMES:
        raise UnknownName("runtime that times single layers", runtime, RUNTIMES)
    return importlib.import_module(RUNTIMES[runtime])


def _split(shapes: Sequence[LayerShape], together: int) -> list[list[list[LayerShape]]]:
    """Cut into sessions of so many layers, and these into groups that fit in memory together."""
    sessions = [list(shapes[i : i + together]) for i in range(0, len(shapes), together)]
    groups: list[list[list[LayerShape]]] = []
    held = SESSIONS_AT_ONCE_BYTES
    for session in sessions:
        size = sum(2 * shape.weight_bytes + shape.tensor_bytes for shape in session)
        if held + size > SESSIONS_AT_ONCE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(session)
        held += size
    return groups


def _measure_group(
    bench: ModuleType, group: Sequence[Sequence[LayerShape]], threads: int, rounds: int, steps: Iterator[int]
) -> list[float]:
    """Run the sessions of one group in turn, `rounds` times, and return each layer's microseconds."""
    import numpy as np

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for shapes in group:
            feeds = {f"x{i}": _draw_input(shape, rng) for i, shape in enumerate(shapes)}
            sessions.append((bench.Bench(build_model(shapes), len(shapes), threads, Path(folder)), feeds))
        for _ in range(rounds):
            for session, feeds in sessions:
                for _ in range(TURN_RUNS):
                    session.run(feeds)
            next(steps)
        return [
            min_of_medians([t for i, t in enumerate(layer) if i % TURN_RUNS])
            for session, _ in sessions
            for layer in session.read()
        ]


def _draw_input(shape: LayerShape, rng: Any) -> Any:
    """Draw an input as a network would hold it: uint8 or float32."""
    import numpy as np

    if shape.precision == "int8":
        return rng.integers(0, 256, shape.input_shape, dtype=np.uint8)
    return rng.random(shape.input_shape, dtype=np.float32)
