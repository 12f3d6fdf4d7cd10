"""Single layers in ONNX Runtime: its profile gives each layer's kernel, and its clock's own cost is measured."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import TargetMissing
from jettison.cost.medians import min_of_medians

if TYPE_CHECKING:
    import onnx

CLOCK_NODES = 32
CLOCK_ROUNDS = 200
_LAYER = re.compile(r"layer(\d+)_")


class Bench:
    """Layers side by side in one profiled session; `layers` is how many there are, `folder` holds the profile."""

    def __init__(self, model: onnx.ModelProto, layers: int, threads: int, folder: Path) -> None:
        self.layers = layers
        self.session = open_session(model.SerializeToString(), threads, folder / f"session{id(self)}")

    def run(self, feeds: Mapping[str, Any]) -> None:
        """Run every layer once."""
        self.session.run(None, dict(feeds))

    def read(self) -> list[list[float]]:
        """Return, for each layer, its microseconds in each run; the bench runs no more after it."""
        return _read_profile(Path(self.session.end_profiling()), self.layers)


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


def measure_clock(threads: int) -> float:
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
    node_us = min_of_medians(runs) / (CLOCK_NODES + 1)
    added_us = (min_of_medians(walls_us[1]) - min_of_medians(walls_us[0])) / CLOCK_NODES
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
