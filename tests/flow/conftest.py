"""What the tests of the pipeline share: one trained network and one finished run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.flow.digits import BUDGET, QUICK, build_trained, make_test_batches, split_digits
from torch import nn

import jettison as jt


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """The trained network; no test may change it."""
    return build_trained()


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    """A copy of the trained network for one test."""
    return copy.deepcopy(trained)


@pytest.fixture(scope="session")
def finished(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> jt.Result:
    """A finished int8 run under a budget of MACs, scored with labels; tests copy its folder before they change it."""
    torch.set_num_threads(1)
    return jt.compress(
        trained,
        split_digits()[0],
        budget=BUDGET,
        recipe=QUICK,
        evaluate=jt.accuracy(make_test_batches()),
        out=tmp_path_factory.mktemp("finished") / "run",
        quiet=True,
        name="digits",
    )


@pytest.fixture(scope="session")
def finished_folder(finished: jt.Result) -> Path:
    return finished.folder
