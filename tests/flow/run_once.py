"""One run in a process of its own, for tests that kill it: `python -m tests.flow.run_once WEIGHTS FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tests.flow.digits import BUDGET, DigitNet, make_test_batches, split_digits

import jettison as jt
from jettison.graph.store import load_tensors_into

RECIPE = jt.Recipe(samples=96, judges=32, positions=2000, steps=30, rounds=10)


def compress(weights: Path, folder: Path) -> jt.Result:
    """Run the same compression each time it is called."""
    torch.set_num_threads(1)
    model = DigitNet()
    load_tensors_into(model, weights)
    return jt.compress(
        model,
        split_digits()[0],
        budget=BUDGET,
        recipe=RECIPE,
        evaluate=jt.accuracy(make_test_batches()),
        out=folder,
        quiet=True,
    )


if __name__ == "__main__":
    compress(Path(sys.argv[1]), Path(sys.argv[2]))
