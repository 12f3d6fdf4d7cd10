"""The network the demonstration compresses: a residual CNN for 28x28 grey pictures."""

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2016), BatchNorm after each."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class FashionNet(nn.Module):
    """A residual CNN of three stages: 69 million MACs and 0.47 million parameters at the default widths.

    Takes `(batch, 1, 28, 28)` pictures scaled to 0..1 and returns `(batch, 10)` logits.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        in_channels = widths[0]
        for stage, width in enumerate(widths):
            for index in range(2):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(ResidualBlock(in_channels, width, stride))
                in_channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=(2, 3)))


def build() -> nn.Module:
    """Return the network with its trained weights, in eval mode."""
    from pathlib import Path

    from safetensors.torch import load_file

    network = FashionNet()
    network.load_state_dict(load_file(Path(__file__).with_name("fashion_net.safetensors")))
    return network.eval()


if __name__ == "__main__":
    print(sum(p.numel() for p in FashionNet().parameters()), FashionNet()(torch.zeros(1, 1, 28, 28)).shape)
