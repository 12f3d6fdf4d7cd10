"""Train the demonstration's network and write its weights: `python -m examples.fashion_mnist.train`.

Twelve epochs with flips and two-pixel shifts reach about 94 % test accuracy; with both cores of a
two-core machine they take about twenty minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from examples.fashion_mnist.data import load
from examples.fashion_mnist.network import FashionNet


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the pictures and shift the batch by up to two pixels."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    dx, dy = (int(v) for v in torch.randint(0, 5, (2,), generator=generator))
    return F.pad(images, (2, 2, 2, 2))[..., dy : dy + 28, dx : dx + 28]


def train(epochs: int, seed: int, data: Path | None) -> nn.Module:
    """Return the trained network; prints a line an epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load("train", data)
    network = FashionNet().to(memory_format=torch.channels_last)
    batch = 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        network.train()
        for chosen in torch.randperm(len(images), generator=generator)[: len(images) // batch * batch].split(batch):
            inputs = augment(images[chosen], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(network(inputs), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}: loss {total * batch / len(images):.3f}, "
            f"test {100 * measure_accuracy(network, data):.2f} %, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return network.eval()


@torch.no_grad()
def measure_accuracy(network: nn.Module, data: Path | None) -> float:
    """Return the share of test pictures whose label the network names."""
    network.eval()
    images, labels = load("test", data)
    right = sum(
        int((network(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with the four IDX files")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fashion_net.safetensors"))
    arguments = parser.parse_args()
    network = train(arguments.epochs, arguments.seed, arguments.data)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, arguments.out)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
