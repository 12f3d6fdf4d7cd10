"""Pictures for EfficientNet-Lite0: unlabelled ones to calibrate and compare with, 20 labelled ones as a smoke gate.

ImageNet is not to be had, so pictures are made: cut-outs of animals, plants, food and things from Debian's tuxpaint
stamps lie on crops of real photos (scikit-image, scikit-learn, Debian's MATE backgrounds); every sixth picture is a
crop alone. The pictures to calibrate with and those held out share no photo and no cut-out. Look at them:

    python -m examples.efficientnet_lite0.photos sheet.png
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.efficientnet_lite0.network import SIZE_PX
from examples.fetch import LINUX_311, cache_folder, fetch_debian, fetch_wheel, scratch_folder

STAMPS = (
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
MATE = (
    "mate-backgrounds",
    "1.26.0-1",
    "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
)
SKIMAGE = (
    "scikit-image",
    "0.25.2",
    "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
)
SKLEARN = (
    "scikit-learn",
    "1.7.2",
    "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
)
FOOLBOX = (
    "foolbox",
    "3.3.4",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)

SEED = 20
COUNTS = {"calibration": 2048, "held_out": 1024}
"""How many pictures there are of each kind."""
VERSION = 2
"""Raised with every change to what the pictures are, so that no old cache is taken for new."""
LONGEST_PX = 1280
"""Photos are shrunk to this side before crops are taken."""
SHARPEST_PX = 96
"""Cut-outs smaller than this would be blurs."""

PHOTOS = {
    "calibration": {
        SKIMAGE: "astronaut.png coffee.png motorcycle_left.png motorcycle_right.png hubble_deep_field.jpg brick.png "
        "grass.png camera.png coins.png ihc.png",
        SKLEARN: "china.jpg",
        MATE: "Aqua.jpg Dune.jpg Garden.jpg LadyBird.jpg RainDrops.jpg TwoWings.jpg YellowFlower.jpg",
    },
    "held_out": {
        SKIMAGE: "chelsea.png rocket.jpg gravel.png retina.jpg",
        SKLEARN: "flower.jpg",
        MATE: "Blinds.jpg FreshFlower.jpg GreenMeadow.jpg Storm.jpg Wood.jpg",
    },
}
"""The photos of each split, by package; the two motorcycles are one scene and so stay together."""
FOLDERS = {SKIMAGE: "skimage/data", SKLEARN: "sklearn/datasets/images", MATE: "usr/share/backgrounds/mate/nature"}


@dataclass(frozen=True)
class Photos:
    """Batches of preprocessed pictures, the same each time they are read."""

    pixels: np.ndarray
    batch: int

    def __len__(self) -> int:
        return -(-len(self.pixels) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.pixels), self.batch):
            yield preprocess(self.pixels[start : start + self.batch])


def calibration(n: int = COUNTS["calibration"], batch: int = 32) -> Photos:
    """Return `n` pictures to calibrate and recover with, as batches of `(batch, 3, 224, 224)`."""
    return Photos(_load("calibration", n), batch)


def held_out(n: int = COUNTS["held_out"], batch: int = 32) -> Photos:
    """Return `n` pictures that share no photo and no cut-out with those of `calibration`."""
    return Photos(_load("held_out", n), batch)


def labelled() -> tuple[Tensor, Tensor]:
    """Return foolbox's 20 ImageNet photos, preprocessed, and their classes: `(20, 3, 224, 224)` and `(20,)`.

    They are read from the wheel each time and never copied: the photos are for research use only.
    """
    pixels, labels = [], []
    with zipfile.ZipFile(fetch_wheel(*FOOLBOX)) as wheel:
        for name in sorted(wheel.namelist()):
            if found := re.fullmatch(r"foolbox/data/imagenet_\d+_(\d+)\.jpg", name):
                photo = Image.open(io.BytesIO(wheel.read(name))).convert("RGB")
                pixels.append(np.asarray(photo.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)))
                labels.append(int(found[1]))
    return preprocess(np.stack(pixels)), torch.tensor(labels)


def preprocess(pixels: np.ndarray) -> Tensor:
    """Turn uint8 `(n, 224, 224, 3)` into what the network was trained on: `(pixel - 127) / 128`, channels first."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float().sub_(127).div_(128)


