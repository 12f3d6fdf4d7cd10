"""`compress` for each target: the whole pipeline on a small trained network, down to the file in its runtime."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.flow.digits import QUICK, DigitNet, make_test_batches, split_digits, train

import jettison as jt
from jettison.core.errors import InputError
from jettison.cost.timing import RUNTIMES
from jettison.targets import TARGETS

LOOSE = jt.Budget(latency=0.999, macs=0.5)
"""The latency must be planned and measured; a busy machine decides nothing."""


def find(name: str) -> pytest.param:  # type: ignore[valid-type]
    reason = importlib.import_module(f"jettison.targets.{name}").why_missing()
    return pytest.param(name, marks=[pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=str(reason))])


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    torch.manual_seed(0)
    return train(DigitNet())


@pytest.mark.parametrize("name", [find(n) for n in TARGETS if n != "onnxruntime"])
def test_compress_for(name: str, trained: torch.nn.Module, tmp_path: Path) -> None:
    target = importlib.import_module(f"jettison.targets.{name}")
    integer = "int8" in target.PRECISIONS
    recipe = jt.Recipe(**{**vars(QUICK), "quantize": integer})
    # PyTorch's calls cost more than computing so small a network: nothing makes it reliably faster there.
    budget = jt.Budget(macs=0.5) if target.PACKAGE == "torch" else LOOSE
    result = jt.compress(
        trained, split_digits()[0], budget=budget, target=name, recipe=recipe,
        evaluate=jt.accuracy(make_test_batches()), out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    record = result.record
    assert record.met and all(check.passed for check in record.checks)
    assert record.target == target.LABEL and result.artifact.name == f"model{target.SUFFIX}"
    assert record.drop.points < 5.0
    # ExecuTorch counts whole microseconds, less than which the compressed network's operators take.
    assert bool(record.time_before) == target.PROFILED
    if integer:
        assert all(layer.integer for layer in record.layers)
        stand_in = any("times of ONNX Runtime" in note for note in record.notes)
        assert stand_in == (name not in RUNTIMES and budget is LOOSE)
    saved = result.save(tmp_path / "saved")
    code = f"{record.load_example}\nprint([list(y.shape) for y in outputs])"
    done = subprocess.run([sys.executable, "-c", code], cwd=saved, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [[1, 10]]


def test_a_target_without_integers_is_refused_before_anything_runs(tmp_path: Path) -> None:
    names = [n for n in TARGETS if "int8" not in importlib.import_module(f"jettison.targets.{n}").PRECISIONS]
    with pytest.raises(InputError, match="quantize=False"):
        jt.compress(DigitNet().eval(), split_digits()[0], budget=LOOSE, target=names[0], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
