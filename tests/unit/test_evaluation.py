"""What an evaluate function may return, and what is said where it returns something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from jettison.core.errors import EvaluateError, InputError
from jettison.flow.evaluation import Outcome, accuracy, agreement, compare, run_evaluate


def identity(x: Any) -> Any:
    return x


def run(evaluate: Callable[..., Any]) -> Outcome:
    return run_evaluate(evaluate, identity, "original file")


@pytest.mark.parametrize(
    "value",
    [0.75, np.float32(0.75), np.float64(0.75), np.array(0.75), torch.tensor(0.75)],
    ids=lambda v: type(v).__name__,
)
def test_one_number(value: Any) -> None:
    found = run(lambda predict: value)
    assert found.value == pytest.approx(0.75) and found.samples is None and found.score.n is None


@pytest.mark.parametrize("value", [1, True, 0])
def test_whole_numbers(value: Any) -> None:
    assert run(lambda predict: value).value == value


@pytest.mark.parametrize(
    "value",
    [[1, 0, 1, 1], (1.0, 0.0, 1.0, 1.0), np.array([1, 0, 1, 1]), torch.tensor([True, False, True, True])],
    ids=["list", "tuple", "array", "bools"],
)
def test_one_per_sample(value: Any) -> None:
    found = run(lambda predict: value)
    assert found.samples == (1.0, 0.0, 1.0, 1.0) and found.value == 0.75 and found.score.n == 4


def test_batches_of_scores_are_flattened() -> None:
    found = run(lambda predict: torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert found.samples == (1.0, 0.0, 1.0, 1.0)
    assert run(lambda predict: [torch.tensor(1.0), torch.tensor(0.0)]).samples == (1.0, 0.0)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (97.3, "Divide percentages by 100"),
        ([0.5] * 5 + [50.0], "50.0"),
        (float("nan"), "nan"),
        (-0.1, "-0.1"),
        ([], "no score"),
        (None, "NoneType"),
        ("good", "str"),
        ({"accuracy": 0.9}, "dict"),
    ],
)
def test_what_is_no_score(value: Any, says: str) -> None:
    with pytest.raises(EvaluateError, match="on the original file") as caught:
        run(lambda predict: value)
    assert says in str(caught.value)


def test_an_error_of_the_caller_is_the_cause() -> None:
    def evaluate(predict: Any) -> float:
        raise KeyError("labels")

    with pytest.raises(EvaluateError, match="KeyError") as caught:
        run(evaluate)
    assert isinstance(caught.value.__cause__, KeyError)


def test_interrupts_pass() -> None:
    def evaluate(predict: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(evaluate)


def test_names() -> None:
    def top5(predict: Any) -> float:
        return 1.0

    assert run(top5).metric == "top5"
    assert run(lambda predict: 1.0).metric == "evaluate"
    assert run(accuracy([(torch.eye(2), torch.arange(2))])).metric == "accuracy"


def test_accuracy_counts_each_sample() -> None:
    x = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    found = run(accuracy([(x[:2], torch.tensor([0, 0])), (x[2:], torch.tensor([0]))]))
    assert found.samples == (1.0, 0.0, 1.0)


def test_accuracy_wants_batches_it_can_read_again() -> None:
    with pytest.raises(InputError, match="only once"):
        accuracy(iter([(torch.eye(2), torch.arange(2))]))
    with pytest.raises(InputError, match="no batches"):
        run(accuracy([]))


def test_a_shuffling_loader_gives_the_same_pairs_each_time() -> None:
    """Paired outcomes must pair the same samples; the caller's random state stays as it was."""
    x = torch.randn(64, 4)
    evaluate = accuracy(DataLoader(TensorDataset(x, torch.randint(0, 4, (64,))), batch_size=8, shuffle=True))
    before = torch.get_rng_state()
    first = run(evaluate)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert run(evaluate).samples == first.samples
    assert 0 < first.value < 1


def test_agreement_compares_with_the_original() -> None:
    x = torch.eye(4)

    def swapped(batch: torch.Tensor) -> torch.Tensor:
        return batch[:, [1, 0, 2, 3]]

    evaluate = agreement(identity, [(x,)])
    assert run(evaluate).samples == (1.0,) * 4
    assert run_evaluate(evaluate, swapped, "compressed file").samples == (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(InputError, match="class scores"):
        run(agreement(identity, [(torch.ones(3),)]))


def test_compare() -> None:
    drop = compare(Outcome("accuracy", 0.75, (1.0, 1.0, 1.0, 0.0)), Outcome("accuracy", 0.5, (1.0, 0.0, 1.0, 0.0)))
    assert drop.points == 25 and drop.bound_points is not None and drop.n == 4
    plain = compare(Outcome("score", 0.75, None), Outcome("score", 0.5, None))
    assert plain.points == 25 and plain.bound_points is None and plain.n is None
    with pytest.raises(EvaluateError, match="3 scores for the original and 2"):
        compare(Outcome("accuracy", 1.0, (1.0,) * 3), Outcome("accuracy", 1.0, (1.0,) * 2))
