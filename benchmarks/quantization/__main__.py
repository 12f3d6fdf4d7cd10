"""jettison beside other libraries: the same network, inputs and threads: `make bench-quantization`.

Every library quantizes in a process of its own; then all files of a network are measured in one interleaved run, and
scored as they are deployed. Writes `benchmarks/results/quantization.csv` and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quantization.cases import CASES, Case
from benchmarks.quantization.libraries import LIBRARIES, export_float
from jettison.targets.timing import time_interleaved

RESULTS = Path(__file__).parent.parent / "results"
ROUNDS = 60


@dataclass(frozen=True)
class Row:
    """One file in one runtime; `speedup` is over float32 in ONNX Runtime, with its 95 % interval."""

    model: str
    library: str
    runtime: str
    score: str
    metric: str
    speedup: str
    speedup_low: str
    speedup_high: str
    size_bytes: str
    processor_s: str
    peak_mb: str
    error: str


Run = Callable[[np.ndarray], np.ndarray]


def open_onnxruntime(path: Path) -> Run:
    from jettison.targets import onnxruntime

    session = onnxruntime.load(path, threads=1)
    return lambda x: session.run([x])[0]


def open_openvino(path: Path) -> Run:
    """Float parts run in float32: OpenVINO's own default would be bfloat16 here."""
    from jettison.targets import openvino

    session = openvino.load(path, threads=1)
    return lambda x: session.run([x])[0]


def open_litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    entry, end = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(x: np.ndarray) -> np.ndarray:
        # Its files take and give integers; what their scales stand for is part of running them.
        if entry["dtype"] == np.int8:
            scale, zero_point = entry["quantization"]
            x = np.clip(np.rint(x / scale) + zero_point, -128, 127).astype(np.int8)
        interpreter.set_tensor(entry["index"], x)
        interpreter.invoke()
        found: np.ndarray = interpreter.get_tensor(end["index"])
        if end["dtype"] == np.int8:
            scale, zero_point = end["quantization"]
            found = (found.astype(np.float32) - zero_point) * scale
        return found

    return run


RUNTIMES: dict[str, tuple[Callable[[Path], Run], str]] = {
    "ONNX Runtime": (open_onnxruntime, ".onnx"),
    "OpenVINO": (open_openvino, ".onnx .xml"),
    "LiteRT": (open_litert, ".tflite"),
}


def quantize(library: str, case: Case, folder: Path) -> dict[str, Any]:
    """Run one library in a process of its own; returns what it printed, or the error."""
    command = [sys.executable, "-m", "benchmarks.quantization.libraries", library, case.name, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}


def score(run: Run, judged: tuple[torch.Tensor, np.ndarray] | None) -> str:
    """Return the share of held-out inputs whose best class is the expected one."""
    if judged is None:
        return ""
    inputs, expected = judged
    right = sum(int(run(x.numpy()).argmax()) == y for x, y in zip(inputs.split(1), expected, strict=True))
    return f"{right / len(expected):.4f}"


def run_case(case: Case, libraries: Iterable[str], folder: Path) -> list[Row]:
    """Quantize, measure and score one network with every library."""
    model, data = case.build(), case.calibrate()
    found: dict[str, dict[str, Any]] = {"float32": {"file": export_float(model, data, folder).name}}
    found |= {library: quantize(library, case, folder) for library in libraries}
    runs: dict[tuple[str, str], Run] = {}
    for library, made in found.items():
        for runtime, (load, suffixes) in RUNTIMES.items():
            if "file" in made and Path(made["file"]).suffix in suffixes.split():
                try:
                    runs[library, runtime] = load(folder / made["file"])
                except Exception as error:  # noqa: BLE001 - a file that a runtime refuses is that row's result
                    made["error"] = f"{runtime}: {error}".splitlines()[0][:200]
    sample = data[:1].numpy()
    timed = {f"{a}|{b}": partial(run, sample) for (a, b), run in runs.items()}
    timings = time_interleaved(timed, baseline="float32|ONNX Runtime", rounds=ROUNDS)
    judged = case.judge(model) if case.judge else None
    rows = []
    for (library, runtime), run in runs.items():
        made, speed = found[library], timings[f"{library}|{runtime}"].speedup
        size = sum(
            p.stat().st_size for p in {folder / made["file"], (folder / made["file"]).with_suffix(".bin")} if p.exists()
        )
        rows.append(
            Row(case.name, library, runtime, score(run, judged), case.metric, f"{speed.value:.3f}", f"{speed.low:.3f}",
                f"{speed.high:.3f}", str(size), str(made.get("processor_s", "")), str(made.get("peak_mb", "")), "")
        )  # fmt: skip
    failed = {library: made["error"] for library, made in found.items() if "error" in made}
    return rows + [Row(case.name, k, "", "", case.metric, "", "", "", "", "", "", v) for k, v in failed.items()]


def show(rows: list[Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(title="int8, one thread, batch 1; speed-up over float32 in ONNX Runtime (95 % interval)")
    for name in ("network", "library", "runtime", "score", "speed-up", "kB", "processor s", "MB"):
        table.add_column(name, justify="left" if name in ("network", "library", "runtime") else "right")
    for row in rows:
        speed = f"{row.speedup} ({row.speedup_low}–{row.speedup_high})" if row.speedup else row.error[:60]
        kilobytes = f"{int(row.size_bytes) / 1000:.0f}" if row.size_bytes else ""
        table.add_row(row.model, row.library, row.runtime, row.score, speed, kilobytes, row.processor_s, row.peak_mb)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES])
    parser.add_argument("--library", action="append", choices=list(LIBRARIES))
    parser.add_argument("--out", type=Path, default=RESULTS / "quantization.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in CASES:
        if not given.case or case.name in given.case:
            with tempfile.TemporaryDirectory() as folder:
                rows += run_case(case, given.library or LIBRARIES, Path(folder))
            show([r for r in rows if r.model == case.name], Console(width=140))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(vars(rows[0])))
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
