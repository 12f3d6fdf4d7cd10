"""torchvision's detectors up to their raw predictions; decoding and suppression depend on values and stay outside.

The detector itself is a submodule of the wrapper: pruning the wrapper into its own class leaves a pruned detector that
still takes pictures and returns boxes. The proposals of two-stage detectors are inputs of the wrapper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.zoo import Built

SIZE = 128
PROPOSALS = 6


class OneStage(nn.Module):
    """Backbone, neck and heads of a one-stage detector."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor) -> Any:
        features = self.detector.backbone(pictures)
        return self.detector.head([features] if isinstance(features, Tensor) else list(features.values()))


class TwoStage(nn.Module):
    """Backbone, neck, proposal head, and the heads that read proposals (boxes, masks, keypoints)."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor, proposals: Tensor) -> Any:
        features = self.detector.backbone(pictures)
        heads = self.detector.roi_heads
        outputs = [*self.detector.rpn.head(list(features.values()))]
        shapes = [tuple(pictures.shape[-2:])] * pictures.shape[0]
        boxes = list(proposals.unbind(0))
        outputs.append(heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, shapes))))
        if heads.has_mask():
            outputs.append(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, shapes))))
        if heads.has_keypoint():
            pooled = heads.keypoint_roi_pool(features, boxes, shapes)
            outputs.append(heads.keypoint_predictor(heads.keypoint_head(pooled)))
        return outputs


def build_detector(name: str) -> Callable[[], Built]:
    """Return what builds the wrapped detector, its pictures, and proposals where it takes any."""

    def build() -> Built:
        from torchvision.models import get_model

        generator = torch.Generator().manual_seed(0)
        detector = get_model(name, weights=None, weights_backbone=None).eval()
        size = 300 if name.startswith("ssd300") else SIZE  # its last feature map would vanish
        pictures = torch.randn(2, 3, size, size, generator=generator)
        if not hasattr(detector, "roi_heads"):
            return OneStage(detector).eval(), (pictures,), {}
        corner = torch.rand(2, PROPOSALS, 2, generator=generator) * SIZE / 2
        sides = (torch.rand(2, PROPOSALS, 2, generator=generator) * 0.4 + 0.1) * SIZE
        return TwoStage(detector).eval(), (pictures, torch.cat([corner, corner + sides], -1)), {}

    return build
