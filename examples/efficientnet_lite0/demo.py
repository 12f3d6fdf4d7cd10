"""Compress EfficientNet-Lite0 without labels: `python -m examples.efficientnet_lite0.demo`.

The budget is 0.4 of the original's latency in ONNX Runtime. What is proved is agreement: on how many held-out
pictures the compressed file names the same class as the original. Beside it stand 20 labelled photos, a smoke gate:
one photo is five points, so it can show that something broke and nothing finer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import jettison as jt
from examples.efficientnet_lite0 import photos
from examples.efficientnet_lite0.network import SIZE_PX, build
from examples.fetch import FetchError
from jettison.core.errors import BudgetError
from jettison.sources.pictures import PictureBatches, PictureSettings, load_pictures

LATENCY = 0.4
"""The share of the original's latency that may be used: 2.5 times faster."""
RECIPE = jt.Recipe(samples=192, judges=64, positions=20_000, steps=0, rounds=100)
"""Refitting only: distilling on composites of 18 photos brought the network nearer to the original on those and further
away on other photos (divergence 0.53 to 0.76 nats), so it is left out. About ten minutes on two cores."""


def make_agreement(original: nn.Module, pictures: Iterable[Tensor]) -> Callable[[Callable[..., Any]], Tensor]:
    """Return `agreement(model)`: 1 for each picture on which `model` names the class that `original` names, else 0."""
    with torch.inference_mode():
        expected = [original(batch).argmax(1) for batch in pictures]

    def agreement(model: Callable[..., Any]) -> Tensor:
        found = [torch.as_tensor(model(batch)).argmax(1) for batch in pictures]
        return (torch.cat(found) == torch.cat(expected)).float()

    return agreement


def split_folder(folder: Path) -> tuple[PictureBatches, PictureBatches]:
    """Return two thirds of the pictures in `folder` to calibrate with, and the others."""
    settings = PictureSettings(size=(SIZE_PX, SIZE_PX), mean=(127 / 255,), std=(128 / 255,))
    pictures = replace(load_pictures(folder, settings, batch=32), labels=None)
    cut = -(-len(pictures.files) * 2 // 3)
    first, rest = pictures.files[:cut], pictures.files[cut:]
    return replace(pictures, files=first, _kept={}), replace(pictures, files=rest, _kept={})


def count_right(scores: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """Return on how many pictures the best class, and one of the best five, is the right one."""
    best = np.argsort(-scores, axis=1)[:, :5]
    return int((best[:, 0] == labels).sum()), int((best == labels[:, None]).any(axis=1).sum())


def run_file(file: Path, pictures: np.ndarray) -> np.ndarray:
    """Run an ONNX file on pictures one by one, with onnxruntime and numpy alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: picture[None]})[0] for picture in pictures])


def print_smoke_gate(original: nn.Module, file: Path) -> None:
    """Print how many of the 20 labelled photos the original and the exported file get right."""
    pictures, labels = photos.labelled()
    with torch.inference_mode():
        before = count_right(original(pictures).numpy(), labels.numpy())
    after = count_right(run_file(file, pictures.numpy()), labels.numpy())
    n = len(labels)
    print(f"Smoke gate, {n} labelled ImageNet photos (no measure of accuracy: one photo is {100 // n} points)")
    print(f"  original, PyTorch       top-1 {before[0]}/{n}, top-5 {before[1]}/{n}")
    print(f"  compressed, {file.name:<12}top-1 {after[0]}/{n}, top-5 {after[1]}/{n}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/efficientnet_lite0"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder of pictures of your own, in place of those that are made")
    given = parser.parse_args(arguments)
    try:
        original = build()
        calibration, held_out = split_folder(given.data) if given.data else (photos.calibration(), photos.held_out())
    except FetchError as error:
        raise SystemExit(f"FetchError: {error}. Pictures can also be your own: --data FOLDER.") from None
    agreement = make_agreement(original, held_out)
    unmet = None
    try:
        result = jt.compress(
            original,
            calibration,
            budget=jt.Budget(latency=LATENCY),
            target="onnxruntime",
            evaluate=agreement,
            recipe=RECIPE,
            threads=given.threads,
            seed=given.seed,
            out=given.out,
            name="EfficientNet-Lite0",
            command=f"python -m examples.efficientnet_lite0.demo --threads {given.threads}",
        )
    except BudgetError as error:
        if error.result is None:
            raise
        result, unmet = error.result, error
    from jettison.report.terminal import print_table

    print_table(result.record, Console())
    print_smoke_gate(original, Path(result.artifact))
    print(f"Report: {given.out / 'report.html'}")
    if unmet is not None:
        raise SystemExit(f"BudgetError: {unmet}")


if __name__ == "__main__":
    main()
