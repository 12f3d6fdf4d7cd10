"""A file that kills the process which loads it is found out in another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jettison.core.errors import CheckpointError
from jettison.targets import openvino
from jettison.targets.memory import find_death, measure_growth

DYING = """
import os, signal

def start(path, threads):
    os.kill(os.getpid(), signal.SIGSEGV)
"""
FAILING = """
def start(path, threads):
    raise RuntimeError("no network")
"""
LIVING = """
def start(path, threads):
    return lambda: None
"""


def test_a_death_is_told_from_an_error(tmp_path: Path) -> None:
    assert find_death(DYING, tmp_path, threads=1) == "SIGSEGV"
    assert find_death(FAILING, tmp_path, threads=1) is None
    assert find_death(LIVING, tmp_path, threads=1) is None
    with pytest.raises(CheckpointError, match="could not be measured"):
        measure_growth(DYING, tmp_path, threads=1)


def write_joined(path: Path) -> Path:
    """Two roundings in a row after a concatenation, of which OpenVINO 2026.4 dies."""
    shape = [2, 4, 32, 32]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "b")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8, 32, 32])
    names = ["joined", "q1", "d1", "q2", "y"]
    nodes = [helper.make_node("Concat", ["a", "b"], ["joined"], axis=1)]
    for operator, source, result in zip(("QuantizeLinear", "DequantizeLinear") * 2, names, names[1:], strict=False):
        nodes.append(helper.make_node(operator, [source, "scale", "zero"], [result]))
    constants = [numpy_helper.from_array(np.float32(0.02), "scale"), numpy_helper.from_array(np.uint8(56), "zero")]
    graph = helper.make_graph(nodes, "joined", inputs, [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.skipif(openvino.why_missing() is not None, reason=str(openvino.why_missing()))
def test_openvino_refuses_what_would_kill_it(tmp_path: Path) -> None:
    path = write_joined(tmp_path / "joined.onnx")
    if find_death(openvino._START, path, threads=1) is None:
        pytest.skip("this OpenVINO does not die of it")
    for _ in range(2):  # the second time it is known
        with pytest.raises(CheckpointError, match=r"kills the process that loads .*joined\.onnx: SIG"):
            openvino.load(path, threads=1)
