"""Model inputs by name: a folder of pictures, an `.npz`, or a Python callable, as batches that can be read again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.errors import CalibrationError, InputError, NonFiniteError
from jettison.sources.names import call_without_arguments, describe, find_object

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Batches = Iterable[Any]
    """A re-iterable of batches: a tensor, a tuple of the model's inputs and then labels, or a dict of inputs."""

FORMS = "a folder of pictures, FILE.npz or package.module:callable"


def load_inputs(
    source: str,
    *,
    batch: int = 32,
    size: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    grey: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Batches:
    """Return the batches that `source` names; read again, they are the same.

    A folder is read recursively: pictures become float32 `(batch, 3, height, width)` in 0..1 (one channel with
    `grey`), resized to cover `size` = `(height, width)` and cropped at the centre, then `(x - mean) / std` if those
    are given; without `size` all must be alike. Two or more sub-folders are classes: labels are their places in
    sorted order. An `.npz` holds `x` (or `x0`, `x1`, … for a model of several inputs; a lone unnamed array is `x`)
    and, if labelled, `y`. A callable returns its own re-iterable of batches. At most `limit` items are used; from
    folders and arrays they are drawn with `seed`.
    Raises CalibrationError if there are no items, NonFiniteError, and InputError for what cannot be read.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch={batch} and limit={limit} must be at least 1. Give positive numbers.")
    path = Path(source).expanduser()
    if path.is_dir():
        from jettison.sources.pictures import PictureSettings, load_pictures

        return load_pictures(path, PictureSettings(size, mean, std, grey), batch=batch, limit=limit, seed=seed)
    if size is not None or mean is not None or std is not None or grey:
        raise InputError(
            f"Size, mean, std and grey apply to folders of pictures, and {source!r} is none. "
            f"Scale the inputs where they are made, or name a folder."
        )
    if source.endswith(".npz"):
        return _load_arrays(path, batch, limit, seed)
    if ":" in source and not path.exists():
        return _load_from_code(source, limit)
    found = "a file of another kind" if path.exists() else "nothing that exists here"
    raise InputError(f"{source!r} is {found}. Inputs come from {FORMS}. Give one of these.")


def split_batch(item: Any, positional: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the model's `positional` inputs in a batch, always as a tuple, and the labels behind them or None.

    Raises InputError if the batch is neither a tensor nor a tuple of them.
    """
    from torch import Tensor

    parts = (item,) if isinstance(item, Tensor) else item
    if not isinstance(parts, (tuple, list)) or not parts or not all(isinstance(x, Tensor) for x in parts):
        raise InputError(
            f"A batch is a {type(item).__name__} that cannot be split into inputs and labels. It came from the inputs. "
            f"Yield a tensor, (tensor, labels), or (tensor, …, labels)."
        )
    return tuple(parts[:positional]), parts[positional] if len(parts) > positional else None


@dataclass(frozen=True)
class ArrayBatches:
    """Arrays in memory, cut into batches."""

    arrays: tuple[Tensor, ...]
    labels: Tensor | None
    batch: int

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.arrays[0]) // self.batch)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches in order."""
        for start in range(0, len(self.arrays[0]), self.batch):
            chosen = slice(start, start + self.batch)
            parts = tuple(a[chosen] for a in self.arrays)
            if self.labels is not None:
                parts += (self.labels[chosen],)
            yield parts if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class FirstItems:
    """The first `limit` items of another re-iterable of batches."""

    batches: Batches
    limit: int

    def __iter__(self) -> Iterator[Any]:
        """Yield batches until `limit` items are out, the last one cut short."""
        left = self.limit
        for item in self.batches:
            size = _count_items(item)
            yield item if size <= left else _cut(item, left)
            left -= size
            if left <= 0:
                return


def _count_items(batch: Any) -> int:
    from torch import Tensor
    from torch.utils import _pytree as pytree

    leaves = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim()]
    if not leaves:
        raise InputError(
            f"A batch is a {type(batch).__name__} without a tensor in it. It came from the inputs. "
            f"Yield tensors whose first axis is the item, for example from a DataLoader."
        )
    return len(leaves[0])


