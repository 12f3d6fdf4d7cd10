"""Single layers in OpenVINO: its counters give each layer's kernel after every run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import TargetMissing
from jettison.targets import openvino as target

if TYPE_CHECKING:
    import onnx

_LAYER = re.compile(r"layer(\d+)_")
_AROUND = ("Reorder", "Result")
"""Layout changes at a branch's ends, which a network has only once; they are named after the layer, too."""


class Bench:
    """Layers side by side in one compiled network; `layers` is how many there are."""

    def __init__(self, model: onnx.ModelProto, layers: int, threads: int, folder: Path) -> None:
        reason = target.why_missing()
        if reason:
            raise TargetMissing(f"Nothing can be timed in OpenVINO on this machine. {reason}")
        import openvino

        core = openvino.Core()
        settings = {**target.describe_settings(threads=threads, precision="fp32"), "PERF_COUNT": True}
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.times_us: list[list[float]] = [[] for _ in range(layers)]

    def run(self, feeds: Mapping[str, Any]) -> None:
        """Run every layer once."""
        self.request.infer(feeds, share_inputs=True)
        spent = [0.0] * len(self.times_us)
        for node in self.request.get_profiling_info():
            if (match := _LAYER.match(node.node_name)) and node.node_type not in _AROUND:
                spent[int(match[1])] += node.real_time.total_seconds() * 1e6
        for times, us in zip(self.times_us, spent, strict=True):
            times.append(us)

    def read(self) -> list[list[float]]:
        """Return, for each layer, its microseconds in each run."""
        return self.times_us


def measure_clock(threads: int) -> float:
    """Return 0: reading the processor's clock around a node costs less than the microsecond that is counted in."""
    return 0.0
