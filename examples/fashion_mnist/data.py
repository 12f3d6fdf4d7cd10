"""Fashion-MNIST (Xiao et al., 2017) as tensors: 60,000 + 10,000 grey pictures of 28x28, ten classes.

The data set comes from Debian's package; off Debian from torchvision's downloader, or from a
folder with the four IDX files: pass `folder`, or set `FASHION_MNIST`.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.fetch import FetchError, cache_folder, fetch_debian

PACKAGE = (
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def load(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return `(images, labels)` of `"train"` or `"test"`: `(n, 1, 28, 28)` float32 in 0..1 and `(n,)` int64."""
    prefix = {"train": "train", "test": "t10k"}[split]
    root = _find(folder)
    images = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz", header_bytes=16).reshape(-1, 1, 28, 28)
    labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", header_bytes=8)
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()


def _find(folder: Path | None) -> Path:
    given = folder or (Path(os.environ["FASHION_MNIST"]) if "FASHION_MNIST" in os.environ else None)
    if given is not None:
        if not (given / "t10k-labels-idx1-ubyte.gz").is_file():
            raise FetchError(f"{given} does not hold the four Fashion-MNIST files (…-ubyte.gz)")
        return given
    try:
        return fetch_debian(*PACKAGE) / "usr/share/datasets/fashion-mnist"
    except FetchError as debian:
        return _download_with_torchvision(debian)


def _download_with_torchvision(debian: FetchError) -> Path:
    remedy = "pass --data FOLDER with the four …-ubyte.gz files, or `pip install torchvision` for its downloader"
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError:
        raise FetchError(f"Fashion-MNIST: {debian}; {remedy}") from None
    root = cache_folder() / "torchvision"
    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise FetchError(f"Fashion-MNIST: {debian}; torchvision's download failed too ({error}); {remedy}") from None
    return root / "FashionMNIST/raw"


def _read_idx(path: Path, header_bytes: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(bytearray(file.read()[header_bytes:]), dtype=np.uint8)