def _cut(batch: Any, n: int) -> Any:
    from torch import Tensor
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda x: x[:n] if isinstance(x, Tensor) and x.dim() else x, batch)


def _load_from_code(source: str, limit: int | None) -> Batches:
    found = find_object(source)
    batches = call_without_arguments(found, source) if callable(found) else found
    if not isinstance(batches, Iterable):
        raise InputError(f"{source!r} gave a {type(batches).__name__}, not batches. Return a list or a DataLoader.")
    if iter(batches) is batches:
        raise InputError(
            f"{source!r} gave a {type(batches).__name__}, which can be read only once. Calibration reads its inputs "
            f"several times. Return a list, a DataLoader, or an object whose __iter__ begins anew."
        )
    for item in itertools.islice(batches, 1):
        _count_items(item)
        return batches if limit is None else FirstItems(batches, limit)
    raise CalibrationError(f"{source!r} gave no batches: it is empty. Calibration needs inputs; a few hundred will do.")


def _load_arrays(path: Path, batch: int, limit: int | None, seed: int) -> ArrayBatches:
    import numpy as np
    import torch

    arrays = _read_npz(path)
    names = _name_inputs(path, sorted(arrays))
    lengths = {name: len(arrays[name]) for name in (*names, "y") if name in arrays and arrays[name].ndim}
    if len(set(lengths.values())) > 1 or len(lengths) < len(names) + ("y" in arrays):
        shapes = ", ".join(f"{n} {a.shape}" for n, a in arrays.items())
        raise InputError(
            f"The arrays of {path} have different lengths: {shapes}. Their first axis is the item. Make it equal."
        )
    n = lengths[names[0]]
    if n == 0:
        raise CalibrationError(
            f"{path} holds no items: {names[0]} is empty. Calibration needs inputs; a few hundred will do."
        )
    order = np.arange(n)
    if limit is not None and limit < n:
        order = np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))
    tensors = tuple(torch.from_numpy(_prepare(arrays[name][order], name, path)) for name in names)
    labels = torch.from_numpy(_prepare_labels(arrays["y"][order])) if "y" in arrays else None
    return ArrayBatches(tensors, labels, batch)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    if not path.is_file():
        raise InputError(f"There is no file {path} in {Path.cwd()}. Write one with numpy.savez(path, x=inputs).")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises ValueError, zipfile and zlib errors of their own
        raise InputError(
            f"{path} cannot be read: {describe(error)}. It is corrupt, or holds Python objects instead of numbers. "
            f"Write it with numpy.savez(path, x=inputs)."
        ) from error


def _name_inputs(path: Path, held: list[str]) -> list[str]:
    """Return the names of the arrays that are model inputs, in the model's order."""
    if "x" in held:
        names = ["x"]
    elif "x0" in held:
        names = list(itertools.takewhile(lambda name: name in held, (f"x{i}" for i in itertools.count())))
    else:
        names = ["arr_0"] if held == ["arr_0"] else []
    if not names or set(held) - {*names, "y"}:
        raise InputError(
            f"{path} holds the arrays {', '.join(held) or '(none)'}. It may hold x (or x0, x1, …), and y for labels. "
            f"Write it with numpy.savez(path, x=inputs, y=labels)."
        )
    return names


def _prepare(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    import numpy as np

    if array.dtype == np.float64:
        array = array.astype(np.float32)  # numpy's default, and no network's
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} of {path} has dtype {array.dtype}, which no network takes. Store numbers.")
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        row = int(np.argwhere(~finite)[0][0])
        raise NonFiniteError(
            f"{int((~finite).sum())} values of {name} are NaN or infinite, first in item {row}. They are in {path}. "
            f"Leave these items out: x[np.isfinite(x).reshape(len(x), -1).all(1)]."
        )
    return np.ascontiguousarray(array)


def _prepare_labels(labels: np.ndarray) -> np.ndarray:
    import numpy as np

    return labels.astype(np.int64) if labels.dtype.kind in "iub" else np.ascontiguousarray(labels)
