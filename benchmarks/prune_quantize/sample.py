"""The sample: models of the zoo whose integers matter, and some that are not in it, at small sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.coverage.zoo import COLLECTIONS, Built, Case, picture

TIMM = {
    64: (
        "resnet18", "resnet50", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "efficientnet_lite0",
        "convnext_atto", "regnetx_002", "regnety_002", "densenet121", "ghostnet_100", "repvgg_a0", "mobilevit_xxs",
    ),
    224: ("deit_tiny_patch16_224",),
}  # fmt: skip
"""Models of timm by the side of their pictures."""
OTHERS: Mapping[str, Sequence[str]] = {
    "torchvision": (
        "shufflenet_v2_x0_5", "squeezenet1_1", "segmentation/deeplabv3_mobilenet_v3_large",
        "segmentation/lraspp_mobilenet_v3_large",
    ),
    "detection": ("ssdlite320_mobilenet_v3_large",),
    "transformers": ("bert", "distilbert", "vit", "swin", "gpt2", "t5"),
    "torch": ("lstm", "gru", "transformer-encoder", "convolutions-1d", "convolutions-2d"),
}  # fmt: skip
"""Cases of the zoo, by collection."""


def list_sample() -> list[Case]:
    """Return the sample, timm's models first."""
    cases = [Case("timm", name, name, _build_timm(name, size)) for size, names in TIMM.items() for name in names]
    for collection, names in OTHERS.items():
        known = {case.name: case for case in COLLECTIONS[collection]()}
        cases += [known[name] for name in names]
    return cases


def _build_timm(name: str, size: int) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        return timm.create_model(name).eval(), (picture(size),), {}

    return build


def find_case(collection: str, name: str) -> Case:
    """Return the case of that name."""
    return next(case for case in list_sample() if (case.collection, case.name) == (collection, name))
