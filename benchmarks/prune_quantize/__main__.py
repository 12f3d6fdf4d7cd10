"""Run the sample and write its table: `make prune-quantize`.

Every model runs in a process of its own, with one thread and a time limit; rows that are already in the CSV are not
run again unless `--again` says so. Results land in `benchmarks/results/prune-quantize.csv`.
"""

from __future__ import annotations

import argparse

from benchmarks.coverage.__main__ import RESULTS, TIMEOUT_S, read_rows, run_case, write_rows
from benchmarks.prune_quantize.sample import list_sample

PATH = RESULTS / "prune-quantize.csv"
COLUMNS = (
    "collection", "model", "outcome", "macs", "removed", "result", "layers", "integer_layers", "integer_share",
    "left_in_float", "steps", "within_a_step", "runtime_db", "float_db", "reload", "file", "processor_s", "peak_mb",
    "stage", "error",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="only these")
    parser.add_argument("--again", choices=("all", "failed"), help="run rows again that are already there")
    given = parser.parse_args()
    cases = list_sample()
    for case in cases:
        if given.model:
            due = case.name in given.model
        else:
            old = read_rows(PATH).get(case.name)
            due = old is None or given.again == "all" or (given.again == "failed" and old["outcome"] != "works")
        if due:
            row = run_case(case, "benchmarks.prune_quantize.one", (), TIMEOUT_S)
            rows = read_rows(PATH) | {case.name: row}
            write_rows(PATH, [rows[c.name] for c in cases if c.name in rows], COLUMNS)
            said = f"{row.get('integer_share', '')}  {row.get('error', '')}"
            print(f"{row['model']:44} {row['outcome']:10} {said}", flush=True)


if __name__ == "__main__":
    main()
