"""The fresh process: load a saved quantized network, run it on saved inputs, export it again.

`python -m benchmarks.prune_quantize.again FOLDER [MODULE]`; MODULE is imported first: what defines the class of the
network's outputs, where that is no tuple, list or dict.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import jettison as jt
from benchmarks.coverage.zoo import list_tensors
from benchmarks.prune_quantize.one import call, join_inputs


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for module in sys.argv[2:]:
        importlib.import_module(module)
    found = jt.load_quantized(folder)
    # safetensors hands out memory that is not aligned as torch aligns its own: kernels would round differently.
    inputs = join_inputs({name: x.clone() for name, x in load_file(folder / "inputs.safetensors").items()})
    outputs = list_tensors(call(found.module, inputs))
    save_file({str(i): y.contiguous() for i, y in enumerate(outputs)}, folder / "outputs.safetensors")
    jt.export(found.module, inputs, folder / "again.onnx")


if __name__ == "__main__":
    main()
