"""The networks that every library quantizes: how each is built, what it is calibrated with, and how it is scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

CALIBRATION = 256
"""Inputs that each library calibrates with: the same ones, without labels."""
NOISE = 32
"""Inputs of networks without trained weights, which are measured for latency alone."""


@dataclass(frozen=True)
class Case:
    """A network with its calibration inputs, one sample each; `judge` gives held-out inputs and what they should give.

    `metric` names the score: "accuracy" against labels, "agreement" with the original's classes, "" where there are no
    trained weights.
    """

    name: str
    metric: str
    build: Callable[[], nn.Module]
    calibrate: Callable[[], Tensor]
    judge: Callable[[nn.Module], tuple[Tensor, np.ndarray]] | None


def _build_fashion() -> nn.Module:
    from examples.fashion_mnist.network import build

    return build()


def _calibrate_fashion() -> Tensor:
    from examples.fashion_mnist.data import load

    images, _ = load("train")
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION]]


def _judge_fashion(model: nn.Module) -> tuple[Tensor, np.ndarray]:
    from examples.fashion_mnist.data import load

    images, labels = load("test")
    return images, labels.numpy()


def _build_lite0() -> nn.Module:
    from examples.efficientnet_lite0.network import build

    return build()


def _calibrate_lite0() -> Tensor:
    from examples.efficientnet_lite0 import photos

    return torch.cat(list(photos.calibration(CALIBRATION)))


def _judge_lite0(model: nn.Module) -> tuple[Tensor, np.ndarray]:
    from examples.efficientnet_lite0 import photos

    held_out = torch.cat(list(photos.held_out()))
    with torch.inference_mode():
        classes = torch.cat([model(x).argmax(1) for x in held_out.split(32)])
    return held_out, classes.numpy()


def _stand_in_for_torchvision() -> None:
    """Let torchvision, which timm imports, load beside the CPU build of torch, whose operators it cannot find."""
    with contextlib.suppress(RuntimeError):  # its own operators are there
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float limit) -> Tensor")


def _untrained(name: str) -> Case:
    def build() -> nn.Module:
        _stand_in_for_torchvision()
        import timm

        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name, pretrained=False).eval()
        return network

    def calibrate() -> Tensor:
        return torch.randn(NOISE, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    return Case(name, "", build, calibrate, None)


CASES: Sequence[Case] = (
    Case("fashion-mnist", "accuracy", _build_fashion, _calibrate_fashion, _judge_fashion),
    Case("efficientnet-lite0", "agreement", _build_lite0, _calibrate_lite0, _judge_lite0),
    _untrained("resnet50"),
    _untrained("mobilenetv2_100"),
    _untrained("vit_tiny_patch16_224"),
)


def find_case(name: str) -> Case:
    """Return the case of that name."""
    return next(c for c in CASES if c.name == name)
