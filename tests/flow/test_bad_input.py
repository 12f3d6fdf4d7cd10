"""What people get wrong, and what machines do to them: one typed error each, saying what, where and what to do."""

from __future__ import annotations

import copy
import errno
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flow.digits import BUDGET, QUICK, make_test_batches, split_digits
from torch import Tensor, nn

import jettison as jt
from jettison.core import plain
from jettison.core.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    EvaluateError,
    InputError,
    NonFiniteError,
    ShapeError,
    StorageError,
    TraceError,
    UnknownName,
    VerificationError,
)

pytestmark = pytest.mark.slow

FLOAT = jt.Recipe(samples=96, judges=32, positions=2000, steps=4, rounds=4, quantize=False)


def run(model: Any, calibration: Any = None, **given: Any) -> jt.Result:
    options: dict[str, Any] = {"budget": BUDGET, "recipe": FLOAT, "quiet": True, **given}
    return jt.compress(model, split_digits()[0] if calibration is None else calibration, **options)


def list_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


# Settings: refused before anything is written.


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"threads": 0}, InputError, "threads=0"),
        ({"threads": -2}, InputError, "threads=-2"),
        ({"threads": 1.5}, InputError, "threads=1.5"),
        ({"threads": None}, InputError, "threads=None"),
        ({"target": "onnxruntim"}, UnknownName, "Did you mean 'onnxruntime'"),
        ({"target": "coreml"}, UnknownName, "no target named 'coreml'"),
        ({"recipe": jt.Recipe(criterion="magnitud")}, UnknownName, "Did you mean 'magnitude'"),
        ({"recipe": jt.Recipe(protect=("iner",))}, UnknownName, "Did you mean 'inner'"),
        ({"recipe": {"steps": 3}}, InputError, "Recipe"),
        ({"budget": 0.5}, InputError, r"Budget\(\.\.\.\)"),
        ({"budget": None}, InputError, "Budget"),
        ({"evaluate": 0.9}, InputError, "evaluate is a float"),
        ({"device": "gpu"}, InputError, "device='gpu'"),
        ({"device": "cuda:9"}, InputError, "device='cuda:9'"),
    ],
)
def test_settings(model: nn.Module, tmp_path: Path, given: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        run(model, out=tmp_path / "run", **given)
    assert list_files(tmp_path) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: jt.Budget(),
        lambda: jt.Budget(macs=0.0),
        lambda: jt.Budget(macs=1.5),
        lambda: jt.Budget(latency=-1),
        lambda: jt.Budget(size="2 MB"),  # type: ignore[arg-type]
        lambda: jt.Budget(drop=math.nan),
        lambda: jt.Recipe(samples=0),
        lambda: jt.Recipe(steps=-1),
        lambda: jt.Recipe(ratios=()),
        lambda: jt.Recipe(ratios=(0.0,)),
        lambda: jt.Recipe(protect="inner"),  # type: ignore[arg-type]
        lambda: jt.accuracy(iter([])),
    ],
)
def test_values_out_of_range(make: Any) -> None:
    with pytest.raises(InputError):
        make()


# The calibration data.


