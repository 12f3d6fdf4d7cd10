"""jettison beside other libraries: the same network, inputs and threads: `make bench-quantization`.

Every library quantizes in a process of its own; then all files of a network are measured in one interleaved run, and
scored as they are deployed. Puts its rows into `benchmarks/results/quantization.csv`, where rows of other networks and
libraries stay, and prints the table. `--case` and `--library` choose; latencies need a quiet machine.
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
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quantization.cases import CASES, Case, Inputs, split
from benchmarks.quantization.libraries import AFTER, LIBRARIES, TRANSFORMERS_ONLY, export_float
from jettison.targets.timing import time_interleaved

RESULTS = Path(__file__).parent.parent / "results"
ROUNDS = 90
SITTINGS = 15
"""Differences of a few percent are asked for, and OpenVINO's sittings differ by more."""


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


Run = Callable[[list[np.ndarray]], np.ndarray]


def open_onnxruntime(path: Path) -> Run:
    from jettison.targets import onnxruntime

    session = onnxruntime.load(path, threads=1)
    return lambda arrays: session.run(arrays)[0]


def open_openvino(path: Path) -> Run:
    """Float parts run in float32: OpenVINO's own default would be bfloat16 here."""
    from jettison.targets import openvino

    session = openvino.load(path, threads=1)
    return lambda arrays: session.run(arrays)[0]


def open_litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    entries = sorted(interpreter.get_input_details(), key=lambda d: d["name"])
    end = interpreter.get_output_details()[0]

    def run(arrays: list[np.ndarray]) -> np.ndarray:
        for entry, x in zip(entries, arrays, strict=True):
            # Its files take and give integers; what their scales stand for is part of running them.
            if entry["dtype"] == np.int8:
                scale, zero_point = entry["quantization"]
                x = np.clip(np.rint(x / scale) + zero_point, -128, 127).astype(np.int8)
            interpreter.set_tensor(entry["index"], x.astype(entry["dtype"], copy=False))
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


def load_anew(runtime: str, path: Path, sample: list[np.ndarray]) -> Callable[[], object]:
    """Load a file and return one call of it."""
    return partial(RUNTIMES[runtime][0](path), sample)


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


def score(run: Run, judged: tuple[Inputs, np.ndarray] | None) -> str:
    """Return the share of held-out inputs whose best class is the expected one."""
    if judged is None:
        return ""
    inputs, expected = judged
    pairs = zip(split(inputs, 1), expected, strict=True)
    right = sum(int(run([x.numpy() for x in item]).argmax()) == y for item, y in pairs)
    return f"{right / len(expected):.4f}"


def quantize_all(case: Case, libraries: Iterable[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Return what each library that has something to say for this network made of it."""
    found: dict[str, dict[str, Any]] = {}
    for library in libraries:
        if library in TRANSFORMERS_ONLY and not case.transformer:
            continue
        if library in AFTER and "error" not in found.get(AFTER[library], {}):
            continue
        found[library] = quantize(library, case, folder)
    return found


def run_case(case: Case, libraries: Iterable[str], folder: Path, rounds: int, judge: int | None) -> list[Row]:
    """Quantize, measure and score one network with every library, on the first `judge` held-out inputs or on all."""
    model, data = case.build(), case.calibrate()
    found: dict[str, dict[str, Any]] = {"float32": {"file": export_float(case, model, data, folder).name}}
    found |= quantize_all(case, libraries, folder)
    runs: dict[tuple[str, str], Run] = {}
    for library, made in found.items():
        for runtime, (load, suffixes) in RUNTIMES.items():
            if "file" in made and Path(made["file"]).suffix in suffixes.split():
                try:
                    runs[library, runtime] = load(folder / made["file"])
                    runs[library, runtime]([x[:1].numpy() for x in data])
                except Exception as error:  # noqa: BLE001 - a file that a runtime refuses is that row's result
                    runs.pop((library, runtime), None)
                    made["error"] = f"{runtime}: {error}".splitlines()[0][:200]
    sample = [x[:1].numpy() for x in data]
    loads = {f"{a}|{b}": partial(load_anew, b, folder / found[a]["file"], sample) for a, b in runs}
    timings = time_interleaved(loads, baseline="float32|ONNX Runtime", rounds=rounds, sittings=SITTINGS)
    judged = case.judge(model) if case.judge else None
    if judged is not None and judge is not None:
        judged = tuple(x[:judge] for x in judged[0]), judged[1][:judge]
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


def merge(path: Path, rows: list[Row]) -> list[Row]:
    """Return the rows of a file with those of the same network and library replaced, networks in the order of CASES."""
    fresh = {(row.model, row.library) for row in rows}
    kept: list[Row] = []
    if path.is_file():
        with path.open(newline="") as handle:
            kept = [Row(**row) for row in csv.DictReader(handle)]
    joined = [row for row in kept if (row.model, row.library) not in fresh] + rows
    models, libraries = [case.name for case in CASES], ["float32", *LIBRARIES]
    return sorted(joined, key=lambda row: (models.index(row.model), libraries.index(row.library)))


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES])
    parser.add_argument("--library", action="append", choices=list(LIBRARIES))
    parser.add_argument("--out", type=Path, default=RESULTS / "quantization.csv")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each file")
    parser.add_argument("--judge", type=int, help="score on so many held-out inputs only, to try things out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        if not given.case or case.name in given.case:
            with tempfile.TemporaryDirectory() as folder:
                rows = run_case(case, given.library or LIBRARIES, Path(folder), given.rounds, given.judge)
            write(given.out, merge(given.out, rows))  # after each network, so that an interrupted run is not lost
            show(rows, Console(width=140))
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
