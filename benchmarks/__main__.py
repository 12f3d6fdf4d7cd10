"""`make bench`: what the default recipe gains over simpler choices, on Fashion-MNIST, measured on the deployed files.

Each row is one run of `compress` at the same limit on MACs, int8, with the same short distillation; only the
criterion that ranks channels, or a stage that is left out, differs. Writes a CSV named after the processor and
prints the table. About two minutes a row on two cores.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from examples.fashion_mnist.demo import make_calibration, make_test
from examples.fashion_mnist.network import build
from rich.console import Console
from rich.table import Table

import jettison as jt
from jettison.core.record import Record
from jettison.cost.latency import describe_machine

RESULTS = Path(__file__).with_name("results")
CASES = {
    "int8, no pruning": jt.Recipe(prune=False, steps=0),
    "random, refitted": jt.Recipe(criterion="random", steps=0),
    "magnitude, refitted": jt.Recipe(criterion="magnitude", steps=0),
    "obs, refitted": jt.Recipe(criterion="obs", steps=0),
    "random, distilled": jt.Recipe(criterion="random", steps=300),
    "magnitude, distilled": jt.Recipe(criterion="magnitude", steps=300),
    "obs, distilled": jt.Recipe(criterion="obs", steps=300),
}


@dataclass(frozen=True)
class Row:
    """One run: what was measured on the deployed file."""

    case: str
    macs_limit: float
    seed: int
    accuracy: float
    drop_points: float
    drop_bound_points: float
    speedup: float
    speedup_low: float
    speedup_high: float
    size_bytes: int
    macs: int
    seconds: float


def run_case(case: str, recipe: jt.Recipe, limit: float, seed: int) -> Row:
    """Compress once and return what was measured."""
    budget = jt.Budget(drop=100.0) if not recipe.prune else jt.Budget(macs=limit)
    with tempfile.TemporaryDirectory() as folder:
        result = jt.compress(
            build(), make_calibration(), budget=budget, evaluate=jt.accuracy(make_test()), recipe=recipe,
            seed=seed, out=Path(folder) / "run",
        )  # fmt: skip
        return _read_row(result.record, case, limit, seed)


def _read_row(record: Record, case: str, limit: float, seed: int) -> Row:
    found = next(v for v in record.variants if v.name == record.compressed)
    assert found.score is not None and found.size_bytes is not None and record.drop.bound_points is not None
    return Row(
        case=case,
        macs_limit=limit,
        seed=seed,
        accuracy=found.score.value,
        drop_points=record.drop.points,
        drop_bound_points=record.drop.bound_points,
        speedup=found.speedup.value,
        speedup_low=found.speedup.low,
        speedup_high=found.speedup.high,
        size_bytes=found.size_bytes,
        macs=found.macs,
        seconds=sum(stage.seconds for stage in record.stages),
    )


def show(rows: list[Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(title="Fashion-MNIST, int8 in ONNX Runtime, one thread, batch 1")
    for name in (
        "case",
        "MACs at most",
        "seed",
        "accuracy",
        "points lost (95 % bound)",
        "speed-up (95 % interval)",
        "kB",
    ):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(
            row.case,
            f"{row.macs_limit:.0%}" if "no pruning" not in row.case else "100%",
            str(row.seed),
            f"{row.accuracy:.2%}",
            f"{row.drop_points:.2f} ({row.drop_bound_points:.2f})",
            f"{row.speedup:.2f}× ({row.speedup_low:.2f}–{row.speedup_high:.2f})",
            f"{row.size_bytes / 1000:.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.25, help="share of the MACs to keep (default: 0.25)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [
        run_case(case, recipe, arguments.macs, seed)
        for seed in range(arguments.seeds)
        for case, recipe in CASES.items()
    ]
    machine = re.sub(r"[^a-z0-9]+", "-", describe_machine()["cpu"].lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"fashion-mnist-criteria-{machine}.csv"
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(vars(rows[0])))
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)
    show(rows, Console())
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
