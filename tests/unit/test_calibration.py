"""Calibration data in all the forms people have it in, and the sealed fifth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from jettison.core.errors import CalibrationError, InputError, NonFiniteError, ShapeError
from jettison.flow.calibration import Calibration, list_digests, make_calibration

CPU = torch.device("cpu")


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, image: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return image * mask * scale


class Anything(nn.Module):
    def forward(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        return inputs[0]


def make(source: Any, model: nn.Module | None = None, *, seal: bool = False, seed: int = 0) -> Calibration:
    return make_calibration(source, model or One(), seal=seal, seed=seed, device=CPU)[0]


def rows(calibration: Calibration, epoch: int = 0) -> list[float]:
    return [float(v) for batch in calibration.iterate(epoch) for v in batch[0][:, 0]]


X = torch.arange(200.0)[:, None].repeat(1, 3)


def test_a_tensor_is_cut_into_batches() -> None:
    data = make(X)
    assert [len(b[0]) for b in data.iterate()] == [64, 64, 64, 8]
    assert rows(data) == list(range(200)) == rows(data)


@pytest.mark.parametrize("kind", ["tensors", "tuples", "lists", "loader", "dicts"])
def test_labels_are_ignored(kind: str) -> None:
    labels = torch.arange(200)
    source: Any = {
        "tensors": list(X.split(50)),
        "tuples": list(zip(X.split(50), labels.split(50), strict=True)),
        "lists": [[a, b] for a, b in zip(X.split(50), labels.split(50), strict=True)],
        "loader": DataLoader(TensorDataset(X, labels), batch_size=50),
        "dicts": [{"y": b, "x": a} for a, b in zip(X.split(50), labels.split(50), strict=True)],
    }[kind]
    data, arguments, keywords = make_calibration(source, One(), seal=False, seed=0, device=CPU)
    assert all(len(b) == 1 for b in data.iterate()) and rows(data) == list(range(200))
    assert (len(arguments), list(keywords)) == ((0, ["x"]) if kind == "dicts" else (1, []))


def test_two_inputs() -> None:
    mask, labels = torch.ones(200, 3), torch.zeros(200)
    for source in (
        [(X, mask)],
        [(X, mask, labels)],
        [{"mask": mask, "image": X}, {"image": X, "mask": mask}],  # the order of keys is no matter
    ):
        for batch in make(source, Two()).iterate():
            assert torch.equal(batch[0], X) and torch.equal(batch[1], mask)


def test_a_network_that_takes_anything() -> None:
    assert len(next(make([(X, torch.zeros(200))], Anything()).iterate())) == 1
    assert len(next(make([(X, X, X)], Anything()).iterate())) == 3
    assert len(next(make([{"a": X, "b": X}], Anything()).iterate())) == 2


def test_shuffling_is_the_same_in_each_epoch_and_process() -> None:
    loader = DataLoader(TensorDataset(X), batch_size=32, shuffle=True)
    torch.manual_seed(5)
    first = rows(make(loader))
    torch.manual_seed(6)
    data = make(loader)
    assert rows(data) == first and sorted(first) == list(range(200)) and first != sorted(first)
    assert rows(data, 1) != first and rows(data, 1) == rows(data, 1)
    assert rows(make(loader, seed=1)) != first


def test_a_loaders_own_generator_is_given_back() -> None:
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    data = make(DataLoader(TensorDataset(X), batch_size=32, shuffle=True, generator=generator))
    first = rows(data)
    assert rows(data) == first and torch.equal(generator.get_state(), state)
    next(data.iterate())  # left off in the middle
    assert torch.equal(generator.get_state(), state)


def test_take() -> None:
    data = make(X)
    assert [len(b[0]) for b in data.take(100)] == [64, 36]
    assert [len(b[0]) for b in data.take(64)] == [64]
    assert sum(len(b[0]) for b in data.take(10_000)) == 200


def test_a_fixed_batch_is_kept() -> None:
    data = Calibration(list(X.split(30)), 1, False, 0, CPU, fixed=16)
    assert {len(b[0]) for b in data.iterate()} == {16} and rows(data) == list(range(192))
    assert [len(b[0]) for b in data.take(40)] == [16, 16] and [len(b[0]) for b in data.take(3)] == [16]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("fixed", [None, 16])
def test_sealed_samples_are_seen_nowhere_else(shuffle: bool, fixed: int | None) -> None:
    x = torch.cat([torch.randn(500, 4), torch.ones(100, 4)])  # with a hundred duplicates, sealed together or not
    loader = DataLoader(TensorDataset(x), batch_size=32, shuffle=shuffle)
    data = Calibration(loader, 1, True, 0, CPU, fixed=fixed)
    sealed = {tuple(r.tolist()) for b in data.iterate_sealed() for r in b[0]}
    assert sealed
    for epoch in range(3):
        assert not sealed & {tuple(r.tolist()) for b in data.iterate(epoch) for r in b[0]}
    if fixed is None:
        # A fifth of 501 different samples, within four standard deviations.
        assert abs(len(sealed) - 100) < 4 * math.sqrt(501 * 0.2 * 0.8)
        assert len(sealed | {tuple(r.tolist()) for b in data.iterate() for r in b[0]}) == 501


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(100,), (100, 3), (100, 2, 2)])
def test_sealing_takes_every_type_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.rand(shape) * 50).to(dtype)
    data = make([x], seal=True)
    assert sum(len(b[0]) for b in [*data.iterate(), *data.iterate_sealed()]) == 100


def test_without_seal_nothing_is_sealed() -> None:
    assert list(make(X).iterate_sealed()) == []


@pytest.mark.parametrize("source", [[], torch.zeros(0, 3), (), DataLoader(TensorDataset(torch.zeros(0, 3)))])
def test_nothing(source: Any) -> None:
    with pytest.raises(CalibrationError, match="no calibration items"):
        make(source)


def make_generator() -> Iterator[Tensor]:
    yield X


@pytest.mark.parametrize("make_source", [make_generator, lambda: iter([X]), lambda: map(torch.abs, [X])])
def test_read_once(make_source: Any) -> None:
    with pytest.raises(CalibrationError, match="only once"):
        make(make_source())


@pytest.mark.parametrize("source", [None, 3, "photos/", b"x", TensorDataset(X)])
def test_no_data_at_all(source: Any) -> None:
    with pytest.raises(InputError, match=r"Give a tensor, a list of batches or a DataLoader\."):
        make(source)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["a", "b"], "item 0 holds a str"),
        ([np.zeros((2, 3))], "item 0 holds a ndarray"),
        ([X, np.zeros((2, 3))], "item 1 holds a ndarray"),
        ([X, None], "item 1 holds a NoneType"),
        ([(1, 2)], "item 0 holds a int"),
        ([{"x": [1, 2]}], "item 0 holds a int"),
    ],
)
def test_items_that_are_no_tensors(items: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        list(make(items).iterate())


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([X, X[:, :2]], r"item 1 has shape \(200, 2\)"),
        ([X, X.double()], "item 1 .*float64"),
        ([torch.tensor(1.0)], "item 0 has inputs of shape"),
        ([X, X[:0]], "item 1 has inputs of shape"),
        ([X, {"x": X}], "item 1 is not like the first"),
        ([{"x": X}, {"y": X}], "item 1 is not like the first"),
        ([{"x": X}, X], "item 1 is not like the first"),
        ([{"pictures": X}], "pictures"),
        ([()], "item 0 holds no tensor"),
    ],
)
def test_items_of_the_wrong_shape(items: list[Any], says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        list(make(items).iterate())


def test_inputs_that_disagree_about_the_batch() -> None:
    with pytest.raises(ShapeError, match=r"\(200, 3\), \(100, 3\)"):
        make([(X, X[:100])], Two())
    with pytest.raises(ShapeError, match="item 1 has 1 inputs, the first has 2"):
        list(make([(X, X), (X,)], Two()).iterate())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad: float) -> None:
    wrong = X.clone()
    wrong[7, 1] = bad
    with pytest.raises(NonFiniteError, match="item 2 holds NaN or infinity"):
        list(make([X, X, wrong, X]).iterate())
    with pytest.raises(NonFiniteError, match="item 0"):
        make([wrong])


def test_what_judges_is_not_learnt_from() -> None:
    data = make(X)
    judges = data.take(50)
    left = [r for batch in data.iterate_without(list_digests(judges)) for r in batch[0].tolist()]
    judged = [r for batch in judges for r in batch[0].tolist()]
    assert len(left) == 150 and not [r for r in judged if r in left]
    assert len([r for batch in data.iterate_without(frozenset()) for r in batch[0]]) == 200
