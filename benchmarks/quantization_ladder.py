"""What each rung of the post-training ladder recovers: `python -m benchmarks.quantization_ladder`.

Measured on the deployed files in ONNX Runtime, whose int8 kernels run the coarser grid: for the Fashion-MNIST CNN on
its 10,000 labelled test pictures, for EfficientNet-Lite0 on pictures that share no photo with those calibrated on, and
on 20 labelled photos (a smoke gate: one photo is five points). Calibrated on unlabelled training pictures. Processor
seconds, one thread. Writes `results/quantization-ladder.csv` and, where matplotlib is there, a plot.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.targets import onnxruntime

RESULTS = Path(__file__).with_name("results")
BITS = ((8, 8), (4, 8))
LADDERS: tuple[tuple[str, ...], ...] = ((), ("bias",), ("gptq",), ("adaround",), ("gptq", "reconstruct"))


@dataclass(frozen=True)
class Case:
    """A network with inputs to calibrate on, and inputs to judge by, whose first `labels` are labelled."""

    name: str
    network: nn.Module
    batches: list[tuple[Tensor, ...]]
    judges: list[Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Row:
    """One network at some bits after some rungs; losses are to the float network."""

    network: str
    weight_bits: int
    activation_bits: int
    rungs: str
    divergence_nats: float
    agreement: float
    accuracy: float
    float_accuracy: float
    recovered: float
    seconds: float


def load_fashion(samples: int, judged: int) -> Case:
    """Return the Fashion-MNIST CNN with training pictures in a fixed order and labelled test pictures."""
    from examples.fashion_mnist.data import load
    from examples.fashion_mnist.network import build

    train, _ = load("train")
    test, labels = load("test")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples]
    batches = [(part,) for part in train[order].split(64)]
    return Case("Fashion-MNIST CNN", build(), batches, list(test[:judged].split(250)), labels[:judged])


def load_lite0(samples: int, judged: int) -> Case:
    """Return EfficientNet-Lite0 with made pictures, and 20 labelled photos before those held out."""
    from examples.efficientnet_lite0 import photos
    from examples.efficientnet_lite0.network import build

    labelled, labels = photos.labelled()
    batches = [(part,) for part in photos.calibration(samples, 32)]
    return Case("EfficientNet-Lite0", build(), batches, [labelled, *photos.held_out(judged, 32)], labels)


CASES: dict[str, Callable[[int, int], Case]] = {"fashion": load_fashion, "lite0": load_lite0}


def measure_case(case: Case, bits: Sequence[tuple[int, int]], ladders: Sequence[tuple[str, ...]]) -> list[Row]:
    """Quantize with each ladder at each number of bits and measure the file."""
    traced = trace_module(case.network, case.batches[0])
    with torch.no_grad():
        floats = torch.cat([case.network(x) for x in case.judges])
    count = len(case.labels)
    right = float((floats[:count].argmax(1) == case.labels).float().mean())
    rows: list[Row] = []
    for weight_bits, activation_bits in bits:
        nearest = 0.0
        for rungs in ladders:
            start = time.process_time()
            found = quantize(
                traced.module, case.batches, scheme=onnxruntime.scheme(), rungs=rungs,
                weight_bits=weight_bits, activation_bits=activation_bits,
            ).module  # fmt: skip
            seconds = time.process_time() - start
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "net.onnx"
                onnxruntime.export(
                    found, traced.example, path, input_names=["x"], output_names=["y"], dynamic_batch=True
                )
                session = onnxruntime.load(path, threads=1)
                given = torch.cat([onnxruntime.predict(session, (x,))[0] for x in case.judges])
            divergence = float(
                F.kl_div(given.log_softmax(1), floats.log_softmax(1), log_target=True, reduction="batchmean")
            )
            nearest = nearest or divergence
            row = Row(
                case.name, weight_bits, activation_bits, "+".join(rungs) or "nearest", divergence,
                float((given.argmax(1) == floats.argmax(1)).float().mean()),
                float((given[:count].argmax(1) == case.labels).float().mean()),
                right, 1 - divergence / nearest, seconds,
            )  # fmt: skip
            rows.append(row)
            print(
                f"{row.network} W{weight_bits}A{activation_bits} {row.rungs:18} KL {divergence:8.5f} "
                f"agreement {row.agreement:.2%} accuracy {row.accuracy:.2%} (float {right:.2%}) "
                f"recovered {row.recovered:.1%} {seconds:.0f} s",
                flush=True,
            )
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot the divergence against the seconds, one line for each network and number of bits."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, bits in dict.fromkeys((r.network, r.weight_bits) for r in rows):
        mine = sorted((r for r in rows if (r.network, r.weight_bits) == (name, bits)), key=lambda r: r.seconds)
        axes.plot([r.seconds for r in mine], [r.divergence_nats for r in mine], marker="o", label=f"{name}, W{bits}A8")
        for row in mine:
            axes.annotate(
                row.rungs, (row.seconds, row.divergence_nats), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    axes.set(xscale="log", yscale="log", xlabel="processor seconds", ylabel="KL to the float network, nats")
    axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), help="one network; its rows replace those in the file")
    parser.add_argument("--samples", type=int, default=256, help="pictures to calibrate on (default: 256)")
    parser.add_argument("--judges", type=int, help="pictures to judge by (default: 10,000 and 1,024)")
    parser.add_argument("--rungs", nargs="*", help="ladders such as gptq or gptq+reconstruct (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ladders = (
        [tuple(r for r in text.split("+") if r) for text in ["", *arguments.rungs]] if arguments.rungs else LADDERS
    )
    rows: list[Row] = []
    for name in [arguments.only] if arguments.only else CASES:
        judged = arguments.judges or {"fashion": 10_000, "lite0": 1_024}[name]
        rows += measure_case(CASES[name](arguments.samples, judged), BITS, ladders)
    file = RESULTS / "quantization-ladder.csv"
    fresh = {row.network for row in rows}
    with file.open(newline="") if file.exists() else open("/dev/null") as handle:
        kept = [old for old in csv.DictReader(handle) if old["network"] not in fresh]
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(vars(rows[0])))
        writer.writeheader()
        writer.writerows([*kept, *map(vars, rows)])
    try:
        draw(rows, RESULTS / "quantization-ladder.svg")
    except ImportError:
        print("matplotlib is not there: no plot")


if __name__ == "__main__":
    main()
