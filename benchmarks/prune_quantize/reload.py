"""The fresh process: load a saved quantized network, run it, export it again, and compare both with what was before."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

import jettison as jt
from benchmarks.coverage.zoo import list_tensors
from benchmarks.prune_quantize.one import TARGET, Inputs, call, join_inputs, order
from jettison.targets import find_target
from jettison.testing.oracles import has_same_bits


def write_reload(folder: Path, needed: Sequence[str]) -> None:
    """Compare, and write what is to be added to the model's row; `needed` are modules to import first."""
    torch.set_num_threads(1)
    row = {}
    try:
        for module in needed:
            importlib.import_module(module)
        found = jt.load_quantized(folder)
        # safetensors hands out memory that is not aligned as torch aligns its own: kernels would round differently.
        inputs = join_inputs({name: x.clone() for name, x in load_file(folder / "inputs.safetensors").items()})
        outputs, expected = list_tensors(call(found.module, inputs)), load_file(folder / "expected.safetensors")
        same = [has_same_bits(y, expected[str(i)]) for i, y in enumerate(outputs)]
        if not all(same) or len(same) != len(expected):
            raise AssertionError(f"the reloaded network computes other bits in {same.count(False)} of its outputs")
        row["reload"] = "bit-equal"
        again = jt.export(found.module, inputs, folder / "again.onnx", target=TARGET)
        row["file"] = compare_files(folder / "model.onnx", again, inputs)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is this model's row
        row |= {"outcome": "wrong", "stage": "reload", "error": f"{type(error).__name__}: {error}"[:300]}
    (folder / "reload.json").write_text(json.dumps(row))


def compare_files(one: Path, other: Path, inputs: Inputs) -> str:
    """Say how equal two exported files are; raises AssertionError where they compute other bits."""
    if one.read_bytes() == other.read_bytes():
        return "byte-equal"
    runtime = find_target(TARGET)
    outputs = []
    for file in (one, other):
        session = runtime.load(file, threads=1)
        outputs.append(runtime.predict(session, order(inputs, session.input_names)))
    if not all(has_same_bits(a, b) for a, b in zip(*outputs, strict=True)):
        raise AssertionError("the file exported after the reload computes other bits")
    return "output bit-equal"
