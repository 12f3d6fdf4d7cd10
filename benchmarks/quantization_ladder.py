"""What each rung of the post-training ladder recovers: `python -m benchmarks.quantization_ladder`.

Measured on the deployed files in ONNX Runtime, whose int8 kernels run the coarser grid: for the Fashion-MNIST CNN on
its 10,000 labelled test pictures, for EfficientNet-Lite0 on pictures that share no photo with those calibrated on, and
on 20 labelled photos (a smoke gate: one photo is five points). Calibrated on unlabelled training pictures. Processor
seconds, one thread. Every row goes into `results/quantization-ladder.csv` as soon as it is measured, in place of an
older one of the same network, bits and rungs; a plot is drawn where matplotlib is there.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.quantization.bits import find_ends
from jettison.quantization.convert import fold
from jettison.quantization.fold import find_layers
from jettison.targets import onnxruntime
from jettison.targets.integer import IntegerScheme

RESULTS = Path(__file__).with_name("results")
BITS: dict[str, tuple[int, ...]] = {"fashion": (8, 4, 3), "lite0": (8, 4)}
"""Bits of the weights; activations have 8. The CNN loses little at 4, so it is also shown at 3."""
SAME = ("network", "weight_bits", "ends_bits", "activation_bits", "rungs")
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
    """One network at some bits after some rungs; losses are to the float network.

    `ends_bits` are those of the first and the last layer, `recovered` the share of what rounding to nearest loses.
    """

    network: str
    weight_bits: int
    ends_bits: int
    activation_bits: int
    samples: int
    rungs: str
    divergence_nats: float
    agreement: float
    accuracy: float
    float_accuracy: float
    recovered: float
    agreement_recovered: float
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


def measure_case(
    case: Case, weight_bits: int, ladders: Sequence[tuple[str, ...]], *, ends_bits: int, samples: int
) -> Iterator[Row]:
    """Quantize with each ladder and measure the file; the first ladder is rounding to nearest."""
    traced = trace_module(case.network, case.batches[0])
    scheme = choose_scheme(traced.module, weight_bits, ends_bits)
    with torch.no_grad():
        floats = torch.cat([case.network(x) for x in case.judges])
    count = len(case.labels)
    right = float((floats[:count].argmax(1) == case.labels).float().mean())
    nearest: tuple[float, float] | None = None
    for rungs in ladders:
        start = time.process_time()
        found = quantize(traced.module, case.batches, scheme=scheme, rungs=rungs).module
        seconds = time.process_time() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            onnxruntime.export(found, traced.example, path, input_names=["x"], output_names=["y"], dynamic_batch=True)
            session = onnxruntime.load(path, threads=1)
            given = torch.cat([onnxruntime.predict(session, (x,))[0] for x in case.judges])
        divergence = float(
            F.kl_div(given.log_softmax(1), floats.log_softmax(1), log_target=True, reduction="batchmean")
        )
        agreement = float((given.argmax(1) == floats.argmax(1)).float().mean())
        nearest = nearest or (divergence, agreement)
        row = Row(
            case.name, weight_bits, ends_bits, 8, samples, "+".join(rungs) or "nearest", divergence, agreement,
            float((given[:count].argmax(1) == case.labels).float().mean()), right,
            1 - divergence / nearest[0], 1 - (1 - agreement) / max(1 - nearest[1], 1 / len(given)), seconds,
        )  # fmt: skip
        print(
            f"{row.network} W{weight_bits} (ends {ends_bits}) A8 {row.rungs:18} KL {divergence:8.5f} "
            f"agreement {agreement:.2%} accuracy {row.accuracy:.2%} (float {right:.2%}) recovered "
            f"{row.recovered:.1%} and {row.agreement_recovered:.1%} {seconds:.0f} s",
            flush=True,
        )
        yield row


def choose_scheme(module: GraphModule, weight_bits: int, ends_bits: int) -> IntegerScheme:
    """Return ONNX Runtime's scheme with so many bits for each layer's weight."""
    scheme = onnxruntime.scheme()
    ends = find_ends(module, scheme)
    names = find_layers(fold(module, frozenset(scheme.weighted)), frozenset(scheme.weighted))
    bits = {name: (ends_bits if name in ends else weight_bits, 8) for name in names}
    return replace(scheme, bits=bits)


def keep_row(row: Row, file: Path) -> list[dict[str, str]]:
    """Put a row into the file, in place of an older one of the same network, bits and rungs, and return all rows."""
    fresh = {key: str(value) for key, value in vars(row).items()}
    olds = list(csv.DictReader(file.open(newline=""))) if file.exists() else []
    kept = [old for old in olds if any(old[key] != fresh[key] for key in SAME)]
    rows = sorted(
        [*kept, fresh],
        key=lambda r: (r["network"], -int(r["weight_bits"]), -int(r["ends_bits"]), float(r["seconds"])),
    )
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(fresh))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Plot the divergence against the seconds, a panel for each network and a line for each number of bits."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        lines: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
        for row in rows:
            if row["network"] == name:
                point = float(row["seconds"]), float(row["divergence_nats"]), row["rungs"]
                lines.setdefault((row["weight_bits"], row["ends_bits"]), []).append(point)
        for (bits, ends), points in lines.items():
            label = f"W{bits}A8" + (f", first and last layer W{ends}" if ends != bits else "")
            axes.scatter([p[0] for p in points], [p[1] for p in points], label=label)
            for seconds, nats, rungs in points:
                axes.annotate(rungs, (seconds, nats), fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel="processor seconds", title=name)
        axes.set_ylabel("KL to the float network, nats")
        axes.margins(x=0.25, y=0.12)
        axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), help="one network")
    parser.add_argument("--samples", type=int, default=256, help="pictures to calibrate on (default: 256)")
    parser.add_argument("--judges", type=int, help="pictures to judge by (default: 10,000 and 1,024)")
    parser.add_argument("--bits", type=int, nargs="*", help="bits of the weights (default: 8 and 4, the CNN also 3)")
    parser.add_argument("--ends", type=int, help="bits of the first and the last layer (default: as the others)")
    parser.add_argument("--rungs", nargs="*", help="ladders such as gptq or gptq+reconstruct (default: all)")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "quantization-ladder.csv"
    if arguments.draw:
        draw(list(csv.DictReader(file.open(newline=""))), file.with_suffix(".svg"))
        return
    given = [tuple(r for r in text.split("+") if r) for text in arguments.rungs or ()]
    for name in [arguments.only] if arguments.only else CASES:
        case = CASES[name](arguments.samples, arguments.judges or {"fashion": 10_000, "lite0": 1_024}[name])
        for bits in arguments.bits or BITS[name]:
            ends, ladders = arguments.ends or bits, [(), *given] if given else LADDERS
            for row in measure_case(case, bits, ladders, ends_bits=ends, samples=arguments.samples):
                rows = keep_row(row, file)
    try:
        draw(rows, file.with_suffix(".svg"))
    except ImportError:
        print("matplotlib is not there: no plot")


if __name__ == "__main__":
    main()
