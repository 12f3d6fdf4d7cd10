"""The caller's calibration data as batches of flat tensors, checked, with a sealed part where one is needed."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jettison.core.errors import CalibrationError, InputError, NonFiniteError, ShapeError
from jettison.graph.trace import Batch

SEALED = 5
"""One sample in five is sealed: kept from every stage that chooses, for the proof."""
BATCH = 64
"""How a single tensor of samples is cut."""


@dataclass(frozen=True)
class Calibration:
    """A re-iterable of model inputs; every pass checks shapes and values.

    `positional` is how many leading items of a tuple are inputs (the rest are labels and are ignored). With `seal`,
    the samples whose content falls into the sealed fifth appear in `iterate_sealed` only: by content, so that
    neither order nor shuffling can leak them.
    """

    source: Iterable[Any] = field(repr=False)
    positional: int
    seal: bool
    seed: int
    device: torch.device

    def iterate(self, epoch: int = 0) -> Iterator[Batch]:
        """Yield the batches that stages may use; a shuffling loader shuffles the same way each time."""
        for index, batch in enumerate(self._read(epoch)):
            yield from self._part(batch, index, sealed=False)

    def iterate_sealed(self) -> Iterator[Batch]:
        """Yield the sealed samples; nothing without `seal`."""
        if self.seal:
            for index, batch in enumerate(self._read(0)):
                yield from self._part(batch, index, sealed=True)

    def take(self, samples: int) -> list[Batch]:
        """Return the first batches that hold `samples` samples, or all there are; raises CalibrationError for none."""
        taken: list[Batch] = []
        have = 0
        for batch in self.iterate():
            size = len(batch[0])
            if have + size > samples:
                batch = tuple(x[: samples - have] for x in batch)
                size = samples - have
            if size:
                taken.append(batch)
            have += size
            if have >= samples:
                break
        if not taken:
            raise CalibrationError("There are no calibration items. Give at least a few dozen typical inputs.")
        return taken

    def _part(self, batch: Batch, index: int, *, sealed: bool) -> Iterator[Batch]:
        if not self.seal:
            yield batch
            return
        chosen = [i for i in range(len(batch[0])) if _is_sealed([x[i] for x in batch]) == sealed]
        if len(chosen) == len(batch[0]):
            yield batch
        elif chosen:
            yield tuple(x[chosen] for x in batch)

    def _read(self, epoch: int) -> Iterator[Batch]:
        torch.manual_seed(self.seed + epoch)
        first: Batch | None = None
        for index, item in enumerate(self.source):
            batch = flatten_item(item, self.positional)
            first = first or batch
            _check(batch, first, index)
            yield tuple(x.to(self.device) for x in batch)


def make_calibration(
    source: Any, model: nn.Module, *, seal: bool, seed: int, device: torch.device
) -> tuple[Calibration, tuple[Any, ...], dict[str, Any]]:
    """Return the calibration data and its first item as the model's arguments and keyword arguments.

    `source` is a tensor of samples, or a re-iterable of items: a tensor, a tuple whose first items are the
    inputs, or a dict of keyword inputs. Raises CalibrationError where it is empty or can be read only once.
    """
    if isinstance(source, Tensor):
        source = source.split(BATCH) if source.dim() and len(source) else []
    if isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
        raise InputError(f"calibration is a {type(source).__name__}. Give a tensor, a list of batches or a DataLoader.")
    if iter(source) is source:
        raise CalibrationError("calibration can be read only once, it is an iterator. Give a list or a DataLoader.")
    first = next(iter(source), None)
    if first is None:
        raise CalibrationError("There are no calibration items. Give at least a few dozen typical inputs.")
    positional = count_inputs(model, first)
    calibration = Calibration(source, positional, seal, seed, device)
    if isinstance(first, Mapping):
        arguments: tuple[Any, ...] = ()
        keywords = {k: v.to(device) for k, v in first.items()}
    else:
        items = (first,) if isinstance(first, Tensor) else tuple(first)[:positional]
        arguments, keywords = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, items), {}
    return calibration, arguments, keywords


def count_inputs(model: nn.Module, item: Any) -> int:
    """Return how many leading items of a calibration tuple are inputs: as many as `forward` must have."""
    if isinstance(item, (Tensor, Mapping)):
        return 1
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if spread and not required:
        return 1 if len(item) == 2 else len(item)  # a traced graph takes anything: (inputs, label) is the usual pair
    return max(1, min(len(item), len(required)))


def flatten_item(item: Any, positional: int) -> Batch:
    """Return an item's input tensors in the order the traced graph takes them."""
    if isinstance(item, (list, tuple)):
        item = tuple(item)[:positional]
    leaves = pytree.tree_leaves(item)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise InputError(f"A calibration item holds a {type(leaf).__name__}; inputs must be tensors.")
    return tuple(leaves)


def _check(batch: Batch, first: Batch, index: int) -> None:
    if len(batch) != len(first):
        raise ShapeError(f"Calibration item {index} has {len(batch)} inputs, the first has {len(first)}.")
    for mine, theirs in zip(batch, first, strict=True):
        if mine.dim() == 0 or mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
            raise ShapeError(
                f"Calibration item {index} has shape {tuple(mine.shape)} ({mine.dtype}), the first "
                f"{tuple(theirs.shape)} ({theirs.dtype}). All items must agree in all but the batch."
            )
        if mine.is_floating_point() and not bool(torch.isfinite(mine).all()):
            raise NonFiniteError(f"Calibration item {index} holds NaN or infinity. Leave it out or repair it.")


def _is_sealed(sample: list[Tensor]) -> bool:
    digest = 0
    for tensor in sample:
        digest = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest)
    return digest % SEALED == 0
