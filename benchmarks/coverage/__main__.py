"""Run the zoo and write the tables: `make coverage` (jettison) or `make coverage-peers` (other libraries).

Every model runs in a process of its own, with one thread and a time limit; rows that are already in the CSV are not
run again unless `--again` says so. Results land in `benchmarks/results/coverage-<collection>.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.coverage import peers
from benchmarks.coverage.zoo import COLLECTIONS, Case

RESULTS = Path(__file__).parent.parent / "results"
COLUMNS = (
    "collection", "model", "family", "outcome", "groups", "prunable", "removed", "opaque", "result", "difference",
    "own_class_removed", "own_class_groups",
    "parameters", "macs", "nodes", "dynamic_batch", "export_s", "analysis_s", "peak_mb", "refusal", "stage", "error",
)  # fmt: skip
"""`prunable` is the share of MACs that goes when every group keeps one position; `removed` the share that went.

`own_class_*`: the same where all is to stay the model's own class; groups that its source cannot express stay whole.
"""
TIMEOUT_S = 900


def run_case(case: Case, module: str, extra: tuple[str, ...], timeout_s: float) -> dict[str, Any]:
    """Run one model in a process of its own; what it prints last is its row."""
    command = [sys.executable, "-m", module, *extra, case.collection, case.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    row: dict[str, Any] = {"collection": case.collection, "model": case.name, "family": case.family}
    row |= {"library": extra[-1]} if extra else {}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired:
        return {**row, "outcome": "timeout", "error": f"not finished in {timeout_s:.0f} s"}
    if done.returncode == -signal.SIGXCPU:
        return {**row, "outcome": "timeout", "error": f"not finished in the processor time of {extra[0]}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {**row, "outcome": "exception", "error": error[:300]}
    found = json.loads(lines[-1])
    found.setdefault("outcome", _judge(found))
    return {**row, **found}


def _judge(row: dict[str, Any]) -> str:
    if not row.get("stage"):
        return "works"
    stage = row["stage"].removeprefix("own class: ")
    return {"masked = sliced": "wrong", "reload": "wrong", "size": "too little"}.get(stage, "exception")


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of an earlier run by model."""
    if not path.exists():
        return {}
    with open(path) as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Write all rows, in the order of the zoo."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collection", action="append", choices=list(COLLECTIONS), help="only these (default: all)")
    parser.add_argument("--model", action="append", help="only these")
    parser.add_argument("--again", choices=("all", "failed"), help="run rows again that are already there")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, help="seconds per model")
    parser.add_argument("--library", choices=list(peers.LIBRARIES), help="run another library instead")
    given = parser.parse_args()
    for collection in given.collection or COLLECTIONS:
        run_collection(collection, given)


def run_collection(collection: str, given: argparse.Namespace) -> None:
    """Run what is due of one collection, and write its table after every model."""
    library = given.library
    extra: tuple[str, ...]
    timeout_s = given.timeout or (peers.TIMEOUT_S if library else TIMEOUT_S)
    module, extra, columns = "benchmarks.coverage.one", (), COLUMNS
    if library:
        module, extra, columns = "benchmarks.coverage.peers", (f"--limit={timeout_s:.0f}", library), peers.COLUMNS
        timeout_s *= 100  # they are held to processor time; the clock's only catches what sleeps
    path = RESULTS / f"coverage-{f'{library}-' if library else ''}{collection}.csv"
    cases = COLLECTIONS[collection]()
    rows = read_rows(path)
    todo = [c for c in cases if _is_due(c, rows, given)]
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda c: run_case(c, module, extra, timeout_s), todo):
            rows[row["model"]] = row
            write_rows(path, [rows[c.name] for c in cases if c.name in rows], columns)
            took = f"{row.get('export_s', row.get('prune_s', ''))} s"
            print(f"{row['model']:44} {row['outcome']:10} {row.get('result', ''):7} {took}  {row.get('error', '')}")


def _is_due(case: Case, rows: dict[str, dict[str, Any]], given: argparse.Namespace) -> bool:
    if given.model:
        return case.name in given.model
    old = rows.get(case.name)
    return old is None or given.again == "all" or (given.again == "failed" and old["outcome"] != "works")


if __name__ == "__main__":
    main()
