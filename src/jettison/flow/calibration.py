"""The caller's calibration data as batches of flat tensors, checked, with a sealed part where one is needed."""

from __future__ import annotations

import contextlib
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

    `takes` is how many leading entries of a tuple, or which keys of a dict, are inputs; the rest are labels and are
    ignored. With `seal`, the samples whose content falls into the sealed fifth appear in `iterate_sealed` only: by
    content, so that neither order nor shuffling can leak them. Where the network takes only batches of `fixed`
    samples, all batches have that size and what is left over is not used.
    """

    source: Iterable[Any] = field(repr=False)
    takes: int | tuple[str, ...]
    seal: bool
    seed: int
    device: torch.device
    fixed: int | None = None

    def iterate(self, epoch: int = 0) -> Iterator[Batch]:
        """Yield the batches that stages may use; a shuffling loader shuffles the same way each time."""
        yield from self._regroup(self._part(epoch, sealed=False))

    def iterate_without(self, digests: frozenset[int], epoch: int = 0) -> Iterator[Batch]:
        """Yield the batches of `iterate` without the samples whose content has one of `digests`."""
        yield from self._regroup(self._drop(self._part(epoch, sealed=False), digests))

    def iterate_sealed(self) -> Iterator[Batch]:
        """Yield the sealed samples; nothing without `seal`."""
        if self.seal:
            yield from self._regroup(self._part(0, sealed=True))

    def take(self, samples: int) -> list[Batch]:
        """Return the first batches that hold `samples` samples, or all there are; raises CalibrationError for none."""
        taken: list[Batch] = []
        have = 0
        if self.fixed is not None:
            samples = max(1, samples // self.fixed) * self.fixed
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

    def _part(self, epoch: int, *, sealed: bool) -> Iterator[Batch]:
        for batch in self._read(epoch):
            if not self.seal:
                yield batch
                continue
            chosen = [i for i in range(len(batch[0])) if _is_sealed([x[i] for x in batch]) == sealed]
            if chosen:
                yield batch if len(chosen) == len(batch[0]) else tuple(x[chosen] for x in batch)

    def _drop(self, batches: Iterator[Batch], digests: frozenset[int]) -> Iterator[Batch]:
        for batch in batches:
            chosen = [i for i in range(len(batch[0])) if digest_sample([x[i] for x in batch]) not in digests]
            if chosen:
                yield batch if len(chosen) == len(batch[0]) else tuple(x[chosen] for x in batch)

    def _regroup(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        if self.fixed is None:
            yield from batches
            return
        waiting: Batch | None = None
        for batch in batches:
            joined = batch if waiting is None else tuple(map(torch.cat, zip(waiting, batch, strict=True)))
            while len(joined[0]) >= self.fixed:
                yield tuple(x[: self.fixed] for x in joined)
                joined = tuple(x[self.fixed :] for x in joined)
            waiting = joined

    def _read(self, epoch: int) -> Iterator[Batch]:
        first: Batch | None = None
        with _seed_loader(self.source, self.seed + epoch):
            for index, item in enumerate(self.source):
                batch = flatten_item(item, self.takes, index)
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
    if isinstance(source, Iterator):  # iter(source) would make a DataLoader draw a seed
        raise CalibrationError("calibration can be read only once, it is an iterator. Give a list or a DataLoader.")
    with _seed_loader(source, seed):
        first = next(iter(source), None)
    if first is None:
        raise CalibrationError("There are no calibration items. Give at least a few dozen typical inputs.")
    takes = find_inputs(model, first)
    flat = flatten_item(first, takes, 0)
    _check(flat, flat, 0)
    calibration = Calibration(source, takes, seal, seed, device)
    inputs = pytree.tree_map(lambda v: v.to(device), _select(first, takes))
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return calibration, arguments, keywords


def find_inputs(model: nn.Module, item: Any) -> int | tuple[str, ...]:
    """Return which part of a calibration item are inputs: how many leading entries, or which keys of a dict."""
    if not isinstance(item, Mapping):
        return count_inputs(model, item)
    parameters = inspect.signature(model.forward).parameters.values()
    named = tuple(p.name for p in parameters if p.name in item)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named += tuple(k for k in item if k not in named)
    if not named:
        raise ShapeError(
            f"Calibration items are dicts with the keys {list(item)}, none of which the network's forward takes. "
            "Name the keys as forward names its inputs."
        )
    return named


def count_inputs(model: nn.Module, item: Any) -> int:
    """Return how many leading items of a calibration tuple are inputs: as many as `forward` must have."""
    if not isinstance(item, (list, tuple)) or not item:
        return 1
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if spread and not required:
        return 1 if len(item) == 2 else len(item)  # a traced graph takes anything: (inputs, label) is the usual pair
    return max(1, min(len(item), len(required)))


def flatten_item(item: Any, takes: int | tuple[str, ...], index: int) -> Batch:
    """Return an item's input tensors in the order the traced graph takes them; raises InputError for other things."""
    if isinstance(item, Mapping) != isinstance(takes, tuple) or (
        isinstance(takes, tuple) and any(k not in item for k in takes)
    ):
        keys = f"the keys {', '.join(takes)}" if isinstance(takes, tuple) else "a tensor or a tuple"
        raise ShapeError(f"Calibration item {index} is not like the first, which has {keys}. Give items of one kind.")
    leaves = pytree.tree_leaves(_select(item, takes))
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise InputError(
                f"Calibration item {index} holds a {type(leaf).__name__}. Inputs must be tensors with a batch "
                "dimension; convert them first, for example with torch.as_tensor."
            )
    if not leaves:
        raise ShapeError(f"Calibration item {index} holds no tensor. Give the network's inputs.")
    # Tensors made under inference_mode could not be learnt from.
    return tuple(x.clone() if x.is_inference() else x for x in leaves)


