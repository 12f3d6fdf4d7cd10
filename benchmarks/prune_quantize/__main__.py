"""Run the sample and write its table: `make prune-quantize`.

Every model runs in a process of its own, with one thread and a time limit, and is reloaded in another; both are forked
from a server that has imported the libraries and nothing else. Rows that are already in the CSV are not run again
unless `--again` says so. Results land in `benchmarks/results/prune-quantize.csv`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.coverage.__main__ import RESULTS, read_rows, write_rows
from benchmarks.coverage.zoo import Case
from benchmarks.prune_quantize.one import write_row
from benchmarks.prune_quantize.reload import write_reload
from benchmarks.prune_quantize.sample import list_sample

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["benchmarks.prune_quantize.reload", "onnxruntime", "onnxscript", "timm", "torchvision", "transformers"]
)
TIMEOUT_S = 3600
PATH = RESULTS / "prune-quantize.csv"
COLUMNS = (
    "collection", "model", "outcome", "macs", "removed", "result", "layers", "integer_layers", "integer_share",
    "left_in_float", "steps", "within_a_step", "runtime_db", "float_db", "reload", "file", "processor_s", "peak_mb",
    "stage", "error",
)  # fmt: skip


def run_case(case: Case) -> dict[str, Any]:
    """Run one model in a process of its own, reload it in another, and return its row."""
    row: dict[str, Any] = {"collection": case.collection, "model": case.name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row |= run_apart(write_row, (case.collection, case.name, folder), folder / "row.json")
        if row["outcome"] == "works":
            row |= run_apart(write_reload, (folder, row["needed"]), folder / "reload.json")
    return row


def run_apart(function: Callable[..., None], arguments: tuple[Any, ...], path: Path) -> dict[str, Any]:
    """Run a function in a process of its own and return what it wrote to `path`."""
    process = SERVER.Process(target=function, args=arguments)
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return {"outcome": "timeout", "error": f"not finished in {TIMEOUT_S} s"}
    if not path.exists():
        return {"outcome": "exception", "error": f"exit code {process.exitcode}"}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="only these")
    parser.add_argument("--again", choices=("all", "failed"), help="run rows again that are already there")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    cases = list_sample()
    todo = [case for case in cases if (case.name in given.model if given.model else is_due(case, given.again))]
    with ThreadPoolExecutor(given.jobs) as pool:
        for done in as_completed([pool.submit(run_case, case) for case in todo]):
            row = done.result()
            rows = read_rows(PATH) | {row["model"]: row}
            write_rows(PATH, [rows[c.name] for c in cases if c.name in rows], COLUMNS)
            said = f"{row.get('integer_share', '')}  {row.get('error', '')}"
            print(f"{row['model']:44} {row['outcome']:10} {said}", flush=True)


def is_due(case: Case, again: str | None) -> bool:
    """Tell whether a model is to be run: it has no row, or that is to be made anew."""
    old = read_rows(PATH).get(case.name)
    return old is None or again == "all" or (again == "failed" and old["outcome"] != "works")


if __name__ == "__main__":
    main()
