"""Times single layers in ONNX Runtime on this machine.

Why not one session per layer and a clock around it: a float convolution alone stands between two layout changes
(ORT's NCHWc blocks) that a network pays only once, an integer one between two transposes, and `session.run` itself
costs as much as a small layer. So many layers stand side by side in one model, and the runtime's own profile gives
each layer's kernel. That also interleaves the layers in time. How many stand together matters: a layer alone keeps its
weights in the nearest cache, hundreds in turn throw each other out; about as many as the network has is right.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jettison.core.errors import InputError, TargetMissing
from jettison.cost.layers import LayerShape, build_model
from jettison.progress import track

BLOCKS = 5
"""Rounds are cut into so many blocks; the smallest of their medians counts, so a busy spell elsewhere does not."""
TURN_RUNS = 3
"""Runs of a session before the next one has its turn; the first finds the caches full of the others and is dropped."""
SESSIONS_AT_ONCE_BYTES = 400 * 2**20
"""Weights (twice: the runtime packs a copy) and tensors alive in open sessions at one time."""
CLOCK_NODES = 32
CLOCK_ROUNDS = 200
_LAYER = re.compile(r"layer(\d+)_")


def measure_layers(
    shapes: Sequence[LayerShape], *, threads: int = 1, rounds: int = 20, together: int = 16
) -> list[float]:
    """Measure each layer's kernel in ONNX Runtime and return milliseconds, in the order given.

    `together` layers run one after another, as in a network of that many. The smallest of 5 medians over interleaved
    rounds, less what the profiler's clock adds to a node (measured), never below zero. Raises InputError for fewer
    than 5 rounds, no thread or no layer together, TargetMissing without ONNX Runtime.
    """
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
        times_us += _measure_group(group, threads, rounds, steps)
    for _ in steps:  # lets the bar close itself
        pass
    clock_us = _measure_clock(threads)
    return [max(0.0, t - clock_us) / 1e3 for t in times_us]


def open_session(model: bytes, threads: int, profile: Path | None = None) -> Any:
    """Open an ONNX Runtime session with all graph optimisations; with `profile`, record to files of that prefix."""
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetMissing(
            "ONNX Runtime is not installed, so nothing can be timed in it. Install it: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


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
    group: Sequence[Sequence[LayerShape]], threads: int, rounds: int, steps: Iterator[int]
) -> list[float]:
    """Run the sessions of one group in turn, `rounds` times, and return each layer's microseconds."""
    import numpy as np

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for number, shapes in enumerate(group):
            model = build_model(shapes).SerializeToString()
            feeds = {f"x{i}": _draw_input(shape, rng) for i, shape in enumerate(shapes)}
            sessions.append((open_session(model, threads, Path(folder) / f"session{number}"), feeds))
        for _ in range(rounds):
            for session, feeds in sessions:
                for _ in range(TURN_RUNS):
                    session.run(None, feeds)
            next(steps)
        times_us = []
        for (session, _), shapes in zip(sessions, group, strict=True):
            runs = _read_profile(Path(session.end_profiling()), len(shapes))
            times_us += [_min_of_medians([t for i, t in enumerate(layer) if i % TURN_RUNS]) for layer in runs]
    return times_us


def _draw_input(shape: LayerShape, rng: Any) -> Any:
    """Draw an input as a network would hold it: uint8 or float32."""
    import numpy as np

    if shape.precision == "int8":
        return rng.integers(0, 256, shape.input_shape, dtype=np.uint8)
    return rng.random(shape.input_shape, dtype=np.float32)


def _read_profile(path: Path, layers: int) -> list[list[float]]:
    """Return, for each layer, its microseconds in each run: the sum over the nodes that bear its name."""
    runs: list[list[float]] = [[] for _ in range(layers)]
    seen: dict[int, float] = {}
    events = [e for e in json.loads(path.read_text()) if e.get("cat") in ("Node", "Session")]
    for event in sorted(events, key=lambda e: (e["ts"] + e["dur"], e["cat"] == "Session")):
        if event["cat"] == "Session":
            # model_run ends a run; whatever carries the layer's name since the last one belongs to it.
            if event["name"] == "model_run":
                for layer in range(layers):
                    runs[layer].append(seen[layer])
                seen = {}
        elif event["name"].endswith("_kernel_time") and (match := _LAYER.match(event["name"])):
            layer = int(match[1])
            seen[layer] = seen.get(layer, 0.0) + event["dur"]
    return runs


def _min_of_medians(times: Sequence[float]) -> float:
    """Return the smallest of the medians of 5 consecutive blocks.

    Grouped medians, because the profile knows whole microseconds only, and small layers take few of them.
    """
    size = len(times) // BLOCKS
    blocks = [times[i * size : (i + 1) * size] for i in range(BLOCKS)]
    return min(statistics.median_grouped(block, interval=1) for block in blocks)


def _measure_clock(threads: int) -> float:
    """Return the microseconds by which a node's time in the profile exceeds what the node adds to an unprofiled run."""
    import numpy as np

    feeds = {"x": np.ones((1, 16), np.float32)}
    short, long = (_build_chain(n).SerializeToString() for n in (1, CLOCK_NODES + 1))
    with tempfile.TemporaryDirectory() as folder:
        profiled = open_session(long, threads, Path(folder) / "clock")
        plain = [open_session(model, threads) for model in (short, long)]
        walls_us: list[list[float]] = [[], []]
        for _ in range(CLOCK_ROUNDS):
            profiled.run(None, feeds)
            for session, wall in zip(plain, walls_us, strict=True):
                start = time.perf_counter_ns()
                session.run(None, feeds)
                wall.append((time.perf_counter_ns() - start) / 1e3)
        (runs,) = _read_profile(Path(profiled.end_profiling()), 1)
    node_us = _min_of_medians(runs) / (CLOCK_NODES + 1)
    added_us = (_min_of_medians(walls_us[1]) - _min_of_medians(walls_us[0])) / CLOCK_NODES
    return max(0.0, node_us - max(0.0, added_us))


def _build_chain(length: int) -> Any:
    """Return a model of `length` trivial nodes that the runtime neither fuses nor removes."""
    from onnx import TensorProto, helper

    names = ["x", *(f"v{i}" for i in range(length - 1)), "y"]
    nodes = [
        helper.make_node("Neg" if i % 2 else "Relu", [names[i]], [names[i + 1]], f"layer0_{i}") for i in range(length)
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 16)) for n in "xy")
    graph = helper.make_graph(nodes, "clock", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