def _select(item: Any, takes: int | tuple[str, ...]) -> tuple[Any, ...] | dict[str, Any]:
    """Return an item without its labels, as positional or keyword inputs."""
    if isinstance(takes, tuple):
        return {k: item[k] for k in takes}
    return tuple(item)[:takes] if isinstance(item, (list, tuple)) else (item,)


@contextlib.contextmanager
def _seed_loader(source: Any, seed: int) -> Iterator[None]:
    """Let a shuffling loader draw from `seed`; a generator of its own is given back as it was."""
    torch.manual_seed(seed)
    generator = getattr(source, "generator", None)
    if not isinstance(generator, torch.Generator):
        yield
        return
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _check(batch: Batch, first: Batch, index: int) -> None:
    if len(batch) != len(first):
        raise ShapeError(
            f"Calibration item {index} has {len(batch)} inputs, the first has {len(first)}. Give items of one kind."
        )
    if any(x.dim() == 0 for x in batch) or len({len(x) for x in batch}) > 1 or not len(batch[0]):
        raise ShapeError(
            f"Calibration item {index} has inputs of shape {', '.join(str(tuple(x.shape)) for x in batch)}. The first "
            "dimension of each must be the batch, the same for all and at least 1."
        )
    for mine, theirs in zip(batch, first, strict=True):
        if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
            raise ShapeError(
                f"Calibration item {index} has shape {tuple(mine.shape)} ({mine.dtype}), the first "
                f"{tuple(theirs.shape)} ({theirs.dtype}). All items must agree in all but the batch."
            )
        if mine.is_floating_point() and not bool(torch.isfinite(mine).all()):
            raise NonFiniteError(f"Calibration item {index} holds NaN or infinity. Leave it out or repair it.")


def list_digests(batches: Iterable[Batch]) -> frozenset[int]:
    """Return the digest of every sample in the batches."""
    return frozenset(digest_sample([x[i] for x in batch]) for batch in batches for i in range(len(batch[0])))


def _is_sealed(sample: list[Tensor]) -> bool:
    return digest_sample(sample) % SEALED == 0


def digest_sample(sample: list[Tensor]) -> int:
    """Return a number that the sample's content gives: the same wherever and in whatever order it comes."""
    digest = 0
    for tensor in sample:
        digest = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), digest)
    return digest
