"""The command line: what it hands on, what it prints, how it ends. `jettison.compress` itself is tested elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import jettison
from jettison.cli import main
from jettison.core import errors
from jettison.core.plain import to_plain, write_json
from jettison.core.record import Drop, Interval, Record, Score, Variant

NETWORK = """
import time
from pathlib import Path
from torch import nn

def build():
    print("a library that talks")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5))

def slow():
    Path("started").touch()
    time.sleep(60)

def swallow():
    try:
        slow()
    except KeyboardInterrupt:
        raise ImportError("initialization failed") from None
"""


def make_record(folder: Path) -> Record:
    def variant(name: str, ms: float) -> Variant:
        interval, score = Interval(ms, ms, ms), Score("accuracy", 0.9, 10)
        return Variant(name, "onnxruntime", "fp32", None, interval, interval, 1000, 500, 20, None, score)

    return Record(
        format="jettison-record-1",
        version="0.1.0",
        created="2026-11-23T00:00:00+00:00",
        command="jettison compress",
        model="net:build",
        target="onnxruntime",
        inputs=(),
        outputs=(),
        seed=0,
        budget={"latency": 0.5},
        met=True,
        unmet=(),
        environment={},
        variants=(variant("original", 2.0), variant("compressed", 1.0)),
        baseline="original",
        compressed="compressed",
        drop=Drop("accuracy", 0.1, 0.4, 0.95, 10),
        groups=(),
        front=(),
        layers=(),
        time_before=(),
        time_after=(),
        checks=(),
        frozen=(),
        notes=(),
        stages=(),
        load_example=str(folder),
    )


@dataclass(frozen=True)
class FakeResult:
    record: Record
    artifact: Path
    folder: Path


class FakeCompress:
    """Stands in for `jettison.compress`: keeps what it was called with, runs `evaluate`, and returns or raises."""

    def __init__(self, folder: Path) -> None:
        self.result = FakeResult(make_record(folder), folder / "model.onnx", folder)
        self.error: BaseException | None = None
        self.given: dict[str, Any] = {}

    def __call__(self, model: Any, calibration: Any, **given: Any) -> FakeResult:
        self.given = {"model": model, "calibration": calibration, **given}
        print("an exporter that talks")
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    x = np.random.default_rng(0).normal(size=(10, 3, 8, 8))
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "xy.npz", x=x, y=np.arange(10) % 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "net", raising=False)
    return tmp_path


@pytest.fixture
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompress:
    compress = FakeCompress(folder)
    monkeypatch.setattr(jettison, "compress", compress, raising=False)
    return compress


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


COMPRESS = ("compress", "net:build", "--inputs", "x.npz")


class TestCompress:
    def test_hands_everything_on(self, fake: FakeCompress, folder: Path) -> None:
        options = "--latency 4ms --size 0.5 --macs 30M --drop 1 --threads 2 --seed 3 --out run --quiet --no-quantize"
        done = run(*COMPRESS, "--test", "xy.npz", "--batch", "4", "--limit", "9", *options.split())
        assert done.exit_code == 0, done.output
        given = fake.given
        assert given["budget"] == jettison_budget(latency_ms=4.0, size=0.5, mmacs=30.0, drop=1.0)
        assert [len(b) for b in given["calibration"]] == [4, 4, 1]
        assert (given["target"], given["threads"], given["seed"], given["quiet"]) == ("onnxruntime", 2, 3, True)
        assert given["out"] == Path("run")
        assert given["recipe"].quantize is False
        assert given["name"] == "net:build"
        assert given["command"].startswith("jettison compress net:build --inputs x.npz --test xy.npz")
        assert not given["model"].training
        assert f"Report: {folder / 'report.html'}" in done.stdout

    def test_accuracy_has_an_outcome_for_each_item(self, fake: FakeCompress) -> None:
        assert run(*COMPRESS, "--test", "xy.npz", "--latency", "0.5", "--batch", "4").exit_code == 0
        accuracy = fake.given["evaluate"]
        assert accuracy.__name__ == "accuracy"
        constant = torch.eye(5)[3]
        outcomes = accuracy(lambda x: constant.expand(len(x), 5))
        assert outcomes.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1, 0]

    def test_json_is_all_there_is_on_stdout(self, fake: FakeCompress) -> None:
        done = run(*COMPRESS, "--latency", "0.5", "--json")
        assert json.loads(done.stdout) == to_plain(fake.result.record)
        assert "a library that talks" in done.stderr
        assert "an exporter that talks" in done.stderr

    def test_a_folder_of_pictures(self, fake: FakeCompress, folder: Path) -> None:
        from PIL import Image

        (folder / "pictures").mkdir()
        Image.new("RGB", (20, 10), (255, 0, 51)).save(folder / "pictures/a.png")
        options = "--size-px 8 --mean 0.5 --std 0.5,0.5,0.25"
        done = run("compress", "net:build", "--inputs", "pictures", "--latency", "50%", *options.split())
        assert done.exit_code == 0, done.output
        (x,) = fake.given["calibration"]
        assert x.shape == (1, 3, 8, 8)
        torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.2]))

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ("", "No budget"),
            ("--latency 4", "not a share"),
            ("--size 2ms", "unknown unit 'ms'"),
            ("--macs much", "not a number"),
            ("--drop -1", "--drop"),
            ("--latency 0.5 --threads 0", "--threads"),
            ("--latency 0.5 --mean 1,x", "--mean"),
            ("--latency 0.5 --size-px 1,2,3", "--size-px"),
            ("--latency 0.5 --test x.npz", "no labels"),
            ("--latency 0.5 --inputs nowhere", "nothing that exists"),
            ("--latency 0.5 --weights w.pt", "no file of weights"),
            ("--latency 0.5 --device toaster", "toaster"),
            ("--latency 0.5 --nonsense", "--nonsense"),
        ],
    )
    def test_wrong_usage_exits_with_2(self, fake: FakeCompress, options: str, says: str) -> None:
        done = run(*COMPRESS, *options.split())
        assert done.exit_code == 2
        assert says in done.stderr
        assert "Traceback" not in done.output
        assert fake.given == {}
        as_json = run(*COMPRESS, *options.split(), "--json")
        assert as_json.exit_code == 2
        assert says in json.loads(as_json.stdout)["message"]

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (errors.ShapeError("It has shape 3."), 2),
            (errors.UnknownName("target", "onnx", ["onnxruntime"]), 2),
            (errors.NonFiniteError("NaN."), 2),
            (errors.TraceError("No graph."), 1),
            (errors.EvaluateError("It raised."), 1),
            (errors.StorageError("The disk is full."), 1),
            (errors.VerificationError("They differ."), 1),
            (errors.BudgetError("It cannot be met."), 1),
            (KeyError("a bug"), 1),
            (KeyboardInterrupt(), 1),
        ],
    )
    def test_errors_end_in_one_message(self, fake: FakeCompress, error: BaseException, code: int) -> None:
        fake.error = error
        done = run(*COMPRESS, "--latency", "0.5")
        kind = "Stopped" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        assert done.exit_code == code
        assert done.stderr.splitlines()[-1 if kind != "KeyError" else -2].startswith(f"{kind}: ")
        assert "Traceback" not in done.output
        as_json = run(*COMPRESS, "--latency", "0.5", "--json")
        assert as_json.exit_code == code
        assert json.loads(as_json.stdout)["error"] == kind
        assert "Traceback" in run(*COMPRESS, "--latency", "0.5", "--debug").stderr

    def test_the_best_result_comes_with_an_unmet_budget(self, fake: FakeCompress, folder: Path) -> None:
        fake.error = errors.BudgetError("0.01 cannot be reached.", fake.result)
        done = run(*COMPRESS, "--latency", "0.01")
        assert done.exit_code == 1
        assert "report.html" in done.stdout
        assert "BudgetError: 0.01 cannot be reached." in done.stderr
        as_json = json.loads(run(*COMPRESS, "--latency", "0.01", "--json").stdout)
        assert as_json["best"] == to_plain(fake.result.record)


def jettison_budget(**limits: float) -> Any:
    from jettison.core.budget import Budget

    return Budget(**limits)


class TestOthers:
    def test_trace(self, folder: Path) -> None:
        done = run("trace", "net:build", "--shape", "2,3,8,8")
        assert done.exit_code == 0, done.output
        assert "gone if every group keeps half" in done.stdout
        plain = json.loads(run("trace", "net:build", "--inputs", "xy.npz", "--json").stdout)
        group = next(g for g in plain["groups"] if g["size"] == 8)
        assert [tuple(m.values()) for m in group["members"]] == [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]
        assert 0 < group["worth"]["half"]["macs"] < group["worth"]["touched"]["macs"] <= 1
        assert {"what", "reason", "where"} == plain["frozen"][0].keys()
        every = run("trace", "net:build", "--shape", "2,3,8,8", "--all").stdout
        assert "0.weight:0, 0.bias:0, 2.weight:1" in every

    def test_trace_draws_a_page(self, folder: Path) -> None:
        done = run("trace", "net:build", "--shape", "2,3,8,8", "--html", "graph.html")
        assert done.exit_code == 0, done.output
        assert done.stdout.endswith("Page: graph.html\n")
        assert "net:build" in (folder / "graph.html").read_text()
        (folder / "graph.html").unlink()
        plain = json.loads(run("trace", "net:build", "--shape", "2,3,8,8", "--html", "graph.html", "--json").stdout)
        assert plain["macs"] > 0
        assert (folder / "graph.html").is_file()
        assert run("trace", "net:build", "--shape", "2,3,8,8", "--html", ".").exit_code == 2

    def test_trace_refuses_a_wrong_shape(self, folder: Path) -> None:
        done = run("trace", "net:build", "--shape", "2,4,8,8")
        assert done.exit_code == 2
        assert done.stderr.startswith("ShapeError: ")

    @pytest.mark.parametrize("options", ["", "--shape 1,3,8,8 --inputs x.npz", "--shape 1,a"])
    def test_trace_wants_one_example(self, folder: Path, options: str) -> None:
        assert run("trace", "net:build", *options.split()).exit_code == 2

    def test_report(self, folder: Path) -> None:
        write_json(make_record(folder), folder / "record.json")
        done = run("report", ".")
        assert done.exit_code == 0, done.output
        assert "report.html" in done.stdout
        assert (folder / "report.html").read_text().lstrip().startswith("<!")
        assert json.loads(run("report", ".", "--json").stdout) == to_plain(make_record(folder))

    def test_report_without_a_record(self, folder: Path) -> None:
        done = run("report", ".")
        assert done.exit_code == 2
        assert "no record.json" in done.stderr
        (folder / "record.json").write_text('{"format": 1}')
        done = run("report", ".")
        assert done.exit_code == 2
        assert done.stderr.startswith("CheckpointError: ")

    def test_doctor(self) -> None:
        done = run("doctor")
        assert done.exit_code == 0
        assert "onnxruntime" in done.stdout
        plain = json.loads(run("doctor", "--json").stdout)
        assert {t["name"] for t in plain["targets"]} >= {"eager", "onnxruntime", "openvino"}

    def test_help_and_version(self) -> None:
        assert run("--version").output.strip().endswith(jettison.__version__)
        for command in ((), ("compress",), ("trace",), ("report",), ("doctor",)):
            assert run(*command, "--help").exit_code == 0
        assert run("nope").exit_code == 2


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jettison.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs tests in the background ignores Ctrl-C for them, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


class TestProcesses:
    def test_exit_codes(self, folder: Path) -> None:
        for arguments, code in ((("doctor",), 0), (("compress", "net:build"), 2), (("report", "nowhere"), 2)):
            process = start(*arguments)
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == code
            assert "Traceback" not in stderr

    @pytest.mark.parametrize("build", ["slow", "swallow"])
    def test_ctrl_c(self, folder: Path, build: str) -> None:
        """Also where it strikes in the import of a C extension, which raises ImportError in its place."""
        process = start("trace", f"net:{build}", "--shape", "1,3,8,8")
        until = time.monotonic() + 60
        while not (folder / "started").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert stderr.strip().startswith("Stopped: Ctrl-C")
        assert "Traceback" not in stderr

    def test_a_reader_that_leaves(self) -> None:
        process = start("doctor")
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        stderr = process.stderr.read()
        process.wait(timeout=60)
        process.stderr.close()
        assert stderr == ""

    def test_a_terminal_without_unicode(self) -> None:
        for arguments in (("--help",), ("trace", "--help"), ("doctor",)):
            process = start(*arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"})
            _, stderr = process.communicate(timeout=60)
            assert (process.returncode, stderr) == (0, "")
