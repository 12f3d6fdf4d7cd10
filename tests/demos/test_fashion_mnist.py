"""The demonstration, with fewer steps of distillation, against the bars it is held to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples.fashion_mnist import demo
from examples.fashion_mnist.data import load
from examples.fashion_mnist.network import build
from examples.fetch import FetchError

from jettison.core.plain import read_json
from jettison.core.record import Record

STEPS = 250
"""A fifth of the demonstration's: enough for its bar on accuracy, in a quarter of the time."""


@pytest.fixture(scope="module")
def data() -> None:
    try:
        load("test")
    except FetchError as error:
        pytest.skip(f"Fashion-MNIST is not here: {error}")


def test_trained_weights(data: None) -> None:
    images, labels = load("test")
    with torch.no_grad():
        right = (build()(images[:1000]).argmax(1) == labels[:1000]).float().mean()
    assert right > 0.92


@pytest.mark.slow
def test_demo_meets_its_bars(data: None, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        # A plan under a latency budget is made from measured times. With another job on the machine those can ask for
        # too much, and the run then says that its budget is missed; only such a run is made once more.
        code, folder = demo.main(["--out", str(tmp_path / "run"), "--steps", str(STEPS)]), tmp_path / "run"
        if code and not read_json(Record, folder / "record.json").met:
            folder = tmp_path / "again"
            code = demo.main(["--out", str(folder), "--steps", str(STEPS)])
        assert code == 0
    finally:
        torch.set_num_threads(1)
    record = read_json(Record, folder / "record.json")
    variants = {v.name: v for v in record.variants}
    compressed, alone, original = (variants[n] for n in ("compressed", "int8 alone", "original"))
    assert record.met and all(check.passed for check in record.checks)
    assert record.drop.metric == "accuracy" and record.drop.n == 10_000
    assert record.drop.points <= 1.0
    assert compressed.speedup.low >= 4.0
    assert compressed.speedup.value / alone.speedup.value >= 1.4
    assert original.size_bytes and compressed.size_bytes and original.size_bytes / compressed.size_bytes >= 6.0
    assert compressed.score is not None and original.score is not None and original.score.value > 0.92
    assert all(layer.integer for layer in record.layers)
