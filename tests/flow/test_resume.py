"""A run that is killed goes on from its last finished stage and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.flow.digits import BUDGET, QUICK, make_test_batches, split_digits
from tests.flow.run_once import compress
from torch import nn

import jettison as jt
from jettison.core import plain
from jettison.core.errors import CheckpointError, JettisonError
from jettison.graph.store import save_tensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAGES = (
    "run.json",
    "original.onnx",
    "int8.onnx",
    "reference.json",
    "sensitivity.json",
    "plan.json",
    "recalibrated.safetensors",
    "distilled.safetensors",
    "model.onnx",
    "measurements.json",
    "checks.json",
    "model.json",
    "model.safetensors",
    "module.safetensors",
    "module.json",
    "quantized.safetensors",
    "quantized.json",
    "record.json",
    "report.html",
)
"""The files of a run in the order they are written."""
ALWAYS = {"model.json", "model.safetensors", "module.safetensors", "module.json", "record.json", "report.html"}
ALWAYS |= {"quantized.json", "quantized.safetensors"}
"""What is written each time, from what the stages left."""
SAME = ("plan.json", "sensitivity.json", "model.onnx", "model.json", "model.safetensors", "module.json")
SAME += ("quantized.json", "quantized.safetensors")
"""What may not depend on kills or clocks."""


@pytest.fixture(scope="module")
def weights(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_tensors(trained, path)
    return path


@pytest.fixture(scope="module")
def undisturbed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(weights, tmp_path_factory.mktemp("undisturbed") / "run").folder


def check_same(folder: Path, undisturbed: Path) -> None:
    for name in SAME:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), f"{name} differs"
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".partial")]
    mine, theirs = (json.loads((f / "record.json").read_text()) for f in (folder, undisturbed))
    for key in ("groups", "layers", "checks", "drop", "budget", "front"):
        assert mine[key] == theirs[key]
    # A kill between a stage's file and the note of its time loses that time and nothing else.
    assert {s["name"] for s in mine["stages"]} <= {s["name"] for s in theirs["stages"]}


def note_times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name in STAGES}


def start(weights: Path, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "tests.flow.run_once", str(weights), str(folder)]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> bool:
    """Poll until `reached`, or until the process has ended."""
    while process.poll() is None:
        if reached():
            return True
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_kill_9_after_each_stage(weights: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One folder, killed as soon as the next file appears, again and again until a run gets to its end."""
    folder = tmp_path / "run"
    for name in ("original.onnx", "sensitivity.json", "recalibrated.safetensors", "model.onnx", "model.json"):
        before = note_times(folder) if folder.exists() else {}
        process = start(weights, folder)
        wait_for(process, (folder / name).exists)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        after = note_times(folder)
        # Sensitivity is written group by group; all else once.
        assert {n: t for n, t in after.items() if n in before and n != "sensitivity.json"} == {
            n: t for n, t in before.items() if n != "sensitivity.json"
        }
    process = start(weights, folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    check_same(folder, undisturbed)


@pytest.mark.slow
def test_kill_9_at_any_moment(weights: Path, undisturbed: Path, tmp_path: Path) -> None:
    generator = random.Random(int.from_bytes(os.urandom(2), "big"))
    folder = tmp_path / "run"
    waits = [generator.uniform(0.0, 4.0) for _ in range(4)]
    for seconds in waits:
        process = start(weights, folder)
        wait_for(process, (folder / "run.json").exists)
        deadline = time.monotonic() + seconds
        wait_for(process, lambda deadline=deadline: time.monotonic() > deadline)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), (waits, errors.decode())
    process = start(weights, folder)
    _, errors = process.communicate()
    assert process.returncode == 0, (waits, errors.decode())
    check_same(folder, undisturbed)


