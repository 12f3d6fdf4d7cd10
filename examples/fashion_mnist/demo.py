"""The main job on real data: `python -m examples.fashion_mnist.demo` (or `make demo`).

Compresses the trained residual CNN for ONNX Runtime on this machine: at most a fifth of the fp32 latency, at most
one point of accuracy lost. Calibration and distillation use the 60,000 training pictures without their labels; the
10,000 test pictures are read only by the proof.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import jettison as jt
from examples.fashion_mnist.data import load
from examples.fashion_mnist.network import build
from examples.fetch import FetchError
from jettison.report.terminal import print_table

BUDGET = jt.Budget(latency=0.2, drop=1.0)


def make_calibration(data: Path | None = None) -> DataLoader[tuple[Tensor, ...]]:
    """Return the training pictures, shuffled, without labels."""
    images, _ = load("train", data)
    return DataLoader(TensorDataset(images), batch_size=128, shuffle=True)


def make_test(data: Path | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return the labelled test pictures in batches."""
    images, labels = load("test", data)
    return list(zip(images.split(250), labels.split(250), strict=True))


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the four Fashion-MNIST files (…-ubyte.gz)")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--threads", type=int, default=1, help="threads of the runtime (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200, help="steps of distillation (default: 1200)")
    arguments = parser.parse_args(given)
    console = Console()
    try:
        calibration, test = make_calibration(arguments.data), make_test(arguments.data)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    if (arguments.out / "record.json").exists():
        console.print(f"{arguments.out} holds a run: finished stages are not run again. Delete it to start anew.")
    try:
        result = jt.compress(
            build(),
            calibration,
            budget=BUDGET,
            evaluate=jt.accuracy(test),
            recipe=jt.Recipe(steps=arguments.steps),
            threads=arguments.threads,
            seed=arguments.seed,
            out=arguments.out,
            name="examples.fashion_mnist.network:build",
            command="python -m examples.fashion_mnist.demo",
        )
    except jt.JettisonError as error:
        best = getattr(error, "result", None)
        if best is not None:
            print_table(best.record, console)
        print(error, file=sys.stderr)
        return 1
    print_table(result.record, console)
    console.print(f"\nReport: {(result.folder / 'report.html').resolve()}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