def make_bad_items(kind: str) -> Any:
    x = split_digits()[0]
    items: list[Any] = list(x[:256].split(64))
    if kind == "first shape":
        return [torch.rand(8, 3, 8, 8), *items]
    if kind == "later shape":
        items[2] = torch.rand(64, 1, 9, 9)
    if kind == "nan":
        items[2] = items[2].clone()
        items[2][5, 0, 3, 3] = math.nan
    if kind == "strings":
        return ["cat.jpg", "dog.jpg"]
    if kind == "one picture":
        return [x[0], x[1]]  # no batch dimension
    return {"empty": [], "no rows": x[:0], "iterator": iter(items), "path": "photos/", "none": 3}.get(kind, items)


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("first shape", ShapeError, r"\(2, 3, 8, 8\)|\(8, 3, 8, 8\)"),
        ("later shape", ShapeError, r"item 2 has shape \(64, 1, 9, 9\)"),
        ("nan", NonFiniteError, "item 2 holds NaN"),
        ("strings", InputError, "item 0 holds a str"),
        ("one picture", ShapeError, "does not take inputs of shape"),
        ("empty", CalibrationError, "no calibration items"),
        ("no rows", CalibrationError, "no calibration items"),
        ("iterator", CalibrationError, "only once"),
        ("path", InputError, "calibration is a str"),
        ("none", InputError, "calibration is a int"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_calibration(model: nn.Module, kind: str, error: type[Exception], says: str, labelled: bool) -> None:
    evaluate = jt.accuracy(make_test_batches()) if labelled else None
    with pytest.raises(error, match=says):
        run(model, make_bad_items(kind), evaluate=evaluate)


@pytest.mark.slow
def test_nothing_to_seal(model: nn.Module, tmp_path: Path) -> None:
    """The advice is to give an evaluate function, and the same folder then takes it."""
    x = split_digits()[0][:2]
    with pytest.raises(InputError, match=r"Give more inputs|give a few dozen|Give a few dozen"):
        run(model, x, out=tmp_path / "run")
    run(model, x, out=tmp_path / "run", evaluate=jt.accuracy(make_test_batches()))


# The network.


def test_nan_weights(model: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        model.inner.weight[3, 1, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'inner\.weight' holds 1 NaN"):
        run(model, out=tmp_path / "run")
    assert list_files(tmp_path) == []


class Logarithm(nn.Module):
    """Its output is infinite where the first pixel is 0, and NaN below."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x.flatten(1)))) + torch.log(x[:, 0, 0, :1])


@pytest.mark.parametrize("where", [0, 70])
def test_nan_outputs(where: int) -> None:
    x = split_digits()[0][:128] + 0.1
    x[where] = 0
    with pytest.raises(NonFiniteError, match="network's own output"):
        run(Logarithm(), x, evaluate=jt.accuracy(make_test_batches()))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.sum() > 0:  # data-dependent
            x = x * 2
        return self.head(x)


def test_a_network_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"test_bad_input\.py:\d+") as caught:
        run(Branches(), out=tmp_path / "run")
    assert "torch.cond" in str(caught.value) and list_files(tmp_path) == []


@pytest.mark.parametrize("thing", [None, "resnet18", torch.relu, nn.Linear])
def test_what_is_no_network(thing: Any) -> None:
    with pytest.raises(InputError, match=r"Expected a torch.nn.Module"):
        run(thing)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def test_agreement_needs_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Pass evaluate="):
        run(Regression(), out=tmp_path / "run")
    assert list_files(tmp_path) == []


# The budget.


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (jt.Budget(macs=0.001), "MACs is .* above the limit of 0.001"),
        (jt.Budget(size_mb=0.0001), "size is .* MB, above the limit"),
        (jt.Budget(latency_ms=1e-6), "latency is .* ms, above the limit"),
    ],
)
@pytest.mark.slow
def test_an_impossible_budget_carries_the_best(model: nn.Module, budget: jt.Budget, says: str) -> None:
    with pytest.raises(BudgetError, match=says) as caught:
        run(model, budget=budget)
    result = caught.value.result
    assert not result.record.met and result.record.unmet
    assert result.model(split_digits()[1][:3]).shape == (3, 10)
    for name in ("model.onnx", "record.json", "report.html", "model.safetensors"):
        assert (result.folder / name).exists()
    assert any(g.after < g.before for g in result.record.groups), "the best is as small as can be"


@pytest.mark.slow
def test_a_drop_that_cannot_be_kept(model: nn.Module) -> None:
    """A third of the MACs without losing a single prediction: measured, not predicted."""
    with pytest.raises(BudgetError, match=r"agreement drop is .* above the limit of 0") as caught:
        run(model, budget=jt.Budget(macs=0.3, drop=0.0))
    assert caught.value.result.record.drop.points > 0


# What the caller's evaluate does. The finished run is measured again, which takes a second.


@pytest.fixture
def unmeasured(finished_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished_folder, folder)
    for name in ("measurements.json", "checks.json", "record.json", "report.html"):
        (folder / name).unlink()
    return folder


class Wandering:
    """Returns another number of scores each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, predict: Any) -> list[float]:
        self.calls += 1
        return [1.0] * (10 + self.calls)


def raise_key_error(predict: Any) -> float:
    raise KeyError("label")


def index_a_dict(predict: Any) -> float:
    return float(predict(split_digits()[1])["logits"].mean())


def feed_two(predict: Any) -> float:
    x = split_digits()[1]
    return float(predict(x, x).mean())


def feed_wrong_shape(predict: Any) -> float:
    return float(predict(torch.rand(3, 1, 5, 5)).mean())


@pytest.mark.parametrize(
    ("evaluate", "error", "says"),
    [
        (raise_key_error, EvaluateError, "raised KeyError: 'label' .on the original file"),
        (index_a_dict, EvaluateError, "raised IndexError"),
        (feed_two, ShapeError, "called with 2 tensors, but takes 1: x"),
        (feed_wrong_shape, InputError, "."),
        (lambda predict: 97.3, EvaluateError, "97.3"),
        (lambda predict: math.nan, EvaluateError, "nan"),
        (lambda predict: None, EvaluateError, "NoneType"),
        (Wandering(), EvaluateError, "must score the same samples"),
    ],
)
def test_evaluate(unmeasured: Path, model: nn.Module, evaluate: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        run(model, recipe=QUICK, evaluate=evaluate, out=unmeasured, name="digits")
    assert not {"measurements.json", "record.json", "report.html"} & set(list_files(unmeasured))
    result = run(model, recipe=QUICK, evaluate=jt.accuracy(make_test_batches()), out=unmeasured, name="digits")
    assert result.record.met


def test_a_check_that_fails_is_said(unmeasured: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose weights are not those of the network is never called finished."""
    import onnx

    path = unmeasured / "model.onnx"
    proto = onnx.load(path)
    weight = next(i for i in proto.graph.initializer if len(i.dims) == 4 and i.data_type == onnx.TensorProto.INT8)
    raw = bytearray(weight.raw_data)
    raw[: len(raw) // 2] = bytes(len(raw) // 2)
    weight.raw_data = bytes(raw)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(VerificationError, match="simulated int8 = runtime") as caught:
        run(model, recipe=QUICK, evaluate=jt.accuracy(make_test_batches()), out=unmeasured, name="digits")
    assert "Do not deploy" in str(caught.value)


# Files and disks.


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"format": "jettison.graph/0"}', b"\x80\x04pickle"])
def test_loading_what_is_no_result(finished: jt.Result, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        finished.save(tmp_path)
        (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json"):
        jt.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, 5000])
def test_loading_weights_cut_short(finished: jt.Result, tmp_path: Path, keep: int) -> None:
    finished.save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        jt.load(tmp_path)


def test_weights_of_another_network(finished: jt.Result, tmp_path: Path) -> None:
    from jettison.graph.store import save_tensors

    finished.save(tmp_path)
    save_tensors(nn.Linear(3, 3), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        jt.load(tmp_path)


@pytest.mark.parametrize("call", [1, 3, 8])
def test_a_disk_that_fills_up(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """From some write on there is no space: a StorageError, no partial files, and room made, the run goes on."""
    calls: list[int] = []
    flush = os.fsync

    def fail(descriptor: int) -> None:
        calls.append(1)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    folder = tmp_path / "run"
    evaluate = jt.accuracy(make_test_batches())
    with monkeypatch.context() as patch:
        patch.setattr(plain.os, "fsync", fail)
        with pytest.raises(StorageError, match="No space left") as caught:
            run(model, out=folder, evaluate=evaluate)
    assert str(folder) in str(caught.value) and "out=" in str(caught.value)
    assert not [n for n in list_files(folder) if n.endswith(".partial")]
    assert run(model, out=folder, evaluate=evaluate).record.met


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 120 kB; the files of a run need more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(model: nn.Module, finished: jt.Result, tiny_disk: Path) -> None:
    evaluate = jt.accuracy(make_test_batches())
    with pytest.raises(StorageError, match="No space left"):
        run(model, out=tiny_disk / "run", evaluate=evaluate)
    assert not [n for n in list_files(tiny_disk) if n.endswith(".partial")]
    with pytest.raises(StorageError, match="No space left"):
        finished.save(tiny_disk / "saved")
    assert not [n for n in list_files(tiny_disk) if n.endswith(".partial")]


def test_a_folder_nobody_may_write(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        run(model, out=tmp_path / "file")


def test_a_folder_with_other_things(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="holds no run"):
        run(model, out=tmp_path)
    assert list_files(tmp_path) == ["thesis.tex"]


# Ctrl-C.


@pytest.mark.parametrize("stage", ["sensitivity", "evaluate"])
def test_an_interrupt_leaves_a_folder_to_go_on_from(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = tmp_path / "run"
    evaluate = jt.accuracy(make_test_batches())

    def interrupt(*arguments: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "sensitivity":
            patch.setattr("jettison.flow.deciding.measure_sensitivity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(copy.deepcopy(model), out=folder, evaluate=interrupt if stage == "evaluate" else evaluate)
    assert "record.json" not in list_files(folder) and "original.onnx" in list_files(folder)
    assert run(model, out=folder, evaluate=evaluate).record.met
