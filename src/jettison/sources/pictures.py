"""A folder of pictures as batches of tensors; needs Pillow, which is the extra `images`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CalibrationError, InputError
from jettison.sources.names import describe

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
KEPT_BYTES = 1 << 30
"""Decoded pictures are kept up to this much memory, because every stage reads them again."""


@dataclass(frozen=True)
class PictureSettings:
    """How a picture becomes a tensor: `(height, width)`, mean and std per channel of 0..1 pixels, grey or colour."""

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    grey: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no picture has."""
        channels = 1 if self.grey else 3
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, channels):
                raise InputError(
                    f"{name} has {len(values)} values and the pictures have {channels} channels. "
                    f"Give one value for all channels, or {channels}."
                )
        if self.std is not None and min(self.std) <= 0:
            raise InputError(f"std={self.std} must be positive: pictures are divided by it. Give what training used.")
        if self.size is not None and min(self.size) < 1:
            raise InputError(f"The size {self.size} must be positive. Give height and width in pixels.")


@dataclass(frozen=True)
class PictureBatches:
    """Pictures on disk, decoded when read and then kept in memory as far as `KEPT_BYTES` goes."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    settings: PictureSettings
    batch: int
    _kept: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.files) // self.batch)

    def __iter__(self) -> Iterator[Any]:
        """Yield float32 batches, with int64 labels if the folder has classes."""
        import numpy as np
        import torch

        for start in range(0, len(self.files), self.batch):
            places = range(start, min(start + self.batch, len(self.files)))
            pixels = [self._read(i) for i in places]
            self._check_alike(pixels, start)
            x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(255)
            if self.settings.mean is not None:
                x -= torch.tensor(self.settings.mean).view(1, -1, 1, 1)
            if self.settings.std is not None:
                x /= torch.tensor(self.settings.std).view(1, -1, 1, 1)
            yield x if self.labels is None else (x, torch.tensor([self.labels[i] for i in places]))

    def _read(self, place: int) -> np.ndarray:
        if place not in self._kept:
            pixels = read_picture(self.files[place], self.settings)
            if pixels.nbytes * (len(self._kept) + 1) > KEPT_BYTES:
                return pixels
            self._kept[place] = pixels
        return self._kept[place]

    def _check_alike(self, pixels: list[np.ndarray], start: int) -> None:
        first = self._read(0).shape
        for i, picture in enumerate(pixels):
            if picture.shape != first:
                raise InputError(
                    f"{self.files[start + i]} is {picture.shape[1]}x{picture.shape[0]} pixels and {self.files[0]} "
                    f"{first[1]}x{first[0]}. A batch needs one size. Give the network's, for example --size-px 224."
                )


def load_pictures(
    folder: Path, settings: PictureSettings, *, batch: int, limit: int | None = None, seed: int = 0
) -> PictureBatches:
    """Return the pictures below `folder`, shuffled with `seed` so that no batch is of one class, at most `limit`.

    Raises CalibrationError if there are none, and InputError if Pillow is missing or a picture cannot be decoded.
    """
    _import_pillow()
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise CalibrationError(
            f"{folder} holds no pictures: no file ends with {', '.join(sorted(SUFFIXES))}. "
            f"Name a folder that does, at any depth; a few hundred pictures will do."
        )
    folders = sorted({p.relative_to(folder).parts[0] for p in files if p.parent != folder})
    # With pictures beside the sub-folders these are no classes, just order.
    classes = tuple(folders) if len(folders) >= 2 and all(p.parent != folder for p in files) else ()
    random.Random(seed).shuffle(files)
    chosen = tuple(files[:limit])
    labels = tuple(classes.index(p.relative_to(folder).parts[0]) for p in chosen) if classes else None
    return PictureBatches(chosen, labels, classes, settings, batch)


def read_picture(path: Path, settings: PictureSettings) -> np.ndarray:
    """Return a picture as uint8 `(height, width, channels)`, resized to cover the size and cropped at the centre.

    Raises InputError naming the file if it cannot be decoded.
    """
    import numpy as np

    image_module = _import_pillow()
    try:
        with image_module.open(path) as file:
            image = file.convert("L" if settings.grey else "RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and struct.error
        raise InputError(
            f"{path} cannot be decoded: {describe(error)}. It is corrupt or no picture. Remove it from the folder."
        ) from error
    if settings.size is not None:
        height, width = settings.size
        scale = max(height / image.height, width / image.width)
        wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        if (wide, high) != image.size:
            image = image.resize((wide, high), image_module.Resampling.BICUBIC)
        left, top = (wide - width) // 2, (high - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[:, :, None] if settings.grey else pixels


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            "Pillow is not installed here, and a folder of pictures needs it. Run `pip install 'jettison[images]'`."
        ) from error
    return Image