class Killed(BaseException):
    """Stands for a kill that no handler sees."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "after"])
def test_cut_off_at_every_write(
    weights: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Every write of a run is cut off once: with half of the bytes in the partial file, or just after it."""
    folder = tmp_path / "run"
    done: set[str] = set()
    write = plain.write_bytes

    def cut_off(content: bytes, path: Path) -> None:
        if path.parent != folder or path.name in done or path.name == "stages.json":
            write(content, path)
            return
        done.add(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if moment == "half":
            path.with_name(f".{path.name}.partial").write_bytes(content[: len(content) // 2])
        if moment == "after":
            write(content, path)
        raise Killed(path.name)

    for module in list(sys.modules.values()):
        if module.__name__.startswith("jettison") and getattr(module, "write_bytes", None) is write:
            monkeypatch.setattr(module, "write_bytes", cut_off)
    for _ in range(len(STAGES) + 5):
        before = note_times(folder) if folder.exists() else {}
        try:
            compress(weights, folder)
        except Killed:
            after = note_times(folder)
            kept = set(before) - ALWAYS - {"sensitivity.json"}
            assert {n: after[n] for n in kept} == {n: before[n] for n in kept}, "a finished stage was computed again"
        else:
            break
    assert done >= set(STAGES) - {"stages.json"}
    check_same(folder, undisturbed)


def test_a_finished_run_is_read_not_repeated(weights: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = note_times(folder)
    result = compress(weights, folder)
    after = note_times(folder)
    rewritten = {n for n in before if before[n] != after[n]}
    assert rewritten <= ALWAYS
    check_same(folder, undisturbed)
    assert (
        result.record.variants
        == jt.core.plain.read_json(  # type: ignore[attr-defined]
            jt.Record, undisturbed / "record.json"
        ).variants
    )


@pytest.mark.slow
def test_an_interrupted_distillation_goes_on(
    weights: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the longest stage."""
    from jettison.distill import train

    folder = tmp_path / "run"
    compute, steps = train._compute_loss, []

    def interrupt(*arguments: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return compute(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train, "_compute_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(weights, folder)
    assert not (folder / "distilled.safetensors").exists() and (folder / "recalibrated.safetensors").exists()
    compress(weights, folder)
    check_same(folder, undisturbed)


def run_again(trained: nn.Module, folder: Path, **changes: object) -> jt.Result:
    given: dict[str, object] = {
        "budget": BUDGET,
        "recipe": QUICK,
        "evaluate": jt.accuracy(make_test_batches()),
        "out": folder,
        "quiet": True,
        "name": "digits",
        **changes,
    }
    return jt.compress(trained, given.pop("calibration", split_digits()[0]), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "settings seed differ"),
        ({"budget": jt.Budget(macs=0.6)}, "settings budget differ"),
        ({"recipe": jt.Recipe(samples=100)}, "settings recipe differ"),
        ({"threads": 2}, "settings threads differ"),
        ({"evaluate": None}, "settings sealed differ"),
        ({"calibration": split_digits()[1]}, "weights or calibration data differ"),
    ],
)
def test_the_folder_of_another_run(
    trained: nn.Module, finished_folder: Path, changes: dict[str, object], says: str
) -> None:
    before = note_times(finished_folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        run_again(trained, finished_folder, **changes)
    assert "out=" in str(caught.value) and note_times(finished_folder) == before


def test_other_weights(model: nn.Module, finished_folder: Path) -> None:
    with torch.no_grad():
        model.head.bias += 1e-4
    with pytest.raises(CheckpointError, match="weights or calibration data differ"):
        run_again(model, finished_folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run.json", b"{"),
        ("reference.json", b""),
        ("sensitivity.json", b'{"groups": 3}'),
        ("plan.json", b"half of a fi"),
        ("recalibrated.safetensors", b"\x08\x00\x00"),
        ("distilled.safetensors", None),
        ("measurements.json", b"{}"),
        ("checks.json", b"null"),
        ("stages.json", b"["),
    ],
)
def test_a_corrupt_stage_is_refused_with_a_remedy(
    trained: nn.Module, finished_folder: Path, tmp_path: Path, name: str, damage: bytes | None
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_folder, folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        run_again(trained, folder)
    assert any(word in str(caught.value) for word in ("Remove it", "anew")), caught.value


@pytest.mark.parametrize("name", ["original.onnx", "model.onnx"])
def test_a_corrupt_file_of_the_runtime(trained: nn.Module, finished_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_folder, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:500])
    (folder / "measurements.json").unlink()
    (folder / "checks.json").unlink()
    with pytest.raises(JettisonError, match=name.replace(".", r"\.")):
        run_again(trained, folder)


def test_removing_a_corrupt_stage_heals_the_run(trained: nn.Module, finished_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_folder, folder)
    for name in ("plan.json", "distilled.safetensors"):
        (folder / name).unlink()
    run_again(trained, folder)
    for name in SAME:
        assert (folder / name).read_bytes() == (finished_folder / name).read_bytes(), name
