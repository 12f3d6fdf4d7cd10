"""OpenVINO on the CPU: runs the same ONNX files, for comparison; float files at explicit float32.

OpenVINO's own default is bfloat16 where the processor has it, which would make a float baseline look both faster
and less exact than it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LABEL = "OpenVINO"


def why_missing() -> str | None:
    """Return None where OpenVINO is installed, else one sentence with the command that installs it."""
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: run `pip install openvino`."
    return None


@dataclass(frozen=True)
class Session:
    """A compiled network."""

    request: Any

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Return the outputs for one batch of inputs."""
        found = self.request.infer(dict(enumerate(arrays)), share_inputs=True)
        return list(found.values())


def load(path: Path, *, threads: int) -> Session:
    """Compile an ONNX file for latency with a fixed number of threads."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return Session(compiled.create_infer_request())
