"""The few lines that run a deployed file, as text to copy: one example a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ONNXRUNTIME = """
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession("@FILE@")
inputs = @INPUTS@
outputs = session.run(None, inputs)
"""
_OPENVINO = """
import numpy as np
import openvino
settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
network = openvino.Core().compile_model("@FILE@", "CPU", settings)
inputs = @INPUTS@
outputs = list(network(inputs).values())
"""
_EXECUTORCH = """
import numpy as np
import torch
from executorch.runtime import Runtime
method = Runtime.get().load_program("@FILE@").load_method("forward")
inputs = @INPUTS@
outputs = method.execute([torch.from_numpy(x) for x in inputs.values()])
"""
_LITERT = """
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter("@FILE@")
interpreter.allocate_tensors()
inputs = @INPUTS@
for place, x in zip(interpreter.get_input_details(), inputs.values()):
    interpreter.set_tensor(place["index"], x)
interpreter.invoke()
outputs = [interpreter.get_tensor(place["index"]) for place in interpreter.get_output_details()]
"""
_TORCH = """
from pathlib import Path
import numpy as np
from jettison.targets import @TARGET@
session = @TARGET@.load(Path("@FILE@"), threads=1)
inputs = @INPUTS@
outputs = session.run(list(inputs.values()))
"""

EXAMPLES: Mapping[str, str] = {
    "onnxruntime": _ONNXRUNTIME,
    "openvino": _OPENVINO,
    "executorch": _EXECUTORCH,
    "litert": _LITERT,
    "eager": _TORCH,
    "inductor": _TORCH,
}


def show_loading(target: str, file: str, inputs: Sequence[tuple[str, Sequence[int], str]]) -> str:
    """Return Python that loads `file` in a target and runs it on zeros; `inputs` are (name, shape, numpy's dtype)."""
    feeds = ", ".join(f'"{name}": np.zeros({list(shape)}, np.{dtype})' for name, shape, dtype in inputs)
    text = EXAMPLES[target].lstrip().replace("@TARGET@", target)
    return text.replace("@FILE@", file).replace("@INPUTS@", f"{{{feeds}}}")
