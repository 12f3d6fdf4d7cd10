"""Without evaluate=, what the proof is counted on is seen by no stage that chooses or learns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tests.flow.digits import BUDGET, QUICK, split_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import jettison as jt
from jettison.flow import calibration

SINKS = (
    ("jettison.flow.sensitivity", "collect_moments"),
    ("jettison.flow.deciding", "measure_sensitivity"),
    ("jettison.flow.recovering", "recalibrate"),
    ("jettison.flow.recovering", "measure_loss"),
    ("jettison.flow.compress", "quantize"),
    ("jettison.distill.train", "_compute_loss"),
)
"""Where each stage takes its inputs in; every tensor shaped like a batch of digits is noted there."""


def name_samples(value: Any) -> set[bytes]:
    """Find all pictures in nested arguments, each named by its bytes."""
    if isinstance(value, Tensor):
        return {row.numpy().tobytes() for row in value} if value.shape[1:] == (1, 8, 8) else set()
    if isinstance(value, (list, tuple)):
        return set().union(*map(name_samples, value)) if value else set()
    return set()


def run_and_watch(model: nn.Module, loader: Iterable[Any], patch: pytest.MonkeyPatch) -> dict[str, set[bytes]]:
    """Compress, and return the samples each stage saw, and those the proof was counted on."""
    seen: dict[str, set[bytes]] = {"proof": set()}

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).update(name_samples([*args, *kwargs.values()]))
            return function(*args, **kwargs)

        return watched

    for module, name in SINKS:
        owner = importlib.import_module(module)
        patch.setattr(owner, name, watch(name, getattr(owner, name)))
    sealed = calibration.Calibration.iterate_sealed

    def iterate_sealed(self: calibration.Calibration) -> Any:
        for batch in sealed(self):
            seen["proof"] |= name_samples(batch)
            yield batch

    patch.setattr(calibration.Calibration, "iterate_sealed", iterate_sealed)
    result = jt.compress(model, loader, budget=BUDGET, recipe=QUICK, quiet=True)
    assert result.record.drop.metric == "agreement" and result.record.drop.n is not None
    assert result.record.drop.n >= len(seen["proof"]) > 100
    return seen


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(split_digits()[0]), batch_size=64, shuffle=True)


@pytest.mark.slow
def test_no_stage_sees_the_sealed_fifth(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run_and_watch(model, make_loader(), monkeypatch)
    proof = seen.pop("proof")
    assert set(seen) == {name for _, name in SINKS}, "a stage was not watched"
    for stage, samples in seen.items():
        assert samples, stage
        assert not samples & proof, f"{stage} saw {len(samples & proof)} sealed samples"
    assert len(seen["_compute_loss"]) > 700  # distillation went through most of the rest


@pytest.mark.slow
def test_a_leak_would_be_seen(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the sealed part is chosen by position, as a naive split of a shuffling loader would."""
    positions = iter(range(10**9))
    monkeypatch.setattr(calibration, "_is_sealed", lambda sample: next(positions) % 5 == 0)
    torch.manual_seed(0)
    seen = run_and_watch(model, make_loader(), monkeypatch)
    proof = seen.pop("proof")
    assert any(samples & proof for samples in seen.values())
