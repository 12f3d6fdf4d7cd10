"""Few bits on the Fashion-MNIST CNN: `python -m benchmarks.qat`. Writes `results/qat.csv`, a row at a time.

Float, post-training quantization and quantization-aware training with the defaults of `train_quantized`, for several
bits. Training sees the training pictures without labels. Accuracy is that of the exported file in ONNX Runtime on the
10,000 test pictures, read once for each file and used for no choice. One thread; rows already in the file are kept.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from examples.fashion_mnist.data import load
from examples.fashion_mnist.network import build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import jettison as jt
from jettison.flow.qat import RECIPE, train_quantized
from jettison.targets import onnxruntime

RESULTS = Path(__file__).with_name("results")
BATCH = 64
CASES: dict[str, dict[str, Any]] = {
    "W8A8": {"weight_bits": 8, "activation_bits": 8},
    "W4A4": {"weight_bits": 4, "activation_bits": 4},
    "W3A3": {"weight_bits": 3, "activation_bits": 3},
    "W2A4": {"weight_bits": 2, "activation_bits": 4},
    "ternary, A8": {"weights": "ternary", "activation_bits": 8},
    "binary, A8": {"weights": "binary", "activation_bits": 8},
    "W2A2": {"weight_bits": 2, "activation_bits": 2},
}
TRAINED = ("W4A4", "W3A3", "ternary, A8", "binary, A8", "W2A4", "W2A2")


@dataclass(frozen=True)
class Row:
    """One network: `accuracy` of its file on the test pictures, `points_lost` against float, and what it took."""

    case: str
    method: str
    steps: int
    seed: int
    accuracy: float
    points_lost: float
    seconds: float


def make_calibration() -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return the training pictures, shuffled, without labels."""
    return DataLoader(TensorDataset(load("train")[0]), batch_size=BATCH, shuffle=True)


def measure_accuracy(module: nn.Module, example: torch.Tensor) -> float:
    """Return the share of test pictures that the exported file names rightly."""
    images, labels = load("test")
    with tempfile.TemporaryDirectory() as folder:
        path = jt.export(module, example, Path(folder) / "network.onnx")
        session = onnxruntime.load(path, threads=1)
        right = 0
        for x, y in zip(images.split(250), labels.split(250), strict=True):
            right += int((onnxruntime.predict(session, (x,))[0].argmax(1) == y).sum())
    return right / len(labels)


def make_tasks(steps: int, seed: int) -> dict[tuple[str, str], Callable[[], nn.Module]]:
    """Return what makes each network, by case and method."""
    tasks: dict[tuple[str, str], Callable[[], nn.Module]] = {("float", "original"): build}
    for case in CASES:
        if case in ("ternary, A8", "binary, A8"):
            continue  # what post-training rounding to 2 bits gives is their start too
        tasks[case, "post-training"] = lambda case=case: _train(case, 0, seed)
    for case in TRAINED:
        tasks[case, "trained"] = lambda case=case: _train(case, steps, seed)
    return tasks


def _train(case: str, steps: int, seed: int) -> nn.Module:
    recipe = replace(RECIPE, steps=steps)
    return train_quantized(build(), make_calibration(), recipe=recipe, seed=seed, **CASES[case]).module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "qat.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = list(csv.DictReader(arguments.out.open())) if arguments.out.exists() else []
    known = {(row["case"], row["method"]) for row in done}
    whole = next((float(row["accuracy"]) for row in done if row["case"] == "float"), 0.0)
    example = load("test")[0][:8]
    for (case, method), make in make_tasks(arguments.steps, arguments.seed).items():
        if (case, method) in known:
            continue
        start = time.perf_counter()
        module = make()
        seconds = time.perf_counter() - start
        accuracy = measure_accuracy(module, example)
        whole = accuracy if case == "float" else whole
        steps = arguments.steps if method == "trained" else 0
        row = Row(case, method, steps, arguments.seed, accuracy, 100 * (whole - accuracy), round(seconds, 1))
        _append(arguments.out, row)
        print(f"{case:12} {method:14} {accuracy:.2%} {row.points_lost:6.2f} points {seconds:7.0f} s", flush=True)


def _append(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(row)))
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


if __name__ == "__main__":
    main()
