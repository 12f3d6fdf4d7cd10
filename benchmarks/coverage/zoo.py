"""The models that are pruned: which they are, how each is built without weights, and what it is called with."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

BATCH = 2
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model with the positional and keyword inputs of one call."""


@dataclass(frozen=True)
class Case:
    """One model; `family` is what it stands for: a timm module file, a torchvision builder, a transformers class."""

    collection: str
    name: str
    family: str
    build: Callable[[], Built]


def find_case(collection: str, name: str) -> Case:
    """Return the case of that name."""
    return next(c for c in COLLECTIONS[collection]() if c.name == name)


def list_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of whatever a network gives, in order."""
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def picture(size: int) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))


def list_timm() -> list[Case]:
    """One model per module file of timm, the smallest of its file that is no test model; see timm.csv.

    There, `size` is the smallest of 64, 96, 128, 160 and the model's own that it takes, `options` keep giants of many
    equal blocks small.
    """
    with open(Path(__file__).with_name("timm.csv")) as file:
        rows = list(csv.DictReader(file))
    return [Case("timm", r["model"], r["family"], _build_timm(r["model"], int(r["size"]), r["options"])) for r in rows]


def _build_timm(name: str, size: int, options: str) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        return timm.create_model(name, **json.loads(options or "{}")).eval(), (picture(size),), {}

    return build


LARGE = {"vit_h_14", "regnet_y_128gf"}
"""Over 600 million parameters: in float64 with its copies each takes more memory than the machine has."""


def list_torchvision() -> list[Case]:
    """Every classification, segmentation and video model of torchvision."""
    from torchvision import models

    cases = []
    for name in models.list_models(models):
        if name not in LARGE:
            cases.append(Case("torchvision", name, name, _build_vision(name, _picture_size(name))))
    for name in models.list_models(models.segmentation):
        cases.append(Case("torchvision", f"segmentation/{name}", name, _build_vision(name, 64)))
    for name in models.list_models(models.video):
        cases.append(Case("torchvision", f"video/{name}", name, _build_video(name)))
    return cases


def _picture_size(name: str) -> int:
    if name.startswith("maxvit_"):
        return 224
    return 128 if name.startswith(("inception", "googlenet", "alexnet", "squeezenet")) else 64


def _build_vision(name: str, size: int) -> Callable[[], Built]:
    def build() -> Built:
        from torchvision.models import get_model

        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            # Their auxiliary classifiers run in training mode only, so that no graph of the network in use holds them.
            options |= {"init_weights": False, "aux_logits": False}
        if "deeplab" in name or "fcn" in name or "lraspp" in name:
            options["weights_backbone"] = None
        if name.startswith("vit_"):
            options["image_size"] = size
        return get_model(name, weights=None, **options).eval(), (picture(size),), {}

    return build


def _build_video(name: str) -> Callable[[], Built]:
    def build() -> Built:
        from torchvision.models import get_model

        size = 224 if name.startswith(("mvit", "s3d")) else 64
        clip = torch.randn(BATCH, 3, 16, size, size, generator=torch.Generator().manual_seed(0))
        return get_model(name, weights=None).eval(), (clip,), {}

    return build


def list_detectors() -> list[Case]:
    """Every detection model of torchvision: backbone, neck and heads; decoding and suppression stay outside."""
    from torchvision import models

    from benchmarks.coverage.detectors import build_detector

    return [Case("detection", n, n, build_detector(n)) for n in models.list_models(models.detection)]


def list_transformers() -> list[Case]:
    """Language, vision and speech models of transformers, small, built from their configurations."""
    from benchmarks.coverage.transformer_models import BUILDERS

    return [Case("transformers", name, name, build) for name, build in BUILDERS.items()]


def list_layers() -> list[Case]:
    """The layers of torch.nn that are networks of their own: recurrent ones, attention, convolutions of other ranks."""
    from benchmarks.coverage.layers import BUILDERS

    return [Case("torch", name, name, build) for name, build in BUILDERS.items()]


COLLECTIONS: Mapping[str, Callable[[], list[Case]]] = {
    "timm": list_timm,
    "torchvision": list_torchvision,
    "detection": list_detectors,
    "transformers": list_transformers,
    "torch": list_layers,
}
