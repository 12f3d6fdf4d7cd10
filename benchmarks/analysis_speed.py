"""How fast the analysis is: its growth with the number of layers, and ResNet-50 from tracing to proof beside a peer.

`make coverage-speed`, in an environment that has torch-pruning and torchvision. Writes `results/analysis-speed.csv` and
a plot of the growth, `results/analysis-speed.svg`. One thread, in processor time: another job must not count.
"""

from __future__ import annotations

import copy
import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jettison.graph.check import check_masked
from jettison.graph.groups import build_graph
from jettison.graph.rewrite import prune_graph
from jettison.graph.surgery import slice_module
from jettison.graph.trace import trace_module

RESULTS = Path(__file__).with_name("results")
BLOCKS = (3, 10, 30, 100)
ROUNDS = 5
TURNS = 9
"""Of nine ratios the second least and the second largest hold the median between them with 96 % confidence."""


class Block(nn.Module):
    """A bottleneck with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.three, self.norm = nn.Conv2d(width // 2, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.three(torch.relu(self.two(torch.relu(self.one(x))))))
        return torch.relu(x + y)


class Encoder(nn.Module):
    """An attention block with a fused projection and a two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(y)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "convolutional": (
        lambda n: nn.Sequential(nn.Conv2d(3, 16, 1), *(Block(16) for _ in range(n)), nn.Conv2d(16, 5, 1)),
        lambda: torch.randn(2, 3, 8, 8),
    ),
    "attention": (
        lambda n: nn.Sequential(nn.Linear(8, 16), *(Encoder(16) for _ in range(n)), nn.Linear(16, 5)),
        lambda: torch.randn(2, 6, 8),
    ),
}


def measure_growth() -> list[tuple[str, int, int, float]]:
    """Return (network, blocks, nodes, seconds of analysis, the least of several rounds)."""
    rows = []
    for name, (build, draw) in NETWORKS.items():
        for blocks in BLOCKS:
            traced = trace_module(build(blocks).eval(), (draw(),))
            seconds = []
            for _ in range(ROUNDS):
                start = time.process_time()
                build_graph(traced)
                seconds.append(time.process_time() - start)
            rows.append((name, blocks, len(traced.module.graph.nodes), min(seconds)))
            print(f"{name:14} {blocks:4} blocks {rows[-1][2]:6} nodes {1000 * min(seconds):9.1f} ms")
    return rows


def compare_resnet50() -> list[tuple[Any, ...]]:
    """Time ResNet-50 in turns: here to its pruned and proven self, in torch-pruning to its pruned self.

    Returns CSV rows: the medians of both and of our stages, and how many times as long ours took in the same turn.
    """
    import torch_pruning
    from torchvision.models import resnet50

    model = resnet50(weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    stages: dict[str, list[float]] = {}

    def take(stage: str, step: Callable[..., Any], *given: Any) -> Any:
        start = time.process_time()
        found = step(*given)
        stages.setdefault(f"of which: {stage}", []).append(time.process_time() - start)
        return found

    def prune_ours() -> None:
        traced = take("trace", trace_module, model, (x,))
        graph = take("analyse", build_graph, traced)
        kept = {g.name: list(range(g.size // 2)) for g in graph.groups}
        keeps = graph.keeps(kept)
        small = take("prune the graph", prune_graph, graph, kept)
        take("prune the class, compare it with the graph", slice_module, model, graph, keeps)
        # The proof does not depend on the size of the pictures; small ones prove the same equality.
        pictures = (torch.randn(2, 3, 64, 64),)
        check = take("masked = sliced", check_masked, graph, small.module, keeps, pictures)
        assert check.passed, check

    def prune_theirs() -> None:
        given = copy.deepcopy(model)
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.MagnitudePruner(
            given, x, importance=importance, pruning_ratio=0.5, ignored_layers=[given.fc]
        ).step()

    ways = {"jettison: trace, analyse, prune, verify": prune_ours, "torch-pruning: prune": prune_theirs}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # the first run pays for imports
    stages.clear()
    for _ in range(TURNS):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    ours, theirs = seconds.values()
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    for name, values in (seconds | stages).items():
        print(f"{name:56} median {statistics.median(values):.2f} s")
    ratio = (statistics.median(ratios), ratios[1], ratios[-2])
    print(
        f"ratio in turns: median {ratio[0]:.2f}, 96 % interval {ratio[1]:.2f} to {ratio[2]:.2f}; load {os.getloadavg()}"
    )
    (ours_name, _), (theirs_name, _) = seconds.items()
    rows = [(ours_name, ours), *stages.items(), (theirs_name, theirs)]
    load = round(os.getloadavg()[0], 1)
    return [
        *((name, "", "", statistics.median(values), "", "", "", load) for name, values in rows),
        (f"{ours_name}, against {theirs_name}", "", "", "", *(round(v, 2) for v in ratio), load),
    ]


def draw_growth(rows: list[tuple[str, int, int, float]], path: Path) -> None:
    """Plot seconds against layers, both logarithmic, with the line of linear growth."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(r[0] for r in rows):
        mine = [r for r in rows if r[0] == name]
        axes.plot([r[1] for r in mine], [1000 * r[3] for r in mine], marker="o", label=name)
        linear = [1000 * mine[-1][3] * r[1] / mine[-1][1] for r in mine]
        axes.plot([r[1] for r in mine], linear, "--", color="grey", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="blocks", ylabel="analysis, ms", title="Dashed: linear growth")
    axes.set_xticks(BLOCKS, labels=[str(b) for b in BLOCKS])
    axes.set_yticks([1, 3, 10, 30, 100], labels=["1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


def main() -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    rows = measure_growth()
    draw_growth(rows, RESULTS / "analysis-speed.svg")
    compared = compare_resnet50()
    with open(RESULTS / "analysis-speed.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("what", "blocks", "nodes", "seconds", "times", "times_low", "times_high", "load"))
        writer.writerows(rows)
        writer.writerows(compared)


if __name__ == "__main__":
    main()
