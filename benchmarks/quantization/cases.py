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


Inputs = tuple[Tensor, ...]
"""What a network takes, one row for each sample."""


@dataclass(frozen=True)
class Case:
    """A network with its calibration inputs; `judge` gives held-out inputs and what they should give.

    `inputs` names what its forward takes. `metric` names the score: "accuracy" against labels, "agreement" with the
    original's classes, "" where there are no trained weights. Libraries that ask are told of a `transformer`.
    """

    name: str
    metric: str
    build: Callable[[], nn.Module]
    calibrate: Callable[[], Inputs]
    judge: Callable[[nn.Module], tuple[Inputs, np.ndarray]] | None
    inputs: tuple[str, ...] = ("x",)
    transformer: bool = False


def split(inputs: Inputs, rows: int) -> list[Inputs]:
    """Cut inputs into batches."""
    return list(zip(*(x.split(rows) for x in inputs), strict=True))


def _choose(count: int) -> Tensor:
    """Return the numbers of the samples to calibrate with."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:CALIBRATION]


def _build_fashion() -> nn.Module:
    from examples.fashion_mnist.network import build

    return build()


def _calibrate_fashion() -> Inputs:
    from examples.fashion_mnist.data import load

    images, _ = load("train")
    return (images[_choose(len(images))],)


def _judge_fashion(model: nn.Module) -> tuple[Inputs, np.ndarray]:
    from examples.fashion_mnist.data import load

    images, labels = load("test")
    return (images,), labels.numpy()


def _build_lite0() -> nn.Module:
    from examples.efficientnet_lite0.network import build

    return build()


def _calibrate_lite0() -> Inputs:
    from examples.efficientnet_lite0 import photos

    return (torch.cat(list(photos.calibration(CALIBRATION))),)


def _judge_lite0(model: nn.Module) -> tuple[Inputs, np.ndarray]:
    from examples.efficientnet_lite0 import photos

    held_out = torch.cat(list(photos.held_out()))
    with torch.inference_mode():
        classes = torch.cat([model(x).argmax(1) for x in held_out.split(32)])
    return (held_out,), classes.numpy()


def _build_minilm() -> nn.Module:
    from benchmarks.quantization.minilm import build

    return build()


def _calibrate_minilm() -> Inputs:
    from benchmarks.quantization.minilm import read_documents

    ids, mask, _ = read_documents("train")
    chosen = _choose(len(ids))
    return ids[chosen], mask[chosen]


def _judge_minilm(model: nn.Module) -> tuple[Inputs, np.ndarray]:
    from benchmarks.quantization.minilm import read_documents

    ids, mask, labels = read_documents("test")
    return (ids, mask), labels.numpy()


def _stand_in_for_torchvision() -> None:
    """Let torchvision, which timm imports, load beside the CPU build of torch, whose operators it cannot find."""
    with contextlib.suppress(RuntimeError):  # its own operators are there
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float limit) -> Tensor")


def _untrained(name: str, *, transformer: bool = False) -> Case:
    def build() -> nn.Module:
        _stand_in_for_torchvision()
        import timm

        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name, pretrained=False).eval()
        return network

    def calibrate() -> Inputs:
        return (torch.randn(NOISE, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)

    return Case(name, "", build, calibrate, None, transformer=transformer)


CASES: Sequence[Case] = (
    Case("fashion-mnist", "accuracy", _build_fashion, _calibrate_fashion, _judge_fashion),
    Case("efficientnet-lite0", "agreement", _build_lite0, _calibrate_lite0, _judge_lite0),
    Case("minilm-r8", "accuracy", _build_minilm, _calibrate_minilm, _judge_minilm, ("ids", "mask"), transformer=True),
    _untrained("resnet50"),
    _untrained("mobilenetv2_100"),
    _untrained("vit_tiny_patch16_224", transformer=True),
)


def find_case(name: str) -> Case:
    """Return the case of that name."""
    return next(c for c in CASES if c.name == name)
