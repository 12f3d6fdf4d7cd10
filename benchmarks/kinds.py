"""What dynamic int8 gains in recurrent layers and attention, and int8 in PyTorch's compiler, against fp32 in turns.

`python -m benchmarks.kinds [recurrent] [attention] [compiled]`; `compiled` needs timm (with its torchvision) and a C++
compiler. Shows a line for each network and form, and writes `results/kinds-recurrent.csv` and so on. Weights are
random: the figures speak of speed, and of how far int8 is from fp32 on noise. One thread, timed in turns by the
processor's clock, which other work on the machine does not stop.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jettison as jt
from benchmarks.quantization.cases import find_case
from jettison.graph.trace import trace_module
from jettison.quantization.dynamic import quantize_dynamic
from jettison.targets import find_target
from jettison.targets.timing import compare_samples, sample_interleaved

RESULTS = Path(__file__).with_name("results")
HEAD = ("group", "network", "form", "speedup", "low", "high", "sqnr_db")
ROUNDS = 30
ANY_SIZE = dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), 1)
Row = tuple[str, str, str, str, str, str, str]


def compare(group: str, network: str, runs: Mapping[str, Callable[[], Any]], baseline: str) -> Iterator[Row]:
    """Time calls in turns, and give a row for each but the first, which gives the right outputs."""
    wanted, *_ = runs["fp32"]()
    samples = sample_interleaved(runs, rounds=ROUNDS, clock=time.process_time)
    timings = compare_samples(samples, baseline=baseline)
    for form, run in runs.items():
        given, *_ = run()
        noise = float(((given - wanted) ** 2).sum())
        ratio = "" if noise == 0 else f"{10 * torch.tensor(float((wanted**2).sum()) / noise).log10():.1f}"
        found = timings[form].speedup
        row = (group, network, form, f"{found.value:.2f}", f"{found.low:.2f}", f"{found.high:.2f}", ratio)
        print("  ".join(row), flush=True)
        yield row


def load(target: str, path: Path, x: Tensor, precision: str = "fp32") -> Callable[[], Any]:
    session = find_target(target).load(path, threads=1, precision=precision)
    run = partial(session.run, [x.numpy()])
    run()
    return run


class First(nn.Module):
    """A recurrent layer's outputs, without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


def measure_recurrent(folder: Path) -> Iterator[Row]:
    """64 steps of one row, or of eight; units as many as features."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        for units, rows in ((64, 1), (128, 1), (256, 1), (512, 1), (256, 8)):
            net = First(kind(units, units, batch_first=True)).eval().requires_grad_(False)
            x = torch.randn(rows, 64, units)
            graph = trace_module(net, (x,)).module
            found = quantize_dynamic(graph, levels=find_target("onnxruntime").scheme().weight, smallest=ANY_SIZE)
            files = {"fp32": jt.export(net, x, folder / "float.onnx"), "int8": folder / "int8.onnx"}
            names = {"input_names": ["x"], "output_names": ["y"], "dynamic_batch": True}
            find_target("onnxruntime").export(found.module, (x,), files["int8"], **names)
            runs = {form: load("onnxruntime", path, x) for form, path in files.items()}
            yield from compare("recurrent", f"{kind.__name__} of {units} units, {rows} rows", runs, "fp32")


class Block(nn.Module):
    """A transformer's layer: attention and a perceptron four times as wide, norms before them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return y


SIZES = {
    "BERT-base, 128 tokens": (768, 12, 128),
    "MiniLM, 128 tokens": (384, 12, 128),
    "MiniLM, 512 tokens": (384, 12, 512),
    "ViT-S, 197 tokens": (384, 6, 197),
    "ViT-B, 197 tokens": (768, 12, 197),
}


def measure_attention(folder: Path) -> Iterator[Row]:
    """Two layers of each size; speed-ups are over integers in the linear layers alone."""
    for name, (width, heads, tokens) in SIZES.items():
        net = nn.Sequential(*[Block(width, heads) for _ in range(2)]).eval().requires_grad_(False)
        x = torch.randn(1, tokens, width)
        runs = {"fp32": load("onnxruntime", jt.export(net, x, folder / "float.onnx"), x)}
        for form, attention in (("linear layers", False), ("and attention", True)):
            found = jt.quantize(net, x, kind="dynamic", attention=attention)
            runs[form] = load("onnxruntime", jt.export(found.module, x, folder / f"{attention}.onnx"), x)
        yield from compare("attention", name, runs, "linear layers")


def measure_compiled(folder: Path) -> Iterator[Row]:
    """One picture; speed-ups are over ONNX Runtime in int8."""
    for name in ("mobilenetv2_100", "vit_tiny_patch16_224"):
        case = find_case(name)
        net, x = case.build().requires_grad_(False), case.calibrate()[:8]
        runs: dict[str, Callable[[], Any]] = {}
        for target in ("onnxruntime", "inductor"):
            suffix = find_target(target).SUFFIX
            plain = jt.export(net, x, folder / f"float{suffix}", target=target)
            found = jt.quantize(net, x, target=target)
            whole = jt.export(found.module, x, folder / f"int8{suffix}", target=target)
            runs["fp32" if target == "onnxruntime" else f"{target} fp32"] = load(target, plain, x[:1])
            runs[f"{target} int8"] = load(target, whole, x[:1], "int8")
        yield from compare("compiled", name, runs, "onnxruntime int8")


GROUPS = {"recurrent": measure_recurrent, "attention": measure_attention, "compiled": measure_compiled}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in names or GROUPS:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(GROUPS[name](Path(folder)))
        with open(RESULTS / f"kinds-{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([HEAD, *rows])


if __name__ == "__main__":
    main(sys.argv[1:])
