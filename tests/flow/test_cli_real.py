"""The command line with the real pipeline behind it, on a network of two layers."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jettison.flow.compress import DELIVERABLES, QUANTIZED_FILES

pytestmark = pytest.mark.slow

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )

def samples():
    print("a loader that talks")
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(8)]
"""
OPTIONS = ("--macs", "0.6", "--batch", "16", "--no-quantize")


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the program as a user would, with Ctrl-C as a terminal sends it."""
    return subprocess.Popen(
        [sys.executable, "-m", "jettison.cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    process = start(folder, *arguments)
    stdout, stderr = process.communicate(timeout=240)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, arrays with and without labels, and pictures in two classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("user")
    (folder / "net.py").write_text(NETWORK)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(160, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "xy.npz", x=x[:100], y=np.arange(100) % 4)
    for index in range(60):
        path = folder / "pictures" / ("cats" if index % 2 else "dogs") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A finished run of the command in `COMMAND`."""
    code, stdout, stderr = run(folder, *COMMAND)
    assert code == 0, stderr
    assert "Report: run/report.html" in stdout
    assert stderr == ""  # a pipe: no progress
    return folder / "run"


COMMAND = ("compress", "net:build", "--inputs", "x.npz", "--test", "xy.npz", *OPTIONS, "--out", "run", "--quiet")


@pytest.mark.slow
class TestCompress:
    def test_leaves_everything_in_the_folder(self, finished: Path) -> None:
        assert {p.name for p in finished.iterdir()} >= {*DELIVERABLES, "model.onnx"} - set(QUANTIZED_FILES)
        record = json.loads((finished / "record.json").read_text())
        assert record["model"] == "net:build" and record["met"] and record["budget"] == {"macs": 0.6}
        assert record["drop"]["metric"] == "accuracy" and record["drop"]["n"] == 100
        assert record["command"] == "jettison " + " ".join(COMMAND)

    def test_the_second_call_is_quick_and_says_the_same(self, folder: Path, finished: Path) -> None:
        record = (finished / "record.json").read_text()
        begun = time.monotonic()
        code, stdout, stderr = run(folder, *COMMAND, "--json")
        seconds = time.monotonic() - begun
        assert (code, stderr) == (0, "")
        again, first = json.loads(stdout), json.loads(record)
        assert again["variants"] == first["variants"] and again["drop"] == first["drop"]
        stages = sum(s["seconds"] for s in first["stages"])
        assert seconds < max(20, stages)  # importing torch and tracing remain

    def test_another_budget_does_not_mix_with_the_run(self, folder: Path, finished: Path) -> None:
        changed = ["0.3" if a == "0.6" else a for a in COMMAND]
        code, _, stderr = run(folder, *changed)
        assert code == 2 and stderr.startswith("CheckpointError: ")

    def test_report_and_json(self, folder: Path, finished: Path) -> None:
        (finished / "report.html").unlink()
        code, stdout, _ = run(folder, "report", "run")
        assert code == 0 and "compressed" in stdout
        assert (finished / "report.html").read_text().rstrip().endswith("</html>")
        code, stdout, _ = run(folder, "report", "run", "--json")
        assert code == 0 and json.loads(stdout) == json.loads((finished / "record.json").read_text())

    def test_inputs_from_code_without_labels(self, folder: Path) -> None:
        code, stdout, stderr = run(folder, "compress", "net:build", "--inputs", "net:samples", *OPTIONS, "--json")
        assert code == 0, stderr
        assert json.loads(stdout)["drop"]["metric"] == "agreement"
        assert stderr == "a loader that talks\n"

    def test_pictures_are_labelled_by_their_folders(self, folder: Path) -> None:
        options = ("--size-px", "8", "--mean", "0.5", "--std", "0.5", "--test", "pictures")
        code, stdout, stderr = run(
            folder, "compress", "net:build", "--inputs", "pictures", *OPTIONS, *options, "--json"
        )
        assert code == 0, stderr
        drop = json.loads(stdout)["drop"]
        assert (drop["metric"], drop["n"]) == ("accuracy", 60)

    def test_an_impossible_budget_ends_with_1_and_the_best(self, folder: Path) -> None:
        code, stdout, stderr = run(
            folder, "compress", "net:build", "--inputs", "x.npz", "--macs", "0.001", "--no-quantize", "--json"
        )
        assert (code, stderr) == (1, "")
        found = json.loads(stdout)
        assert found["error"] == "BudgetError" and not found["best"]["met"] and found["best"]["unmet"]

    def test_in_a_terminal_there_are_bars_unless_quiet(self, folder: Path) -> None:
        """A terminal is what the program sees as one; the bars come after two seconds, so a long stage is asked for."""
        x = np.random.default_rng(0).normal(size=(160, 3, 32, 32)).astype(np.float32)
        np.savez(folder / "large.npz", x=x)
        command = ("compress", "net:build", "--inputs", "large.npz", *OPTIONS, "--batch", "64")
        assert "Distilling" in self.show(folder, *command)
        assert self.show(folder, *command, "--quiet") == ""

    @staticmethod
    def show(folder: Path, *arguments: str) -> str:
        """Return what stands on standard error when that is a terminal."""
        ours, theirs = pty.openpty()
        process = start(folder, *arguments, stderr=theirs, env={**os.environ, "TERM": "xterm"})
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(ours)
        process.communicate(timeout=240)
        assert process.returncode == 0
        return shown.decode()


@pytest.mark.slow
def test_ctrl_c_ends_with_1_and_the_run_goes_on(folder: Path, finished: Path) -> None:
    """Stopped while it measures sensitivities; then it ends with the weights of a run that was not."""
    command = ["interrupted" if a == "run" else a for a in COMMAND]
    process = start(folder, *command)
    until = time.monotonic() + 120
    while not (folder / "interrupted" / "original.onnx").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert stderr.strip().startswith("Stopped: Ctrl-C") and "Traceback" not in stderr
    assert not (folder / "interrupted" / "record.json").exists()
    code, _, stderr = run(folder, *command)
    assert code == 0, stderr
    for name in ("plan.json", "model.safetensors"):
        assert (folder / "interrupted" / name).read_bytes() == (finished / name).read_bytes()
    shutil.rmtree(folder / "interrupted")


def test_what_is_wrong_ends_with_2(folder: Path) -> None:
    compress = ("compress", "net:build", "--inputs", "x.npz")
    for arguments, says in (
        (("compress", "net:buidl", "--inputs", "x.npz", "--macs", "0.5"), "'build'"),
        ((*compress, "--macs", "0.5", "--target", "onnxruntim"), "'onnxruntime'"),
        (("compress", "net:build", "--inputs", "xy.npz", "--test", "x.npz", "--macs", "0.5"), "no labels"),
    ):
        code, stdout, stderr = run(folder, *arguments)
        assert (code, stdout) == (2, "") and says in stderr, stderr


def test_trace_and_doctor(folder: Path) -> None:
    code, stdout, _ = run(folder, "trace", "net:build", "--inputs", "xy.npz")
    assert code == 0 and "2 prune groups" in stdout
    code, stdout, _ = run(folder, "doctor", "--json")
    assert code == 0
    usable = {t["name"]: t["usable"] for t in json.loads(stdout)["targets"]}
    assert usable["onnxruntime"]
