"""Tensors into a loaded file and out again, the same for every target whose session takes numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from jettison.core.errors import ShapeError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Runs(Protocol):
    """What a loaded file offers; shapes hold None where a dimension is free."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs in the order `run` takes them."""

    @property
    def input_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """Their shapes."""

    def run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run once."""


def open_run(
    target: ModuleType, path: Path, arrays: Sequence[np.ndarray[Any, Any]], *, threads: int, precision: str = "fp32"
) -> Callable[[], object]:
    """Load a file anew and return one call of it, as `timing.time_interleaved` asks for."""
    return partial(target.load(path, threads=threads, precision=precision).run, arrays)


def predict(session: Runs, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run tensors through a file; a file with a fixed batch gets them in pieces of its size.

    Raises ShapeError where the number of inputs or a shape does not fit, or the batch is no multiple of the file's.
    """
    import numpy as np
    import torch

    arrays = [np.ascontiguousarray(x.detach().cpu().numpy()) for x in inputs]
    check_shapes(session, arrays)
    fixed = session.input_shapes[0][0] if session.input_shapes and session.input_shapes[0] else None
    if fixed is None or arrays[0].shape[0] == fixed:
        return tuple(torch.from_numpy(y) for y in session.run(arrays))
    count = arrays[0].shape[0]
    pieces = [session.run([a[i : i + fixed] for a in arrays]) for i in range(0, count, fixed)]
    return tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*pieces, strict=True))


def check_shapes(session: Runs, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    """Raise ShapeError where the arrays are not what the file takes."""
    if len(arrays) != len(session.input_names):
        raise ShapeError(
            f"{len(arrays)} inputs were given to a file that takes {len(session.input_names)}. "
            f"It takes {', '.join(session.input_names)}. Give one tensor for each."
        )
    for name, shape, array in zip(session.input_names, session.input_shapes, arrays, strict=True):
        fits = len(shape) == array.ndim and all(
            want in (None, have) or (axis == 0 and want is not None and want > 0 and have % want == 0 and have > 0)
            for axis, (want, have) in enumerate(zip(shape, array.shape, strict=True))
        )
        if not fits:
            raise ShapeError(
                f"Input {name!r} has shape {tuple(array.shape)}, but the file takes {shape} (None is free). "
                "A fixed batch can only be split where it divides the inputs. Change the inputs, or export with "
                "dynamic_batch=True."
            )