def _load(split: str, n: int) -> np.ndarray:
    if not 0 < n <= COUNTS[split]:
        raise ValueError(f"there are {COUNTS[split]} {split} pictures, not {n}")
    file = cache_folder() / f"efficientnet-photos-v{VERSION}-{split}-{COUNTS[split]}.npy"
    if not file.is_file():
        pixels = make_pictures(split, COUNTS[split])
        with scratch_folder() as scratch:
            np.save(scratch / file.name, pixels)
            (scratch / file.name).rename(file)
    return np.load(file, mmap_mode="r")[:n]


def make_pictures(split: str, n: int) -> np.ndarray:
    """Draw the first `n` pictures of a split as uint8 `(n, 224, 224, 3)`; picture `i` is the same whatever `n`."""
    photos, cutouts = read_photos(split), [_read_cutout(p) for p in list_cutouts(split)]
    return np.stack([_draw(i, split, photos, cutouts) for i in range(n)])


def read_photos(split: str) -> list[Image.Image]:
    """Return the real photos of a split, their longest side at most 1280 px."""
    photos = []
    for package, names in PHOTOS[split].items():
        for name in names.split():
            photo = Image.open(_open_photo(package, f"{FOLDERS[package]}/{name}")).convert("RGB")
            photo.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.BICUBIC)
            photos.append(photo)
    return photos


def _open_photo(package: tuple[str, str, str], name: str) -> io.BytesIO:
    if package == MATE:
        return io.BytesIO((fetch_debian(*MATE) / name).read_bytes())
    with zipfile.ZipFile(fetch_wheel(*package, LINUX_311)) as wheel:
        return io.BytesIO(wheel.read(name))


def list_cutouts(split: str) -> list[Path]:
    """Return the stamps of a split: no symbols and no cartoons; those of one kind (frog, frog-1) stay together."""
    root = fetch_debian(*STAMPS) / "usr/share/tuxpaint/stamps"
    chosen = []
    for path in sorted(root.rglob("*.png")):
        parts = path.relative_to(root).parts
        if "symbols" in parts or "cartoon" in parts or "flags" in parts:
            continue
        with Image.open(path) as stamp:
            if max(stamp.size) < SHARPEST_PX or stamp.mode == "RGB":
                continue
        kind = re.split(r"[^a-z]", path.stem.lower())[0]
        is_held_out = hashlib.sha256(kind.encode()).digest()[0] % 10 < 3
        if is_held_out == (split == "held_out"):
            chosen.append(path)
    return chosen


def _read_cutout(path: Path) -> Image.Image:
    stamp = Image.open(path).convert("RGBA")
    return stamp.crop(stamp.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def _draw(index: int, split: str, photos: list[Image.Image], cutouts: list[Image.Image]) -> np.ndarray:
    rng = np.random.default_rng([SEED, sorted(COUNTS).index(split), index])
    picture = _crop(photos[rng.integers(len(photos))], rng)
    if index % 6:
        # Going round the cut-outs uses all of them alike; the second one, if any, lies before the first.
        _paste(picture, cutouts[index % len(cutouts)], rng, smallest=0.45, largest=0.95)
        if rng.random() < 0.2:
            _paste(picture, cutouts[rng.integers(len(cutouts))], rng, smallest=0.2, largest=0.45)
    pixels = np.asarray(picture, dtype=np.float32)
    contrast, light = rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    return np.clip((pixels - 127) * contrast + 127 + light, 0, 255).round().astype(np.uint8)


def _crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(min(photo.size) * rng.uniform(0.35, 1.0))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    crop = photo.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _paste(
    picture: Image.Image, cutout: Image.Image, rng: np.random.Generator, *, smallest: float, largest: float
) -> None:
    scale = SIZE_PX * rng.uniform(smallest, largest) / max(cutout.size)
    size = (max(1, round(cutout.width * scale)), max(1, round(cutout.height * scale)))
    small = cutout.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    place = tuple(int(rng.integers(0, SIZE_PX - length + 1)) for length in small.size)
    picture.paste(small, place, small)


def main() -> None:
    """Write a contact sheet: five rows to calibrate with, three held out."""
    rows = np.concatenate([make_pictures("calibration", 60), make_pictures("held_out", 36)])
    sheet = rows.reshape(8, 12, SIZE_PX, SIZE_PX, 3).transpose(0, 2, 1, 3, 4).reshape(8 * SIZE_PX, -1, 3)
    Image.fromarray(sheet).resize((12 * 112, 8 * 112)).save(sys.argv[1])
    for split in COUNTS:
        print(
            f"{split}: {COUNTS[split]} pictures, {len(read_photos(split))} photos, {len(list_cutouts(split))} cut-outs"
        )


if __name__ == "__main__":
    main()
